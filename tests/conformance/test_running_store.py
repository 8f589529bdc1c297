"""The primitives of running tasks: every store does what `aioresult.backends.runs` says, here in the memory backend."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from itertools import count
from time import monotonic
from typing import Any

import pytest

import aioresult
from aioresult import Backend, TaskMeta
from aioresult.exceptions import OutputSuperseded
from aioresult.log import CLOSED, OUTPUT_TOPIC, START, Entry, Flush, OutputNews, Page, PageRequest, Place
from aioresult.record import Record
from aioresult.run import WORKER_TOPIC, WORKERS_TOPIC, RunOp, RunState, RunStep, Verdict
from aioresult.states import FAILURE, READY_STATES, RETRY, REVOKED, STARTED, SUCCESS
from aioresult.waiter import Outcome

from ..harness import Harness, hub_of, until

#: The stores that have no running tasks yet.
#: What a beat returned that was not long ago.
NO_GAP = 1e12

WITHOUT: tuple[str, ...] = ()

PROGRESS = "PROGRESS"


@pytest.fixture
async def store(harness: Harness) -> Backend:
    if harness.name in WITHOUT:
        pytest.skip(f"{harness.name} has no running tasks")
    return await harness.connect()


@pytest.fixture
async def model() -> AsyncIterator[Backend]:
    """The reference, with a store of its own."""
    async with aioresult.connect("memory://") as backend:
        yield backend


def record(backend: Backend, task_id: str, state: str, result: Any = None, expires: float = 600.0) -> Record:
    if result is None and state in (FAILURE, RETRY, REVOKED):
        result = KeyError(state)
    payload = backend._encode(TaskMeta(task_id, state, result))
    return Record(task_id, payload, expires, custom=state not in READY_STATES | {STARTED, RETRY})


def start(backend: Backend, run: str, task_id: str = "t", worker: str = "w", **terms: Any) -> RunStep:
    given = {"record": record(backend, task_id, STARTED), "lives": 600.0, **terms}
    return RunStep(RunOp.START, task_id, run, worker, **given)


def finish(backend: Backend, run: str, state: str, task_id: str = "t", **terms: Any) -> RunStep:
    return RunStep(RunOp.FINISH, task_id, run, state=state, **{"record": record(backend, task_id, state), **terms})


def revoke(backend: Backend, task_id: str = "t", **terms: Any) -> RunStep:
    return RunStep(RunOp.REVOKE, task_id, record=record(backend, task_id, REVOKED), reason="why", lives=600.0, **terms)


async def step(backend: Backend, step: RunStep) -> RunState:
    (state,) = await backend._run_steps([step])
    assert isinstance(state, RunState), state
    return state


async def flush(backend: Backend, task_id: str = "t", writer: str = "p", epoch: int = 0, **terms: Any) -> int:
    last = terms.pop("last", 1)
    data = b"" if "state" in terms else b'["%d"]' % last
    given = {"data": data, "expires": 600.0, **terms}
    (outcome,) = await backend._append([Flush(task_id, writer, epoch, last, **given)])
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


async def page(backend: Backend, after: Place | None = START, limit: int = 100, task_id: str = "t") -> Page:
    (found,) = await backend._pages([PageRequest(task_id, after, limit)])
    assert isinstance(found, Page), found
    return found


async def stored(backend: Backend, *task_ids: str) -> list[str | None]:
    values = await backend._fetch(task_ids)
    found = zip(task_ids, values, strict=True)
    return [None if value is None else backend._decode(task_id, value).status for task_id, value in found]


class Listener:
    """Collects what the hub tells of a topic. `connected` returns once the subscription stands."""

    def __init__(self, backend: Backend, topic: str) -> None:
        self.news: list[Any] = []
        self._connected = asyncio.Event()
        self._backend, self._topic = backend, topic
        hub_of(backend, topic).watch(topic, self, read_first=False)

    def receive(self, task_id: str, outcome: Outcome) -> None:
        assert isinstance(outcome, TaskMeta), outcome
        if self._connected.is_set():
            self.news.append(outcome.result)
        self._connected.set()

    async def connected(self) -> Listener:
        await self._connected.wait()
        return self

    async def heard(self, count: int) -> list[Any]:
        await until(lambda: len(self.news) >= count)
        return self.news


# -- against the reference --------------------------------------------------------------------------------------------


class Beside:
    """One store beside the reference. Whatever is done is done to both, and must come to the same.

    With ``twice``, everything is done to the store twice, as after a reply that was lost; the second outcome counts.
    """

    def __init__(self, model: Backend, store: Backend, chance: random.Random, twice: bool) -> None:
        self.model, self.store, self.chance, self.twice = model, store, chance, twice
        #: The epochs of each task, as the two know them.
        self.epochs: dict[str, list[tuple[int, int]]] = {}
        self.verdicts: Counter[object] = Counter()

    async def flush(self, ids: Sequence[str]) -> None:
        terms = [self._flush(task_id) for task_id in ids]
        expected = await self.model._append([flush._replace(epoch=epochs[0]) for flush, epochs in terms])
        flushes = [flush._replace(epoch=epochs[1]) for flush, epochs in terms]
        outcomes = await self.store._append(flushes)
        if self.twice:
            assert [type(outcome) for outcome in outcomes] == [type(outcome) for outcome in expected]
            outcomes = await self.store._append(flushes)
        for flush, wanted, outcome in zip(flushes, expected, outcomes, strict=True):
            self.verdicts[type(wanted)] += 1
            assert type(outcome) is type(wanted), (flush, outcome)
            if isinstance(wanted, int) and isinstance(outcome, int):
                epochs = self.epochs.setdefault(flush.task_id, [])
                if (wanted, outcome) not in epochs:
                    assert all(wanted > ours and outcome > theirs for ours, theirs in epochs)
                    epochs.append((wanted, outcome))

    def _flush(self, task_id: str) -> tuple[Flush, tuple[int, int]]:
        chance = self.chance
        epochs = chance.choice([(0, 0), *self.epochs.get(task_id, [])[-2:] * 2])
        writer, last = chance.choice("pqrs") + task_id, chance.randrange(1, 9)
        run = "" if epochs[0] else chance.choice(["", "r1", "r2", "r3"])
        expires = chance.choice([None, 600.0, 0.0])
        match chance.randrange(6):
            case 0:
                return Flush(task_id, writer, 0, last, state=CLOSED, expires=expires, run=run), epochs
            case 1 if epochs[0]:
                return Flush(task_id, writer, 0, last, expires=expires), epochs
        return Flush(task_id, writer, 0, last, b'["%d"]' % chance.randrange(10), expires=expires, run=run), epochs

    async def step(self, ids: Sequence[str]) -> None:
        drawn = [self._step(task_id) for task_id in ids]
        steps = {backend: [self._of(step, backend) for step in drawn] for backend in (self.model, self.store)}
        expected = await self.model._run_steps(steps[self.model])
        outcomes = await self.store._run_steps(steps[self.store])
        if self.twice:
            assert list(outcomes) == expected, drawn
            outcomes = await self.store._run_steps(steps[self.store])
            for step, wanted, outcome in zip(drawn, expected, outcomes, strict=True):
                # What a step without a record has ended is over when it comes again.
                ended = step[0].op is RunOp.FINISH and step[0].record is None
                assert ended or outcome == wanted, (step, outcome, wanted)
        else:
            assert list(outcomes) == expected, drawn
        self.verdicts.update(state.verdict for state in expected if isinstance(state, RunState))

    def _step(self, task_id: str) -> tuple[RunStep, str, int, tuple[int, int]]:
        """A step with ``None`` for its record and its output, the state and the result to make the first of, epochs."""
        chance = self.chance
        op = chance.choice([*RunOp, RunOp.START, RunOp.START, RunOp.FINISH])
        run = "" if op in (RunOp.REVOKE, RunOp.READ) else chance.choice(["r1", "r2", "r3"])
        state, lives = "", chance.choice([None, 600.0, 0.0])
        match op:
            case RunOp.START:
                state = chance.choice(["", STARTED, STARTED])
            case RunOp.STORE:
                state = chance.choice([PROGRESS, PROGRESS, SUCCESS])
            case RunOp.FINISH:
                state = chance.choice([SUCCESS, FAILURE, REVOKED, RETRY])
            case RunOp.REVOKE:
                state = REVOKED
        worker = chance.choice(["", "w1", "w2"]) if op is RunOp.START else ""
        step = RunStep(
            op,
            task_id,
            run,
            worker,
            lives,
            state=state if op is RunOp.FINISH else "",
            reason=chance.choice(["", "why"]) if op is RunOp.REVOKE else "",
            skip_done=op is RunOp.START and chance.random() < 0.5,
            gone=chance.choice(["", "w1"]) if op is RunOp.REVOKE else "",
        )
        if op is RunOp.FINISH and chance.random() < 0.2:
            state = ""
        epochs = chance.choice([(0, 0), *self.epochs.get(task_id, [])[-2:]])
        return step, state, chance.randrange(2), epochs

    def _of(self, drawn: tuple[RunStep, str, int, tuple[int, int]], backend: Backend) -> RunStep:
        step, state, result, epochs = drawn
        epoch = epochs[backend is self.store]
        value = KeyError(result) if state in (FAILURE, RETRY, REVOKED) else result
        return step._replace(
            record=record(backend, step.task_id, state, value) if state else None,
            output=Place(epoch, 3 + result) if epoch and step.op is RunOp.FINISH else None,
        )

    async def compare(self, ids: Sequence[str]) -> None:
        asks = []
        for task_id in ids:
            epochs = self.chance.choice([(0, 0), *self.epochs.get(task_id, [])[-2:]])
            asks.append((task_id, epochs, self.chance.randrange(9), self.chance.randrange(1, 4)))
            asks.append((task_id, epochs, -1, 1))
            asks.append((task_id, (0, 0), 0, 100))
        places, pages = {}, {}
        for backend in (self.model, self.store):
            side = backend is self.store
            places[backend] = [
                PageRequest(task_id, Place(epochs[side], seq) if seq >= 0 else None, limit)
                for task_id, epochs, seq, limit in asks
            ]
            pages[backend] = await backend._pages(places[backend])
        for ask, ours, theirs in zip(places[self.model], pages[self.model], pages[self.store], strict=True):
            if isinstance(ours, Page) and isinstance(theirs, Page):
                self._note(ask.task_id, (ours.top.epoch, theirs.top.epoch))
                for one, other in zip(ours.entries, theirs.entries, strict=False):
                    self._note(ask.task_id, (one.epoch, other.epoch))
        found = {
            backend: [self._alike(ask, page, backend is self.store) for ask, page in zip(*both, strict=True)]
            for backend, both in ((each, (places[each], pages[each])) for each in (self.model, self.store))
        }
        assert found[self.store] == found[self.model], asks
        assert await stored(self.store, *ids) == await stored(self.model, *ids)

    def _note(self, task_id: str, epochs: tuple[int, int]) -> None:
        """An epoch that is new in both: no flush, but the success of an older run has begun it."""
        known = self.epochs.setdefault(task_id, [])
        if all(epochs) and not any(one == epochs[0] or other == epochs[1] for one, other in known):
            known.append(epochs)

    def _alike(self, ask: PageRequest, page: Page | BaseException, side: bool) -> Page:
        """The page with the epochs of the reference, and with an end only where one is needed."""
        assert isinstance(page, Page), page
        known = {0: 0, **{epochs[side]: epochs[0] for epochs in self.epochs.get(ask.task_id, [])}}
        entries = tuple(entry._replace(epoch=known[entry.epoch]) for entry in page.entries)
        top = START if entries else page.top._replace(epoch=known[page.top.epoch])
        return page._replace(entries=entries, top=top)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("seed", range(2))
async def test_any_sequence_comes_to_the_same_as_in_the_reference(
    store: Backend, model: Backend, seed: int, twice: bool
) -> None:
    chance = random.Random(seed)
    beside = Beside(model, store, chance, twice)
    everyone = ["a", "b{c}d", "{e}"]
    for _ in range(240):
        ids = chance.sample(everyone, chance.randrange(1, 4))
        match chance.randrange(12):
            case 0 | 1 | 2:
                await asyncio.gather(model.forget(ids[0]), store.forget(ids[0]))
                beside.epochs.pop(ids[0], None)
            case 3 | 4 | 5:
                await beside.flush(ids)
            case _:
                # One task may be in a call twice; its steps are taken in order.
                await beside.step(ids if twice else ids + chance.choices(everyone, k=chance.randrange(3)))
        await beside.compare(everyone)
    missing = {*Verdict, int, OutputSuperseded} - set(beside.verdicts)
    assert not missing, "draw more"


# -- the log ----------------------------------------------------------------------------------------------------------


async def test_what_is_flushed_is_read_and_its_end_with_it(store: Backend) -> None:
    epoch = await flush(store, last=2, data=b'["a", "b"]')
    assert await flush(store, epoch=epoch, last=3) == epoch
    assert await flush(store, epoch=epoch, last=4, state=CLOSED) == epoch
    entries = (Entry(epoch, 2, b'["a", "b"]'), Entry(epoch, 3, b'["3"]'), Entry(epoch, 4, b"", CLOSED))
    found = await page(store)
    assert (found.final, found.entries, found.more) == (False, entries, False)
    assert (await page(store, None)).entries == entries[-1:]
    behind = await page(store, Place(epoch, 4))
    assert behind == Page(False, (), False, Place(epoch, 4))


@pytest.mark.parametrize("seq", [0, 1, 2])
async def test_a_cursor_in_the_middle_of_an_entry_gets_the_entry(store: Backend, seq: int) -> None:
    epoch = await flush(store, last=3, data=b"[1, 2, 3]")
    assert (await page(store, Place(epoch, seq))).entries == (Entry(epoch, 3, b"[1, 2, 3]"),)


async def test_a_page_has_no_more_entries_than_were_asked_for(store: Backend) -> None:
    epoch = await flush(store)
    for last in range(2, 6):
        await flush(store, epoch=epoch, last=last)
    pages = [await page(store, Place(epoch, seq), limit=2) for seq in (0, 2, 3, 4, 5)]
    assert [[entry.last for entry in found.entries] for found in pages] == [[1, 2], [3, 4], [4, 5], [5], []]
    assert [found.more for found in pages] == [True, True, False, False, False]


@pytest.mark.parametrize("cursor", ["0-0", "99999999999999999999-99999999999999999999", "18446744073709551615-7"])
async def test_any_cursor_is_answered(store: Backend, cursor: str) -> None:
    nothing = await page(store, Place.parse(cursor))
    assert nothing == Page(False, (), False, START)
    epoch = await flush(store)
    found = await page(store, Place.parse(cursor))
    assert found.entries == (() if cursor[0] != "0" else (Entry(epoch, 1, b'["1"]'),))
    assert found.top == Place(epoch, 1)


async def test_an_opening_ends_what_was_before(store: Backend) -> None:
    first = await flush(store, writer="p")
    assert await flush(store, writer="p") == first
    second = await flush(store, writer="q", last=2)
    assert second > first
    with pytest.raises(OutputSuperseded):
        await flush(store, writer="p", epoch=first, last=2)
    with pytest.raises(OutputSuperseded):
        await flush(store, writer="p", epoch=first, data=b"")
    assert (await page(store)).entries == (Entry(second, 2, b'["2"]'),)
    behind = await page(store, Place(second, 2))
    assert behind.top == Place(second, 2)


async def test_a_run_that_is_over_opens_nothing(store: Backend) -> None:
    assert await flush(store, "pending", run="r0")
    await step(store, start(store, "r1"))
    with pytest.raises(OutputSuperseded):
        await flush(store, run="r0")
    assert await flush(store, run="r1")
    await step(store, finish(store, "r1", RETRY))
    with pytest.raises(OutputSuperseded):
        await flush(store, writer="q", run="r1")
    assert await flush(store, writer="q")  # of no run


async def test_a_log_that_is_gone_is_made_anew_by_the_next_flush(store: Backend) -> None:
    epoch = await flush(store)
    await flush(store, epoch=epoch, last=2)
    await store.forget("t")
    assert await page(store, Place(epoch, 2)) == Page(False, (), False, START)
    assert await flush(store, epoch=epoch, last=3) == epoch
    assert (await page(store, Place(epoch, 2))).entries == (Entry(epoch, 3, b'["3"]'),)


async def test_what_need_not_be_kept_is_dropped_some_time(store: Backend) -> None:
    epoch = await flush(store)
    for first in range(2, 1000, 100):
        await asyncio.gather(*(flush(store, f"t{n}", writer=f"{n}") for n in range(3)))
        for last in range(first, first + 100):
            await flush(store, epoch=epoch, last=last, keep_from=max(0, last - 20))
    kept = [entry.last for entry in (await page(store, limit=2000)).entries]
    assert kept == list(range(kept[0], 1002))
    assert kept[0] <= 1001 - 20
    assert len(kept) < 500


async def test_an_output_expires_unless_it_is_kept(store: Backend) -> None:
    for writer in map(str, count()):
        begun, epochs = monotonic(), {}
        for task_id in ("brief", "renewed", "kept", "longer"):
            epochs[task_id] = await flush(store, task_id, writer=writer, expires=0.2)
        await flush(store, "renewed", epoch=epochs["renewed"], data=b"", expires=600.0)
        await flush(store, "kept", epoch=epochs["kept"], last=2, expires=0.0)
        await flush(store, "longer", epoch=epochs["longer"], last=2, expires=600.0)
        if monotonic() < begun + 0.15:  # in time
            break

    async def gone() -> bool:
        return not (await page(store, task_id="brief")).entries

    await until(gone)
    assert [len((await page(store, task_id=task_id)).entries) for task_id in ("renewed", "kept", "longer")] == [1, 2, 2]


async def test_a_page_says_whether_the_task_is_over(store: Backend) -> None:
    for state in (STARTED, PROGRESS, RETRY):
        await store._store([record(store, "t", state)])
        assert not (await page(store)).final
    for state in sorted(READY_STATES):
        await store._store([record(store, state, state)])
        assert (await page(store, task_id=state)).final
        assert (await page(store, None, task_id=state)).final


async def test_flushes_and_looks_of_many_tasks_in_one_call(store: Backend) -> None:
    ids = [f"t{n}" for n in range(50)]
    epochs = await store._append([Flush(task_id, "p", 0, 1, b'["%s"]' % task_id.encode()) for task_id in ids])
    pages = await store._pages([PageRequest(task_id, START, 10) for task_id in ids])
    for task_id, epoch, found in zip(ids, epochs, pages, strict=True):
        assert isinstance(epoch, int)
        assert isinstance(found, Page)
        assert found.entries == (Entry(epoch, 1, b'["%s"]' % task_id.encode()),)


async def test_every_flush_is_told(harness: Harness, store: Backend) -> None:
    news = await Listener(await harness.connect(), OUTPUT_TOPIC + "t").connected()
    epoch = await flush(store, last=2, data=b"[1, 2]")
    told = await news.heard(1)
    assert told[0] in (OutputNews(epoch, 2, b"[1, 2]"), OutputNews(epoch, 2, None))
    await flush(store, epoch=epoch, last=3, data=b'["' + b"x" * 40_000 + b'"]')
    assert (await news.heard(2))[1] == OutputNews(epoch, 3, None)
    await flush(store, epoch=epoch, last=4, state=CLOSED)
    assert (await news.heard(3))[2] == OutputNews(epoch, 4, None)
    await flush(store, epoch=epoch, last=4, data=b"")
    await flush(store, "other")
    await flush(store, epoch=epoch, last=5)
    assert (await news.heard(4))[3][:2] == (epoch, 5)
    later = await flush(store, writer="q", last=1, data=b'["' + b"x" * 40_000 + b'"]')
    assert (await news.heard(5))[4] == OutputNews(later, 1, None)


# -- runs -------------------------------------------------------------------------------------------------------------


async def test_the_life_of_a_run(store: Backend) -> None:
    assert await step(store, start(store, "r1")) == RunState(Verdict.STARTED, "r1", "w")
    assert await stored(store, "t") == [STARTED]
    epoch = await flush(store, run="r1", last=2)
    progress = RunStep(RunOp.STORE, "t", "r1", record=record(store, "t", PROGRESS, 1))
    assert await step(store, progress) == RunState(Verdict.STORED, "r1", "w")
    assert await stored(store, "t") == [PROGRESS]
    assert await step(store, RunStep(RunOp.READ, "t")) == RunState(Verdict.NOTED, "r1", "w")
    ending = finish(store, "r1", SUCCESS, output=Place(epoch, 2))
    for _ in range(2):
        assert await step(store, ending) == RunState(Verdict.STORED)
    found = await page(store)
    assert found.final
    assert found.entries[1:] == (Entry(epoch, 3, b"", SUCCESS),)
    assert await step(store, start(store, "r2", skip_done=True)) == RunState(Verdict.DONE)


async def test_a_finish_tells_the_waiter_and_the_reader(harness: Harness, store: Backend) -> None:
    web = await harness.connect()
    news = await Listener(web, OUTPUT_TOPIC + "t").connected()
    waiting = asyncio.create_task(web.wait_for("t"))
    await step(store, start(store, "r1"))
    epoch = await flush(store, run="r1")
    await step(store, finish(store, "r1", SUCCESS, output=Place(epoch, 1), record=record(store, "t", SUCCESS, 5)))
    assert (await waiting).result == 5
    assert (await news.heard(2))[1] == OutputNews(epoch, 2, None)


async def test_the_failure_of_an_older_attempt_leaves_the_newer_output_alone(store: Backend) -> None:
    await step(store, start(store, "r1"))
    first = await flush(store, run="r1")
    await step(store, start(store, "r2"))
    second = await flush(store, writer="q", run="r2")
    assert await step(store, finish(store, "r1", FAILURE, output=Place(first, 1))) == RunState(
        Verdict.SUPERSEDED, "r2", "w"
    )
    assert (await page(store)).entries == (Entry(second, 1, b'["1"]'),)


@pytest.mark.parametrize("older", [True, False], ids=["with an output", "without"])
@pytest.mark.parametrize("newer", [True, False], ids=["of a newer one", "of none"])
async def test_the_success_of_an_older_attempt_voids_the_output(store: Backend, older: bool, newer: bool) -> None:
    """A success counts, and so the output of the newer attempt does not: its readers and its writer are told."""
    await step(store, start(store, "r1"))
    first = await flush(store, run="r1") if older else 0
    await step(store, start(store, "r2"))
    second = await flush(store, writer="q", run="r2") if newer else 0
    for _ in range(2):
        state = await step(store, finish(store, "r1", SUCCESS, output=Place(first, 1) if older else None))
        assert state == RunState(Verdict.STORED, "r2", "w")
    (*_, end) = (await page(store)).entries
    own = older and not newer
    assert end == (Entry(first, 2, b"", SUCCESS) if own else Entry(second + 1, 1, b"", SUCCESS))
    assert len((await page(store)).entries) == 1 + own
    with pytest.raises(OutputSuperseded):
        await flush(store, writer="q", epoch=second, last=2, run="r2")
    await step(store, finish(store, "r2", SUCCESS, output=Place(second, 2) if newer else None))
    assert (await page(store)).entries[-1] == end


async def test_what_has_succeeded_is_begun_again_only_by_name(store: Backend) -> None:
    await step(store, start(store, "r1"))
    epoch = await flush(store, run="r1")
    await step(store, finish(store, "r1", SUCCESS, output=Place(epoch, 1)))
    assert await step(store, start(store, "r2")) == RunState(Verdict.AGAIN, "r2", "w")
    with pytest.raises(OutputSuperseded):  # what has succeeded stays
        await flush(store, writer="q", run="r2")
    assert len((await page(store)).entries) == 2
    assert await flush(store, writer="q") > epoch  # who writes without a run decides for itself


async def test_a_revoke_is_told_to_the_worker_that_runs_the_task(harness: Harness, store: Backend) -> None:
    news = await Listener(await harness.connect(), f"{WORKER_TOPIC}w").connected()
    others = await Listener(await harness.connect(), f"{WORKER_TOPIC}v").connected()
    await step(store, start(store, "r1"))
    assert await step(store, revoke(store)) == RunState(Verdict.ASKED, "r1", "w", "why")
    assert await news.heard(1) == ["r1"]
    assert await stored(store, "t") == [STARTED]
    assert await step(store, finish(store, "r1", REVOKED)) == RunState(Verdict.STORED)
    await step(store, start(store, "r2", "u", worker="v"))
    await step(store, revoke(store, "u"))
    assert await others.heard(1) == ["r2"]
    assert len(news.news) == 1


async def test_a_revoke_of_what_no_worker_runs_is_done_at_once(harness: Harness, store: Backend) -> None:
    waiting = asyncio.create_task((await harness.connect()).wait_for("pending"))
    assert await step(store, revoke(store, "pending")) == RunState(Verdict.REVOKED, wish="why")
    assert (await waiting).status == REVOKED
    assert await step(store, start(store, "r1", "pending")) == RunState(Verdict.REVOKED, wish="why")
    await step(store, start(store, "r1"))
    assert (await step(store, revoke(store, gone="w"))).verdict is Verdict.REVOKED
    assert await stored(store, "t") == [REVOKED]
    assert (await step(store, finish(store, "r1", FAILURE))).verdict is Verdict.REVOKED
    assert await stored(store, "t") == [REVOKED]


async def test_a_wish_ends_the_task_when_its_run_gives_up(harness: Harness, store: Backend) -> None:
    for number, ending in enumerate([RunStep(RunOp.RELEASE, "t", "r1"), finish(store, "r1", RETRY)]):
        ending = ending._replace(task_id=f"t{number}")
        if ending.record is not None:
            ending = ending._replace(record=record(store, ending.task_id, RETRY))
        waiting = asyncio.create_task((await harness.connect()).wait_for(ending.task_id))
        await step(store, start(store, "r1", ending.task_id))
        epoch = await flush(store, ending.task_id, run="r1")
        await step(store, revoke(store, ending.task_id))
        state = await step(store, ending._replace(output=Place(epoch, 1)))
        assert state == RunState(Verdict.REVOKED, wish="why")
        assert (await waiting).status == REVOKED
        assert (await page(store, None, task_id=ending.task_id)).entries == (Entry(epoch, 2, b"", REVOKED),)


async def test_what_is_forgotten_has_no_run_and_no_wish(store: Backend) -> None:
    await step(store, start(store, "r1", record=None))
    await flush(store, run="r1")
    await step(store, revoke(store))
    await store.forget("t")
    assert await step(store, RunStep(RunOp.READ, "t")) == RunState(Verdict.NOTED)
    assert (await page(store)).entries == ()
    await step(store, start(store, "r2"))
    await store.forget_many(["t", "u"])
    assert await step(store, RunStep(RunOp.READ, "t")) == RunState(Verdict.NOTED)


async def test_a_note_expires_unless_it_is_renewed(store: Backend) -> None:
    for run in map(str, count()):
        begun = monotonic()
        for task_id in ("brief", "renewed"):
            await step(store, start(store, run, task_id, lives=0.2))
        await step(store, RunStep(RunOp.RENEW, "renewed", run, lives=600.0))
        if monotonic() < begun + 0.15:  # in time
            break

    async def gone() -> bool:
        return not (await step(store, RunStep(RunOp.READ, "brief"))).run

    await until(gone)
    assert (await step(store, RunStep(RunOp.READ, "renewed"))).run == run


async def test_the_result_of_a_run_expires_as_its_record_says_and_its_output_with_it(
    harness: Harness, store: Backend
) -> None:
    await step(store, start(store, "r1"))
    epoch = await flush(store, run="r1", expires=0.0)
    last = record(store, "t", SUCCESS, expires=0.2)
    await step(store, finish(store, "r1", SUCCESS, record=last, output=Place(epoch, 1)))

    async def gone() -> bool:
        return not (await page(store)).entries

    await until(gone)


# -- workers ----------------------------------------------------------------------------------------------------------


async def lapsed(store: Backend, worker: str) -> None:
    async def gone() -> bool:
        return await store._alive([worker]) == [False]

    await until(gone)


async def test_a_worker_lives_for_its_lease(store: Backend) -> None:
    await store._beat("a", 0.1)
    await store._beat("b", 600.0)
    assert await store._alive(["b", "nobody", "b"]) == [True, False, True]
    await lapsed(store, "a")
    await store._beat("a", 600.0)
    assert await store._alive(["a", "b"]) == [True, True]
    assert await store._alive([]) == []


async def test_the_dead_are_told_once_and_by_those_who_reap(harness: Harness, store: Backend) -> None:
    news = await Listener(await harness.connect(), WORKERS_TOPIC).connected()
    await store._beat("a", 0.05)
    await store._beat("b", 0.05)
    await lapsed(store, "b")
    await store._beat("c", 600.0)
    assert news.news == []
    await store._beat("", 600.0, NO_GAP)
    assert sorted(await news.heard(2)) == ["a", "b"]
    await store._beat("c", 600.0, NO_GAP)
    await store._beat("c", 0.0)
    assert (await news.heard(3))[2:] == ["c"]
    assert await store._alive(["a", "b", "c"]) == [False] * 3


async def test_a_good_bye_is_told_once(harness: Harness, store: Backend) -> None:
    news = await Listener(await harness.connect(), WORKERS_TOPIC).connected()
    await store._beat("a", 600.0)
    for _ in range(2):
        await store._beat("a", 0.0)
        assert await store._alive(["a"]) == [False]
    await store._beat("b", 600.0)
    await store._beat("b", 0.0)
    assert await news.heard(2) == ["a", "b"]


async def test_a_beat_that_is_late_removes_nobody(harness: Harness, store: Backend) -> None:
    """As of a server that was frozen: the others, too, may have beaten, and not have been heard."""
    news = await Listener(await harness.connect(), WORKERS_TOPIC).connected()
    await store._beat("a", 0.05)
    await lapsed(store, "a")
    last = await store._beat("", 600.0)
    assert await store._beat("", 600.0, last - 301) >= last
    await store._beat("mark", 600.0)
    await store._beat("mark", 0.0)
    await store._beat("", 600.0, last - 200)
    assert await news.heard(2) == ["mark", "a"]


async def test_after_an_outage_each_worker_has_half_a_lease_to_beat(harness: Harness, store: Backend) -> None:
    news = await Listener(await harness.connect(), WORKERS_TOPIC).connected()
    for worker in ("late", "dead"):
        await store._beat(worker, 0.01)
    await lapsed(store, "dead")
    outage_ends = monotonic() + 0.05
    await until(lambda: monotonic() > outage_ends)
    await store._beat("", 0.02, NO_GAP)  # by this lease, theirs have been over for longer than one
    await store._beat("late", 600.0)
    await store._beat("mark", 600.0)
    await store._beat("mark", 0.0)
    await lapsed(store, "dead")
    await store._beat("", 600.0, NO_GAP)
    assert await news.heard(2) == ["mark", "dead"]
    assert await store._alive(["late", "dead"]) == [True, False]
