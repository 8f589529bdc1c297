"""The protocol of waiters, and the waiter for a single result."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from operator import attrgetter
from typing import Protocol, TypeAlias

from .exceptions import TimeoutError
from .meta import TaskMeta
from .seconds import Limit
from .tasks import EMPTY, fail

__all__ = ["FINAL_READ", "Outcome", "SingleWaiter", "Waiter", "timed_out"]

#: If a timeout is shorter than so many seconds, it may end before the store was read at all. So the store is read one
#: more time at its end. That read may take so many seconds.
FINAL_READ = 1.0

#: What a waiter receives: a meta (a stored state of the task), or the error that ends the wait without one.
Outcome: TypeAlias = TaskMeta | Exception


class Waiter(Protocol):
    """Receives news of a task from the hub.

    The hub calls `receive` in the event loop, so `receive` must not block. If it raises, the hub logs the error and
    never calls this waiter again. Other waiters are not affected.
    """

    def receive(self, task_id: str, outcome: Outcome) -> None:
        """Take news of ``task_id``: a meta, or an error. After a final meta or an error there are no further calls."""


class SingleWaiter:
    """Waits for one task. The caller's deadline is a timer, so a wait needs no lock, asyncio task or cancellation.

    The result or the deadline settles `future`, whichever comes first. The result is the first meta for which
    ``until(meta)`` is true; by default a final one. The deadline is ``timeout`` seconds from now, ``None`` for no
    deadline. ``what`` is the name of the task for the text of the error.
    """

    __slots__ = ("_timer", "_until", "future")

    def __init__(
        self, what: str, timeout: float | None, until: Callable[[TaskMeta], bool] = attrgetter("ready")
    ) -> None:
        loop = asyncio.get_running_loop()
        self.future: asyncio.Future[TaskMeta] = loop.create_future()
        self._until = until
        self._timer = (
            None if timeout is None else loop.call_later(timeout, self._expire, what, timeout, context=EMPTY.context)
        )

    def receive(self, task_id: str, outcome: Outcome) -> None:
        if self.future.done():
            return
        if isinstance(outcome, Exception):
            fail(self.future, outcome)
        elif self._until(outcome):
            self.future.set_result(outcome)

    def _expire(self, what: str, timeout: float) -> None:
        if not self.future.done():
            fail(self.future, timed_out(what, timeout))

    def stop(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()


def timed_out(what: str, timeout: float) -> TimeoutError:
    """Make the error for a caller whose own deadline has passed."""
    return TimeoutError(f"{what} was not ready within {Limit.name_of(timeout)} seconds; you may await it again")
