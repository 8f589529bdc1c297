"""Implements the parameter ``must_exist``: a wait begins only if something is stored under the task id."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from math import inf
from typing import Protocol, TypeVar

from .exceptions import TaskNotFoundError
from .seconds import Limit, Timeout, checked_timeout
from .waiter import FINAL_READ, timed_out

__all__ = ["when_stored"]

T = TypeVar("T")


class _Store(Protocol):
    """The attributes and methods of a backend that this module uses."""

    @property
    def default_timeout(self) -> float | None: ...
    async def exists(self, task_id: str) -> bool: ...


async def when_stored(store: _Store, task_id: str, timeout: Timeout, wait: Callable[[float], Awaitable[T]]) -> T:
    """Check that something is stored under ``task_id``; then await ``wait(seconds)`` and return its result.

    ``seconds`` is what the check has left of ``timeout``. Raises `TaskNotFoundError` if nothing is stored. Also raises
    `TimeoutError` if the check takes too long, and the errors of `Backend.exists`.
    """
    now = asyncio.get_running_loop().time
    began, seconds = now(), checked_timeout(timeout, store.default_timeout)
    if seconds is None or seconds <= 0:
        found, left = await store.exists(task_id), inf if seconds is None else seconds
    else:
        try:
            async with asyncio.timeout(max(seconds, FINAL_READ)):
                found = await store.exists(task_id)
        except TimeoutError:
            raise timed_out(f"task {task_id}", seconds) from None
        left = Limit(max(seconds - (now() - began), 0.0), Limit.name_of(seconds))
    if not found:
        raise TaskNotFoundError(
            f"nothing is stored under the id of task {task_id}. It was never submitted, or its result has expired or "
            f"was forgotten. Submitting a task stores nothing either, unless the submitter calls "
            f"'await backend.mark_as_pending(task_id)'"
        )
    return await wait(left)
