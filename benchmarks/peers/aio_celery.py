"""aio-celery: reads what Celery's workers store."""

from __future__ import annotations

from typing import Any

from aio_celery import Celery
from aio_celery.backend import create_redis_connection_pool
from aio_celery.result import AsyncResult

from ..subject import Subject

__all__ = ["AioCelery"]


class AioCelery(Subject):
    """``pool``: connections at most."""

    async def open(self) -> None:
        self._app = Celery()
        size = self.options.get("pool", self._app.conf.result_backend_connection_pool_size)
        # What `Celery.setup` does for the results; it would connect to a broker besides.
        self._pool = create_redis_connection_pool(url=self.url, pool_size=size)
        self._app.conf.update(result_backend=self.url)
        self._app._result_backend_connection_pool = self._pool

    async def close(self) -> None:
        await self._pool.disconnect()

    async def wait(self, task_id: str) -> Any:
        return await AsyncResult(task_id, app=self._app).get()
