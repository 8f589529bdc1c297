"""Many results at once: handed over in the order in which they finish, whichever backend each lives on.

Joins, groups and `as_completed` all stand on `Completions`. It costs a waiter per backend, and a large join a task per
backend, but none per result.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Generic, Protocol, Self, TypeVar

from .exceptions import AioResultError, UsageError
from .hub import chunked
from .meta import ResultTuple, SupportsAsTuple, TaskMeta
from .seconds import Timeout, checked_timeout
from .states import IGNORED, PENDING
from .tasks import EMPTY, StandingTask
from .waiter import LAST_LOOK, Outcome, Waiter, timed_out

__all__ = ["Completions", "Leaf", "ResultStore", "look_up"]

#: So many are left to the hub, which gathers them with those of other joins.
_FEW = 100


class ResultStore(Protocol):
    """What result handles need of a backend (`aioresult.backends.base.Backend` is one)."""

    #: How many ids go into one round trip.
    fetch_chunk: int

    @property
    def store_id(self) -> Hashable:
        """Equal for objects that keep their results in the same place."""

    def check(self) -> None: ...
    def result(self, task_id: str) -> Any: ...
    def watch(self, task_id: str, waiter: Waiter, look: bool = True) -> None: ...
    def unwatch(self, task_id: str, waiter: Waiter) -> None: ...
    async def look_up(self, task_ids: Iterable[str]) -> list[Outcome]: ...
    async def get_task_meta(self, task_id: str) -> TaskMeta: ...
    async def wait_for(self, task_id: str, timeout: Timeout = None) -> TaskMeta: ...
    async def exists(self, task_id: str) -> bool: ...
    async def forget_many(self, task_ids: Iterable[str]) -> None: ...
    async def save_group(self, group_id: str, group: SupportsAsTuple | ResultTuple) -> None: ...
    async def restore_group(self, group_id: str) -> Any: ...
    async def delete_group(self, group_id: str) -> None: ...


class Leaf(Protocol):
    """A handle on one task: `aioresult.result.AsyncResult`."""

    @property
    def id(self) -> str: ...
    @property
    def store(self) -> ResultStore | None:
        """Where it is kept; ``None`` if its meta is all there ever was."""

    @property
    def outcome(self) -> Outcome | None:
        """The last news of it."""

    def learn(self, outcome: Outcome) -> None:
        """Note the news."""


L = TypeVar("L", bound=Leaf)


class _Inbox(Generic[L]):
    """The waiter at one store: sorts what arrives to the handles on that id."""

    def __init__(self, owner: Completions[L]) -> None:
        self._owner = owner
        self.pending: dict[str, list[L]] = {}

    def receive(self, task_id: str, outcome: Outcome) -> None:
        for leaf in self.pending.get(task_id, ()):
            leaf.learn(outcome)
        if isinstance(outcome, Exception) or outcome.ready:
            self._owner.finish(self.pending.pop(task_id, ()), outcome)


class Completions(Generic[L]):
    """An async iterator of what has finished since its last step, in order, as a list of ``(leaf, outcome)``.

    Every outcome is a ready meta, or why there will be none.

    Use it in ``with``, which ends the subscriptions that are left. ``timeout`` is in seconds from now: after it, the
    next step that would have to wait raises `aioresult.TimeoutError`. With 0 what is stored is looked up once. A result
    that is stored beats a deadline that has passed: after less than a second, what is missing is looked up once more.

    Of many, what is over already is found by looking, a chunk at a time, and never meets the hub.
    """

    def __init__(self, leaves: Iterable[L], timeout: Timeout = None) -> None:
        self._timeout = checked_timeout(timeout)
        self._once = self._timeout is not None and self._timeout <= 0
        self._expired = False
        self._looks: list[StandingTask] = []
        #: Why looking once has failed.
        self._error: Exception | None = None
        self._finished: list[tuple[L, Outcome]] = []
        self._inboxes: dict[ResultStore, _Inbox[L]] = {}
        self._wake: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._unfinished = 0
        for leaf in leaves:
            known, store = leaf.outcome, leaf.store
            if isinstance(known, TaskMeta) and (known.ready or known.status == IGNORED or store is None):
                self._finished.append((leaf, known))
            elif store is None:
                error = UsageError(f"{leaf!r} has no backend")
                leaf.learn(error)
                self._finished.append((leaf, error))
            else:
                self._unfinished += 1
                if (inbox := self._inboxes.get(store)) is None:
                    inbox = self._inboxes[store] = _Inbox(self)
                inbox.pending.setdefault(leaf.id, []).append(leaf)

    def __enter__(self) -> Self:
        for store in self._inboxes:
            store.check()
        if not self._inboxes:
            return self
        if self._once:
            self._begin(self._look_once)
            return self
        if self._timeout is not None:
            expire = self._expire if self._timeout >= LAST_LOOK else partial(self._begin, self._look_at_the_end)
            self._timer = asyncio.get_running_loop().call_later(self._timeout, expire, context=EMPTY)
        for store, inbox in self._inboxes.items():
            if len(inbox.pending) > _FEW:
                self._begin(partial(self._look_and_watch, store, inbox))
            else:
                self._watch(store, inbox, tuple(inbox.pending), look=True)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for look in self._looks:
            look.cancel()
        if self._timer is not None:
            self._timer.cancel()
        for store, inbox in self._inboxes.items():
            for task_id in inbox.pending:
                store.unwatch(task_id, inbox)

    def _begin(self, look: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = StandingTask(look, "aioresult-look", lambda: True)
        self._looks.append(task)
        task.start()

    async def _look_once(self) -> None:
        try:
            await self._look_all()
        except Exception as exc:
            self._error = exc
        self._expire()

    async def _look_at_the_end(self) -> None:
        with suppress(TimeoutError, AioResultError):  # then there is nothing that could beat the deadline
            async with asyncio.timeout(LAST_LOOK):
                await self._look_all()
        self._expire()

    async def _look_all(self) -> None:
        for store, inbox in self._inboxes.items():
            for task_ids in chunked(inbox.pending, store.fetch_chunk):
                await self._look_up(store, inbox, task_ids)

    async def _look_and_watch(self, store: ResultStore, inbox: _Inbox[L]) -> None:
        for task_ids in chunked(inbox.pending, store.fetch_chunk):
            # Whoever watches is told of what goes wrong if it is for good, and else waits until it has passed.
            with suppress(Exception):
                await self._look_up(store, inbox, task_ids)
            self._watch(store, inbox, [task_id for task_id in task_ids if task_id in inbox.pending], look=False)

    async def _look_up(self, store: ResultStore, inbox: _Inbox[L], task_ids: Sequence[str]) -> None:
        for task_id, outcome in zip(task_ids, await store.look_up(task_ids), strict=True):
            if isinstance(outcome, Exception) or outcome.status != PENDING:
                inbox.receive(task_id, outcome)

    def _watch(self, store: ResultStore, inbox: _Inbox[L], task_ids: Iterable[str], look: bool) -> None:
        for task_id in task_ids:
            try:
                store.watch(task_id, inbox, look)
            except AioResultError as exc:  # it was closed meanwhile, or the id is none
                inbox.receive(task_id, exc)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[tuple[L, Outcome]]:
        while not self._finished:
            if not self._unfinished:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error
            if self._expired and self._timeout is not None:
                raise timed_out(self._describe(), self._timeout)
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        finished, self._finished = self._finished, []
        return finished

    def finish(self, leaves: Iterable[L], outcome: Outcome) -> None:
        """Called by an inbox: these are over."""
        for leaf in leaves:
            self._unfinished -= 1
            self._finished.append((leaf, outcome))
        self._rouse()

    def _expire(self) -> None:
        self._expired = True
        self._rouse()

    def _rouse(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _describe(self) -> str:
        first = next(task_id for inbox in self._inboxes.values() for task_id in inbox.pending)
        others = self._unfinished - 1
        return f"task {first}" + (f", with {others:,} more," if others else "")


async def look_up(leaves: Iterable[Leaf]) -> None:
    """Have every leaf that is not known to be ready learn what is stored of it now, in one go per store.

    Raises what cannot be read, as `aioresult.backends.base.Backend.get_task_meta` does.
    """
    by_store: dict[ResultStore, list[Leaf]] = {}
    for leaf in leaves:
        known = leaf.outcome
        if leaf.store is not None and not (isinstance(known, TaskMeta) and known.ready):
            by_store.setdefault(leaf.store, []).append(leaf)
    for store, unknown in by_store.items():
        outcomes = await store.look_up([leaf.id for leaf in unknown])
        for leaf, outcome in zip(unknown, outcomes, strict=True):
            leaf.learn(outcome)
            if isinstance(outcome, Exception):
                raise outcome
