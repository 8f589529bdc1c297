"""PostgreSQL as it is in the field: time zones, older tables, rights, locks, encodings, and the caller's own pools."""

from __future__ import annotations

import asyncio
import math
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from celery import Celery
from celery.result import AsyncResult as CeleryAsyncResult
from celery.result import GroupResult as CeleryGroupResult

import aioresult
import aioresult.backends.worker
import aioresult.celery
from aioresult import (
    BackendConnectionError,
    BackendGetMetaError,
    BackendRefusedError,
    DecodeError,
    ImproperlyConfigured,
    TaskRequest,
)
from aioresult.backends.postgres import PostgresBackend, schema_sql
from aioresult.backends.postgres.schema import EXTENDED_COLUMNS

from .harness import until
from .postgres_harness import pass_time
from .test_postgres import settled


@asynccontextmanager
async def session(url: str, **settings: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Another program's connection, with these settings of the server."""
    connection: asyncpg.Connection[Any] = await asyncpg.connect(url, server_settings=settings)
    try:
        yield connection
    finally:
        await connection.close()


async def store_as_celery(connection: asyncpg.Connection[Any], task_id: str) -> None:
    """What Celery's backend does: ``now()`` becomes the local time of the session."""
    await connection.execute(
        "INSERT INTO celery_taskmeta (id, task_id, status, result, date_done) "
        "VALUES (nextval('task_id_sequence'), $1, 'SUCCESS', '7', now())",
        task_id,
    )


async def blocked(admin: asyncpg.Connection[Any]) -> int:
    """How many connections wait for a lock."""
    count: int = await admin.fetchval("SELECT count(*)::int FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    return count


# -- cleanup beside everything else ---------------------------------------------------------------------------------


async def create(backend: PostgresBackend) -> None:
    await backend.create_chord("id", size=2)


async def part(backend: PostgresBackend) -> None:
    await backend.on_chord_part_return("id", "a", "SUCCESS", 1, 0)


async def size(backend: PostgresBackend) -> None:
    await backend.set_chord_size("id", 2)


async def has_chord(backend: PostgresBackend) -> bool:
    progress = await backend.chord("id").progress()
    return progress != (0, None)


async def done(backend: PostgresBackend) -> None:
    assert await backend.mark_as_done("id", 1)


async def done_for_longer(backend: PostgresBackend) -> None:
    assert await backend.mark_as_done("id", 1, expires=200, request=TaskRequest(id="id", group="id"))


async def pending(backend: PostgresBackend) -> None:
    assert await backend.mark_as_pending("id")


async def has_result(backend: PostgresBackend) -> bool:
    return await backend.exists("id")


async def save(backend: PostgresBackend) -> None:
    await backend.save_group("id", backend.group(["a", "b"]))


async def has_group(backend: PostgresBackend) -> bool:
    return await backend.restore_group("id") is not None


Step = Callable[[PostgresBackend], Awaitable[None]]
Check = Callable[[PostgresBackend], Awaitable[bool]]

STEPS: list[tuple[Step, Check]] = [
    (create, has_chord),
    (part, has_chord),
    (size, has_chord),
    (done, has_result),
    (done_for_longer, has_result),
    (pending, has_result),
    (save, has_group),
]
ROWS = {
    "celery_taskmeta": "task_id",
    "celery_tasksetmeta": "taskset_id",
    "celery_taskmeta_expiry": "id",
    "celery_tasksetmeta_expiry": "id",
    "celery_tasksetmeta_chord": "group_id",
}


@pytest.mark.parametrize("deleted", [False, True], ids=["locked", "deleted"])
@pytest.mark.parametrize(("step", "there"), STEPS, ids=[step.__name__ for step, _ in STEPS])
async def test_what_is_stored_while_its_expired_predecessor_is_removed_is_there(
    postgres_url: str, admin: asyncpg.Connection[Any], step: Step, there: Check, deleted: bool
) -> None:
    """Cleanup has locked every row, or has deleted them and not committed."""
    async with PostgresBackend(postgres_url, expires=100) as backend:
        await backend.create_chord("id", size=2)
        await backend.on_chord_part_return("id", "a", "SUCCESS", 1, 0)
        await backend.mark_as_done("id", 0, expires=50)
        await backend.save_group("id", backend.group(["old"]), expires=50)
        async with session(postgres_url, session_replication_role="replica") as past:
            for table, column in (("chord", "expires_at"), ("expiry", "expires_at")):
                name = f"celery_tasksetmeta_{table}"
                await past.execute(f"UPDATE {name} SET {column} = now() - interval '1 hour'")
            await past.execute("UPDATE celery_taskmeta_expiry SET expires_at = now() - interval '1 hour'")
        async with admin.transaction():
            for table in ROWS:
                await admin.execute(f"SELECT FROM {table} FOR UPDATE")
            removals = [*backend._sql.cleanup, backend._chord_table.cleanup]
            if deleted:
                assert sum([await admin.fetchval(each, column=1) for each in removals]) == 3
            stored = asyncio.ensure_future(step(backend))
            async with session(postgres_url) as other:
                await until(lambda: _is(blocked(other), 1))
            if not deleted:
                assert sum([await admin.fetchval(each, column=1) for each in removals]) == 3
        await stored
        assert await there(backend)
        assert await backend.cleanup() == 0
        assert await there(backend)


async def _is(number: Awaitable[int], wanted: int) -> bool:
    return await number == wanted


async def test_a_chord_created_while_its_predecessor_is_removed_completes(
    postgres_url: str, admin: asyncpg.Connection[Any]
) -> None:
    async with PostgresBackend(postgres_url) as backend:
        await backend.create_chord("totals", size=2)
        await admin.execute("UPDATE celery_tasksetmeta_chord SET expires_at = now() - interval '1 hour'")
        async with admin.transaction():
            await admin.execute("SELECT FROM celery_tasksetmeta_chord FOR UPDATE")
            created = asyncio.ensure_future(backend.create_chord("totals", size=2))
            async with session(postgres_url) as other:
                await until(lambda: _is(blocked(other), 1))
            await admin.execute("DELETE FROM celery_tasksetmeta_chord")
        chord = await created
        for index, task_id in enumerate("ab"):
            await backend.on_chord_part_return("totals", task_id, "SUCCESS", task_id, index)
        assert await chord == ["a", "b"]


async def test_a_saved_group_lives_as_long_as_its_chord(postgres_url: str, admin: asyncpg.Connection[Any]) -> None:
    async with PostgresBackend(postgres_url, expires=100) as backend:
        inner = backend.group(["q", "r"], id="inner")
        await backend.create_chord(backend.group([backend.result("p"), inner], id="g"))
        for index, task_id in enumerate("pqr"):
            await pass_time(admin, 70, table="celery_tasksetmeta")
            await admin.execute("UPDATE celery_tasksetmeta_chord SET expires_at = expires_at - interval '70 seconds'")
            ready = await backend.on_chord_part_return("g", task_id, "SUCCESS", task_id, index)
        assert ready is not None
        assert ready.results == ["p", ["q", "r"]]


async def test_a_registration_for_ever_leaves_nothing_behind(postgres_url: str, admin: asyncpg.Connection[Any]) -> None:
    """Its row says infinity, and Celery, which deletes the result, does not know of it."""
    async with PostgresBackend(postgres_url, expires=100) as backend:
        await backend.mark_as_done("a", 1, expires=0)
        await backend.mark_as_done("b", 1, expires=0)
        await admin.execute("DELETE FROM celery_taskmeta WHERE task_id = 'a'")
        assert await backend.cleanup() == 0
        assert [row[0] for row in await admin.fetch("SELECT id FROM celery_taskmeta_expiry")] == ["b"]


# -- time -----------------------------------------------------------------------------------------------------------

ZONES = ["UTC", "America/New_York", "Asia/Tokyo", "Pacific/Kiritimati"]


@pytest.mark.parametrize("theirs", ZONES)
@pytest.mark.parametrize("ours", ["UTC", "Asia/Tokyo"])
async def test_results_of_a_session_in_another_time_zone(
    postgres_url: str, admin: asyncpg.Connection[Any], ours: str, theirs: str
) -> None:
    """They are awaited, read, kept and removed by the time at which they were stored."""
    await PostgresBackend(postgres_url).create_schema()
    options = {"server_settings": {"timezone": ours, "datestyle": "SQL, DMY", "intervalstyle": "sql_standard"}}
    async with (
        PostgresBackend(postgres_url, expires=3600, connect_options=options) as backend,
        session(postgres_url, timezone=theirs) as celery,
    ):
        waiter = asyncio.ensure_future(backend.wait_for("a"))
        await settled(backend, 1)
        await store_as_celery(celery, "a")
        meta = await waiter
        assert meta.result == 7
        assert meta.date_done is not None
        assert abs(meta.date_done - datetime.now(UTC)) < timedelta(minutes=5)
        assert await backend.cleanup() == 0
        assert await backend.exists("a")
        assert (await celery.fetchval("SELECT now() - date_done FROM celery_taskmeta")) < timedelta(minutes=5)

        await celery.execute(
            "INSERT INTO celery_tasksetmeta VALUES (nextval('taskset_id_sequence'), 'g', $1, now())",
            b'[["g", null], [[["a", null], null]]]',
        )
        assert await backend.cleanup() == 0
        assert await backend.restore_group("g") is not None

        for table in ("celery_taskmeta", "celery_tasksetmeta"):
            await pass_time(admin, 3500, table=table)
        assert await backend.exists("a")
        assert await backend.cleanup() == 0
        for table in ("celery_taskmeta", "celery_tasksetmeta"):
            await pass_time(admin, 200, table=table)
        assert not await backend.exists("a")
        assert await backend.restore_group("g") is None
        assert await backend.cleanup() == 2
        assert await admin.fetchval("SELECT count(*) FROM celery_taskmeta_expiry") == 0


async def test_our_own_sessions_may_have_any_time_zone(postgres_url: str) -> None:
    tokyo = {"server_settings": {"timezone": "Asia/Tokyo"}}
    async with (
        PostgresBackend(postgres_url, expires=3600) as worker,
        PostgresBackend(postgres_url, expires=3600, connect_options=tokyo) as web,
    ):
        waiter = asyncio.ensure_future(web.wait_for("a"))
        await settled(web, 1)
        assert await worker.mark_as_done("a", 1)
        assert (await waiter).result == 1
        assert await web.mark_as_done("b", 2)
        for backend in (worker, web):
            assert await backend.cleanup() == 0
            assert [meta.result for meta in await backend.get_many(["a", "b"])] == [1, 2]


async def test_a_celery_worker_whose_libpq_has_a_time_zone(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTZ", "America/New_York")
    app = Celery(
        "shop", backend="db+" + postgres_url.replace("postgresql:", "postgresql+psycopg:"), set_as_current=False
    )
    app.conf.result_expires = 3600
    async with aioresult.celery.backend_from_app(app, create=True) as backend:
        await asyncio.to_thread(app.backend.store_result, "a", 7, "SUCCESS")
        assert await backend.cleanup() == 0
        assert await backend.result("a") == 7
        assert await asyncio.to_thread(app.backend.get_result, "a") == 7


@pytest.mark.parametrize("minutes", [-20, 20])
async def test_a_worker_whose_clock_is_wrong_stores_what_readers_see(
    postgres_url: str, admin: asyncpg.Connection[Any], monkeypatch: pytest.MonkeyPatch, minutes: int
) -> None:
    class Wrong(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(minutes=minutes)

    async with PostgresBackend(postgres_url, expires=600) as backend:
        with monkeypatch.context() as patch:
            patch.setattr(aioresult.backends.worker, "datetime", Wrong)
            assert await backend.mark_as_done("a", 1)
        assert await backend.result("a") == 1
        assert await backend.cleanup() == 0
        await pass_time(admin, 601)
        assert not await backend.exists("a")
        assert await backend.cleanup() == 1


# -- tables as they come --------------------------------------------------------------------------------------------

#: Which columns the tables of these versions of Celery lack.
LACKING = {
    "5.3 plain": ["children", *EXTENDED_COLUMNS],
    "5.5 extended": ["children", "stamps"],
    "5.7 plain": [*EXTENDED_COLUMNS],
}


@pytest.mark.parametrize("version", LACKING)
async def test_tables_of_older_versions(postgres_url: str, admin: asyncpg.Connection[Any], version: str) -> None:
    await admin.execute(schema_sql())
    await admin.execute("DROP TRIGGER aioresult_notify ON celery_taskmeta")
    for column in LACKING[version]:
        await admin.execute(f"ALTER TABLE celery_taskmeta DROP COLUMN {column}")
    for table in ("celery_taskmeta", "celery_tasksetmeta"):
        await admin.execute(f"DROP INDEX {table}_date_done_idx")
    extended = "extended" in version
    async with PostgresBackend(postgres_url, create=True, extended=extended) as backend:
        waiter = asyncio.ensure_future(backend.wait_for("a"))
        await settled(backend, 1)
        await store_as_celery(admin, "a")
        assert (await waiter).result == 7
        request = TaskRequest(id="b", task="add", children=[backend.result("c")])
        assert await backend.mark_as_failure("b", ValueError("no"), traceback="line 1", request=request)
        meta = await backend.get_task_meta("b")
        assert (meta.traceback, meta.name) == ("line 1", "add" if extended else None)
        assert len(meta.children) == (1 if "5.7" in version else 0)
        assert await backend.cleanup() == 0
    columns = await admin.fetch("SELECT attname FROM pg_attribute WHERE attrelid = 'celery_taskmeta'::regclass")
    assert not {row[0] for row in columns} & set(LACKING[version]), "Celery's own table was changed"
    indexed = "SELECT count(*) FROM pg_indexes WHERE indexdef LIKE '%(date_done)%' AND tablename = $1"
    for table in ("celery_taskmeta", "celery_tasksetmeta"):
        assert await admin.fetchval(indexed, table) == 1


async def test_groups_that_older_versions_pickled(postgres_url: str, admin: asyncpg.Connection[Any]) -> None:
    """Up to Celery 5.6 it is the group itself that is pickled, and needs Celery to be read."""
    async with PostgresBackend(postgres_url, accept=["json", "pickle"]) as backend:
        app = Celery("shop", backend="cache+memory://", set_as_current=False)
        group = CeleryGroupResult("g", [CeleryAsyncResult("a", app=app), CeleryAsyncResult("b", app=app)], app=app)
        await admin.execute(
            "INSERT INTO celery_tasksetmeta VALUES (nextval('taskset_id_sequence'), 'g', $1, now())",
            pickle.dumps(group),
        )
        restored = await backend.restore_group("g")
        assert restored is not None
        assert [result.id for result in restored] == ["a", "b"]


PARTITIONED = """
    CREATE SEQUENCE task_id_sequence; CREATE SEQUENCE taskset_id_sequence;
    CREATE TABLE celery_taskmeta (id int, task_id varchar(155) UNIQUE, status varchar(50), result bytea,
        date_done timestamp, traceback text, children bytea) PARTITION BY HASH (task_id);
    CREATE TABLE t0 PARTITION OF celery_taskmeta FOR VALUES WITH (MODULUS 2, REMAINDER 0);
    CREATE TABLE t1 PARTITION OF celery_taskmeta FOR VALUES WITH (MODULUS 2, REMAINDER 1);
    CREATE TABLE celery_tasksetmeta (id int PRIMARY KEY, taskset_id varchar(155) UNIQUE, result bytea,
        date_done timestamp)"""


async def test_a_partitioned_table(postgres_url: str, admin: asyncpg.Connection[Any]) -> None:
    await admin.execute(PARTITIONED)
    async with PostgresBackend(postgres_url, create=True, expires=100) as backend:
        ids = [f"id-{number}" for number in range(20)]
        waiters = [asyncio.ensure_future(backend.wait_for(task_id)) for task_id in ids]
        await settled(backend, 20)
        assert all(await asyncio.gather(*(backend.mark_as_done(task_id, task_id) for task_id in ids)))
        assert [meta.result for meta in await asyncio.gather(*waiters)] == ids
        assert await admin.fetchval("SELECT count(DISTINCT tableoid) FROM celery_taskmeta") == 2
        # A row has the same place in both partitions: none but the one that is meant may go.
        await backend.forget(ids[0])
        assert [await backend.exists(task_id) for task_id in ids] == [False, *[True] * 19]
        await admin.execute("ALTER TABLE celery_taskmeta DISABLE TRIGGER aioresult_stored")
        await admin.execute(
            "UPDATE celery_taskmeta SET date_done = date_done - interval '101 s' WHERE task_id = ANY($1)", ids[:10]
        )
        assert await backend.cleanup() == 9
        assert [await backend.exists(task_id) for task_id in ids] == [*[False] * 10, *[True] * 10]


@pytest.mark.parametrize(
    "column",
    [
        "date_done = 'infinity'",
        "date_done = '-infinity'",
        "date_done = '20000-01-01'",
        "date_done = '4000-01-01 BC'",
        "date_done = NULL",
        "status = NULL",
        "status = ''",
        "result = NULL",
        "result = '\\xff00'",
        "result = ''",
        "traceback = ''",
        "children = '[1]'",
    ],
)
async def test_an_odd_row_harms_only_its_readers(
    postgres_url: str, admin: asyncpg.Connection[Any], column: str
) -> None:
    async with PostgresBackend(postgres_url) as backend:
        waiters = [asyncio.ensure_future(backend.wait_for(task_id)) for task_id in ("a", "b")]
        odd = asyncio.ensure_future(backend.wait_for("odd", timeout=60))
        await settled(backend, 3)
        await store_as_celery(admin, "a")
        async with admin.transaction():
            await store_as_celery(admin, "odd")
            await admin.execute(f"UPDATE celery_taskmeta SET {column} WHERE task_id = 'odd'")
        await store_as_celery(admin, "b")
        assert [meta.result for meta in await asyncio.gather(*waiters)] == [7, 7]
        found: list[Any] = [*await backend.get_outcomes(["a", "odd", "b"])]
        assert [meta.result for meta in (found[0], found[2]) if not isinstance(meta, Exception)] == [7, 7]
        if isinstance(found[1], DecodeError) or found[1].ready:
            await asyncio.wait({odd})
        odd.cancel()
        await asyncio.gather(odd, return_exceptions=True)
        await backend.cleanup()


async def test_the_triggers_take_what_the_table_took(postgres_url: str, admin: asyncpg.Connection[Any]) -> None:
    """A row without an id, and ids longer than a notification may be, in a table made by hand."""
    await admin.execute(schema_sql())
    await admin.execute("ALTER TABLE celery_taskmeta ALTER COLUMN task_id TYPE text")
    async with PostgresBackend(postgres_url) as backend:
        waiter = asyncio.ensure_future(backend.wait_for("a"))
        await settled(backend, 1)
        for task_id in (None, "x" * 8000, "é" * 5000):
            for date_done in ("now()", "now() - interval '1 day'", "'infinity'"):
                await admin.execute(
                    f"INSERT INTO celery_taskmeta (id, task_id, status, date_done) VALUES ("
                    f"nextval('task_id_sequence'), $1, 'SUCCESS', {date_done}) "
                    f"ON CONFLICT (task_id) DO UPDATE SET date_done = excluded.date_done",
                    task_id,
                )
        await store_as_celery(admin, "a")
        assert (await waiter).result == 7


# -- other encodings ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def database(admin: asyncpg.Connection[Any], url: str, encoding: str) -> AsyncIterator[str]:
    await admin.execute(f"CREATE DATABASE other ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
    try:
        yield url.rpartition("/")[0] + "/other"
    finally:
        await admin.execute("DROP DATABASE other WITH (FORCE)")


@pytest.mark.parametrize("encoding", ["LATIN1", "WIN1252", "EUC_JP", "SQL_ASCII"])
async def test_a_database_that_is_not_utf8(postgres_url: str, admin: asyncpg.Connection[Any], encoding: str) -> None:
    async with database(admin, postgres_url, encoding) as url, PostgresBackend(url) as backend:
        ids = ["a", "b", "c"]
        waiters = [asyncio.ensure_future(backend.wait_for(task_id)) for task_id in ids]
        await settled(backend, 3)
        odd = asyncio.ensure_future(backend.wait_for("Ωमस्ते"))
        if encoding != "SQL_ASCII":
            with pytest.raises(BackendGetMetaError):
                await odd
        odd.cancel()
        kept = [backend.mark_as_failure(each, ValueError("x"), traceback="… → 日本 é") for each in ids]
        assert await asyncio.gather(*kept) == [True] * 3
        metas = await asyncio.gather(*waiters)
        assert {meta.traceback is not None and "é" in meta.traceback for meta in metas} <= {True, False}
        assert all(meta.traceback for meta in metas)
        await asyncio.gather(odd, return_exceptions=True)


# -- rights and locks -----------------------------------------------------------------------------------------------


async def test_a_schema_of_the_roles_own_is_enough(postgres_url: str, admin: asyncpg.Connection[Any]) -> None:
    await admin.execute("CREATE ROLE shop LOGIN; CREATE SCHEMA shop AUTHORIZATION shop")
    url = postgres_url.replace("postgres@", "shop@")
    try:
        async with PostgresBackend(url, schema="shop") as backend:
            assert await backend.mark_as_done("a", 1)
        async with PostgresBackend(url, schema="shop", create=True) as backend:
            assert await backend.mark_as_done("b", 1)
    finally:
        await admin.execute("DROP OWNED BY shop; DROP ROLE shop")


async def test_nothing_is_asked_for_where_nothing_is_missing(postgres_url: str, admin: asyncpg.Connection[Any]) -> None:
    """Neither rights, nor locks: a transaction that has every table locked is in nobody's way."""
    await PostgresBackend(postgres_url).create_schema()
    await admin.execute(
        "CREATE ROLE guest LOGIN; GRANT USAGE ON SCHEMA public TO guest; "
        "GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO guest"
    )
    await admin.execute(
        "GRANT DELETE ON celery_taskmeta_expiry TO guest; GRANT USAGE ON SEQUENCE task_id_sequence TO guest"
    )
    url = postgres_url.replace("postgres@", "guest@")
    try:
        async with admin.transaction():
            await admin.execute("LOCK TABLE celery_taskmeta, celery_tasksetmeta IN ROW EXCLUSIVE MODE")
            async with PostgresBackend(url, create=True) as backend:
                await backend.create_schema()
                assert await backend.mark_as_done("a", 1)
    finally:
        await admin.execute("DROP OWNED BY guest; DROP ROLE guest")


async def test_a_celery_role_without_rights_on_our_tables_stores_all_the_same(
    postgres_url: str, admin: asyncpg.Connection[Any]
) -> None:
    """Also with a date_done that has to be noted beside the result. It can use our function for nothing else."""
    await PostgresBackend(postgres_url).create_schema()
    await admin.execute("CREATE ROLE worker LOGIN; GRANT SELECT, INSERT, UPDATE ON celery_taskmeta TO worker")
    await admin.execute(
        "GRANT USAGE ON SEQUENCE task_id_sequence TO worker; GRANT USAGE, CREATE ON SCHEMA public TO worker"
    )
    try:
        async with session(postgres_url.replace("postgres@", "worker@"), timezone="Asia/Tokyo") as celery:
            await store_as_celery(celery, "a")
            await celery.execute("CREATE TABLE mine AS SELECT task_id, date_done FROM celery_taskmeta")
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await celery.execute(
                    "CREATE TRIGGER t AFTER INSERT ON mine FOR EACH ROW EXECUTE FUNCTION aioresult_stored()"
                )
        assert await admin.fetchval("SELECT count(*) FROM celery_taskmeta_expiry WHERE stored_at IS NOT NULL") == 1
    finally:
        await admin.execute("DROP OWNED BY worker; DROP ROLE worker")


async def test_a_busy_table_is_left_alone(postgres_url: str, admin: asyncpg.Connection[Any]) -> None:
    await admin.execute(schema_sql())
    await admin.execute("DROP TRIGGER aioresult_notify ON celery_taskmeta")
    async with admin.transaction():
        await store_as_celery(admin, "a")
        with pytest.raises(BackendConnectionError, match="cannot be locked"):
            await PostgresBackend(postgres_url, create=True).open()
        async with session(postgres_url) as other:
            assert await blocked(other) == 0
            await store_as_celery(other, "b")
    async with PostgresBackend(postgres_url, create=True) as backend:
        assert await backend.exists("a")


# -- deadlocks ------------------------------------------------------------------------------------------------------


async def test_batches_of_every_kind_do_not_wait_for_each_other(
    postgres_url: str, admin: asyncpg.Connection[Any]
) -> None:
    """Registrations, results, repetitions, groups and removals of the same ids, in opposite order."""
    count = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    before = await admin.fetchval(count)
    async with PostgresBackend(postgres_url) as one, PostgresBackend(postgres_url) as two:
        for attempt in range(8):
            ids = [f"{attempt}-{number}" for number in range(200)]
            await one.save_group(f"g{attempt}", one.group(ids))

            async def churn(backend: PostgresBackend, ids: list[str], group: str) -> None:
                request = TaskRequest(id="x", group=group)
                await asyncio.gather(
                    *(
                        call
                        for index, task_id in enumerate(ids)
                        for call in (
                            backend.mark_as_pending(task_id) if index % 3 else backend.mark_as_started(task_id),
                            backend.mark_as_started(task_id, pid=index)
                            if index % 2
                            else backend.mark_as_pending(task_id),
                            backend.mark_as_done(task_id, 1, request=request, expires=50 if index % 5 else None),
                            *([backend.forget(task_id)] if index % 7 == 0 else []),
                        )
                    )
                )

            await asyncio.gather(
                churn(one, ids, f"g{attempt}"), churn(two, ids[::-1], f"g{attempt}"), one.cleanup(), two.cleanup()
            )
    await admin.execute("SELECT pg_stat_force_next_flush()")
    assert await admin.fetchval(count) == before


# -- pools of the caller's ------------------------------------------------------------------------------------------


async def test_a_pool_of_one_is_refused(postgres_url: str) -> None:
    async with asyncpg.create_pool(postgres_url, min_size=1, max_size=1) as pool:
        with pytest.raises(ImproperlyConfigured, match="max_size=2"):
            PostgresBackend(postgres_url, pool=pool)
        async with PostgresBackend(postgres_url, pool=pool, listen_dsn=postgres_url) as backend:
            waiter = asyncio.ensure_future(backend.wait_for("a"))
            await settled(backend, 1)
            await backend.mark_as_done("a", 1)
            assert (await waiter).result == 1


async def test_a_pool_that_is_closed_fails_waiters_and_calls_at_once(postgres_url: str) -> None:
    pool = await asyncpg.create_pool(postgres_url, min_size=1, max_size=3)
    async with PostgresBackend(postgres_url, pool=pool) as backend:
        waiter = asyncio.ensure_future(backend.wait_for("a"))
        await settled(backend, 1)
        pool.terminate()
        with pytest.raises(BackendRefusedError, match="is closed"):
            await waiter
        with pytest.raises(BackendRefusedError, match="is closed"):
            await backend.mark_as_done("a", 1)


async def test_a_pool_without_a_free_connection_is_told_to_the_waiter(postgres_url: str) -> None:
    async with asyncpg.create_pool(postgres_url, min_size=1, max_size=2) as pool:
        async with PostgresBackend(postgres_url, pool=pool, heartbeat=0.2, retry_for=0.5) as backend:
            async with pool.acquire(), pool.acquire():
                with pytest.raises(BackendRefusedError, match="make it larger"):
                    await backend.wait_for("a")
            await backend.mark_as_done("a", 1)
            assert await backend.result("a") == 1


async def test_a_codec_of_the_callers_for_dates_harms_nothing(postgres_url: str) -> None:
    async def init(connection: asyncpg.Connection[Any]) -> None:
        for name in ("timestamptz", "timestamp", "json", "numeric"):
            await connection.set_type_codec(name, schema="pg_catalog", encoder=str, decoder=lambda text: math.pi)

    async with asyncpg.create_pool(postgres_url, min_size=1, max_size=3, init=init) as pool:
        async with PostgresBackend(postgres_url, pool=pool) as backend:
            waiter = asyncio.ensure_future(backend.wait_for("a"))
            await settled(backend, 1)
            before = datetime.now(UTC)
            assert await backend.mark_as_done("a", [1])
            meta = await waiter
            assert meta.result == [1]
            assert meta.date_done is not None
            assert before <= meta.date_done <= datetime.now(UTC)


async def test_a_codec_of_the_callers_for_bytes_is_refused(postgres_url: str) -> None:
    async def init(connection: asyncpg.Connection[Any]) -> None:
        await connection.set_type_codec("bytea", schema="pg_catalog", encoder=str, decoder=str)

    async with asyncpg.create_pool(postgres_url, min_size=1, max_size=3, init=init) as pool:
        with pytest.raises(ImproperlyConfigured, match="bytea"):
            await PostgresBackend(postgres_url, pool=pool).open()


# -- what a second reader found -------------------------------------------------------------------------------------


async def test_nobody_can_have_our_function_run_code_of_theirs(
    postgres_url: str, admin: asyncpg.Connection[Any]
) -> None:
    """It runs with the rights of its owner: a table of the same name in pg_temp must not be taken for ours."""
    await PostgresBackend(postgres_url).create_schema()
    await admin.execute("CREATE ROLE worker LOGIN; GRANT SELECT, INSERT, UPDATE ON celery_taskmeta TO worker")
    await admin.execute("GRANT USAGE ON SEQUENCE task_id_sequence TO worker; GRANT USAGE ON SCHEMA public TO worker")
    try:
        async with session(postgres_url.replace("postgres@", "worker@"), timezone="Asia/Tokyo") as celery:
            await celery.execute("""
                CREATE TEMP TABLE celery_taskmeta_expiry (
                    id text PRIMARY KEY, expires_at timestamptz, stored_at timestamptz, date_done timestamp);
                CREATE FUNCTION pg_temp.f() RETURNS trigger LANGUAGE plpgsql AS
                    $$BEGIN EXECUTE 'ALTER ROLE worker SUPERUSER'; RETURN NEW; END$$;
                CREATE TRIGGER t BEFORE INSERT ON celery_taskmeta_expiry FOR EACH ROW EXECUTE FUNCTION pg_temp.f()""")
            await store_as_celery(celery, "a")
        assert not await admin.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = 'worker'")
        assert await admin.fetchval("SELECT count(*) FROM celery_taskmeta_expiry") == 1
    finally:
        await admin.execute("DROP OWNED BY worker; DROP ROLE worker")


@pytest.mark.parametrize(
    "change",
    [
        "DROP TABLE celery_taskmeta_expiry",
        "CREATE SCHEMA archive; ALTER TABLE celery_taskmeta_expiry SET SCHEMA archive",
        "ALTER TABLE celery_taskmeta_expiry RENAME COLUMN stored_at TO moment",
        "ALTER TABLE celery_taskmeta_expiry ALTER COLUMN id TYPE varchar(3)",
    ],
)
async def test_a_celery_worker_stores_whatever_becomes_of_our_tables(
    postgres_url: str, admin: asyncpg.Connection[Any], change: str
) -> None:
    await PostgresBackend(postgres_url).create_schema()
    await admin.execute(change)
    try:
        async with session(postgres_url, timezone="Asia/Tokyo") as celery:
            await store_as_celery(celery, "a long id")
        assert await admin.fetchval("SELECT count(*) FROM celery_taskmeta") == 1
    finally:
        await admin.execute("DROP SCHEMA IF EXISTS archive CASCADE")


async def test_a_table_of_the_first_release_is_made_anew(postgres_url: str, admin: asyncpg.Connection[Any]) -> None:
    """Before there was stored_at: an id of 155 characters, and an expiry that was always there."""
    await PostgresBackend(postgres_url).create_schema()
    for table in ("celery_taskmeta", "celery_tasksetmeta"):
        await admin.execute(
            f"DROP TRIGGER aioresult_stored ON {table}; ALTER TABLE {table}_expiry DROP COLUMN stored_at, "
            f"DROP COLUMN meta, ALTER COLUMN id TYPE varchar(155), ALTER COLUMN expires_at SET NOT NULL"
        )
    with pytest.raises(BackendRefusedError, match="create_schema"):
        await PostgresBackend(postgres_url).open()
    async with (
        PostgresBackend(postgres_url, create=True) as backend,
        session(postgres_url, timezone="Asia/Tokyo") as far,
    ):
        await store_as_celery(far, "a")
        assert await backend.result("a") == 7
        assert await admin.fetchval("SELECT count(*) FROM celery_taskmeta_expiry WHERE stored_at IS NOT NULL") == 1


async def test_metadata_counts_for_how_many_results_are_read_at_once(postgres_url: str) -> None:
    async with PostgresBackend(postgres_url) as backend:
        await backend.mark_as_done("a", 1, meta={"text": "x" * 1_000_000})
        await backend.get_task_meta("a")
        assert backend._shards[0]._value_size > 1_000_000


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo"])
async def test_what_celery_stores_later_has_no_metadata_of_an_earlier_state(postgres_url: str, zone: str) -> None:
    """In a session of another zone, the trigger writes the row that had the metadata."""
    async with PostgresBackend(postgres_url) as backend, session(postgres_url, timezone=zone) as celery:
        await backend.mark_as_failure("a", ValueError(), meta={"tries": 1})
        assert (await backend.get_task_meta("a")).meta == {"tries": 1}
        await celery.execute("UPDATE celery_taskmeta SET status = 'SUCCESS', result = '7', date_done = now()")
        found = await backend.get_task_meta("a")
        assert (found.result, found.meta) == (7, None)


async def test_the_zone_is_that_of_the_database_and_not_of_the_session(
    postgres_url: str, admin: asyncpg.Connection[Any]
) -> None:
    async with session(postgres_url, timezone="Asia/Tokyo") as migration:
        await migration.execute(schema_sql())
    async with PostgresBackend(postgres_url, expires=3600) as backend:
        # Several, because one that takes more than a second, on a busy machine, is noted in any zone.
        theirs, ours = ({f"{name} {number}" for number in range(5)} for name in ("theirs", "ours"))
        for task_id in theirs:
            await store_as_celery(admin, task_id)
        for task_id in ours:
            await backend.mark_as_done(task_id, 1)
        await pass_time(admin, 60)
        assert await backend.cleanup() == 0
        assert await backend.exists("theirs 0")
        noted = {row[0] for row in await admin.fetch("SELECT id FROM celery_taskmeta_expiry")}
        assert theirs - noted
        assert ours - noted


async def test_an_hour_that_a_time_zone_has_twice_deletes_nothing_early(
    postgres_url: str, admin: asyncpg.Connection[Any]
) -> None:
    """A row of the second 02:30 looks older than the first 02:45."""
    database = await admin.fetchval("SELECT current_database()")
    await admin.execute(f"ALTER DATABASE {database} SET timezone = 'Europe/Berlin'")
    try:
        second, first = datetime(2026, 10, 25, 1, 30, tzinfo=UTC), datetime(2026, 10, 25, 0, 45, tzinfo=UTC)
        expires = (datetime.now(UTC) - first).total_seconds()
        async with PostgresBackend(postgres_url, expires=expires, create=True) as backend:
            await backend.mark_as_done("a", 1)
            async with session(postgres_url, session_replication_role="replica") as past:
                await past.execute("UPDATE celery_taskmeta SET date_done = $1::timestamptz::timestamp", second)
            assert await backend.exists("a")
            assert await backend.cleanup() == 0
            assert await backend.exists("a")
    finally:
        await admin.execute(f"ALTER DATABASE {database} RESET timezone")


@pytest.mark.parametrize("how", ["member", "part"])
async def test_a_worker_with_a_shorter_default_takes_nothing_from_a_group(
    postgres_url: str, admin: asyncpg.Connection[Any], how: str
) -> None:
    async with PostgresBackend(postgres_url, expires=1000) as web, PostgresBackend(postgres_url, expires=10) as worker:
        await web.save_group("g", web.group(["a"]))
        if how == "member":
            await worker.mark_as_done("a", 1, request=TaskRequest(id="a", group="g"))
        else:
            await worker.on_chord_part_return("g", "a", "SUCCESS", 1, 0)
        await pass_time(admin, 500, table="celery_tasksetmeta")
        assert await web.cleanup() == 0
        assert await web.restore_group("g") is not None
        assert await worker.restore_group("g") is None
        await pass_time(admin, 501, table="celery_tasksetmeta")
        assert await web.restore_group("g") is None
        assert await web.cleanup() == 1


async def test_what_lives_for_ever_is_looked_through_a_bounded_number_at_a_time(
    postgres_url: str, admin: asyncpg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("CLEANUP_BATCH", 3), ("ORPHANS", 3)):
        monkeypatch.setattr(f"aioresult.backends.postgres.statements.{name}", size)
        monkeypatch.setattr(f"aioresult.backends.postgres.cleanup.{name}", size)
    async with PostgresBackend(postgres_url, expires=100) as backend:
        lasting = [f"lasting {number}" for number in range(8)]
        ids = [f"id {number}" for number in range(8)]
        await asyncio.gather(*(backend.mark_as_done(task_id, 1, expires=0) for task_id in lasting))
        await asyncio.gather(*(backend.mark_as_done(task_id, 1) for task_id in ids))
        async with session(postgres_url, session_replication_role="replica") as past:
            # All of one moment, as after a bulk insert; those that last come first.
            for table in ("celery_taskmeta", "celery_taskmeta_expiry"):
                await past.execute(f"UPDATE {table} SET date_done = date_trunc('day', now()) - interval '2 days'")
            await past.execute(
                "UPDATE celery_taskmeta SET date_done = date_done + interval '1 s' WHERE task_id LIKE 'id%'"
            )
            await past.execute("DELETE FROM celery_taskmeta WHERE task_id IN ('lasting 1', 'lasting 6')")
        assert await backend.cleanup() == 8
        left = "SELECT array_agg(id ORDER BY id) FROM celery_taskmeta_expiry"
        for _ in range(3):
            await backend.cleanup()
        assert await admin.fetchval(left) == [each for each in lasting if each not in ("lasting 1", "lasting 6")]


async def test_what_of_a_mixed_batch_is_committed_is_not_repeated(
    postgres_url: str, admin: asyncpg.Connection[Any]
) -> None:
    """A registration that was repeated would find itself, and say that something was there."""
    async with PostgresBackend(postgres_url) as backend:
        await admin.execute("ALTER TABLE celery_taskmeta ADD CHECK (status <> 'BAD')")
        outcomes = await asyncio.gather(
            backend.mark_as_pending("a"),
            backend.mark_as_pending("b"),
            backend.mark_as_started("c"),
            backend.mark_as_done("c", 1),
            backend.store_result("b", None, "BAD"),
            return_exceptions=True,
        )
        assert list(outcomes[:4]) == [True] * 4
        assert isinstance(outcomes[4], aioresult.BackendStoreError)


async def test_creating_the_schema_beside_another_that_hangs_ends(
    postgres_url: str, admin: asyncpg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = aioresult.backends.postgres.schema._text("begin.sql")
    assert "'10s'" in begin
    monkeypatch.setattr(
        "aioresult.backends.postgres.schema._text",
        lambda name, text=aioresult.backends.postgres.schema._text: text(name).replace("'10s'", "'100ms'"),
    )
    async with admin.transaction():
        await admin.execute("SELECT pg_advisory_xact_lock(hashtext('aioresult schema'))")
        with pytest.raises(BackendConnectionError, match="cannot be locked"):
            await PostgresBackend(postgres_url).create_schema()
        async with session(postgres_url) as other:
            assert await blocked(other) == 0


async def test_a_large_table_without_an_index_is_warned_of(
    postgres_url: str, admin: asyncpg.Connection[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    await PostgresBackend(postgres_url).create_schema()
    await admin.execute("DROP INDEX celery_taskmeta_date_done_idx")
    await store_as_celery(admin, "a")
    monkeypatch.setattr("aioresult.backends.postgres.schema._LARGE_TABLE", 0)
    await PostgresBackend(postgres_url).create_schema()
    assert any("CONCURRENTLY: ON celery_taskmeta (date_done)" in record.getMessage() for record in caplog.records)
