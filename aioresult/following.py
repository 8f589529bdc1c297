"""`Following`: the base of the iterators over a running task. Each has one reader at a time, and a subscription."""

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
    """An async iterator that holds a subscription from its first steps until it is closed or garbage-collected."""

    def __init__(self) -> None:
        self._closed = self._busy = False
        #: A call that ends the subscription, while there is one; and the event loop of the subscription.
        self._leave: Callable[[], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __aiter__(self) -> Self:
        return self

    def _begin(self) -> None:
        """Raise `UsageError` if another reader is at work. Callers reset `_busy` when they are done.

        This is no context manager, because that would cost more time than taking a chunk.
        """
        if self._busy:
            raise UsageError(f"{self!r} can have only one reader at a time; open one for each reader")
        self._busy = True

    def _hold(self, leave: Callable[[], None]) -> None:
        """Note that there is a subscription now, which ``leave`` ends. ``leave`` must not refer to this iterator."""
        self._leave, self._loop = leave, asyncio.get_running_loop()

    def _close(self) -> None:
        self._closed = True
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()
        self._wake()

    @abstractmethod
    def _wake(self) -> None:
        """Wake a waiting reader, so that it notices that another task has closed this."""

    async def aclose(self) -> None:
        """End the subscription. The task goes on. A second call does nothing."""
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
