"""`Interruption`: cancels a block in a caller's task, and tells this cancellation from all other cancellations."""

from __future__ import annotations

import asyncio

__all__ = ["Interruption"]


class Interruption:
    """Cancels the task that called `enter`, as `asyncio.timeout` does, and later undoes exactly that cancellation.

    Between `enter` and `leave` an `interrupt` makes the task's present await raise `asyncio.CancelledError`.
    """

    def __init__(self) -> None:
        #: The argument of `interrupt`; ``None`` if the block was not interrupted.
        self.reason: Exception | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0

    def enter(self) -> None:
        """Begin the block, in the running task."""
        self._task = asyncio.current_task()
        # A task that was cancelled may enter a block while it cleans up. Its count of cancellations is not 0 then.
        self._cancelling = 0 if self._task is None else self._task.cancelling()

    def interrupt(self, reason: Exception) -> None:
        """Cancel the block. Does nothing if the block has ended or was interrupted before."""
        if self._task is not None and self.reason is None:
            self.reason = reason
            self._task.cancel()

    def leave(self, exc: BaseException | None) -> bool:
        """End the block, which raised ``exc``. Returns whether `interrupt` is the only cause of ``exc``."""
        task, self._task = self._task, None
        if task is None or self.reason is None:
            return False
        others = task.uncancel() > self._cancelling
        return isinstance(exc, asyncio.CancelledError) and not others
