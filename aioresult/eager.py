"""`EagerResult`: the result of a task that the caller has run itself."""

from __future__ import annotations

from typing import TypeVar, cast

from .exceptions import UsageError
from .handle import ResultStore
from .live import OnLost
from .meta import TaskMeta
from .result import AsyncResult
from .seconds import Timeout, checked_timeout
from .states import SUCCESS
from .tree import raise_or_return

__all__ = ["EagerResult"]

T = TypeVar("T")


class EagerResult(AsyncResult[T]):
    """The result of a task that the caller has run itself, without a worker. Nothing is stored.

    ``value`` is the return value, or the exception if ``state`` is a state with an exception, such as FAILURE.
    """

    __slots__ = ()

    def __init__(self, id: str, value: T | BaseException, state: str = SUCCESS, traceback: str | None = None) -> None:
        super().__init__(id, None)
        self._outcome = TaskMeta(id, state, value, traceback)

    async def get(
        self,
        timeout: Timeout = None,
        propagate: bool = True,
        follow_parents: bool = True,
        on_lost: OnLost = "wait",
        must_exist: bool = False,
    ) -> T:
        """Return the value, or raise the exception. With ``propagate=False``, return the exception. Never waits."""
        checked_timeout(timeout)
        return cast("T", raise_or_return(self.outcome) if propagate else self.value())

    @property
    def backend(self) -> ResultStore:
        """Raises `UsageError`, because an eager result belongs to no backend."""
        raise UsageError(
            f"{self!r} is in no backend: the task was run on the spot. Its value is known; there are no states and no "
            f"output to follow"
        )

    async def fetch(self) -> TaskMeta:
        """Return the meta with the value, the state and the traceback that this result was made with."""
        return cast("TaskMeta", self.meta)

    async def ready(self) -> bool:
        """Return true: an eager result is always ready."""
        return True

    async def exists(self) -> bool:
        """Return true: an eager result always has its value."""
        return True

    async def forget(self) -> None:
        """Do nothing, because nothing is stored."""
