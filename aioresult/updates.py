"""`Updates`: an async iterator over the states of a task, from the present one to the final one."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Protocol

from .exceptions import UsageError
from .following import Following
from .liveness import Liveness
from .meta import TaskMeta
from .retry import retry_outages
from .tasks import copy_of_error
from .waiter import Outcome, Waiter

__all__ = ["UpdateStore", "Updates"]


class UpdateStore(Protocol):
    """What updates need of a backend."""

    @property
    def liveness(self) -> Liveness: ...
    def check(self) -> None: ...
    def dumps_text(self, task_id: str, value: Any) -> bytes: ...
    def watch(self, task_id: str, waiter: Waiter, read_first: bool = True) -> None: ...
    def unwatch(self, task_id: str, waiter: Waiter) -> None: ...
    async def get_task_meta(self, task_id: str) -> TaskMeta: ...


class _Newest:
    """Holds the newest state for one iterator. It does not keep the iterator from being garbage-collected."""

    def __init__(self) -> None:
        self.news: Outcome | None = None
        self._closed = False
        self._woken: asyncio.Future[None] | None = None

    def receive(self, task_id: str, outcome: Outcome) -> None:
        """Take news of the task from the hub (`aioresult.waiter.Waiter`). Older news that was not fetched is lost."""
        self.news = outcome
        self._wake()

    def close(self) -> None:
        """End the iteration, also for a reader that waits now."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    def lost(self, error: Exception) -> None:
        """Take ``error``, which says that the worker of the task has died. A final state that has arrived is kept."""
        if not isinstance(self.news, TaskMeta) or not self.news.ready:
            self.receive("", error)

    async def next(self) -> Outcome | None:
        """Wait for news, and return the newest. Returns ``None`` if the iterator is closed meanwhile."""
        while self.news is None and not self._closed:
            self._woken = asyncio.get_running_loop().create_future()
            try:
                await self._woken
            finally:
                self._woken = None
        news, self.news = self.news, None
        return news


class Updates(Following[TaskMeta]):
    """Iterates over the states of a task: ``async for meta in result.updates()``.

    The first item is the present state. Then each change follows, and the final state is the last item.

    A slow reader gets the newest state and misses the states in between. Before the first step there is no I/O and no
    subscription. With ``async with result.updates() as updates`` the subscription ends with the block.
    """

    def __init__(self, store: UpdateStore, task_id: str, on_lost: str) -> None:
        if on_lost not in ("raise", "wait"):
            raise UsageError(f"on_lost must be 'raise' or 'wait', not {on_lost!r}")
        super().__init__()
        self._store = store
        self._task_id = task_id
        self._on_lost = on_lost == "raise"
        self._newest = _Newest()
        self._last: TaskMeta | None = None

    async def __anext__(self) -> TaskMeta:
        if self._closed:
            raise StopAsyncIteration
        self._begin()
        try:
            meta = await (self._present() if self._last is None else self._change())
        finally:
            self._busy = False
        if meta is None:
            raise StopAsyncIteration
        self._last = meta
        if meta.ready:
            self._close()
        return meta

    async def _present(self) -> TaskMeta:
        """Return the state that is stored now."""
        self._store.check()
        return await retry_outages(partial(self._store.get_task_meta, self._task_id))

    async def _change(self) -> TaskMeta | None:
        """Wait for the next state. Returns ``None`` if another asyncio task closes this iterator meanwhile."""
        self._store.check()
        if self._leave is None:
            self._hold(partial(_leave, self._store, self._task_id, self._newest))
            self._store.watch(self._task_id, self._newest, read_first=False)
            if self._on_lost:
                self._store.liveness.watch(self._task_id, self._newest.lost)
        while True:
            news = await self._newest.next()
            if news is None:
                return None
            if isinstance(news, Exception):
                self._close()
                raise copy_of_error(news)
            if self._last is None or news.ready or _likeness(news) != _likeness(self._last):
                return news.with_new_exception()

    def resumed(self, on_lost: str) -> Updates:
        """Make a new iterator over the states of the same task. For ``on_lost`` see `aioresult.AsyncResult.updates`."""
        return Updates(self._store, self._task_id, on_lost)

    def dumps(self, value: Any) -> bytes:
        """Encode ``value`` as JSON for a browser, as `aioresult.OutputStream.dumps` does."""
        return self._store.dumps_text(self._task_id, value)

    def _wake(self) -> None:
        self._newest.close()

    def __repr__(self) -> str:
        return f"<Updates of {self._task_id}>"


def _leave(store: UpdateStore, task_id: str, newest: _Newest) -> None:
    store.unwatch(task_id, newest)
    store.liveness.unwatch(task_id, newest.lost)


def _likeness(meta: TaskMeta) -> tuple[Any, ...]:
    """Return a key that is equal for two reads of one stored state. It uses `repr`: exceptions never compare equal."""
    result = repr(meta.result) if isinstance(meta.result, BaseException) else meta.result
    return meta.status, result, meta.traceback, meta.extra
