"""Many results at once: handed over in the order in which they finish, whichever backend each lives on.

Joins, groups and `as_completed` all stand on `Completions`. It costs one waiter per backend, not a task per result.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Any, Generic, Protocol, Self, TypeVar

from .exceptions import UsageError
from .hub import Outcome, Waiter, timed_out
from .meta import ResultTuple, SupportsAsTuple, TaskMeta
from .states import IGNORED

__all__ = ["Completions", "Leaf", "ResultStore", "look_up"]


class ResultStore(Protocol):
    """What result handles need of a backend (`aioresult.backends.base.Backend` is one)."""

    def result(self, task_id: str) -> Any: ...
    def watch(self, task_id: str, waiter: Waiter) -> None: ...
    def unwatch(self, task_id: str, waiter: Waiter) -> None: ...
    async def look_up(self, task_ids: Iterable[str]) -> list[Outcome]: ...
    async def get_task_meta(self, task_id: str) -> TaskMeta: ...
    async def wait_for(self, task_id: str, timeout: float | None = None) -> TaskMeta: ...
    async def exists(self, task_id: str) -> bool: ...
    async def forget(self, task_id: str) -> None: ...
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
    """An async iterator of ``(leaf, outcome)``; every outcome is a ready meta, or why there will be none.

    Use it in ``with``, which ends the subscriptions that are left. ``timeout`` is in seconds from now: after it, the
    next step that would have to wait raises `aioresult.TimeoutError`. With 0 what is stored is looked up once.
    """

    def __init__(self, leaves: Iterable[L], timeout: float | None = None) -> None:
        self._timeout = timeout
        self._expired = False
        self._finished: deque[tuple[L, Outcome]] = deque()
        self._inboxes: dict[ResultStore, _Inbox[L]] = {}
        self._wake: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._unfinished = 0
        for leaf in leaves:
            known = leaf.outcome
            if isinstance(known, TaskMeta) and (known.ready or known.status == IGNORED or leaf.store is None):
                self._finished.append((leaf, known))
            elif leaf.store is None:
                error = UsageError(f"{leaf!r} has no backend")
                leaf.learn(error)
                self._finished.append((leaf, error))
            else:
                self._unfinished += 1
                inbox = self._inboxes.setdefault(leaf.store, _Inbox(self))
                inbox.pending.setdefault(leaf.id, []).append(leaf)

    def __enter__(self) -> Self:
        if self._timeout is not None and self._timeout <= 0:
            return self
        if self._timeout is not None:
            self._timer = asyncio.get_running_loop().call_later(self._timeout, self._expire)
        try:
            for store, inbox in self._inboxes.items():
                for task_id in inbox.pending:
                    store.watch(task_id, inbox)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for store, inbox in self._inboxes.items():
            for task_id in inbox.pending:
                store.unwatch(task_id, inbox)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[L, Outcome]:
        if self._timeout is not None and self._timeout <= 0 and not self._expired:
            await self._look_once()
        while not self._finished:
            if not self._unfinished:
                raise StopAsyncIteration
            if self._expired and self._timeout is not None:
                raise timed_out(self._describe(), self._timeout)
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        return self._finished.popleft()

    async def _look_once(self) -> None:
        self._expired = True
        for store, inbox in self._inboxes.items():
            ids = list(inbox.pending)
            for task_id, outcome in zip(ids, await store.look_up(ids), strict=True):
                inbox.receive(task_id, outcome)

    def finish(self, leaves: Iterable[L], outcome: Outcome) -> None:
        """Called by an inbox: these are over."""
        for leaf in leaves:
            self._unfinished -= 1
            self._finished.append((leaf, outcome))
        self._rouse()

    @property
    def at_hand(self) -> bool:
        """Whether the next step has an outcome without waiting."""
        return bool(self._finished)

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
