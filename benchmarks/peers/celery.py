"""Celery: a synchronous client, so that every call has a thread to block."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from celery import Celery
from celery.result import AsyncResult, GroupResult

from ..subject import Subject

__all__ = ["CeleryDatabase", "CeleryRedis"]

T = TypeVar("T")

#: As many threads as any work has calls at once; more waiters than that wait for a thread.
_THREADS = 1000


class CeleryRedis(Subject):
    """``app.backend.store_result`` and `AsyncResult.get`."""

    async def open(self) -> None:
        self._app = Celery("benchmark", broker="memory://", backend=self.url, set_as_current=False)
        self._threads = ThreadPoolExecutor(_THREADS)

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def store(self, task_id: str, value: Any) -> None:
        await self._in_thread(lambda: self._app.backend.store_result(task_id, value, "SUCCESS"))

    async def wait(self, task_id: str) -> Any:
        return await self._in_thread(lambda: AsyncResult(task_id, app=self._app).get())

    async def join(self, task_ids: Sequence[str]) -> Sequence[Any]:
        members = [AsyncResult(task_id, app=self._app) for task_id in task_ids]
        return await self._in_thread(lambda: list(GroupResult("group", members, app=self._app).join()))

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


class CeleryDatabase(CeleryRedis):
    """The same with SQLAlchemy, in the same tables."""

    async def open(self) -> None:
        self.url = "db+postgresql+psycopg://" + self.url.partition("://")[2]
        await super().open()
