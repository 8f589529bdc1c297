"""`Following`: the base class of the iterators that follow a running task (of the queue): its states, or its output.

Such an iterator has a subscription at the backend, and one reader (an asyncio task that iterates over it) at a time.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

from .exceptions import UsageError
from .tasks import call_from_finalizer

__all__ = ["Following"]

T_co = TypeVar("T_co", covariant=True)


class Following(AsyncIterator[T_co], Generic[T_co]):
    """An async iterator with a subscription. The subscription ends when the iterator is closed or garbage-collected."""

    def __init__(self) -> None:
        self._closed = self._busy = False
        #: The function that ends the subscription; ``None`` while there is no subscription.
        self._leave: Callable[[], None] | None = None
        #: The event loop in which the subscription was made.
        self._loop: asyncio.AbstractEventLoop | None = None

    def __aiter__(self) -> Self:
        return self

    def _begin(self) -> None:
        """Begin a read. Raises `UsageError` if another asyncio task reads from this iterator at the same time.

        The caller sets `_busy` to false at the end of the read. A context manager would cost more time than the read.
        """
        if self._busy:
            raise UsageError(f"{self!r} can have only one reader at a time; open one for each reader")
        self._busy = True

    def _hold(self, leave: Callable[[], None]) -> None:
        """Record that there is a subscription now, and that calling ``leave`` ends it.

        ``leave`` must not refer to this iterator. Otherwise the iterator could never be garbage-collected.
        """
        self._leave, self._loop = leave, asyncio.get_running_loop()

    def _close(self) -> None:
        self._closed = True
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()
        self._wake()

    @abstractmethod
    def _wake(self) -> None:
        """Wake the reader (an asyncio task) if it waits, so that it notices that the iterator was closed."""

    async def aclose(self) -> None:
        """End the subscription. The task (of the queue) goes on. A second call does nothing."""
        self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._close()

    def __del__(self) -> None:
        leave: Callable[[], None] | None = getattr(self, "_leave", None)
        if leave is not None and self._loop is not None:
            call_from_finalizer(self._loop, leave)
