"""taskiq with taskiq-redis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from taskiq import AsyncTaskiqTask, TaskiqResult, gather
from taskiq_redis import RedisAsyncResultBackend

from ..subject import Subject

__all__ = ["Taskiq"]


class Taskiq(Subject):
    """``pool``: connections at most."""

    async def open(self) -> None:
        self._backend = RedisAsyncResultBackend[Any](self.url, max_connection_pool_size=self.options.get("pool"))
        await self._backend.startup()

    async def close(self) -> None:
        await self._backend.shutdown()

    async def store(self, task_id: str, value: Any) -> None:
        result = TaskiqResult[Any](is_err=False, return_value=value, execution_time=0.0)
        await self._backend.set_result(task_id, result)

    async def wait(self, task_id: str) -> Any:
        return (await self._task(task_id).wait_result()).return_value

    async def join(self, task_ids: Sequence[str]) -> Sequence[Any]:
        return [result.return_value for result in await gather(*map(self._task, task_ids))]

    def _task(self, task_id: str) -> AsyncTaskiqTask[Any]:
        return AsyncTaskiqTask(task_id, self._backend)
