"""Plans that were made while the tables were empty, used when there are 600,000 rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from aioresult.backends.postgres import PostgresBackend
from aioresult.backends.postgres.runs import RunTable
from aioresult.chord import ChordOp, ChordStep
from aioresult.log import START, Flush, PageRequest, Place
from aioresult.record import Record
from aioresult.run import RunOp, RunStep

TABLES = (
    "celery_taskmeta",
    "celery_tasksetmeta",
    "celery_taskmeta_expiry",
    "celery_tasksetmeta_expiry",
    "celery_tasksetmeta_chord",
    "celery_tasksetmeta_chord_part",
    "celery_taskmeta_output",
    "celery_taskmeta_log",
    "celery_taskmeta_run",
)
FILL = """
    SET session_replication_role = replica;
    INSERT INTO celery_taskmeta (id, task_id, status, result, date_done)
        SELECT -i, 'id-' || i, 'SUCCESS', '1', now() FROM generate_series(1, 600000) i;
    INSERT INTO celery_taskmeta_expiry (id, expires_at, date_done)
        SELECT 'id-' || i, now() + interval '1 day', now() FROM generate_series(1, 50000) i;
    INSERT INTO celery_tasksetmeta (id, taskset_id, result, date_done)
        SELECT i, 'id-' || i, '1', now() FROM generate_series(1, 50000) i;
    INSERT INTO celery_tasksetmeta_expiry (id, expires_at, date_done)
        SELECT 'id-' || i, now() + interval '1 day', now() FROM generate_series(1, 50000) i;
    INSERT INTO celery_tasksetmeta_chord (group_id, size, count, expires_at)
        SELECT 'id-' || i, 2, 1, now() + interval '1 day' FROM generate_series(1, 50000) i;
    INSERT INTO celery_tasksetmeta_chord_part (group_id, task_id, index, part)
        SELECT 'id-' || i, 'a', 0, '1' FROM generate_series(1, 50000) i;
    INSERT INTO celery_taskmeta_output (task_id, epoch, seq, data, state)
        SELECT 'id-' || i % 1000, 1, i / 1000, '1', '' FROM generate_series(1, 20000) i;
    INSERT INTO celery_taskmeta_log (task_id, epoch, expires_at)
        SELECT 'id-' || i, 1, now() + interval '1 day' FROM generate_series(1, 20000) i;
    INSERT INTO celery_taskmeta_run (task_id, run, expires_at)
        SELECT 'id-' || i, 'r', now() + interval '1 day' FROM generate_series(1, 20000) i"""

#: No statements; one whose work is done in a function; and those on the workers, of whom there are few.
NOT_PLANNED = ("columns", "rule", "living_on", "living_on_of_runs", "is_final", "_steps", "_open", "_beat", "_given")


def statements(backend: PostgresBackend) -> Iterator[tuple[str, str]]:
    """Every statement that the backend sends, by a name."""
    for holder in (backend._sql, backend._chord_table, backend._run_table):
        for name, sql in vars(holder).items():
            if name in NOT_PLANNED or not isinstance(sql, (str, list, dict)) or name in ("_places", "_where"):
                continue
            for key, each in (
                sql.items() if isinstance(sql, dict) else enumerate([sql] if isinstance(sql, str) else sql)
            ):
                yield f"{name} {key}", each


def arguments(sql: str) -> str:
    """Arguments for a prepared statement: arrays where it takes arrays."""
    count = max((int(number) for number in re.findall(r"\$(\d+)", sql)), default=0)
    arrays = set(re.findall(r"\$(\d+)::\w+\[\]", sql))
    given = ", ".join(
        "'{}'" if str(index) in arrays else "NULL" if f"${index}::float8" in sql else "'1'"
        for index in range(1, count + 1)
    )
    return f"({given})" if count else ""


async def scans(connection: asyncpg.Connection[Any]) -> dict[str, int]:
    """How often each table has been read from end to end, this connection's last statement included."""
    await connection.fetchval("SELECT pg_stat_force_next_flush()")
    await connection.fetchval("SELECT pg_stat_clear_snapshot()")
    rows = await connection.fetch("SELECT relname, seq_scan FROM pg_stat_user_tables WHERE relname = ANY($1)", TABLES)
    return {row["relname"]: row["seq_scan"] for row in rows}


async def run(table: RunTable, task_id: str, connection: asyncpg.Connection[Any]) -> None:
    """Every kind of flush, page and step."""
    for epoch in (0, 1, 1):
        await table.append([Flush(task_id, "p", epoch, 2, b"1", keep_from=1, expires=9.0, run="r")], connection)
    await table.pages([PageRequest(task_id, START, 9), PageRequest(task_id, None, 1)], connection)
    payload = ("REVOKED", b"1", 10**15, "traceback")
    for op in (*RunOp, RunOp.START):
        last = Record(task_id, payload, 9.0, group_id=task_id)
        await table.take([RunStep(op, task_id, "r", "w", 9.0, last, "REVOKED", output=Place(1, 9))], connection)


def steps(group_id: str) -> list[ChordStep]:
    """Every kind of step."""
    return [
        ChordStep(
            op,
            group_id,
            token="token",
            lease=5.0,
            expires=100.0,
            group_expires=100.0,
            run=str(uuid4()),
            size=2,
            body=b"b",
            task_id="a",
            index=0,
            part=b"1",
        )
        for op in ChordOp
    ]


@pytest.mark.timeout(90)
async def test_no_table_is_read_from_end_to_end(postgres_url: str) -> None:
    async with PostgresBackend(postgres_url) as backend:
        plans = dict(statements(backend))
        # Making the schema has read the tables, and the server counts that when it likes.
        await backend._connections.query("SELECT pg_stat_force_next_flush()")
        connection = await backend._connections.new()
        try:
            await connection.execute("SET plan_cache_mode = force_generic_plan")
            for table in TABLES:
                await connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
            await connection.execute(f"VACUUM ANALYZE {', '.join(TABLES)}")
            for number, sql in enumerate(plans.values()):
                await connection.execute(f"PREPARE p{number} AS {sql}")
                await connection.execute(f"EXPLAIN EXECUTE p{number}{arguments(sql)}")
            for number in range(3):
                for op in steps(f"early {number}"):
                    await backend._chord_table.take(connection, [op])
                await run(backend._run_table, f"early {number}", connection)
            filler = await asyncpg.connect(postgres_url)
            await filler.execute(FILL)
            await filler.close()
            for number, (name, sql) in enumerate(plans.items()):
                rows = await connection.fetch(f"EXPLAIN EXECUTE p{number}{arguments(sql)}")
                plan = "\n".join(row[0] for row in rows)
                assert "Seq Scan" not in plan, f"{name}\n{plan}"
                # To read the whole of an index is no better.
                by_index = [row[0] for row in rows if re.search(r"Index (Only )?Scan", row[0])]
                assert plan.count("Index Cond") == len(by_index), f"{name}\n{plan}"
            before = await scans(connection)
            for op in steps("id-7"):
                await backend._chord_table.take(connection, [op])
            await backend._chord_table.active(connection)
            await run(backend._run_table, "id-7", connection)
            assert await scans(connection) == before
        finally:
            await connection.close()
