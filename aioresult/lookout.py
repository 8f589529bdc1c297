"""Waits for chords that Celery may finish. Celery publishes nothing on the group's key: no message ends the wait.

The header of a chord is its group of tasks, the body is its callback, and a part is the result of one header task.
While a waiter waits for such a chord, the backend reads the state of the chord again

- at once when the result of the body arrives, if a part that this library stored has named the body's id;
- at once when the results of all members have arrived, if the group was saved;
- otherwise every ``heartbeat`` seconds. One timer serves all chords of a backend, and one batch reads them.

Each read returns a few numbers. If the number of parts has grown since the last read, the backend fetches the new
parts, to find a part that failed. After each fetch it pauses for nine times as long as the fetch took. So fetching
takes at most a tenth of the time, however large the header is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, Protocol

from .exceptions import AioResultError, BackendConnectionError, ChordError, UsageError
from .failure import safe_repr
from .meta import TaskMeta
from .result import GroupResult
from .states import PROPAGATE_STATES
from .tasks import CALLBACKS_PER_TURN, EMPTY, StandingTask, fail_all
from .waiter import Outcome, SingleWaiter, Waiter

__all__ = ["ChordWaiter", "LookoutStore", "Lookouts", "part_failed", "result_id_of"]

logger: logging.Logger = logging.getLogger("aioresult")

#: The pause after a fetch of a chord's parts, as a multiple of the time that the fetch took.
_REST = 9


class LookoutStore(Protocol):
    """What this module needs of a backend."""

    heartbeat: float
    chords_beside: bool

    def read_again(self, topic: str) -> None: ...
    def watch(self, task_id: str, waiter: Waiter, read_first: bool = True) -> None: ...
    def unwatch(self, task_id: str, waiter: Waiter) -> None: ...
    async def restore_group(self, group_id: str) -> GroupResult | None: ...


#: A function that looks for a failed part of a group. It skips each part whose hash is in the set, and adds the
#: hashes of the parts that it has read.
FindFailure = Callable[[str, set[int]], Coroutine[Any, Any, ChordError | None]]


class ChordWaiter(SingleWaiter):
    """Waits for one chord. Calls ``saw(waiter, meta)`` with each state of the chord that does not end the wait."""

    __slots__ = ("_saw", "over", "propagate")

    def __init__(
        self, what: str, timeout: float | None, propagate: bool, saw: Callable[[ChordWaiter, TaskMeta], None]
    ) -> None:
        super().__init__(what, timeout, self.satisfied)
        self.propagate: bool = propagate
        #: True if the chord is over although its own state does not show it.
        self.over: bool = False
        self._saw = saw

    def satisfied(self, meta: TaskMeta) -> bool:
        """True if ``meta`` ends the wait: the chord is over, or a part has failed and this waiter is to raise that."""
        return meta.ready or (self.propagate and meta.result.failure is not None)

    def receive(self, task_id: str, outcome: Outcome) -> None:
        super().receive(task_id, outcome)
        if not self.future.done() and isinstance(outcome, TaskMeta):
            self._saw(self, outcome)

    def end(self, meta: TaskMeta) -> None:
        """End the wait with ``meta``. The chord is over, even if ``meta`` does not show it."""
        if not self.future.done():
            self.over = True
            self.future.set_result(meta)


class Lookouts:
    """Looks after the chords of one backend that have waiters and that Celery may finish: one `_Lookout` for each."""

    def __init__(self, store: LookoutStore, prefix: str, find_failure: FindFailure) -> None:
        self._store = store
        self._prefix = prefix
        self._find_failure = find_failure
        self._lookouts: dict[str, _Lookout] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def saw(self, group_id: str, waiter: ChordWaiter, meta: TaskMeta) -> None:
        """Note that ``waiter`` has received ``meta``, a state of the chord that does not end the wait."""
        if not self._store.chords_beside:
            return
        if meta.result.ours:  # this library has created the chord by now, so a message will end the wait
            self.leave(group_id, waiter)
            return
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # the old event loop has ended, and its waiters with it
            self._loop, self._lookouts, self._timer = loop, {}, None
        lookout = self._lookouts.get(group_id)
        if lookout is None:
            lookout = self._lookouts[group_id] = _Lookout(self._store, group_id, self._prefix, self._find_failure)
        lookout.saw(waiter, meta)
        if self._timer is None:
            self._set_timer(loop)

    def leave(self, group_id: str, waiter: ChordWaiter) -> None:
        """Note that ``waiter`` no longer waits. Does nothing if this object does not know the waiter."""
        lookout = self._lookouts.get(group_id)
        if lookout is not None and lookout.leave(waiter):
            del self._lookouts[group_id]
            if not self._lookouts and self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(self._store.heartbeat, self._check, context=EMPTY.context)

    def _check(self) -> None:
        for group_id in self._lookouts:
            self._store.read_again(self._prefix + group_id)
        self._set_timer(asyncio.get_running_loop())


class _Lookout:
    """Looks after one chord, on behalf of all waiters of the chord."""

    #: The callback stores nothing before all parts have arrived. So `aioresult.unheard` must not warn about its id.
    expects_nothing: Final = True

    def __init__(self, store: LookoutStore, group_id: str, prefix: str, find_failure: FindFailure) -> None:
        self._store = store
        self._group_id = group_id
        self._topic = prefix + group_id
        self._find_failure = find_failure
        self._waiters: dict[ChordWaiter, None] = {}
        self._latest: TaskMeta | None = None
        self._error: ChordError | None = None
        self._body_id = ""
        #: The ids of the saved group's members; and the ids of those members that are not over yet.
        self._members: list[str] = []
        self._missing: set[str] = set()
        #: The hashes of the parts that were read, and the number of parts at the last fetch.
        self._seen: set[int] = set()
        self._seen_count = 0
        self._grown = asyncio.Event()
        self._task = StandingTask(self._attend, "aioresult-chord-lookout", lambda: bool(self._waiters))
        self._task.start()

    def saw(self, waiter: ChordWaiter, meta: TaskMeta) -> None:
        state, before = meta.result, self._latest
        self._waiters[waiter] = None
        self._latest = meta
        if state.body_id and not self._body_id:
            self._body_id = state.body_id
            self._watch(state.body_id)
        if before is not None and before.result.count and not state.count and state.size is None:
            self._end()  # Celery has removed the parts of the finished chord; Celery before 5.7 leaves no trace
        elif self._error is not None:
            self._fail(self._error)
        elif waiter.propagate and state.count > self._seen_count:
            self._grown.set()

    def leave(self, waiter: ChordWaiter) -> bool:
        """Remove a waiter. Returns true if that was the last waiter; then this lookout has stopped."""
        self._waiters.pop(waiter, None)
        if self._waiters:
            return False
        self._task.cancel()
        for task_id in (self._body_id, *self._members):
            if task_id:
                self._store.unwatch(task_id, self)
        return True

    def receive(self, task_id: str, outcome: Outcome) -> None:
        """Take news of a result that belongs to the chord: the result of the body, or of a header task."""
        if isinstance(outcome, TaskMeta) and not outcome.ready:
            return
        if task_id == self._body_id:
            self._store.read_again(self._topic)
        if task_id in self._missing and isinstance(outcome, TaskMeta):
            self._missing.discard(task_id)
            if outcome.status in PROPAGATE_STATES:
                self._fail(part_failed(self._group_id, task_id, outcome.with_new_exception().result))
            if not self._missing:
                self._end()

    def _watch(self, task_id: str) -> None:
        try:
            self._store.watch(task_id, self)
        except UsageError as exc:
            logger.warning("chord %s names a task id that is not valid: %s", self._group_id, exc)

    def _fail(self, error: ChordError) -> None:
        self._error = error
        fail_all([waiter.future for waiter in self._waiters if waiter.propagate], error)

    def _end(self) -> None:
        if self._latest is not None:
            for waiter in self._waiters:
                waiter.end(self._latest)

    async def _attend(self) -> None:
        """Wait for the members of the group, and read the parts that Celery adds. Runs as an asyncio task."""
        while True:
            try:
                await self._watch_members()
                while True:
                    await self._grown.wait()
                    self._grown.clear()
                    await self._look_at_parts()
            except BackendConnectionError as exc:
                logger.warning("cannot read chord %s (%s); trying again", self._group_id, exc)
                self._grown.set()
                await asyncio.sleep(self._store.heartbeat)
            except AioResultError as exc:
                fail_all([waiter.future for waiter in self._waiters], exc)
                return

    async def _watch_members(self) -> None:
        if self._members or (group := await self._store.restore_group(self._group_id)) is None:
            return
        self._members = list({str(leaf.id): None for leaf in group.leaves()})
        self._missing = set(self._members)
        for number, task_id in enumerate(self._members, 1):
            self._watch(task_id)
            if number % CALLBACKS_PER_TURN == 0:
                await asyncio.sleep(0)

    async def _look_at_parts(self) -> None:
        now = asyncio.get_running_loop().time
        began = now()
        count = self._latest.result.count if self._latest is not None else 0
        error = await self._find_failure(self._group_id, self._seen)
        self._seen_count = max(self._seen_count, count)
        if error is not None:
            self._fail(error)
        await asyncio.sleep(_REST * (now() - began))


def result_id_of(body: Any) -> str:
    """Return the task id in ``body`` if ``body`` is a signature of Celery's; otherwise an empty string."""
    options = body.get("options") if isinstance(body, Mapping) else None
    task_id = options.get("task_id") if isinstance(options, Mapping) else None
    # The id is sent to the server in one batch with other steps. An id that cannot be encoded would fail them all.
    return task_id if isinstance(task_id, str) and task_id.isascii() else ""


def part_failed(group_id: str, task_id: str, value: Any) -> ChordError:
    """Make the error that a chord raises if its header task ``task_id`` failed with ``value``."""
    error = ChordError(f"part {task_id} of chord {group_id} failed: {safe_repr(value)}")
    error.__cause__ = value
    return error
