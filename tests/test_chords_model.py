"""Any order of events, against a model of what a chord is: on memory, Redis and PostgreSQL.

The model knows nothing of tokens, steps or stores. It has a header of parts, a callback, and at most one claimant.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aioresult.backends.memory
from aioresult import Backend, ChordClaimLost, ChordError, TimeoutError
from aioresult.chord import ChordOp, ChordStep, ReadyChord
from aioresult.states import FAILURE, SUCCESS

from .harness import Harness, MemoryHarness, until

#: Sentinels change nothing of this.
BACKENDS = ["memory", "redis", "postgres"]

#: Longer than any test takes, in seconds.
LONG = 1000.0
EXPIRES = 10 * LONG * LONG


class Claimant:
    """Somebody who was given the chord to dispatch."""

    def __init__(self, ready: ReadyChord) -> None:
        self.ready = ready
        self.inside = False


# -- the model ------------------------------------------------------------------------------------------------------


@dataclass
class Model:
    size: int | None = None
    body: Any = None
    #: (task, index) → what came first under it, in order of arrival.
    parts: dict[tuple[str, int | None], Any] = field(default_factory=dict)
    failures: list[Any] = field(default_factory=list)
    #: Who may dispatch now, and who was the last that might.
    holder: Claimant | None = None
    last: Claimant | None = None
    done: bool = False

    @property
    def ready(self) -> bool:
        return not self.done and self.size is not None and len(self.parts) >= self.size

    @property
    def free(self) -> bool:
        return self.ready and self.holder is None

    @property
    def results(self) -> list[Any]:
        with_index = sorted((index, value) for (_, index), value in self.parts.items() if index is not None)
        # Equal indexes of different tasks are in no particular order; the tests have none.
        return [value for _, value in with_index] + [value for (_, i), value in self.parts.items() if i is None]

    def create(self, body: Any, size: int | None) -> None:
        if self.done:
            self.__init__()  # type: ignore[misc] # a new run
        self.body = body if self.body is None else self.body
        self.resize(size)

    def resize(self, size: int | None) -> None:
        if not self.done and size is not None:
            self.size = size

    def add(self, task: str, index: int | None, value: Any, failing: bool) -> None:
        if not self.done and (task, index) not in self.parts:
            self.parts[task, index] = value
            if failing:
                self.failures.append(value)

    def take(self, claimant: Claimant) -> None:
        self.holder = self.last = claimant

    def lapse(self) -> None:
        self.holder = None

    def give_back(self, claimant: Claimant) -> None:
        if self.ready and self.last is claimant:
            self.holder = self.last = None

    def finish(self, claimant: Claimant) -> None:
        if self.ready and self.last is claimant:
            self.done, self.holder, self.size = True, None, len(self.parts)


# -- the same events, done to a backend -----------------------------------------------------------------------------

Event = tuple[Any, ...]

#: Parts: the same task at two indexes, and tasks without any.
SLOTS: list[tuple[str, int | None]] = [("a", 0), ("a", 7), ("b", 3), ("c", None), ("d", None)]

SLOT = st.sampled_from(SLOTS)
#: Counted from the last who was given the chord; so as to leave, one has to have entered.
WHO = st.sampled_from([0, 0, 0, 1, 2])
EVENTS = st.one_of(
    st.tuples(st.just("create"), st.sampled_from([None, "one", ["two"]]), st.none() | st.integers(0, 3)),
    st.tuples(st.just("resize"), st.integers(0, 3)),
    st.tuples(st.just("part"), SLOT, st.booleans(), st.booleans()),
    st.tuples(st.just("part"), SLOT, st.just(False), st.booleans()),
    st.tuples(st.just("burst"), st.lists(st.sampled_from(SLOTS[:3]), min_size=2, max_size=6)),
    st.tuples(st.just("claim")),
    st.tuples(st.just("enter"), WHO),
    st.tuples(st.just("enter"), WHO),
    st.tuples(st.just("leave"), WHO),
    st.tuples(st.just("leave"), WHO),
    st.tuples(st.just("fail"), WHO),
    st.tuples(st.just("lapse")),
)

#: Of these, every sequence is tried.
SHORT: list[Event] = [
    ("create", "another body", 1),
    ("resize", 2),
    ("part", ("a", 7), False, True),
    ("part", ("a", 0), True, False),
    ("claim",),
    ("enter", 0),
    ("leave", 0),
    ("fail", 0),
    ("lapse",),
]


class World:
    """One chord, by the library and by the model, which must agree."""

    def __init__(self, backends: tuple[Backend, Backend], time: Time) -> None:
        self._backend, self._other = backends
        self._time = time
        self._chord = self._backend.chord(str(uuid4()))
        self._model = Model()
        self._claimants: list[Claimant] = []
        self._numbers = itertools.count()

    async def run(self, story: list[Event], look_often: bool = True) -> None:
        try:
            for name, *args in story:
                await getattr(self, f"_{name}")(*args)
                if look_often:
                    await self._look()
            await self._look()
        finally:
            for claimant in self._claimants:
                if claimant.inside:
                    await claimant.ready.__aexit__(KeyError, KeyError(), None)

    async def _look(self) -> None:
        model, chord = self._model, self._chord
        state = await self._backend.chord_step(ChordStep(ChordOp.READ, chord.id))
        assert (state.count, state.size, state.done) == (len(model.parts), model.size, model.done)
        assert (state.lease_left is None) == (model.holder is None)
        assert await chord.progress() == (len(model.parts), model.size)
        assert (await self._got(propagate=False), await self._got(propagate=True)) == self._expected()
        if model.ready:
            assert chord.id in await self._other.active_chords()

    async def _got(self, propagate: bool) -> str:
        try:
            return repr(await self._chord.get(timeout=0, propagate=propagate))
        except ChordError as exc:
            return f"failed: {exc.__cause__!r}"
        except TimeoutError:
            return "not yet"

    def _expected(self) -> tuple[str, str]:
        patient = repr(self._model.results) if self._model.ready or self._model.done else "not yet"
        return patient, f"failed: {self._model.failures[0]!r}" if self._model.failures else patient

    def _handed_out(self, ready: ReadyChord | None, wanted: bool) -> None:
        """``ready`` is what somebody got of the library, who ``wanted`` to dispatch."""
        assert (ready is not None) == (wanted and self._model.free)
        if ready is not None:
            assert ready.body == self._model.body
            assert repr(ready._results) == repr(self._model.results)
            self._took(ready)

    def _took(self, ready: ReadyChord) -> None:
        assert (ready.error is None) == (not self._model.failures)
        claimant = Claimant(ready)
        self._claimants.append(claimant)
        self._model.take(claimant)

    async def _create(self, body: Any, size: int | None) -> None:
        self._model.create(body, size)
        await self._backend.create_chord(self._chord.id, body, size)

    async def _resize(self, size: int) -> None:
        self._model.resize(size)
        self._handed_out(await self._other.set_chord_size(self._chord.id, size), True)

    async def _part(self, slot: tuple[str, int | None], failing: bool, wanted: bool) -> None:
        number = next(self._numbers)
        value = ValueError(number) if failing else number
        task, index = slot
        self._model.add(task, index, value, failing)
        ready = await self._backend.on_chord_part_return(
            self._chord.id, task, FAILURE if failing else SUCCESS, value, index, lease=LONG if wanted else 0
        )
        self._handed_out(ready, wanted)

    async def _burst(self, slots: list[tuple[str, int]]) -> None:
        """All at once, over two backends: whoever is first, one of them gets the chord."""
        for task, index in slots:
            self._model.add(task, index, f"{task}{index}", failing=False)
        backends = itertools.cycle((self._backend, self._other))
        readies = await asyncio.gather(
            *(
                next(backends).on_chord_part_return(self._chord.id, task, SUCCESS, f"{task}{index}", index)
                for task, index in slots
            )
        )
        got = [ready for ready in readies if ready is not None]
        assert len(got) == self._model.free
        for ready in got:
            self._took(ready)

    async def _claim(self) -> None:
        self._handed_out(await self._other.chord(self._chord.id).claim(), True)

    def _find(self, who: int, inside: bool) -> Claimant | None:
        found = [claimant for claimant in self._claimants if claimant.inside is inside]
        return found[-1 - who % len(found)] if found else None

    async def _enter(self, who: int) -> None:
        claimant = self._find(who, inside=False)
        if claimant is None:
            return
        may = self._model.ready and self._model.holder in (None, claimant)
        try:
            await claimant.ready.__aenter__()
        except ChordClaimLost:
            assert not may
        else:
            assert may
            self._model.take(claimant)
            claimant.inside = True

    async def _leave(self, who: int) -> None:
        if (claimant := self._find(who, inside=True)) is not None:
            claimant.inside = False
            self._model.finish(claimant)
            await claimant.ready.__aexit__(None, None, None)

    async def _fail(self, who: int) -> None:
        if (claimant := self._find(who, inside=True)) is not None:
            claimant.inside = False
            self._model.give_back(claimant)
            await claimant.ready.__aexit__(KeyError, KeyError(), None)

    async def _lapse(self) -> None:
        """The claimant is slow, and its lease runs out."""
        holder = self._model.holder
        if holder is not None and self._model.ready:  # a claim to what has become incomplete cannot be cut short
            self._model.lapse()
            await self._time.run_out(self._chord.id, holder.ready)

    async def _expire(self) -> None:
        """Nobody does anything for so long that all of it is gone."""
        self._model = Model()
        self._time.pass_all()


class Time:
    """Passes when it is told to."""

    async def run_out(self, group_id: str, ready: ReadyChord) -> None:
        """Let the lease of who holds the claim run out."""
        raise NotImplementedError

    def pass_all(self) -> None:
        """Let everything expire."""
        raise NotImplementedError


class MemoryTime(Time):
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._now = 0.0
        monkeypatch.setattr(aioresult.backends.memory, "monotonic", lambda: self._now)

    async def run_out(self, group_id: str, ready: ReadyChord) -> None:
        self._now += LONG

    def pass_all(self) -> None:
        self._now += 2 * EXPIRES


class ServerTime(Time):
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def run_out(self, group_id: str, ready: ReadyChord) -> None:
        async def has_run_out() -> bool:
            return (await self._backend.chord_step(ChordStep(ChordOp.READ, group_id))).lease_left is None

        await self._backend.chord_step(ChordStep(ChordOp.RENEW, group_id, ready._token, 0.001))
        await until(has_run_out)


@pytest.fixture
async def new_world(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> Callable[[], World]:
    backends = await harness.pair(chord_lease=LONG, expires=EXPIRES)
    time = MemoryTime(monkeypatch) if isinstance(harness, MemoryHarness) else ServerTime(backends[0])
    return lambda: World(backends, time)


#: Stories of four events take a minute.
LONGEST = 4 if os.environ.get("AIORESULT_TEST_ALL") else 3

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@given(story=st.lists(EVENTS, min_size=10, max_size=30))
@settings(unhurried, max_examples=40)
async def test_any_story(new_world: Callable[[], World], story: list[Event]) -> None:
    await new_world().run(story)


@pytest.mark.parametrize("store_name", ["memory"], indirect=True)
@given(story=st.lists(st.one_of(EVENTS, st.just(("expire",))), min_size=20, max_size=60))
@settings(unhurried, max_examples=75)
async def test_any_long_story_in_which_things_expire(new_world: Callable[[], World], story: list[Event]) -> None:
    await new_world().run(story)


@pytest.mark.parametrize("store_name", ["memory"], indirect=True)
@pytest.mark.parametrize(
    ("beginning", "length"), [([], 3), ([("create", "body", 2), ("part", ("a", 0), False, True)], LONGEST)]
)
async def test_every_short_story(new_world: Callable[[], World], beginning: list[Event], length: int) -> None:
    for end in itertools.product(SHORT, repeat=length):
        await new_world().run([*beginning, *end], look_often=False)
