"""Both ways between Celery 5.7 and this library in PostgreSQL, where Celery polls and a trigger tells us."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4
from zoneinfo import ZoneInfo

import asyncpg
import psycopg
import pytest
from celery.result import GroupResult as CeleryGroupResult
from psycopg.rows import dict_row

import aioresult
from aioresult import Backend, GroupResult, states
from aioresult.backends.postgres import PostgresBackend, schema_sql
from aioresult.celery import backend_from_app

from .celery_app import make_app
from .celery_suite import Interoperability
from .celery_worker import GUARD, Worker, app_with, both, celery_workers, reaches
from .harness import until
from .servers import PostgresServer

pytestmark = [
    pytest.mark.xdist_group("celery-postgres"),
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:The DatabaseBackend result backend cannot store compressed payloads"),
]

CONFIGURATIONS: Mapping[str, Mapping[str, Any]] = {
    "Celery's tables": {"result_chord_retry_interval": 0.05},
    "our tables": {
        "result_chord_retry_interval": 0.05,
        "result_extended": True,
        "result_expires": 1234,
        "result_compression": "gzip",
        "timezone": "Asia/Tokyo",
    },
}

#: Of the database with our tables. No hour of it begins with an hour of UTC.
ZONE = "America/St_Johns"

NAMES = {
    "database_table_schemas": {"task": "the shop", "group": "the shop"},
    "database_table_names": {"task": "Outcomes", "group": "Groups of them"},
}


def celerys(url: str) -> str:
    """What Celery calls that database."""
    return url.replace("postgresql:", "db+postgresql+psycopg:")


def plain(url: str) -> str:
    return url.replace("db+postgresql+psycopg:", "postgresql:")


def execute(url: str, *statements: str) -> None:
    with psycopg.connect(plain(url), autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


def query(url: str, statement: str, *args: Any, options: str = "") -> list[dict[str, Any]]:
    with psycopg.connect(plain(url), row_factory=dict_row, options=options) as connection:
        return connection.execute(statement, args).fetchall()


@pytest.fixture(scope="module")
def start_worker(
    own_postgres: PostgresServer, shared_redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Worker]]:
    """Start the worker of a configuration, with a database of its own, or return the one that runs."""
    running: dict[str, Worker] = {}
    databases = {name: f"celery_{number}" for number, name in enumerate((*CONFIGURATIONS, "other names"))}
    execute(own_postgres.url, *(f"CREATE DATABASE {database}" for database in databases.values()))
    try:
        with celery_workers(shared_redis_url, tmp_path_factory.mktemp("celery")) as start_one:

            def start(name: str) -> Worker:
                if name in running:
                    return running[name]
                url = celerys(urlsplit(own_postgres.url)._replace(path=f"/{databases[name]}").geturl())
                if name == "other names":
                    execute(url, 'CREATE SCHEMA "the shop"')
                    running[name] = start_one(name, url, NAMES, apart=True)
                    execute(url, schema_sql("the shop", "Outcomes", "Groups of them"))
                elif name == "our tables":
                    execute(url, f"ALTER DATABASE {databases[name]} SET timezone = '{ZONE}'")
                    execute(url, schema_sql())
                    running[name] = start_one(name, url, CONFIGURATIONS[name])
                    running[name].zone = ZoneInfo(ZONE)
                else:
                    running[name] = start_one(name, url, CONFIGURATIONS[name])
                    execute(url, schema_sql())
                return running[name]

            yield start
    finally:
        execute(own_postgres.url, *(f"DROP DATABASE {database} WITH (FORCE)" for database in databases.values()))


@pytest.fixture(params=CONFIGURATIONS)
def worker(request: pytest.FixtureRequest, start_worker: Callable[[str], Worker]) -> Iterator[Worker]:
    worker = start_worker(request.param)
    worker.check()
    yield worker
    worker.check()


@pytest.fixture
async def backend(worker: Worker) -> AsyncIterator[Backend]:
    async with backend_from_app(worker.app) as backend:
        yield backend


class StoredInPostgres:
    def __init__(self, url: str) -> None:
        self._url = url

    async def task(self, task_id: str) -> dict[str, Any]:
        return self._row("SELECT * FROM celery_taskmeta WHERE task_id = %s", task_id)

    async def group(self, group_id: str) -> dict[str, Any]:
        return self._row("SELECT * FROM celery_tasksetmeta WHERE taskset_id = %s", group_id)

    def _row(self, statement: str, id: str) -> dict[str, Any]:
        (row,) = query(self._url, statement, id)
        assert isinstance(row["result"], bytes)
        return row | {"id": None, "date_done": row["date_done"] is not None}


@pytest.fixture
def stored(worker: Worker) -> StoredInPostgres:
    return StoredInPostgres(worker.backend)


class TestOnPostgres(Interoperability):
    pass


# -- waiting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("progress", [None, {"done": 3}])
async def test_a_waiter_asks_nothing_until_the_workers_store_is_announced(worker: Worker, progress: Any) -> None:
    asked: list[str] = []

    async def connect() -> asyncpg.Connection[Any]:
        connection = await asyncpg.connect(plain(worker.backend))
        connection.add_query_logger(lambda record: asked.append(record.query))
        return connection

    gate = str(uuid4())
    sent = worker.call("gated", gate, progress)

    def runs() -> bool:
        return bool(sent.state == ("PROGRESS" if progress else states.STARTED))

    await until(runs)
    async with backend_from_app(worker.app, connect=connect, heartbeat=GUARD) as backend:
        assert isinstance(backend, PostgresBackend)
        fetch = backend._sql.fetch
        waiting = asyncio.create_task(backend.result(sent.id).get(timeout=GUARD))

        def listens_and_has_looked() -> bool:
            return asked[-2:] == [f'LISTEN "{backend._channel(sent.id)}"', fetch]

        await until(listens_and_has_looked)
        asked.clear()
        for _ in range(20):  # in which time whoever polls would
            await asyncio.to_thread(runs)
        assert not waiting.done()
        assert asked == []
        worker.open(gate, "open")
        assert await waiting == "open"
        assert asked[0] == fetch
        assert asked.count(fetch) == 1


async def test_retries_and_progress_are_announced_as_they_are_stored(worker: Worker, backend: Backend) -> None:
    """Heard by somebody who only listens, on the channel on which a waiter does."""
    assert isinstance(backend, PostgresBackend)
    heard: list[str] = []
    connection = await asyncpg.connect(plain(worker.backend))
    try:
        task_id, gate = str(uuid4()), str(uuid4())
        await backend.exists(task_id)
        await backend._subscribe([task_id])  # which learns the names of the channels
        await connection.add_listener(backend._channel(task_id), lambda *args: heard.append(str(args[-1])))
        worker.signature("flaky", gate).apply_async(task_id=task_id)
        await reaches(backend.result(task_id), states.RETRY)
        worker.open(gate, "open")

        def announced() -> bool:
            return f"7 SUCCESS{task_id}" in heard

        await until(announced)
        assert f"5 RETRY{task_id}" in heard
    finally:
        await connection.close()


# -- tables ---------------------------------------------------------------------------------------------------------


def shape(url: str) -> list[dict[str, Any]]:
    """Columns and indexes of Celery's two tables, and its sequences."""
    columns = query(
        url,
        """SELECT table_name, column_name, data_type, character_maximum_length, is_nullable, column_default
        FROM information_schema.columns WHERE table_name IN ('celery_taskmeta', 'celery_tasksetmeta')
        ORDER BY table_name, ordinal_position""",
    )
    indexes = query(
        url,
        """SELECT indrelid::regclass::text AS table_name, indisunique, indisprimary,
            (SELECT array_agg(attname::text) FROM pg_attribute WHERE attrelid = indrelid AND attnum = ANY(indkey))
        FROM pg_index WHERE indrelid IN ('celery_taskmeta'::regclass, 'celery_tasksetmeta'::regclass)
        ORDER BY 1, 4""",
    )
    sequences = query(
        url, "SELECT sequencename FROM pg_sequences WHERE sequencename IN ('task_id_sequence', 'taskset_id_sequence')"
    )
    return [*columns, *indexes, *sorted(sequences, key=str)]


async def test_tables_of_celerys_get_a_trigger_and_stay_as_they_are(postgres_url: str) -> None:
    with app_with(celerys(postgres_url)) as app:
        theirs, ours = (app.AsyncResult(str(uuid4())) for _ in range(2))
        app.backend.mark_as_started(theirs.id)
        before = shape(postgres_url)
        backend = backend_from_app(app)
        with pytest.raises(aioresult.BackendError, match=r"create them once with 'await backend\.create_schema\(\)'"):
            await backend.open()
        assert isinstance(backend, PostgresBackend)
        await backend.create_schema()
        assert shape(postgres_url) == before
        async with backend:
            waiting = asyncio.create_task(backend.result(theirs.id).get(timeout=GUARD))
            await asyncio.to_thread(app.backend.mark_as_done, theirs.id, "theirs")
            assert await waiting == "theirs"
            await backend.mark_as_done(ours.id, "ours")
            assert ours.get(timeout=GUARD) == "ours"


async def test_tables_of_ours_are_as_celery_makes_them(postgres_url: str) -> None:
    with app_with(celerys(postgres_url)) as app:
        app.backend.mark_as_done("first", 1)
        expected = shape(postgres_url)
        for column in expected:
            if column.get("column_name") == "id":
                column["data_type"] = "bigint"  # one table in a busy service outgrows Celery's integer
    execute(postgres_url, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    async with aioresult.connect(postgres_url) as backend:
        await backend.mark_as_done("ours", 1)
        assert shape(postgres_url) == expected
        with app_with(celerys(postgres_url)) as app:
            app.backend.mark_as_done("theirs", 2)
            CeleryGroupResult("group", [app.AsyncResult("ours")]).save(app.backend)
            assert await both(app.AsyncResult("ours"), backend.result("theirs")) == (1, 2)
            assert await backend.restore_group("group") is not None
        assert shape(postgres_url) == expected


async def test_tables_of_other_names(start_worker: Callable[[str], Worker]) -> None:
    worker = start_worker("other names")
    async with backend_from_app(make_app(None, worker.backend, **NAMES)) as backend:
        ours = backend.result(str(uuid4()))
        assert await backend.result(worker.call("add", 1, 2).id).get(timeout=GUARD) == 3
        await backend.mark_as_done(ours.id, "ours")
        assert await backend.result(worker.call("look_up", ours.id).id).get(timeout=GUARD) == [states.SUCCESS, "ours"]
        group = backend.group([ours])
        await group.save()
        saved_by_celery = await backend.result(worker.call("save_again", group.id).id).get(timeout=GUARD)
        restored = await GroupResult.restore(saved_by_celery, backend)
        assert restored is not None
        assert await restored == ["ours"]
    worker.check()


# -- expiry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who_cleans", ["Celery", "we"])
async def test_both_agree_on_what_has_expired(worker: Worker, backend: Backend, who_cleans: str) -> None:
    # What an earlier test has left may have expired since.
    execute(worker.backend, "DELETE FROM celery_taskmeta", "DELETE FROM celery_tasksetmeta")
    theirs, their_old, ours, our_old = ids = [str(uuid4()) for _ in range(4)]
    for id in (theirs, their_old):
        worker.app.backend.mark_as_done(id, 1)
        CeleryGroupResult(id, [worker.app.AsyncResult(id)]).save(worker.app.backend)
    for id in (ours, our_old):
        await backend.mark_as_done(id, 1)
        await backend.group([id], id=id).save()
    for age, name in ((backend.expires - GUARD, (theirs, ours)), (backend.expires + GUARD, (their_old, our_old))):
        for table, key in (("celery_taskmeta", "task_id"), ("celery_tasksetmeta", "taskset_id")):
            older = f"UPDATE {table} SET date_done = date_done - %s * interval '1 second' WHERE {key} = ANY(%s)"
            as_if_time_had_passed = "-c session_replication_role=replica"  # without the triggers
            query(worker.backend, f"{older} RETURNING 1", age, list(name), options=as_if_time_had_passed)
    assert [await backend.exists(id) for id in ids] == [True, False, True, False]
    assert [await backend.restore_group(id) is not None for id in ids] == [True, False, True, False]
    if who_cleans == "Celery":
        worker.app.backend.cleanup()
    else:
        assert await backend.cleanup() == 4
    left = query(
        worker.backend,
        "SELECT task_id AS id FROM celery_taskmeta UNION ALL SELECT taskset_id FROM celery_tasksetmeta",
    )
    assert sorted(row["id"] for row in left if row["id"] in ids) == sorted([theirs, ours] * 2)


# -- pickles --------------------------------------------------------------------------------------------------------

OF_CELERY_BEFORE_5_7: Mapping[str, Any] = {
    states.SUCCESS: {"a": (1, 2)},
    states.FAILURE: {"exc_type": "ValueError", "exc_message": ("by hand",), "exc_module": "builtins"},
}


@pytest.mark.parametrize("state", OF_CELERY_BEFORE_5_7)
async def test_a_pickle_of_before_5_7_is_refused_unless_accepted(worker: Worker, backend: Backend, state: str) -> None:
    sent = worker.app.AsyncResult(str(uuid4()))
    worker.app.backend.store_result(sent.id, ValueError() if state == states.FAILURE else 1, state)
    query(
        worker.backend,
        "UPDATE celery_taskmeta SET result = %s WHERE task_id = %s RETURNING 1",
        pickle.dumps(OF_CELERY_BEFORE_5_7[state]),
        sent.id,
    )
    with pytest.raises(aioresult.DecodeError, match=r"pickle"):
        await backend.result(sent.id)
    async with backend_from_app(worker.app, accept=["json", "pickle"]) as accepting:
        theirs, ours = await both(sent, accepting.result(sent.id))
    assert repr(ours) == repr(theirs)
    assert type(ours) is (ValueError if state == states.FAILURE else dict)


async def test_what_an_app_pickles_is_refused_by_another(worker: Worker, backend: Backend) -> None:
    task_id = str(uuid4())
    with app_with(worker.backend, result_serializer="pickle", accept_content=["pickle"]) as app:
        app.backend.mark_as_done(task_id, {1, 2})
    with pytest.raises(aioresult.DecodeError, match=r"pickle"):
        await backend.result(task_id)


# -- the settings of an app -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ({"database_table_schemas": {"task": "one", "group": "another"}}, "names two schemas"),
        ({"database_table_schemas": {"task": "one"}}, "names two schemas"),
        ({"database_table_names": {"task": "n" * 64}}, "cannot name a table"),
    ],
)
def test_names_that_cannot_be_had(conf: Mapping[str, Any], message: str) -> None:
    with pytest.raises(aioresult.ImproperlyConfigured, match=message):
        backend_from_app(make_app(None, "db+postgresql+psycopg://there/results", **conf))
