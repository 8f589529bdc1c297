"""The library as a `Subject`, on whichever backend the URL names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

import aioresult
from aioresult.chord import ReadyChord

from .subject import Subject

__all__ = ["Ours"]


class Ours(Subject):
    """``options`` go to `aioresult.connect`."""

    async def open(self) -> None:
        self._backend = await aioresult.connect(self.url, on_chord_ready=self._dispatch, **self.options).open()

    async def close(self) -> None:
        await self._backend.aclose()

    async def store(self, task_id: str, value: Any) -> None:
        await self._backend.mark_as_done(task_id, value)

    async def wait(self, task_id: str) -> Any:
        return await self._backend.result(task_id)

    async def join(self, task_ids: Sequence[str]) -> Sequence[Any]:
        return await self._backend.group(task_ids)

    def as_completed(self, task_ids: Sequence[str]) -> AsyncIterator[Any]:
        return self._backend.group(task_ids).as_completed()

    async def chord(self, task_ids: Sequence[str], value: Any) -> None:
        group_id = str(uuid4())
        self._dispatched: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        await self._backend.create_chord(self._backend.group(task_ids, group_id))

        async def part(index: int, task_id: str) -> None:
            request = aioresult.TaskRequest(id=task_id, group=group_id, group_index=index, chord=True)
            await self._backend.mark_as_done(task_id, value, request)

        await asyncio.gather(*(part(index, task_id) for index, task_id in enumerate(task_ids)))
        assert await self._dispatched == [value] * len(task_ids)

    async def _dispatch(self, ready: ReadyChord) -> None:
        self._dispatched.set_result(ready.results)
