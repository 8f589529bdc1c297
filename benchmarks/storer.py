"""Storing for a measurement: in a process of its own, or in this one for a store that no other process can see."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable, Sequence
from time import monotonic_ns
from typing import Any, Protocol

from .channel import Channel, spawn
from .subject import Subject

__all__ = ["LocalStorer", "RemoteStorer", "Storer", "serve", "store_all"]

_PAIR = "one"
_MANY = "many"


class Storer(Protocol):
    """Both return when the store began, as `time.monotonic_ns` says: one clock for all processes of a machine."""

    async def store_one(self, task_id: str, value: Any) -> int: ...
    async def store_many(self, task_ids: Sequence[str], value: Any, concurrency: int) -> int: ...
    async def close(self) -> None: ...


async def store_all(subject: Subject, task_ids: Iterable[str], value: Any, concurrency: int) -> None:
    """Store them all, so many at a time."""
    left = iter(task_ids)

    async def worker() -> None:
        for task_id in left:
            await subject.store(task_id, value)

    await asyncio.gather(*(worker() for _ in range(concurrency)))


class LocalStorer:
    """Stores in this process."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    async def store_one(self, task_id: str, value: Any) -> int:
        began = monotonic_ns()
        await self._subject.store(task_id, value)
        return began

    async def store_many(self, task_ids: Sequence[str], value: Any, concurrency: int) -> int:
        began = monotonic_ns()
        await store_all(self._subject, task_ids, value, concurrency)
        return began

    async def close(self) -> None:
        pass


class RemoteStorer:
    """Has another process store."""

    def __init__(self, process: asyncio.subprocess.Process, channel: Channel) -> None:
        self._process = process
        self._channel = channel

    @classmethod
    async def start(cls, spec: dict[str, Any]) -> RemoteStorer:
        """``spec`` as of a child without work."""
        return cls(*await spawn([spec.pop("python", sys.executable), "-m", "benchmarks.child", json.dumps(spec)]))

    async def store_one(self, task_id: str, value: Any) -> int:
        return await self._ask([_PAIR, [task_id], value, 1])

    async def store_many(self, task_ids: Sequence[str], value: Any, concurrency: int) -> int:
        return await self._ask([_MANY, list(task_ids), value, concurrency])

    async def _ask(self, request: list[Any]) -> int:
        answer = await self._channel.ask(request)
        if isinstance(answer, dict):
            raise RuntimeError(f"the storing process failed: {answer}")
        return int(answer)

    async def close(self) -> None:
        """End the process."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


async def serve(subject: Subject, channel: Channel) -> dict[str, Any]:
    """Be the process behind a `RemoteStorer`, until that is gone."""
    local = LocalStorer(subject)
    while True:
        try:
            kind, task_ids, value, concurrency = await channel.receive()
        except EOFError:
            return {}
        if kind == _PAIR:
            began = await local.store_one(task_ids[0], value)
        else:
            began = await local.store_many(task_ids, value, concurrency)
        await channel.send(began)
