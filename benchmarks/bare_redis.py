"""The limit on Redis: asyncio protocols with `hiredis.Reader`, one future per store or waiter, and nothing else.

No deadline, no reconnect, no reference counts, no second look; SUCCESS is overwritten. What is stored was encoded
beforehand, but for the id. Commands given in one turn of the event loop go out in one write.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import hiredis

from .subject import Subject, chunks

__all__ = ["BareRedis", "Commands", "connected", "pack"]

C = TypeVar("C", bound="Commands")

_KEY = "celery-task-meta-"
_NOTHING = object()


class Commands(asyncio.Protocol):
    """Replies settle the futures in the order of the commands."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader(notEnoughData=_NOTHING)
        self._replies: deque[asyncio.Future[Any] | None] = deque()
        self._out: list[bytes] = []
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not _NOTHING:
            self.replied(reply)

    def replied(self, reply: Any) -> None:
        future = self._replies.popleft()
        if future is not None:
            future.set_result(reply)

    def send(self, *commands: tuple[str | bytes | int, ...]) -> asyncio.Future[Any]:
        """A future for the reply to the last of them; the others' are dropped."""
        future = self._loop.create_future()
        self._replies.extend([None] * (len(commands) - 1))
        self._replies.append(future)
        self.write(b"".join(map(pack, commands)))
        return future

    def write(self, data: bytes) -> None:
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(data)

    def _flush(self) -> None:
        self._transport.write(b"".join(self._out))
        self._out.clear()

    def close(self) -> None:
        """Close the socket."""
        self._transport.close()


class _Messages(Commands):
    """Messages settle the futures of their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[bytes, asyncio.Future[Any]] = {}

    def replied(self, reply: Any) -> None:
        if reply[0] == b"message":
            self.waiting.pop(reply[1]).set_result(_value(reply[2]))


async def connected(url: str, kind: Callable[[], C]) -> C:
    """A connection to the server at ``url``."""
    address = urlsplit(url)
    loop = asyncio.get_running_loop()
    return (await loop.create_connection(kind, address.hostname or "", address.port or 0))[1]


class BareRedis(Subject):
    """One connection for commands, one for messages."""

    async def open(self) -> None:
        self._commands = await connected(self.url, Commands)
        self._messages = await connected(self.url, _Messages)
        self._to_subscribe: list[bytes] = []

    async def close(self) -> None:
        for connection in (self._commands, self._messages):
            connection.close()

    async def store(self, task_id: str, value: Any) -> None:
        key, payload = _KEY + task_id, _payload(task_id, value)
        await self._commands.send(("MULTI",), ("SETEX", key, 86400, payload), ("PUBLISH", key, payload), ("EXEC",))

    async def wait(self, task_id: str) -> Any:
        loop = asyncio.get_running_loop()
        channel = (_KEY + task_id).encode()
        waiter = self._messages.waiting[channel] = loop.create_future()
        if not self._to_subscribe:
            loop.call_soon(self._subscribe)
        self._to_subscribe.append(channel)
        return await waiter

    def _subscribe(self) -> None:
        channels, self._to_subscribe = self._to_subscribe, []
        for chunk in chunks(channels):
            self._messages.write(pack(("SUBSCRIBE", *chunk)))

    async def join(self, task_ids: Sequence[str]) -> Sequence[Any]:
        return [value async for value in self.as_completed(task_ids)]

    async def as_completed(self, task_ids: Sequence[str]) -> AsyncIterator[Any]:
        for chunk in chunks(task_ids):
            for payload in await self._commands.send(("MGET", *(_KEY + task_id for task_id in chunk))):
                yield _value(payload)

    async def chord(self, task_ids: Sequence[str], value: Any) -> None:
        parts = f"parts-{task_ids[0]}"
        await asyncio.gather(*(self._part(parts, index, task_id, value) for index, task_id in enumerate(task_ids)))
        stored = await self._commands.send(("ZRANGE", parts, 0, -1))
        assert [json.loads(part)[3] for part in stored] == [value] * len(task_ids)

    async def _part(self, parts: str, index: int, task_id: str, value: Any) -> None:
        key, payload = _KEY + task_id, _payload(task_id, value)
        part = json.dumps([1, task_id, "SUCCESS", value])
        await self._commands.send(
            ("MULTI",),
            ("SETEX", key, 86400, payload),
            ("PUBLISH", key, payload),
            ("ZADD", parts, index, part),
            ("EXPIRE", parts, 86400),
            ("ZCARD", parts),
            ("EXEC",),
        )


pack: Any = hiredis.pack_command
_encoded: dict[Any, bytes] = {}


def _payload(task_id: str, value: Any) -> bytes:
    """In Celery's format; but for the id, encoded only once."""
    if value not in _encoded:
        done = "2026-01-01T00:00:00.000000+00:00"
        fields = {"status": "SUCCESS", "result": value, "traceback": None, "children": [], "date_done": done}
        _encoded[value] = json.dumps(fields)[:-1].encode()
    return b'%b, "task_id": "%b"}' % (_encoded[value], task_id.encode())


def _value(payload: bytes) -> Any:
    return json.loads(payload)["result"]
