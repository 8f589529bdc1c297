"""streaq: its worker stores, with this call."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from streaq import Worker
from streaq.types import StreamMessage
from streaq.utils import now_ms

from ..subject import Subject

__all__ = ["Streaq"]


class Streaq(Subject):
    """``pool``: connections at most. A waiter has one of them to itself, and for a moment needs another."""

    async def open(self) -> None:
        pool = self.options.get("pool")
        self._worker = Worker(self.url, redis_kwargs={"max_connections": pool} if pool else None)
        await self._worker.__aenter__()

    async def close(self) -> None:
        await self._worker.__aexit__(None, None, None)

    async def store(self, task_id: str, value: Any) -> None:
        # `Worker.run_task` ends with this. There is no message to acknowledge; and nothing is logged.
        now = now_ms()
        await self._worker.finish_task(
            StreamMessage("0-1", task_id, self._worker.priorities[0], now),
            finish=True,
            schedule=None,
            return_value=value,
            start_time=now,
            finish_time=now,
            created_time=now,
            fn_name="task",
            success=True,
            silent=True,
            ttl=timedelta(minutes=5),  # as of `Worker.task`
            triggers=None,
            lock_key=None,
            tries=1,
            otherwise=None,
        )

    async def wait(self, task_id: str) -> Any:
        return (await self._worker.result_by_id(task_id)).result
