"""The batcher: concurrent calls become one round trip.

Whatever is asked for while a round trip is in flight goes out together in the next one. A lone call therefore pays
one round trip and no delay, a thousand concurrent ones pay a few; nothing waits for a timer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

import anyio

from .exceptions import BackendError

__all__ = ["Batcher", "fail", "uncancelled"]

Item = TypeVar("Item")
Out = TypeVar("Out")


class Batcher(Generic[Item, Out]):
    """Gathers the items of concurrent callers, hands them to ``run`` and each outcome back to its caller.

    ``run(items)`` returns one outcome per item, in order; an outcome that is an exception is raised to that caller
    alone, and an exception out of ``run`` itself to every caller of the batch. At most ``max_items`` go into one
    batch, and at most ``parallel`` batches are in flight.

    The batch runs in a task of its own: a caller that is cancelled stops waiting, and its item leaves the queue if it
    was not sent yet, but nobody's cancellation reaches the I/O.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Awaitable[Sequence[Out | BaseException]]],
        *,
        max_items: int,
        parallel: int = 1,
    ) -> None:
        self._run = run
        self._max_items = max_items
        self._parallel = parallel
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[Item, asyncio.Future[Out]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._working = 0
        self._starting = False
        self._closed: Exception | None = None

    def submit(self, item: Item) -> asyncio.Future[Out]:
        """The outcome for ``item``, to be awaited: whatever ``run`` has for it, or the error given to `close`."""
        if self._closed is not None:
            raise self._closed
        future: asyncio.Future[Out] = self._loop.create_future()
        self._queue.append((item, future))
        self._start()
        return future

    def _start(self) -> None:
        if self._working < self._parallel and not self._starting:
            self._starting = True
            self._working += 1
            task = self._loop.create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _work(self) -> None:
        # Only now, and not in `submit`: every coroutine that was ready to run in this turn of the loop is in the batch.
        self._starting = False
        while self._queue:
            batch = self._take()
            if self._queue:
                self._start()
            if batch:
                await self._perform(batch)
        self._working -= 1  # in the step that found the queue empty: nothing can be submitted between

    def _take(self) -> list[tuple[Item, asyncio.Future[Out]]]:
        batch: list[tuple[Item, asyncio.Future[Out]]] = []
        while self._queue and len(batch) < self._max_items:
            entry = self._queue.popleft()
            if not entry[1].done():  # its caller was cancelled
                batch.append(entry)
        return batch

    async def _perform(self, batch: list[tuple[Item, asyncio.Future[Out]]]) -> None:
        outcomes: Sequence[Out | BaseException]
        try:
            outcomes = await self._run([item for item, _ in batch])
            if len(outcomes) != len(batch):  # else those beyond the last outcome would wait for ever
                raise BackendError(f"{len(outcomes)} outcomes came back for {len(batch)} items")
        except asyncio.CancelledError:
            outcomes = [self._closed or asyncio.CancelledError()] * len(batch)
        except Exception as exc:
            outcomes = [exc] * len(batch)
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            if future.done():
                continue
            if isinstance(outcome, BaseException):
                fail(future, outcome)
            else:
                future.set_result(outcome)

    async def close(self, error: Exception) -> None:
        """Refuse new items, fail the queued ones with ``error``, let what is in flight finish for a moment."""
        self._closed = error
        while self._queue:
            _, future = self._queue.popleft()
            if not future.done():
                fail(future, error)
        if tasks := list(self._tasks):
            _, late = await asyncio.wait(tasks, timeout=1.0)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)


def fail(future: asyncio.Future[Any], error: BaseException) -> None:
    """Fail a future that somebody awaits, or did until a moment ago.

    Whoever is cancelled in the very turn of the loop in which this happens never asks for the error, and asyncio would
    log it as one that nobody noticed.
    """
    future.set_exception(error)
    future.exception()


async def uncancelled(cleanup: Coroutine[Any, Any, None]) -> None:
    """See ``cleanup`` through, and only then pass a cancellation on: half-closed would be worse than late.

    The scope keeps anyio's cancellations off, which are repeated until they are obeyed; `asyncio.shield` a task's own.
    """
    cancelled: asyncio.CancelledError | None = None
    task = asyncio.ensure_future(cleanup)
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError as exc:
                cancelled = exc
    task.result()
    if cancelled is not None:
        raise cancelled
