"""`Interruption`: ending a block of a caller's task from outside, and telling that from every other cancellation."""

from __future__ import annotations

import asyncio

__all__ = ["Interruption"]


class Interruption:
    """Cancels the task that entered it, as `asyncio.timeout` does, and accounts for that one cancellation.

    Between `enter` and `leave` an `interrupt` makes the task's present await raise `asyncio.CancelledError`.
    """

    def __init__(self) -> None:
        #: Why the block was interrupted; ``None`` if it was not.
        self.reason: Exception | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0

    def enter(self) -> None:
        """The block begins. It belongs to the running task."""
        self._task = asyncio.current_task()
        # A task that is being cancelled already may enter a block while it cleans up.
        self._cancelling = 0 if self._task is None else self._task.cancelling()

    def interrupt(self, reason: Exception) -> None:
        """End the block, once; does nothing if it has been left."""
        if self._task is not None and self.reason is None:
            self.reason = reason
            self._task.cancel()

    def leave(self, exc: BaseException | None) -> bool:
        """The block ends with ``exc``: whether that is the cancellation by `interrupt`, and by nothing else."""
        task, self._task = self._task, None
        if task is None or self.reason is None:
            return False
        others = task.uncancel() > self._cancelling
        return isinstance(exc, asyncio.CancelledError) and not others
