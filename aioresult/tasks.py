"""The asyncio tasks that the library starts for itself.

They keep no context variables of their callers. If code outside the library cancels such a task, the library starts it
again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator
from contextlib import suppress
from contextvars import Context
from itertools import islice
from typing import Any, Generic, TypeVar

import anyio

from .exceptions import AioResultError

__all__ = [
    "CALLBACKS_PER_TURN",
    "EMPTY",
    "LONGEST_STEP",
    "RESTART_AFTER",
    "SingleFlight",
    "StandingTask",
    "all_of",
    "call_from_finalizer",
    "cancel_all",
    "cancellable",
    "chunked",
    "copy_of_error",
    "fail",
    "fail_all",
    "run_to_completion",
    "spawn",
]

logger: logging.Logger = logging.getLogger("aioresult")

T = TypeVar("T")


class _Empty(threading.local):
    """Holds an empty context for each thread: two threads cannot use the same context at the same time."""

    def __init__(self) -> None:
        self.context: Context = Context()


#: ``EMPTY.context`` is for timers and callbacks of the loop that runs in this thread. A callback keeps its context
#: alive for as long as it may still be called, and a cancelled timer keeps it until the timer would have been due. So
#: it must not be the context of a caller.
EMPTY = _Empty()
#: Seconds after which the library restarts an asyncio task of its own that code outside the library has cancelled.
RESTART_AFTER = 0.01
#: After so many seconds of decoding or delivering without an await, the event loop gets a turn.
LONGEST_STEP = 0.005
#: How many callbacks are scheduled before the event loop gets a turn.
CALLBACKS_PER_TURN = 500


def spawn(work: Coroutine[Any, Any, T], name: str | None = None) -> asyncio.Task[T]:
    """Start ``work`` as an asyncio task in an empty context.

    The task may serve many callers, so it must not keep the context variables of its first caller alive.
    """
    return asyncio.get_running_loop().create_task(work, name=name, context=Context())


async def cancellable(work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, which may swallow a cancellation: it is cancelled until it ends."""
    task = spawn(work)
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        while not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task], timeout=RESTART_AFTER)
        _retrieved(task)
        raise
    return task.result()


async def all_of(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all coroutines, each to its end, and return their results. Raises the first error."""
    several = list(calls)
    if len(several) == 1:
        return [await several[0]]
    outcomes = await asyncio.gather(*several, return_exceptions=True)
    found: list[T] = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        found.append(outcome)
    return found


async def cancel_all(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel these asyncio tasks, and wait for their ends."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


class StandingTask:
    """Runs ``work()`` until it returns or `stop` is called.

    Shutdown handlers often cancel every task of the loop. If the task is cancelled in that way, or fails, it starts
    again: after `RESTART_AFTER` seconds if ``wanted()`` is true by then, otherwise with the next call of `start`.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]], name: str, wanted: Callable[[], bool]) -> None:
        self._work = work
        self._name = name
        self._wanted = wanted
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def start(self) -> None:
        """Start the asyncio task unless it runs already. Needs a running event loop."""
        if self._task is None and not self._stopped:
            self._task = spawn(self._work(), self._name)
            self._task.add_done_callback(self._ended, context=EMPTY.context)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            if (error := task.exception()) is None:
                self._stopped = True
            else:
                logger.error("the task %s failed and will be restarted", task.get_name(), exc_info=error)
        self._task = None
        if not self._stopped:
            # `asyncio.run` cancels all tasks when it ends. Then this timer never fires.
            asyncio.get_running_loop().call_later(RESTART_AFTER, self._start_if_wanted, context=EMPTY.context)

    def _start_if_wanted(self) -> None:
        if self._wanted():
            self.start()

    def cancel(self) -> None:
        """Cancel the asyncio task, without waiting for its end. It does not start again."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()

    async def stop(self) -> None:
        """Cancel the asyncio task, and wait for its end."""
        self.cancel()
        await self.finish()

    async def finish(self) -> None:
        """Wait until the asyncio task ends by itself. It does not start again."""
        self._stopped = True
        if self._task is not None:
            await asyncio.wait([self._task])


class SingleFlight(Generic[T]):
    """Runs one ``attempt()`` at a time. Every caller that arrives during an attempt shares its result or its exception.

    Cancelling a caller ends only the waiting of that caller; the attempt goes on.
    """

    def __init__(self, attempt: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._attempt = attempt
        self._task: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        while True:
            if self._task is None or self._task.done():
                self._task = spawn(self._attempt())
                self._task.add_done_callback(_retrieved, context=EMPTY.context)
            task = self._task
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                me = asyncio.current_task()
                if not task.cancelled() or (me is not None and me.cancelling()):
                    raise
                continue  # the attempt was cancelled, and this caller was not: try again
            except AioResultError as exc:
                error = copy_of_error(exc)
            raise error

    @property
    def running(self) -> bool:
        """True if an attempt is under way."""
        return self._task is not None and not self._task.done()

    def restart(self) -> None:
        """Cancel the attempt, if one is under way. Its callers begin another one.

        An attempt that calls this itself goes on.
        """
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    async def stop(self) -> None:
        """Cancel the attempt, if one is under way, and wait for its end."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])


def _retrieved(task: asyncio.Task[Any]) -> None:
    """Mark the error of an attempt as seen: asyncio would log it if every caller had gone before the attempt failed."""
    if not task.cancelled():
        task.exception()


def copy_of_error(error: T) -> T:
    """Return a copy of ``error`` for one more caller.

    If two callers raised the same instance, each would see the other's frames in the traceback.
    """
    if not isinstance(error, AioResultError):
        return error
    try:
        other = type(error)(*error.args)
    except Exception:  # a subclass from outside the library, whose constructor takes other arguments
        return error
    other.__dict__.update(error.__dict__)
    if isinstance(notes := other.__dict__.get("__notes__"), list):
        other.__notes__ = notes.copy()  # a note that one caller adds must not reach the others
    other.__cause__ = error.__cause__
    other.__suppress_context__ = error.__suppress_context__
    return other


def fail(future: asyncio.Future[Any], error: BaseException) -> None:
    """Set ``error`` on a future that a caller awaits, and mark the error as seen.

    A caller that is cancelled in the same turn of the event loop never retrieves the error. Without the mark, asyncio
    would log "exception was never retrieved".
    """
    future.set_exception(error)
    future.exception()


def fail_all(futures: Iterable[asyncio.Future[Any]], error: BaseException) -> None:
    """Fail each future that is not done with its own copy of ``error``."""
    for future in futures:
        if not future.done():
            fail(future, copy_of_error(error))


def call_from_finalizer(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: Any) -> None:
    """Have ``loop`` call ``callback`` soon, from a ``__del__``.

    The garbage collector may call ``__del__`` in any thread, and after the loop has ended.
    """
    with suppress(RuntimeError):  # the loop is closed, so there is nothing left to clean up
        loop.call_soon_threadsafe(callback, *args, context=Context())  # an empty context, and not this thread's


def chunked(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Yield ``items`` in tuples of at most ``size``. They are copied first, so that ``items`` may change meanwhile."""
    source = iter(tuple(items))
    while chunk := tuple(islice(source, size)):
        yield chunk


async def run_to_completion(cleanup: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run ``cleanup()`` to its end, and only then raise a cancellation of the caller.

    A late cancellation is better than a half-closed object. The anyio scope keeps out anyio's cancellations, which are
    repeated until the task ends; `asyncio.shield` keeps out asyncio's own. If code outside the library cancels the task
    of the clean-up itself, the clean-up begins again, so it must be idempotent.
    """
    cancelled: asyncio.CancelledError | None = None
    task = spawn(cleanup())
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError as exc:
                me = asyncio.current_task()
                if not task.cancelled() or (me is not None and me.cancelling()):
                    cancelled = exc
                if task.cancelled():
                    task = spawn(cleanup())
    task.result()
    if cancelled is not None:
        raise cancelled
