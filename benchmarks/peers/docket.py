"""docket: its worker stores, with these two calls."""

from __future__ import annotations

from base64 import b64encode
from datetime import UTC, datetime
from typing import Any

import cloudpickle
from docket import Docket, Execution

from ..subject import Subject

__all__ = ["DocketResults"]


class DocketResults(Subject):
    """``pool``: connections at most, in each of its pools. A waiter has one of those for pub/sub to itself."""

    async def open(self) -> None:
        pool = self.options.get("pool")
        self._docket = Docket(url=f"{self.url}?max_connections={pool}" if pool else self.url)
        await self._docket.__aenter__()

    async def close(self) -> None:
        await self._docket.__aexit__(None, None, None)

    async def store(self, task_id: str, value: Any) -> None:
        # What its worker does when a task returns, in `Worker._execute`. There is no message to acknowledge.
        execution = self._execution(task_id)
        key = f"{task_id}:{execution.generation}"
        data = {"data": b64encode(cloudpickle.dumps(value)).decode()}
        await self._docket.result_storage.put(key, data, ttl=self._docket.execution_ttl.total_seconds())
        await execution.mark_as_completed(key)

    async def wait(self, task_id: str) -> Any:
        return await self._execution(task_id).get_result()

    def _execution(self, task_id: str) -> Execution:
        """As `Docket.add` makes it, but not scheduled: waiting does not need that."""
        return Execution(self._docket, _task, (), {}, task_id, datetime.now(UTC), attempt=1)


async def _task() -> None:
    """Never runs."""
