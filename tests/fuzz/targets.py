"""What must hold for any bytes whatever; each function raises if it does not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redis.asyncio.connection import Connection

from aioresult import AioResultError, BackendConnectionError, TaskMeta
from aioresult.backends.postgres import PostgresBackend
from aioresult.backends.redis import RedisBackend
from aioresult.backends.redis.connection import RedisConnection
from aioresult.backends.redis.listener import RedisListener
from aioresult.backends.shard import Shard
from aioresult.serialization import Codec
from aioresult.states import EXCEPTION_STATES

CODEC = Codec(accept=("json", "msgpack"), max_result_size=2**20)
META = TaskMeta("t", "FAILURE", ValueError("no", 1), "Traceback", [[["child", None], None]])

#: What is valid, to begin from.
SEEDS: dict[str, list[bytes]] = {
    "codec": [
        Codec(serializer, ("json", "msgpack"), compression).encode(META)
        for serializer in ("json", "msgpack")
        for compression in (None, "gzip", "bzip2", "lzma")
    ],
    "redis": [
        b"*3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n*3\r\n$9\r\nsubscribe\r\n$1\r\nb\r\n:2\r\n",
        b'*3\r\n$7\r\nmessage\r\n$18\r\ncelery-task-meta-t\r\n$21\r\n{"status": "SUCCESS"} \r\n',
        b">3\r\n$7\r\nmessage\r\n$20\r\ncelery-taskset-meta-g\r\n$0\r\n\r\n+OK\r\n_\r\n#t\r\n,1.5\r\n(99\r\n",
        b"*3\r\n$7\r\nmessage\r\n$16\r\naioresult-chords\r\n$1\r\n\xff\r\n-ERR no\r\n*-1\r\n$-1\r\n%1\r\n+a\r\n:1\r\n",
        b"*3\r\n+message\r\n:1\r\n:2\r\n",
        b"*3\r\n$7\r\nmessage\r\n:1\r\n:2\r\n",
        b"*0\r\n",
    ],
    "postgres": [b"7 SUCCESSt", b"chord g", b"ready g", b"-1 SUCCESSt", b"99999999999999999999 t", b"x t", b" ", b""],
}


def stored_result(data: bytes) -> None:
    """A stored value is a meta, or an error of ours. Pickle is left out: who accepts that trusts the writer."""
    try:
        meta = CODEC.decode("t", data)
    except AioResultError:
        return
    assert isinstance(meta, TaskMeta)
    assert meta.task_id == "t"
    if meta.status in EXCEPTION_STATES:
        assert isinstance(meta.result, Exception)


class _Transport(asyncio.Transport):
    """Goes nowhere."""

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        pass

    def abort(self) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0


@contextmanager
def _connection(backend: RedisBackend | None, lost: list[BaseException]) -> Iterator[RedisConnection]:
    connection = RedisConnection("here", 60, lost.append)
    if backend is not None:
        connection = RedisListener("here", 60, backend._published, lambda channel: None, lost.append)
    connection._link, connection._transport = Connection(), _Transport()
    try:
        yield connection
    finally:
        connection._stop_timer()


async def redis_replies(data: bytes, listening: bool) -> None:
    """Bytes from a Redis are replies to what was asked, messages, or the end of the connection; nothing escapes."""
    lost: list[BaseException] = []
    backend = _REDIS if listening else None
    with _connection(backend, lost) as connection:
        asking: asyncio.Future[Any]
        if isinstance(connection, RedisListener):
            asking = asyncio.ensure_future(connection.subscribe([("SUBSCRIBE", "a", "b")]))
        else:
            asking = asyncio.ensure_future(connection.request([("GET", "a"), ("GET", "b")]))
        await asyncio.sleep(0)
        middle = len(data) // 2
        for piece in (data[:middle], data[middle:]):
            if not connection.closed:
                connection.data_received(piece)
        if not asking.done():
            connection.connection_lost(None)
        try:
            assert len(await asking) == 2
        except BackendConnectionError:
            assert connection.closed
        assert len(lost) <= 1


class _StrictHub:
    """Somebody waits for everything; ids are what the hub takes for ids."""

    def has_waiters(self, task_id: str) -> bool:
        return True

    def receive(self, task_id: str, outcome: object, mark: object = None, remember: bool = True) -> None:
        assert isinstance(task_id, str)
        assert isinstance(outcome, (TaskMeta, AioResultError))

    def mark_stale(self, task_id: str) -> None:
        assert isinstance(task_id, str)

    def lost(self, task_ids: object = None) -> None:
        pass


def notification(text: str) -> None:
    """A payload of NOTIFY, which anybody who may connect can send."""
    _POSTGRES._notified(text)


_REDIS, _POSTGRES = RedisBackend("redis://"), PostgresBackend("postgresql://")
for _each in (_REDIS, _POSTGRES):
    _shard = object.__new__(Shard)  # its batches would need an event loop
    _shard.hub, _shard._backend = _StrictHub(), _each  # type: ignore[assignment]
    _each._shards = [_shard]
