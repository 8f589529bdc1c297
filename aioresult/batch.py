"""The batcher: concurrent calls become one round trip.

Whatever is asked for in one turn of the event loop, or while as many round trips as may be are in flight, goes out
together in the next one. A lone call therefore pays one round trip and no delay, a thousand concurrent ones pay a few;
nothing waits for a timer. Who comes alone again and again is not even kept for that turn, if there is a way to send
at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from functools import partial
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

    ``at_once(item, done)`` is tried for an item that comes while nothing is under way, if the last batch was of one. It
    sends the item in this very call and returns true, or does nothing and returns false. Once, and not before it has
    returned, it calls ``done`` with the outcome, or with ``None`` after any trouble: then ``run`` gets the item. What
    comes meanwhile is kept until then, so that trouble cannot put one item behind another.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Awaitable[Sequence[Out | BaseException]]],
        *,
        max_items: int,
        parallel: int = 1,
        at_once: Callable[[Item, Callable[[Out | None], None]], bool] | None = None,
    ) -> None:
        self._run = run
        self._at_once = at_once
        self._max_items = max_items
        self._parallel = parallel
        self._loop = asyncio.get_running_loop()
        self._items: deque[Item] = deque()
        self._futures: deque[asyncio.Future[Out]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        #: For the outcome of what was sent at once and has not been answered.
        self._lone: asyncio.Future[Out] | None = None
        #: Whether the last batch was of more than one: so, most likely, is the next.
        self._expect_company = True
        self._working = 0
        #: Whether a task was made that has not begun: it will take what is submitted until then.
        self._starting = False
        self._closed: Exception | None = None

    def submit(self, item: Item) -> asyncio.Future[Out]:
        """The outcome for ``item``, to be awaited: whatever ``run`` has for it, or the error given to `close`."""
        if self._closed is not None:
            raise self._closed
        future: asyncio.Future[Out] = self._loop.create_future()
        if not self._send_at_once(item, future):
            self._items.append(item)
            self._futures.append(future)
            self._start()
        return future

    def _send_at_once(self, item: Item, future: asyncio.Future[Out]) -> bool:
        if self._expect_company or self._working or self._lone is not None or self._at_once is None:
            return False
        if not self._at_once(item, partial(self._done_at_once, item, future)):
            return False
        self._lone = future
        return True

    def _done_at_once(self, item: Item, future: asyncio.Future[Out], outcome: Out | None) -> None:
        self._lone = None
        if not future.done():
            if outcome is not None:
                future.set_result(outcome)
            elif self._closed is not None:
                fail(future, self._closed)
            else:
                self._items.appendleft(item)
                self._futures.appendleft(future)
        if self._items:
            self._start()

    def _start(self) -> None:
        if self._working < self._parallel and not self._starting and self._lone is None:
            self._starting = True
            self._working += 1
            task = self._loop.create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():  # before its first step, for it sees every later cancellation itself
            self._starting = False
            self._working -= 1
            if self._items:
                self._start()

    async def _work(self) -> None:
        # Only now, and not in `submit`: every coroutine that was ready to run in this turn of the loop is in the batch.
        self._starting = False
        while self._items:
            items, futures = self._take()
            if self._items:
                self._start()
            if items:
                await self._perform(items, futures)
        self._working -= 1  # in the step that found the queue empty: nothing can be submitted between

    def _take(self) -> tuple[Sequence[Item], Sequence[asyncio.Future[Out]]]:
        count = min(self._max_items, len(self._items))
        self._expect_company = count > 1
        items = [self._items.popleft() for _ in range(count)]
        futures = [self._futures.popleft() for _ in range(count)]
        if any(map(asyncio.Future.done, futures)):  # a caller was cancelled
            items = [item for item, future in zip(items, futures, strict=True) if not future.done()]
            futures = [future for future in futures if not future.done()]
        return items, futures

    async def _perform(self, items: Sequence[Item], futures: Sequence[asyncio.Future[Out]]) -> None:
        outcomes: Sequence[Out | BaseException]
        try:
            outcomes = await self._run(items)
            if len(outcomes) != len(items):  # else those beyond the last outcome would wait for ever
                raise BackendError(f"{len(outcomes)} outcomes came back for {len(items)} items")
        except asyncio.CancelledError as exc:  # by `close`, or at the end of `asyncio.run`: those in the queue are next
            _fail_all(futures, self._closed or exc)
        except Exception as exc:
            _fail_all(futures, exc)
        else:
            for future, outcome in zip(futures, outcomes, strict=True):
                if future.done():
                    continue
                if isinstance(outcome, BaseException):
                    fail(future, outcome)
                else:
                    future.set_result(outcome)

    async def close(self, error: Exception) -> None:
        """Refuse new items, fail the queued ones with ``error``, let what is in flight finish for a moment."""
        self._closed = error
        _fail_all(self._futures, error)
        self._items.clear()
        self._futures.clear()
        under_way: list[asyncio.Future[Any]] = [*self._tasks]
        if self._lone is not None:
            under_way.append(self._lone)
        if under_way:
            _, late = await asyncio.wait(under_way, timeout=1.0)
            if self._lone is not None:
                _fail_all([self._lone], error)
            for task in self._tasks:
                task.cancel()
            if late:
                await asyncio.wait(late)


def _fail_all(futures: Iterable[asyncio.Future[Any]], error: BaseException) -> None:
    for future in futures:
        if not future.done():
            fail(future, error)


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
