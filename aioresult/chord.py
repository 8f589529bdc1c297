"""Chords: a group (the header) whose completion triggers one callback (the body), with the results in order.

A part is the result of one task of the header. A backend executes one atomic step, `ChordStep` → `ChordState`. It keeps
the parts as a set: a part that is stored twice counts as one part. The step that adds the last part also decides which
process gets the *claim* to dispatch the callback. The claim is a lease: it runs out if its holder dies. This module
does everything else, the same for every backend.

Only one process at a time holds the claim. The callback is dispatched exactly once, with two exceptions: the holder of
the claim dies between dispatching and leaving ``async with``, or its lease runs out because it cannot renew it. Then
another process dispatches the callback again. See docs/chords.md.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self
from uuid import uuid4

from .exceptions import (
    BackendError,
    BackendGetMetaError,
    ChordClaimLost,
    ChordError,
    DecodeError,
)
from .lookout import ChordWaiter, Lookouts, LookoutStore, part_failed, result_id_of
from .meta import TaskMeta
from .restore import load_exception
from .result import ResultBase, ResultSet
from .seconds import Timeout, checked_timeout
from .serialization import Codec, reading
from .states import EXCEPTION_STATES, PROPAGATE_STATES, SUCCESS
from .tasks import LONGEST_STEP, StandingTask, run_to_completion
from .waiter import FINAL_READ, SingleWaiter, Waiter, timed_out

__all__ = [
    "CHORD_TOPIC",
    "READY_TOPIC",
    "Chord",
    "ChordOp",
    "ChordProgress",
    "ChordState",
    "ChordStep",
    "ChordStore",
    "Chords",
    "ReadyChord",
    "chord_meta",
]

logger: logging.Logger = logging.getLogger("aioresult")

#: Prefix of the hub's topic for one chord; the group's id follows it. No task id begins with NUL.
CHORD_TOPIC = "\x00chord "
#: The hub's topic that announces every completed chord.
READY_TOPIC = "\x00chords"


class ChordOp(enum.Enum):
    """What a `ChordStep` does."""

    #: Set the number of parts and the body (the callback). If the chord is finished, begin a new run of it.
    CREATE = "create"
    #: Set the number of parts.
    SIZE = "size"
    #: Add a part (the result of one task of the header), if it is new.
    PART = "part"
    #: Claim the completed chord, to dispatch its callback.
    CLAIM = "claim"
    #: Renew the lease of a claim, or claim again after it ran out. Does not return the body, as CLAIM does.
    RENEW = "renew"
    #: Give the claim back, so that another process can claim the chord.
    RELEASE = "release"
    #: Record that the callback was dispatched: keep the parts, remove everything else.
    FINISH = "finish"
    #: Change nothing, and return the state.
    READ = "read"
    #: Change nothing, and return the state and the parts.
    PARTS = "parts"


@dataclass(frozen=True, slots=True)
class ChordStep:
    """One atomic change of one chord. Every step is idempotent: a repeated step gives the same answer.

    CREATE, SIZE and PART also claim the chord for `token`, if a token is given and the step completes the chord.
    Waiters and dispatchers are notified when a step completes the chord, makes it fail, or gives a claim back. Only
    CREATE changes a finished chord.
    """

    op: ChordOp
    group_id: str
    #: The id of the claim; an empty text claims nothing.
    token: str = ""
    #: Seconds that a claim lasts.
    lease: float = 0.0
    #: Seconds that the chord is kept, at least, after its last CREATE, SIZE, PART or claim. 0 keeps it for ever.
    expires: float = 0.0
    #: Seconds that the saved group with the id `group_id` is kept, if it exists. It gives nested results their shape.
    group_expires: float = 0.0
    #: The id of the run that a CREATE begins. A repeated CREATE with the same id does not restart a finished chord.
    run: str = ""
    size: int | None = None
    #: The callback, kept until the chord is finished. If several steps give a body, the first one counts.
    body: bytes | None = None
    #: The id of the callback's result, for waiters of chords that Celery may finish. The first id given counts.
    body_id: str = ""
    task_id: str = ""
    #: The place in the list of results. Parts with the index ``None`` come last, in order of arrival.
    index: int | None = None
    #: The part, encoded.
    part: bytes = b""
    #: True if the part failed.
    failed: bool = False


@dataclass(frozen=True, slots=True)
class ChordState:
    """The state of a chord after a step."""

    #: The number of parts that are stored.
    count: int = 0
    #: The number of parts that the chord needs; ``None`` while it is not known.
    size: int | None = None
    #: True if the step's token holds the claim now. After FINISH: true if it held the claim before the step.
    claimed: bool = False
    #: True if the callback was dispatched.
    done: bool = False
    #: The callback; set only if the step has claimed the chord.
    body: bytes | None = None
    #: The part that failed first; set only by READ and PARTS.
    failure: bytes | None = None
    #: Seconds until the present claim runs out; ``None`` if no process holds the claim.
    lease_left: float | None = None
    #: The parts in order; set only by `ChordOp.PARTS`.
    parts: tuple[bytes, ...] = ()
    #: True if this library created the chord, and not Celery. Then a message always announces the chord's end.
    ours: bool = field(default=False, compare=False)
    #: The `ChordStep.body_id` of an earlier step; set only by READ of a chord that is not `ours`.
    body_id: str = field(default="", compare=False)

    @property
    def complete(self) -> bool:
        """True if all parts are stored."""
        return self.done or (self.size is not None and self.count >= self.size)


class ChordProgress(NamedTuple):
    """How many parts of a chord are stored (``done``), and how many there are (``size``)."""

    done: int
    #: ``None`` while the size is not known.
    size: int | None


class ChordStore(LookoutStore, Protocol):
    """The attributes and methods of a backend that chords use."""

    codec: Codec
    expires: float
    chord_expires: float
    chord_lease: float
    default_timeout: float | None

    async def chord_step(self, step: ChordStep) -> ChordState: ...
    async def chord_steps(self, steps: Sequence[ChordStep]) -> Sequence[ChordState | BaseException]: ...
    async def active_chords(self) -> Sequence[str]: ...
    async def wait_for_topic(self, topic: str, waiter: SingleWaiter, patient: bool) -> TaskMeta | None: ...
    def watch_topic(self, topic: str, waiter: Waiter) -> None: ...


class Chords:
    """Serves the chords of one backend: encodes and sends steps, and turns the states that come back into objects."""

    def __init__(self, store: ChordStore) -> None:
        self._store = store
        self._lookouts = Lookouts(store, CHORD_TOPIC, self._find_failure)

    @property
    def group_expires(self) -> float:
        """Seconds that the saved group of a chord is kept, as in Celery: long enough for readers of the group, too."""
        kept = self._store.chord_expires, self._store.expires
        return max(kept) if all(kept) else 0.0

    async def create(self, group_id: str, size: int | None, body: Any) -> Chord:
        """See `aioresult.backends.base.Backend.create_chord`."""
        packed = self._pack_body(group_id, body)
        await self._step(ChordStep(ChordOp.CREATE, group_id, size=size, body=packed, run=str(uuid4())))
        return self.chord(group_id)

    def _pack_body(self, group_id: str, body: Any) -> bytes | None:
        """Encode the body. ``None`` means that no body is given yet; a later step may give the first one."""
        return None if body is None else self._store.codec.dumps(body, f"the body of chord {group_id}", "body")

    async def set_size(self, group_id: str, size: int) -> ReadyChord | None:
        """See `aioresult.backends.base.Backend.set_chord_size`."""
        ready, _ = await self._claim_with(ChordStep(ChordOp.SIZE, group_id, size=size), self._store.chord_lease)
        return ready

    async def add_part(
        self, group_id: str, task_id: str, state: str, value: Any, index: int | None, body: Any, lease: float
    ) -> ReadyChord | None:
        """See `aioresult.backends.base.Backend.on_chord_part_return`. With a ``lease`` of 0 this never claims."""
        codec, what = self._store.codec, f"the part {task_id} of chord {group_id}"
        # A part begins with a number: Celery writes 1, and readers skip it. A sorted set in Redis drops equal members.
        # So our script appends spaces to equal parts. Readers of msgpack refuse spaces; there the number differs.
        number = 1 if index is None or codec.serializer != "msgpack" else 2 + index
        step = ChordStep(
            ChordOp.PART,
            group_id,
            task_id=task_id,
            index=index,
            part=codec.dumps_part(number, task_id, state, value, what),
            failed=state in PROPAGATE_STATES,
            body=self._pack_body(group_id, body),
            body_id=result_id_of(body) if self._store.chords_beside else "",
        )
        ready, _ = await self._claim_with(step, lease)
        return ready

    async def claim(self, group_id: str) -> tuple[ReadyChord | None, ChordState]:
        """See `Chord.claim`. Also returns the state of the chord after the step."""
        return await self._claim_with(ChordStep(ChordOp.CLAIM, group_id), self._store.chord_lease)

    async def _claim_with(self, step: ChordStep, lease: float) -> tuple[ReadyChord | None, ChordState]:
        token = str(uuid4()) if lease else ""
        state = await self._step(replace(step, token=token, lease=lease))
        if not state.claimed:
            return None, state
        group_id = step.group_id
        body = None
        if state.body is not None:
            body = self._store.codec.loads(state.body, f"the body of chord {group_id}")
        results, error = await self._results(group_id)
        return ReadyChord(self, group_id, body, results, error, token, lease), state

    async def _step(self, step: ChordStep) -> ChordState:
        expires, group_expires = self._store.chord_expires, self.group_expires
        return await self._store.chord_step(replace(step, expires=expires, group_expires=group_expires))

    async def _results(self, group_id: str) -> tuple[list[Any], ChordError | None]:
        """Return the values of all stored parts, with exceptions as values; and the chord's error if it failed."""
        state = await self._step(ChordStep(ChordOp.PARTS, group_id))
        parts = [self._unpack(group_id, part) for part in state.parts]
        group = await self._store.restore_group(group_id)
        gone = not parts and state.size != 0
        # Celery may have finished the chord and removed its parts. But each task also has a result under its own id.
        asked = gone or (not state.complete and self._is_beside(state))
        from_results = asked and group is not None and await group.ready()
        if gone and not from_results:
            raise BackendGetMetaError(
                f"the parts of chord {group_id} are gone: Celery has dispatched its callback, or they have expired; "
                f"await the group, backend.result(chord_result).parent, or the result of the body instead"
            )
        if group is not None and from_results:
            values = group.value()
            metas = [leaf.meta for leaf in group.leaves() if leaf.meta is not None]
            parts = [(meta.task_id, meta.status, meta.result) for meta in metas]
        elif group is not None and any(isinstance(member, ResultSet) for member in group):
            by_id = {task_id: value for task_id, _, value in parts}
            values = [_shaped(member, by_id) for member in group]
        else:
            values = [value for _, _, value in parts]
        if state.failure is not None:  # the part that failed first may have a later place in the list
            parts = [self._unpack(group_id, state.failure)]
        for task_id, status, value in parts:
            if status in PROPAGATE_STATES:
                return values, part_failed(group_id, task_id, value)
        return values, None

    def _unpack(self, group_id: str, part: bytes) -> tuple[str, str, Any]:
        with reading(f"a part of chord {group_id}"):
            match self._store.codec.loads(part, f"a part of chord {group_id}"):
                case [_, str(task_id), str(state), value]:
                    if state in EXCEPTION_STATES:
                        value = load_exception(value, state, None)
                    return task_id, state, value
        raise DecodeError(f"a part of chord {group_id} cannot be read: it is not [1, task id, state, result]")

    def chord(self, group_id: str) -> Chord:
        """Make a handle on a chord, without I/O."""
        return Chord(self, group_id)

    async def wait(self, group_id: str, timeout: Timeout, propagate: bool) -> list[Any]:
        """See `Chord.get`."""
        what, seconds = f"chord {group_id}", checked_timeout(timeout, self._store.default_timeout)
        if seconds is not None and seconds <= 0:
            if not await self._is_over(group_id, propagate):
                raise timed_out(what, seconds)
        else:
            patient = seconds is None or seconds >= FINAL_READ
            waiter = ChordWaiter(what, seconds, propagate, partial(self._lookouts.saw, group_id))
            try:
                found = await self._store.wait_for_topic(CHORD_TOPIC + group_id, waiter, patient)
            finally:
                self._lookouts.leave(group_id, waiter)
            if seconds is not None and not waiter.over and (found is None or not waiter.satisfied(found)):
                raise timed_out(what, seconds)
        results, error = await self._results(group_id)
        if error is not None and propagate:
            raise error
        return results

    def _is_beside(self, state: ChordState) -> bool:
        return self._store.chords_beside and not state.ours

    async def _is_over(self, group_id: str, propagate: bool) -> bool:
        """True if there is nothing to wait for. With ``propagate``, raises the error of a part that Celery stored."""
        state = await self.read(group_id)
        if state.complete or (propagate and state.failure is not None):
            return True
        if not self._is_beside(state):
            return False
        if propagate and state.count and (error := await self._find_failure(group_id, set())) is not None:
            raise error
        group = await self._store.restore_group(group_id)
        return group is not None and await group.ready()

    async def _find_failure(self, group_id: str, seen: set[int]) -> ChordError | None:
        """Return the error of the first failed part. Skips parts whose hash is in ``seen``; adds all others to it."""
        state = await self._step(ChordStep(ChordOp.PARTS, group_id))
        now = asyncio.get_running_loop().time
        pause_at = now() + LONGEST_STEP
        for part in state.parts:
            if (mark := hash(part)) in seen:
                continue
            seen.add(mark)
            try:
                task_id, status, value = self._unpack(group_id, part)
            except DecodeError:  # `_results` raises the error later, when it reads all parts
                continue
            if status in PROPAGATE_STATES:
                return part_failed(group_id, task_id, value)
            if now() >= pause_at:
                await asyncio.sleep(0)
                pause_at = now() + LONGEST_STEP
        return None

    async def progress(self, group_id: str) -> ChordProgress:
        """See `Chord.progress`."""
        state = await self.read(group_id)
        if state.size is None and not state.count and self._is_beside(state):
            # Celery may have finished the chord and removed its parts and its size.
            group = await self._store.restore_group(group_id)
            if group is not None and (state.done or await group.ready()):
                size = sum(1 for _ in group.leaves())
                return ChordProgress(size, size)
        return ChordProgress(state.count, state.size)

    async def read(self, group_id: str) -> ChordState:
        """Return the present state of the chord."""
        return await self._step(ChordStep(ChordOp.READ, group_id))

    async def finish(self, group_id: str, token: str) -> bool:
        """Record that the callback was dispatched. Returns true if ``token`` still held the claim."""
        return (await self._step(ChordStep(ChordOp.FINISH, group_id, token))).claimed

    async def release(self, group_id: str, token: str) -> None:
        """Give back the claim with the id ``token``."""
        await self._step(ChordStep(ChordOp.RELEASE, group_id, token))

    async def renew(self, group_id: str, token: str, lease: float) -> bool:
        """Renew the claim's lease. Returns true if ``token`` still held the claim, or has got the claim again."""
        return (await self._step(ChordStep(ChordOp.RENEW, group_id, token, lease))).claimed


class Chord:
    """A handle on a chord. ``await`` it to get the list of the header's results. Creating it costs no I/O."""

    __slots__ = ("_chords", "id")

    def __init__(self, chords: Chords, id: str) -> None:
        self._chords = chords
        self.id: str = id

    def __await__(self) -> Generator[Any, None, list[Any]]:
        return self.get().__await__()

    async def get(self, timeout: Timeout = None, propagate: bool = True) -> list[Any]:
        """Wait until all parts are stored, and return the results of the header in order.

        A message announces the last part, unless a Celery worker stores it. Then the wait ends when the result of the
        callback arrives, if this library stored a part; otherwise within ``heartbeat`` seconds (a backend option).

        :param timeout: seconds; ``None`` for the backend's ``default_timeout``, infinity for ever. 0 does not wait.
        :param propagate: raise as soon as a part fails. If false, wait for all parts and return exceptions as values.
        :raises ChordError: a part failed; ``__cause__`` is its exception.
        :raises BackendGetMetaError: Celery has dispatched the callback and removed the parts, and the group was not
            saved. Await the group, as ``result_from_celery(chord_result, backend).parent``, or the body's result.
        :raises TimeoutError: the chord was not complete within ``timeout``.
        """
        return await self._chords.wait(self.id, timeout, propagate)

    async def progress(self) -> ChordProgress:
        """Return how many parts are stored, and how many there are."""
        return await self._chords.progress(self.id)

    async def claim(self) -> ReadyChord | None:
        """Claim the chord and return it, if it is complete, not dispatched and not claimed; otherwise ``None``."""
        ready, _ = await self._chords.claim(self.id)
        return ready

    def __repr__(self) -> str:
        return f"<Chord: {self.id}>"


class ReadyChord:
    """A completed chord that this process has claimed. Dispatch its callback inside ``async with``.

    ``__aenter__`` renews the claim, or raises `ChordClaimLost`. Inside the block, the claim is renewed in the
    background. If the block ends without an exception, the callback counts as dispatched. An exception gives the claim
    back; then `ready_chords` yields the chord again, in this process or another one.
    """

    def __init__(
        self,
        chords: Chords,
        group_id: str,
        body: Any,
        results: list[Any],
        error: ChordError | None,
        token: str,
        lease: float,
    ) -> None:
        self.id: str = group_id
        #: The callback as it was passed to `create_chord` or with a part, such as a signature of Celery's.
        self.body = body
        #: The error if a part failed; then there is nothing to dispatch, and `results` raises it. Otherwise ``None``.
        self.error = error
        self._chords = chords
        self._results = results
        self._token = token
        self._lease = lease
        self._leaving = asyncio.Event()
        self._renewing: StandingTask | None = None

    @property
    def results(self) -> list[Any]:
        """The results of the header, in order. Raises `error` if a part failed: let it leave the ``async with``."""
        if self.error is not None:
            raise self.error
        return self._results

    async def __aenter__(self) -> Self:
        if not await self._chords.renew(self.id, self._token, self._lease):
            raise ChordClaimLost(f"the claim to chord {self.id} ran out after {self._lease:g} s; another worker has it")
        self._leaving.clear()
        self._renewing = StandingTask(self._keep, "aioresult-chord-lease", lambda: not self._leaving.is_set())
        self._renewing.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await run_to_completion(partial(self._leave, exc))

    async def _leave(self, exc: BaseException | None) -> None:
        self._leaving.set()
        if self._renewing is not None:
            await self._renewing.finish()  # otherwise a renewal in flight could claim the chord again after its release
        if exc is None or exc is self.error:
            if not await self._chords.finish(self.id, self._token):
                logger.warning("the claim to chord %s was lost: its callback may be dispatched twice", self.id)
            return
        try:
            await self._chords.release(self.id, self._token)
        except BackendError as error:
            logger.warning("the claim to chord %s could not be given back, and will run out: %s", self.id, error)

    async def _keep(self) -> None:
        while not self._leaving.is_set():
            try:
                async with asyncio.timeout(self._lease / 3):
                    await self._leaving.wait()
            except TimeoutError:
                try:
                    await self._chords.renew(self.id, self._token, self._lease)
                except BackendError as exc:
                    logger.warning("the claim to chord %s could not be renewed, and is tried again: %s", self.id, exc)

    def __repr__(self) -> str:
        return f"<ReadyChord: {self.id}>"


def _shaped(member: ResultBase, values: dict[str, Any]) -> Any:
    if isinstance(member, ResultSet):
        return [_shaped(nested, values) for nested in member]
    return values.get(str(member.id))


def chord_meta(state: ChordState) -> TaskMeta:
    """Wrap a chord's state in the form that the hub delivers: a meta that is ready if all parts are stored."""
    return TaskMeta("", SUCCESS if state.complete else "PROGRESS", state)
