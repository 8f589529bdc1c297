"""The limits on PostgreSQL: asyncpg and nothing else, in the tables and with the trigger that the library made.

`BarePostgres` stores and fetches in batches, `OneByOne` runs a statement per result through a pool. Neither has a
deadline, a reconnect, or an expiry. What is stored was encoded beforehand.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import asyncpg

from .subject import CHUNK, Subject, chunks

__all__ = ["BarePostgres", "OneByOne"]

_INSERT = (
    "INSERT INTO celery_taskmeta AS t (id, task_id, status, result, date_done) SELECT nextval('task_id_sequence'),"
)
_UNLESS = """
    ON CONFLICT (task_id) DO UPDATE SET status = excluded.status, result = excluded.result,
        date_done = excluded.date_done
    WHERE t.status <> 'SUCCESS'"""
_STORE_ONE = f"{_INSERT} $1::varchar, 'SUCCESS', $2::bytea, now() {_UNLESS}"
_STORE_MANY = f"{_INSERT} task_id, 'SUCCESS', $2, now() FROM unnest($1::varchar[]) AS i(task_id) {_UNLESS}"
# A look-up per id: "= ANY" may compare every row with every id, if it was planned while the table was empty.
_FETCH = """
    SELECT t.task_id, t.status, t.result FROM unnest($1::varchar[]) AS wanted(id)
    CROSS JOIN LATERAL (SELECT * FROM celery_taskmeta WHERE task_id = wanted.id LIMIT 1) t"""
_CHANNELS = "SELECT 'aioresult_' || 'celery_taskmeta'::regclass::oid || '_' || lpad(to_hex(n), 2, '0') \
FROM generate_series(0, 255) n"
_PARTS = """
    INSERT INTO celery_tasksetmeta_chord_part (group_id, task_id, index, part)
    SELECT $1, task_id, index, $4 FROM unnest($2::varchar[], $3::bigint[]) AS i(task_id, index)"""
_COUNT = "UPDATE celery_tasksetmeta_chord SET count = count + $2 WHERE group_id = $1"
_BEGIN = "INSERT INTO celery_tasksetmeta_chord (group_id, size, expires_at) VALUES ($1, $2, 'infinity')"
_READ = "SELECT part FROM celery_tasksetmeta_chord_part WHERE group_id = $1 ORDER BY index"


class OneByOne(Subject):
    """As most programs do it: a pool of 10."""

    async def open(self) -> None:
        self._pool = await asyncpg.create_pool(self.url, min_size=10, max_size=10)

    async def close(self) -> None:
        await self._pool.close()

    async def store(self, task_id: str, value: Any) -> None:
        await self._pool.execute(_STORE_ONE, task_id, _encode(value))


class BarePostgres(Subject):
    """What is asked for while two batches are under way goes out in the next. Two connections store."""

    async def open(self) -> None:
        self._idle = [await asyncpg.connect(self.url) for _ in range(2)]
        self._queue: list[tuple[str, Any, asyncio.Future[None]]] = []
        self._reader = await asyncpg.connect(self.url)
        self._listener = await asyncpg.connect(self.url)
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._news: list[str] = []
        self._fetching = False
        for (channel,) in await self._listener.fetch(_CHANNELS):
            await self._listener.add_listener(channel, self._notified)

    async def close(self) -> None:
        for connection in (*self._idle, self._reader, self._listener):
            await connection.close()

    # -- storing ----------------------------------------------------------------------------------------------------

    async def store(self, task_id: str, value: Any) -> None:
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((task_id, value, stored))
        if self._idle:
            self._task = asyncio.create_task(self._store_batches(self._idle.pop()))
        await stored

    async def _store_batches(self, connection: Any) -> None:
        await asyncio.sleep(0)  # other stores of this turn of the loop join the batch
        while self._queue:
            batch, self._queue = self._queue[:CHUNK], self._queue[CHUNK:]
            await connection.execute(_STORE_MANY, [task_id for task_id, _, _ in batch], _encode(batch[0][1]))
            for _, _, stored in batch:
                stored.set_result(None)
        self._idle.append(connection)

    # -- waiting ----------------------------------------------------------------------------------------------------

    async def wait(self, task_id: str) -> Any:
        waiter = self._waiting[task_id] = asyncio.get_running_loop().create_future()
        return await waiter

    def _notified(self, connection: Any, pid: int, channel: str, payload: Any) -> None:
        task_id = payload[len("7 SUCCESS") :]
        if task_id in self._waiting:
            self._news.append(task_id)
            if not self._fetching:
                self._fetching = True
                self._task = asyncio.create_task(self._fetch_news())

    async def _fetch_news(self) -> None:
        while self._news:
            batch, self._news = self._news[:CHUNK], self._news[CHUNK:]
            for row in await self._reader.fetch(_FETCH, batch):
                self._waiting.pop(row["task_id"]).set_result(json.loads(row["result"]))
        self._fetching = False

    # -- many -------------------------------------------------------------------------------------------------------

    async def join(self, task_ids: Sequence[str]) -> Sequence[Any]:
        return [value async for value in self.as_completed(task_ids)]

    async def as_completed(self, task_ids: Sequence[str]) -> AsyncIterator[Any]:
        for chunk in chunks(task_ids):
            for row in await self._reader.fetch(_FETCH, chunk):
                yield json.loads(row["result"])

    async def chord(self, task_ids: Sequence[str], value: Any) -> None:
        group_id = task_ids[0]
        part = json.dumps([1, group_id, "SUCCESS", value]).encode()
        connection = self._reader
        await connection.execute(_BEGIN, group_id, len(task_ids))
        for start in range(0, len(task_ids), CHUNK):
            batch = task_ids[start : start + CHUNK]
            async with connection.transaction():
                await connection.execute(_STORE_MANY, batch, _encode(value))
                await connection.execute(_PARTS, group_id, batch, range(start, start + len(batch)), part)
                await connection.execute(_COUNT, group_id, len(batch))
        stored = await connection.fetch(_READ, group_id)
        assert [json.loads(row["part"])[3] for row in stored] == [value] * len(task_ids)


def _encode(value: Any) -> bytes:
    if value not in _encoded:
        _encoded[value] = json.dumps(value).encode()
    return _encoded[value]


_encoded: dict[Any, bytes] = {}
