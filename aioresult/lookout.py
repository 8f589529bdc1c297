"""Waiting for a chord that Celery may finish: its script publishes nothing on the group's key.

While such a chord is waited for, it is looked at again

- at once, when the result of its body arrives, if a part of ours has said which that is;
- at once, when its members' results have arrived, if the group was saved;
- otherwise once every ``heartbeat``: one timer for all of a backend's chords, whose looks are one batch.

Each look reads a few numbers. Only if parts have come since the last one are they fetched, to find one that failed;
that takes up a tenth of the time at most, however large the header.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

from .exceptions import AioResultError, BackendConnectionError, ChordError, UsageError
from .failure import safe_repr
from .meta import TaskMeta
from .result import GroupResult
from .states import PROPAGATE_STATES
from .tasks import EMPTY, SLICE, StandingTask, fail_all
from .waiter import Outcome, SingleWaiter, Waiter

__all__ = ["ChordWaiter", "LookoutStore", "Lookouts", "part_failed", "result_id_of"]

logger: logging.Logger = logging.getLogger("aioresult")

#: After a fetch of the parts, the next one waits for so many times as long as that took.
_REST = 9


class LookoutStore(Protocol):
    """What this needs of a backend."""

    heartbeat: float
    chords_beside: bool

    def read_again(self, topic: str) -> None: ...
    def watch(self, task_id: str, waiter: Waiter, read_first: bool = True) -> None: ...
    def unwatch(self, task_id: str, waiter: Waiter) -> None: ...
    async def restore_group(self, group_id: str) -> GroupResult | None: ...


#: Finds, among the parts of a group that are not in the set, one that failed; and adds them to the set.
FindFailure = Callable[[str, set[int]], Coroutine[Any, Any, ChordError | None]]


class ChordWaiter(SingleWaiter):
    """Waits for one chord. What it is told while it waits on goes to ``saw``, too."""

    __slots__ = ("_saw", "over", "propagate")

    def __init__(
        self, what: str, timeout: float | None, propagate: bool, saw: Callable[[ChordWaiter, TaskMeta], None]
    ) -> None:
        super().__init__(what, timeout, self.satisfied)
        self.propagate: bool = propagate
        #: Whether the chord is over in a way that its own state does not show.
        self.over: bool = False
        self._saw = saw

    def satisfied(self, meta: TaskMeta) -> bool:
        """Whether there is nothing more to wait for."""
        return meta.ready or (self.propagate and meta.result.failure is not None)

    def receive(self, task_id: str, outcome: Outcome) -> None:
        super().receive(task_id, outcome)
        if not self.future.done() and isinstance(outcome, TaskMeta):
            self._saw(self, outcome)

    def end(self, meta: TaskMeta) -> None:
        """The chord is over, whatever ``meta`` says."""
        if not self.future.done():
            self.over = True
            self.future.set_result(meta)


class Lookouts:
    """The chords of one backend that are waited for, and that Celery may finish."""

    def __init__(self, store: LookoutStore, prefix: str, find_failure: FindFailure) -> None:
        self._store = store
        self._prefix = prefix
        self._find_failure = find_failure
        self._lookouts: dict[str, _Lookout] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def saw(self, group_id: str, waiter: ChordWaiter, meta: TaskMeta) -> None:
        """``waiter`` was told ``meta``, and waits on."""
        if not self._store.chords_beside:
            return
        if meta.result.ours:  # which it need not have been before
            self.leave(group_id, waiter)
            return
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # those of a loop that has ended are gone with it
            self._loop, self._lookouts, self._timer = loop, {}, None
        lookout = self._lookouts.get(group_id)
        if lookout is None:
            lookout = self._lookouts[group_id] = _Lookout(self._store, group_id, self._prefix, self._find_failure)
        lookout.saw(waiter, meta)
        if self._timer is None:
            self._set_timer(loop)

    def leave(self, group_id: str, waiter: ChordWaiter) -> None:
        """``waiter`` waits no more; harmless if it never was here."""
        lookout = self._lookouts.get(group_id)
        if lookout is not None and lookout.leave(waiter):
            del self._lookouts[group_id]
            if not self._lookouts and self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(self._store.heartbeat, self._check, context=EMPTY)

    def _check(self) -> None:
        for group_id in self._lookouts:
            self._store.read_again(self._prefix + group_id)
        self._set_timer(asyncio.get_running_loop())


class _Lookout:
    """One chord, for all of its waiters."""

    def __init__(self, store: LookoutStore, group_id: str, prefix: str, find_failure: FindFailure) -> None:
        self._store = store
        self._group_id = group_id
        self._topic = prefix + group_id
        self._find_failure = find_failure
        self._waiters: dict[ChordWaiter, None] = {}
        self._latest: TaskMeta | None = None
        self._error: ChordError | None = None
        self._body_id = ""
        #: The members of the saved group, and those of them that are not over.
        self._members: list[str] = []
        self._missing: set[str] = set()
        #: The parts that have been looked at, by their hashes, and how many there were.
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
            self._end()  # Celery has removed the parts; before 5.7 it leaves no mark
        elif self._error is not None:
            self._fail(self._error)
        elif waiter.propagate and state.count > self._seen_count:
            self._grown.set()

    def leave(self, waiter: ChordWaiter) -> bool:
        """Whether nobody is left; then this has stopped."""
        self._waiters.pop(waiter, None)
        if self._waiters:
            return False
        self._task.cancel()
        for task_id in (self._body_id, *self._members):
            if task_id:
                self._store.unwatch(task_id, self)
        return True

    def receive(self, task_id: str, outcome: Outcome) -> None:
        """News of a result that belongs to the chord."""
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
            logger.warning("chord %s names a result that cannot be: %s", self._group_id, exc)

    def _fail(self, error: ChordError) -> None:
        self._error = error
        fail_all([waiter.future for waiter in self._waiters if waiter.propagate], error)

    def _end(self) -> None:
        if self._latest is not None:
            for waiter in self._waiters:
                waiter.end(self._latest)

    async def _attend(self) -> None:
        """Watch the members, and look at the parts that Celery brings."""
        while True:
            try:
                await self._watch_members()
                while True:
                    await self._grown.wait()
                    self._grown.clear()
                    await self._look_at_parts()
            except BackendConnectionError as exc:
                logger.warning("cannot look at chord %s (%s); trying again", self._group_id, exc)
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
            if number % SLICE == 0:
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
    """The id of the result of Celery's signature ``body``, if that is what it is."""
    options = body.get("options") if isinstance(body, Mapping) else None
    task_id = options.get("task_id") if isinstance(options, Mapping) else None
    # The script gets it with everybody's steps: nothing that could not be sent.
    return task_id if isinstance(task_id, str) and task_id.isascii() else ""


def part_failed(group_id: str, task_id: str, value: Any) -> ChordError:
    """What a chord raises for a part that failed with ``value``."""
    error = ChordError(f"part {task_id} of chord {group_id} failed: {safe_repr(value)}")
    error.__cause__ = value
    return error
