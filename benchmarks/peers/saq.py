"""saq."""

from __future__ import annotations

from typing import Any

from saq import Job, Queue, Status

from ..subject import Subject

__all__ = ["Saq"]


class Saq(Subject):
    """`Job.finish` and ``Job.refresh(until_complete=0)``."""

    async def open(self) -> None:
        self._queue = Queue.from_url(self.url)
        await self._queue.connect()

    async def close(self) -> None:
        await self._queue.disconnect()

    async def store(self, task_id: str, value: Any) -> None:
        await Job("task", key=task_id, queue=self._queue).finish(Status.COMPLETE, result=value)

    async def wait(self, task_id: str) -> Any:
        job = await self._queue.enqueue("task", key=task_id)
        assert job is not None
        await job.refresh(until_complete=0)
        return job.result
