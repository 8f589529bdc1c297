"""Tasks of the library's own: they keep nothing of their callers, and no stranger's cancellation ends them for good."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from contextvars import Context
from typing import Any, Generic, TypeVar

import anyio

from .exceptions import AioResultError

__all__ = [
    "EMPTY",
    "RESTART_AFTER",
    "SLICE",
    "TURN",
    "SingleFlight",
    "StandingTask",
    "call_from_finalizer",
    "fail",
    "fail_all",
    "spawn",
    "twin",
    "uncancelled",
]

logger: logging.Logger = logging.getLogger("aioresult")

T = TypeVar("T")

#: The context of timers and callbacks: each keeps the one it was made in for as long as it may still be called, and a
#: timer that was cancelled does so until it would have been due.
EMPTY = Context()
#: Seconds after which a task of ours that a stranger has cancelled is started again.
RESTART_AFTER = 0.01
#: After so many seconds of work in one step, decoding or delivering, the event loop has a turn.
TURN = 0.005
#: How many callbacks are scheduled before the event loop gets a turn.
SLICE = 500


def spawn(work: Coroutine[Any, Any, T], name: str | None = None) -> asyncio.Task[T]:
    """A task in an empty context: it serves everybody, and must not keep alive what its first caller had in there."""
    return asyncio.get_running_loop().create_task(work, name=name, context=Context())


class StandingTask:
    """Runs ``work()`` until it returns or `stop` is called.

    Shutdown handlers often cancel every task of the loop. If that happens to this one, or if it fails, it is started
    again as soon as ``wanted()`` says that somebody depends on it: after a moment, or by the next `start`.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]], name: str, wanted: Callable[[], bool]) -> None:
        self._work = work
        self._name = name
        self._wanted = wanted
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def start(self) -> None:
        """Start the task unless it runs. Needs a running event loop."""
        if self._task is None and not self._stopped:
            self._task = spawn(self._work(), self._name)
            self._task.add_done_callback(self._ended, context=EMPTY)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            if (error := task.exception()) is None:
                self._stopped = True
            else:
                logger.error("the task %s failed, and is started again", task.get_name(), exc_info=error)
        self._task = None
        if not self._stopped:
            # At the end of `asyncio.run` everything is cancelled in one sweep, and this timer never fires.
            asyncio.get_running_loop().call_later(RESTART_AFTER, self._start_if_wanted, context=EMPTY)

    def _start_if_wanted(self) -> None:
        if self._wanted():
            self.start()

    def cancel(self) -> None:
        """End the task as soon as it can be."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()

    async def stop(self) -> None:
        """End the task, and return once it has ended."""
        self.cancel()
        await self.finish()

    async def finish(self) -> None:
        """Return once the task has ended by itself; it is not started again."""
        self._stopped = True
        if self._task is not None:
            await asyncio.wait([self._task])


class SingleFlight(Generic[T]):
    """One ``attempt()`` at a time: every caller that comes while it is under way gets its outcome, also a failure.

    A caller's cancellation ends that caller's waiting, and not the attempt.
    """

    def __init__(self, attempt: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._attempt = attempt
        self._task: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        while True:
            if self._task is None or self._task.done():
                self._task = spawn(self._attempt())
                self._task.add_done_callback(_retrieved, context=EMPTY)
            task = self._task
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                me = asyncio.current_task()
                if not task.cancelled() or (me is not None and me.cancelling()):
                    raise
                # Somebody cancelled the attempt, and not this caller: try again.
            except AioResultError as exc:
                error = twin(exc)
            raise error

    async def stop(self) -> None:
        """End the attempt that is under way."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])


def _retrieved(task: asyncio.Task[Any]) -> None:
    """Every caller may have gone before the attempt failed: then its error is nobody's news."""
    if not task.cancelled():
        task.exception()


def twin(error: T) -> T:
    """An error like ``error``, for one more caller: raised twice, one instance would show each the other's frames."""
    if not isinstance(error, AioResultError):
        return error
    try:
        other = type(error)(*error.args)
    except Exception:  # a class of somebody's own, with a constructor of its own
        return error
    other.__dict__.update(error.__dict__)
    other.__cause__ = error.__cause__
    other.__suppress_context__ = error.__suppress_context__
    return other


def fail(future: asyncio.Future[Any], error: BaseException) -> None:
    """Fail a future that somebody awaits, or did until a moment ago.

    A caller that is cancelled in the very turn of the loop in which this happens never asks for the error, and asyncio
    would log it as one that nobody noticed.
    """
    future.set_exception(error)
    future.exception()


def fail_all(futures: Iterable[asyncio.Future[Any]], error: BaseException) -> None:
    """Fail those that are not done, each with an error of its own."""
    for future in futures:
        if not future.done():
            fail(future, twin(error))


def call_from_finalizer(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: Any) -> None:
    """Call ``callback`` soon. A ``__del__`` runs in whatever thread collects, and perhaps after the loop has ended."""
    with suppress(RuntimeError):  # the loop was closed, and everything in it has ended
        loop.call_soon_threadsafe(callback, *args, context=EMPTY)


async def uncancelled(cleanup: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """See ``cleanup()`` through, and only then pass a cancellation on: half-closed would be worse than late.

    The scope keeps anyio's cancellations off, which are repeated until they are obeyed; `asyncio.shield` a task's own.
    If a stranger cancels the task of the clean-up itself, that begins again: it must bear being done twice.
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
