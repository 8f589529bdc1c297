"""`Interruption`: cancels a block of code in the caller's asyncio task.

It also tells this cancellation from all other cancellations of the asyncio task.
"""

from __future__ import annotations

import asyncio

__all__ = ["Interruption"]


class Interruption:
    """Cancels the asyncio task that called `enter`, and later undoes this cancellation, as `asyncio.timeout` does.

    Call `enter` at the beginning of a block and `leave` at its end. If `interrupt` is called in between, the present
    ``await`` of the block raises `asyncio.CancelledError`.
    """

    def __init__(self) -> None:
        #: The argument of `interrupt`: why the block was cancelled. ``None`` if it was not.
        self.reason: Exception | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0

    def enter(self) -> None:
        """Begin the block, in the running asyncio task."""
        self._task = asyncio.current_task()
        # An asyncio task that was cancelled may enter a block while it cleans up. Then its `cancelling()` is not 0.
        self._cancelling = 0 if self._task is None else self._task.cancelling()

    def interrupt(self, reason: Exception) -> None:
        """Cancel the block, because of ``reason``. Does nothing if the block has ended or was interrupted before."""
        if self._task is not None and self.reason is None:
            self.reason = reason
            self._task.cancel()

    def leave(self, exc: BaseException | None) -> bool:
        """End the block. ``exc`` is the exception that left the block, or ``None``.

        Returns true if `interrupt` is the only cause of ``exc``.
        """
        task, self._task = self._task, None
        if task is None or self.reason is None:
            return False
        others = task.uncancel() > self._cancelling
        return isinstance(exc, asyncio.CancelledError) and not others
