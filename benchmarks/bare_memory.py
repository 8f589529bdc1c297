"""The limit in one process: a dict, a future per waiter, and JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from .subject import Subject

__all__ = ["BareMemory"]


class BareMemory(Subject):
    """Stores bytes, as a server would."""

    async def open(self) -> None:
        self._stored: dict[str, bytes] = {}
        self._waiting: dict[str, asyncio.Future[Any]] = {}

    async def store(self, task_id: str, value: Any) -> None:
        payload = self._stored[task_id] = json.dumps({"status": "SUCCESS", "result": value}).encode()
        waiter = self._waiting.pop(task_id, None)
        if waiter is not None:
            waiter.set_result(_value(payload))
        await asyncio.sleep(0)

    async def wait(self, task_id: str) -> Any:
        waiter = self._waiting[task_id] = asyncio.get_running_loop().create_future()
        return await waiter

    async def join(self, task_ids: Sequence[str]) -> Sequence[Any]:
        return [_value(self._stored[task_id]) for task_id in task_ids]

    async def as_completed(self, task_ids: Sequence[str]) -> AsyncIterator[Any]:
        for task_id in task_ids:
            yield _value(self._stored[task_id])

    async def chord(self, task_ids: Sequence[str], value: Any) -> None:
        for task_id in task_ids:
            await self.store(task_id, value)
        await self.join(task_ids)


def _value(payload: bytes) -> Any:
    return json.loads(payload)["result"]
