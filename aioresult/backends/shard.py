"""`Shard`: a part of the store that fails and recovers by itself, with its own hub, batches and retries.

Most stores are one shard. A Redis Cluster has one for each master, so that a dead master delays no waiter and no caller
of the other masters.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

from ..batch import Batcher
from ..chord import CHORD_TOPIC, ChordOp, ChordState, ChordStep, chord_meta
from ..exceptions import AioResultError, BackendConnectionError, BackendError
from ..health import Health
from ..hub import Hub
from ..log import Flush, Page, PageRequest
from ..meta import TaskMeta
from ..record import Record
from ..retry import Persistence
from ..run import RunState, RunStep
from ..serialization import unreadable
from ..source import Finding
from ..states import EXCEPTION_STATES
from ..tasks import LONGEST_STEP, copy_of_error
from ..waiter import Outcome
from .contract import BackendContract, Removal

__all__ = ["Shard", "as_error"]

logger: logging.Logger = logging.getLogger("aioresult")

T = TypeVar("T")

#: The most calls in flight at once, if they are of a kind that cannot be batched.
_PARALLEL_CALLS = 8
#: How many ids go into the first read, while the size of the values is unknown.
_FIRST_READ = 100
#: The estimated size of a value shrinks at most by this factor from one read to the next.
_ESTIMATE_SINKS = 8


class Shard:
    """Adds batches, retries and one hub to the primitives of ``backend``, for the ids in one part of its store.

    A *primitive* is a method that the author of a backend writes; see `contract`. ``where`` names the part in errors
    and logs: it is a URL without a password. ``hand_over(shard, topics)`` gives topics to other shards; see `Hub`.
    """

    def __init__(
        self, backend: BackendContract, where: str, hand_over: Callable[[Shard, Sequence[str]], None] | None = None
    ) -> None:
        self._backend = backend
        self.health: Health = Health(where)
        self.persistence: Persistence = Persistence(backend.retry_for, self._outage, self.health)
        self.hub: Hub = Hub(
            self,
            chunk=backend.fetch_chunk,
            recheck=backend.recheck,
            pauses=self.persistence.pauses,
            health=self.health,
            where=backend.as_uri(),
            hand_over=(lambda _: None) if hand_over is None else partial(hand_over, self),
        )
        #: The estimated size of a stored value. It decides how many ids go into a read, to stay within `chunk_bytes`.
        self._value_size = backend.chunk_bytes / _FIRST_READ
        batcher = partial(Batcher[Any, Any], max_bytes=backend.chunk_bytes)
        writing = partial(
            batcher,
            max_items=backend.store_chunk,
            parallel=backend.store_parallel,
            persistence=self.persistence,
        )
        reading = partial(batcher, max_items=backend.fetch_chunk, parallel=2)
        most = backend.max_pending_bytes
        self.writes: Batcher[Record | Removal, bool] = writing(
            self._write_batch, max_held=most, at_once=self._write_at_once
        )
        self.fetches: Batcher[str, Outcome | None] = reading(self.outcomes)
        self.calls: Batcher[Callable[[], Awaitable[Any]], Any] = batcher(
            self._perform_calls, max_items=1, parallel=_PARALLEL_CALLS
        )
        self.steps: Batcher[ChordStep, ChordState] = reading(
            lambda steps: backend._chord_steps(steps), max_held=most, persistence=self.persistence
        )
        self.appends: Batcher[Flush, int] = writing(
            lambda flushes: backend._append(flushes), at_once=self._append_at_once
        )
        self.page_reads: Batcher[PageRequest, Page] = reading(
            lambda requests: backend._pages(requests), persistence=self.persistence
        )
        self.runs: Batcher[RunStep, RunState] = writing(lambda steps: backend._run_steps(steps), max_held=most)
        # Pings are not in `calls`: a ping must not wait for other calls, and must not be retried.
        self.pings: Batcher[None, float] = reading(self._perform_pings)
        self.extensions: Batcher[Record, bool] = writing(lambda records: backend._extend_groups(records))
        self.stores: tuple[Batcher[Any, Any], ...] = (self.writes, self.steps, self.appends, self.runs, self.extensions)
        self._batchers = (*self.stores, self.fetches, self.calls, self.page_reads, self.pings)

    def start(self) -> None:
        """Start the hub. Needs a running event loop."""
        self.hub.start()

    async def close(self, error: Exception) -> None:
        """Pass ``error`` to every waiter and to every caller, after what is in flight has had time to end."""
        await self.hub.close(error)
        await asyncio.gather(*(batcher.close(error) for batcher in self._batchers))

    def is_busy_with(self, topic: str) -> bool:
        """True if ``topic`` has waiters here, or changes that are queued or in flight."""
        return self.hub.has_waiters(topic) or self.is_changing(topic)

    def is_changing(self, topic: str) -> bool:
        """True if changes of ``topic`` are queued or in flight here."""
        return any(topic in batcher for batcher in (self.writes, self.appends, self.runs, self.calls))

    @property
    def failing(self) -> bool:
        """True if the store could not be reached when it was last tried."""
        return self.persistence.down_since is not None or self.health.outage is not None

    def try_again(self) -> None:
        """Try again now what waits for its next attempt, because another server has taken over."""
        self.persistence.pauses.end()

    def listener_lost(self, reason: BaseException, topics: Sequence[str] | None = None) -> None:
        """Restore the subscriptions to these topics, by default to all, because the listener has broken."""
        logger.warning(
            "the listener of %s was lost (%s); its subscriptions will be restored", self.health.where, reason
        )
        self.health.failed(reason)
        self.hub.lost(topics)

    async def call(self, operation: Callable[[], Awaitable[T]], key: str | None = None) -> T:
        """Await ``operation()``, with retries, in one of the shard's asyncio tasks. Calls with the same ``key`` keep
        their order.
        """
        return cast("T", await self.calls.submit(partial(self.persistence.call, operation), key))

    def _outage(self, error: BackendConnectionError) -> None:
        """Make the queued calls raise ``error``, because the server has been away for ``retry_for`` seconds."""
        for batcher in self._batchers:
            batcher.fail_queued(copy_of_error(error))

    # -- what the hub calls: see `aioresult.hub.Source` ---------------------------------------------------------------

    async def subscribe(self, task_ids: Sequence[str]) -> Mapping[str, Exception] | None:
        return await self._backend._subscribe(task_ids)

    async def unsubscribe(self, task_ids: Sequence[str]) -> None:
        await self._backend._unsubscribe(task_ids)

    # -- what the batchers run ------------------------------------------------------------------------------------

    async def _perform_calls(self, calls: Sequence[Callable[[], Awaitable[Any]]]) -> Sequence[Any]:
        return [await call() for call in calls]

    async def _perform_pings(self, pings: Sequence[None]) -> Sequence[float]:
        now = asyncio.get_running_loop().time
        began = now()
        try:
            await self._backend._ping()
        except BackendConnectionError as exc:
            self.health.lost(exc)
            raise
        except Exception as exc:
            self.health.failed(exc)
            raise as_error(exc) from exc.__cause__
        # This does not end the outage for `Persistence`: a server may answer a ping before it is ready to store.
        self.health.connected = True
        return [now() - began] * len(pings)

    def _write_at_once(self, write: Record | Removal, done: Callable[[bool | None], None]) -> bool:
        return isinstance(write, Record) and self._backend._store_at_once(write, partial(self._done_at_once, done))

    def _append_at_once(self, flush: Flush, done: Callable[[int | None], None]) -> bool:
        return self._backend._append_at_once(flush, partial(self._done_at_once, done))

    def _done_at_once(self, done: Callable[[T | None], None], outcome: T | BaseException | None) -> None:
        if isinstance(outcome, BaseException):
            self.persistence.not_reached(outcome)
            outcome = None
        elif outcome is not None:
            self.persistence.reached()
        done(outcome)

    async def _write_batch(self, writes: Sequence[Record | Removal]) -> Sequence[bool | BaseException]:
        """Do stores and removals. Their order does not matter: no id has both a store and a removal in one batch."""
        records = [write for write in writes if isinstance(write, Record)]
        if len(records) == len(writes):
            return await self._backend._store(records)
        removals = [write for write in writes if isinstance(write, Removal)]
        removed, stored = await asyncio.gather(
            self._remove(removals), self._backend._store(records) if records else _nothing(), return_exceptions=True
        )
        if isinstance(removed, BaseException):
            raise removed
        if isinstance(stored, BaseException):
            raise stored
        outcomes = {True: iter(stored), False: iter(removed)}
        return [next(outcomes[isinstance(write, Record)]) for write in writes]

    async def _remove(self, removals: Sequence[Removal]) -> Sequence[bool | BaseException]:
        unseen = [removal for removal in removals if removal.version is None]
        errors: dict[Removal, BaseException] = {}
        if unseen:
            versions = await self._backend._versions([removal.task_id for removal in unseen])
            for removal, version in zip(unseen, versions, strict=True):
                if isinstance(version, BaseException):
                    errors[removal] = version
                else:
                    removal.version = _NOTHING if version is None else version
        due = [removal for removal in removals if removal.version not in (None, _NOTHING)]
        if due:
            refused = await self._backend._delete(
                [removal.task_id for removal in due], [removal.version for removal in due]
            )
            errors.update(
                (removal, error) for removal, error in zip(due, refused or (), strict=False) if error is not None
            )
        return [errors.get(removal, True) for removal in removals]

    async def outcomes(self, task_ids: Sequence[str]) -> Sequence[Outcome | None]:
        return [None if finding is None else finding[0] for finding in await self._read(task_ids, patient=True)]

    async def read(self, task_ids: Sequence[str]) -> Sequence[Finding | None]:
        """Read for the hub. It tries again itself for an id that the server cannot serve now."""
        return await self._read(task_ids, patient=False)

    async def _read(self, task_ids: Sequence[str], patient: bool) -> Sequence[Finding | None]:
        """Fetch and decode. If one result cannot be decoded, an error takes its place; the others are not affected.

        Without ``patient``, the same holds for a result that the server alone cannot serve now.
        """
        if min(task_ids) < "\x01":  # a topic that is not a task begins with NUL, so it sorts before every task id
            return await self._read_topics(task_ids, patient)
        found: list[Finding | None] = []
        while len(found) < len(task_ids):
            some = task_ids[len(found) : len(found) + max(1, int(self._backend.chunk_bytes / self._value_size))]
            stored = await self.persistence.collect(self._backend._fetch, some, patient)
            seen = sum(self._backend._stored_size(value) for value in stored if value is not None) / len(stored)
            self._value_size = max(seen, self._value_size / _ESTIMATE_SINKS, 1.0)
            await self._decode_into(found, some, stored)
        return found

    async def _decode_into(self, found: list[Finding | None], task_ids: Sequence[str], stored: Sequence[Any]) -> None:
        """Decode ``stored`` into ``found``, and give the event loop a turn every few milliseconds."""
        now = asyncio.get_running_loop().time
        pause_at = now() + LONGEST_STEP
        for task_id, value in zip(task_ids, stored, strict=True):
            found.append(None if value is None else self.finding(task_id, value))
            if now() >= pause_at:
                await asyncio.sleep(0)
                pause_at = now() + LONGEST_STEP

    async def _read_topics(self, topics: Sequence[str], patient: bool) -> Sequence[Finding | None]:
        """Do the same as `_read`, for a list of topics that are not all task ids."""
        tasks = [topic for topic in topics if not topic.startswith("\x00")]
        chords = [topic for topic in topics if topic.startswith(CHORD_TOPIC)]
        found: dict[str, Finding | None] = dict(
            zip(tasks, await self._read(tasks, patient) if tasks else (), strict=True)
        )
        steps = [ChordStep(ChordOp.READ, topic.removeprefix(CHORD_TOPIC)) for topic in chords]
        states = await self.persistence.collect(self._backend._chord_steps, steps, patient) if steps else ()
        for topic, state in zip(chords, states, strict=True):
            if isinstance(state, ChordState):
                found[topic] = chord_meta(state), (state.count, state.size, state.done, state.failure, state.body_id)
            else:
                found[topic] = as_error(state), None
        # The other topics carry events and have no state. Their waiters find out themselves what happened before.
        for topic in topics:
            found.setdefault(topic, (TaskMeta(topic, "NEWS"), None))
        return [found[topic] for topic in topics]

    def finding(self, task_id: str, stored: Any) -> Finding:
        """Return the meta in ``stored``, or an error instead; and a mark, which is equal for equal stored bytes."""
        if isinstance(stored, BaseException):
            return as_error(stored), None
        try:
            meta = self._backend._decode(task_id, stored)
            if meta.status in EXCEPTION_STATES:
                # Each caller raises its own instance of the exception, which is decoded again for it.
                meta = replace(meta, _again=partial(self._backend._decode, task_id, stored))
            return meta, None if meta.ready else _mark(stored)
        except BaseException as exc:
            return unreadable(f"the result of task {task_id}", exc), None


#: Stands for the version of a result that did not exist when its removal began.
_NOTHING = object()


async def _nothing() -> Sequence[bool]:
    return ()


def _mark(stored: Any) -> int | None:
    try:
        return hash(stored)
    except TypeError:
        return None


def as_error(error: BaseException) -> Exception:
    """Return ``error`` if it is one of this library. Otherwise it is a bug: wrap it in a `BackendError`."""
    if isinstance(error, AioResultError):
        return error
    named = BackendError(f"the backend failed: {type(error).__name__}: {error}")
    named.__cause__ = error
    return named
