"""arq: its worker stores, with these two calls."""

from __future__ import annotations

from typing import Any

from arq import create_pool
from arq.connections import RedisSettings
from arq.constants import default_queue_name, result_key_prefix
from arq.jobs import Job, serialize_result

from ..subject import Subject

__all__ = ["Arq"]


class Arq(Subject):
    """``pool``: connections at most."""

    async def open(self) -> None:
        settings = RedisSettings.from_dsn(self.url)
        settings.max_connections = self.options.get("pool")
        self._redis = await create_pool(settings)

    async def close(self) -> None:
        await self._redis.aclose()

    async def store(self, task_id: str, value: Any) -> None:
        payload = serialize_result("task", (), {}, 1, 0, True, value, 0, 0, "", default_queue_name, task_id)
        await self._redis.set(result_key_prefix + task_id, payload, ex=3600)

    async def wait(self, task_id: str) -> Any:
        await self._redis.zadd(default_queue_name, {task_id: 0})  # it waits only for what is queued
        return await Job(task_id, self._redis).result()
