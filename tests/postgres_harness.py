"""PostgreSQL for the conformance suite."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import asyncpg

import aioresult
from aioresult import Backend
from aioresult.backends.postgres import PostgresBackend

from .harness import Harness


class PostgresHarness(Harness):
    name = "postgres"
    example = "postgresql://{}/0"
    judges_by_content = False
    longest_id = 155
    keeps_family = False

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url

    def make(self, **options: Any) -> Backend:
        return aioresult.connect(self.url, **options)

    async def _row(self, sql: str, *args: Any) -> Any:
        connection = await asyncpg.connect(self.url)
        try:
            return await connection.fetchrow(sql, *args)
        finally:
            await connection.close()

    async def put_raw(self, task_id: str, data: bytes) -> None:
        await self._row(
            """
            INSERT INTO celery_taskmeta (id, task_id, status, result, date_done)
            VALUES (nextval('task_id_sequence'), $1, 'SUCCESS', $2, now())
            ON CONFLICT (task_id) DO UPDATE SET status = 'SUCCESS', result = excluded.result
            """,
            task_id,
            data,
        )

    async def put_raw_group(self, group_id: str, data: bytes) -> None:
        await self._row(
            "INSERT INTO celery_tasksetmeta (id, taskset_id, result, date_done) "
            "VALUES (nextval('taskset_id_sequence'), $1, $2, now())",
            group_id,
            data,
        )

    async def holdings(self) -> dict[str, float | None]:
        """A chord's parts live for as long as the chord; `Backend.cleanup` removes what has expired."""
        connection = await asyncpg.connect(self.url)
        try:
            tasks = await connection.fetch("SELECT task_id FROM celery_taskmeta")
            groups = await connection.fetch("SELECT taskset_id FROM celery_tasksetmeta")
            chords = await connection.fetch(
                "SELECT 'chord ' || group_id, nullif(extract(epoch FROM expires_at - now()), 'infinity')::float8 "
                "FROM celery_tasksetmeta_chord UNION ALL "
                "SELECT concat_ws(' ', 'part', group_id, task_id, index), "
                "  (SELECT nullif(extract(epoch FROM expires_at - now()), 'infinity')::float8 "
                "   FROM celery_tasksetmeta_chord WHERE group_id = p.group_id) "
                "FROM celery_tasksetmeta_chord_part p"
            )
        finally:
            await connection.close()
        held = {f"task {task_id}": await self.seconds_left(task_id) for (task_id,) in tasks}
        held.update({f"group {group_id}": await self.group_seconds_left(group_id) for (group_id,) in groups})
        held.update({str(name): left for name, left in chords})
        return held

    async def subscriptions(self) -> int:
        """The server knows channels, each shared by many ids; which ids, only the backends do."""
        backends = [backend for backend in self._open if isinstance(backend, PostgresBackend)]
        return len({task_id for backend in backends for ids in backend._waiting.values() for task_id in ids})

    async def seconds_left(self, task_id: str) -> float | None:
        return await self._left("celery_taskmeta", "task_id", task_id)

    async def group_seconds_left(self, group_id: str) -> float | None:
        return await self._left("celery_tasksetmeta", "taskset_id", group_id)

    async def _left(self, table: str, key: str, value: str) -> float | None:
        """By our table where it has a row, else by Celery's rule with the default expiry of the last backend opened."""
        row = await self._row(
            f"SELECT t.date_done::timestamptz, expires_at FROM {table} t LEFT JOIN {table}_expiry e "
            f"ON e.id = {key} AND e.date_done IS NOT DISTINCT FROM t.date_done WHERE {key} = $1",
            value,
        )
        assert row is not None, f"{value} is gone"
        now = datetime.now(UTC)
        if row["expires_at"] is not None:
            forever = row["expires_at"].year >= 9999
            return None if forever else float((row["expires_at"] - now).total_seconds())
        expires = self._open[-1].expires
        return float((row["date_done"] - now).total_seconds() + expires) if expires else None


async def pass_time(
    connection: asyncpg.Connection[Any], seconds: float, *ids: str, table: str = "celery_taskmeta"
) -> None:
    """Make rows older, all of them by default, and whatever is noted of them; as time would, so no trigger hears of it.

    A store that took more than a second, on a busy machine, has a note too: when the server stored it.
    """
    key = "task_id" if table == "celery_taskmeta" else "taskset_id"
    ago = f"interval '1 second' * {seconds}"
    async with connection.transaction():
        await connection.execute("SET LOCAL session_replication_role = replica")
        await connection.execute(
            f"UPDATE {table} SET date_done = date_done - {ago} WHERE {key} = ANY($1) OR $1 = '{{}}'", list(ids)
        )
        await connection.execute(
            f"UPDATE {table}_expiry SET date_done = date_done - {ago}, stored_at = stored_at - {ago}, "
            f"expires_at = expires_at - {ago} WHERE id = ANY($1) OR $1 = '{{}}'",
            list(ids),
        )
