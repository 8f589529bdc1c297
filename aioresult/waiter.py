"""What waits for a result: the protocol, and the waiter for a single one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from operator import attrgetter
from typing import Protocol, TypeAlias

from .exceptions import TimeoutError
from .meta import TaskMeta
from .tasks import EMPTY, fail

__all__ = ["FINAL_READ", "Outcome", "SingleWaiter", "Waiter", "timed_out"]

#: A timeout below that many seconds may be over before the store was read at all. Then it is read once more, and that
#: may take as long.
FINAL_READ = 1.0

#: What a waiter is told: a meta, or why there will be none.
Outcome: TypeAlias = TaskMeta | Exception


class Waiter(Protocol):
    """What waits. `receive` is called from the event loop; it must not block. If it raises, that is logged, and this
    waiter hears no more; no other notices.
    """

    def receive(self, task_id: str, outcome: Outcome) -> None:
        """News of ``task_id``: any meta, final or not, or an exception. After either of the last two, no more."""


class SingleWaiter:
    """Waits for the end of one task, with the caller's deadline on a timer: no lock, no task, no cancellation.

    ``what`` is waited for, as the error names it, for ``timeout`` seconds at most, until ``until(meta)`` is true: by
    default one that is ready. Whichever comes first, the result or the deadline, settles `future`.
    """

    __slots__ = ("_timer", "_until", "future")

    def __init__(
        self, what: str, timeout: float | None, until: Callable[[TaskMeta], bool] = attrgetter("ready")
    ) -> None:
        loop = asyncio.get_running_loop()
        self.future: asyncio.Future[TaskMeta] = loop.create_future()
        self._until = until
        self._timer = None if timeout is None else loop.call_later(timeout, self._expire, what, timeout, context=EMPTY)

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
        """Drop the timer."""
        if self._timer is not None:
            self._timer.cancel()


def timed_out(what: str, timeout: float) -> TimeoutError:
    """The error for a caller whose own deadline has passed."""
    return TimeoutError(f"{what} was not ready within timeout={timeout:g} seconds; it may be awaited again")
