"""The tables of django-celery-results: what Django's Celery workers store is awaited, with nothing changed for them."""

from __future__ import annotations

import asyncio
import base64
import os
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import kombu.pools
import pytest
import redis
from celery import Celery

import aioresult
from aioresult import AsyncResult, BackendRefusedError, DecodeError
from aioresult.backends.postgres import PostgresBackend

from .celery_app import CardDeclined
from .servers import PostgresServer
from .test_postgres import settled

TABLE = "django_celery_results_taskresult"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def url(own_postgres: PostgresServer) -> Iterator[str]:
    """A database with the tables that Django's migrations make."""

    async def admin(statement: str) -> None:
        connection = await asyncpg.connect(own_postgres.url)
        await connection.execute(statement)
        await connection.close()

    asyncio.run(admin("CREATE DATABASE django"))
    try:
        url = urlsplit(own_postgres.url)._replace(path="/django").geturl()
        environ = os.environ | {"AIORESULT_TEST_DJANGO": url}
        subprocess.run([sys.executable, "-m", "tests.django_app"], cwd=ROOT, env=environ, check=True)
        yield url
    finally:
        asyncio.run(admin("DROP DATABASE django WITH (FORCE)"))


@pytest.fixture(scope="module")
def app(url: str, shared_redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Celery]:
    """To call the tasks of a real worker of the Django project, which runs."""
    with redis.Redis.from_url(shared_redis_url) as client:
        client.flushall()
    broker = urlsplit(shared_redis_url)._replace(path="/7").geturl()
    output = tmp_path_factory.mktemp("django") / "worker"
    environ = os.environ | {"AIORESULT_TEST_DJANGO": url, "AIORESULT_TEST_CELERY_BROKER": broker}
    options = "--pool solo --without-gossip --without-mingle --without-heartbeat -l WARNING"
    command = [sys.executable, "-m", "celery", "-A", "tests.django_app", "worker", *options.split()]
    with output.open("w") as file:
        worker = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT)
    app = Celery("tests", broker=broker, set_as_current=False)
    try:
        while not app.control.ping(timeout=0.1, limit=1):
            assert worker.poll() is None, output.read_text()
        yield app
    finally:
        worker.terminate()
        worker.wait()
        app.close()
        kombu.pools.reset()  # type: ignore[no-untyped-call]
        with redis.Redis.from_url(shared_redis_url) as client:
            client.flushall()


@pytest.fixture
async def backend(url: str) -> AsyncIterator[PostgresBackend]:
    async with PostgresBackend(url, table=TABLE, create=True) as backend:
        yield backend


@pytest.fixture
async def admin(url: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


async def ended(backend: PostgresBackend, app: Celery, name: str, *args: Any) -> AsyncResult[Any]:
    """A handle on the result of a task, which a waiter was told of that had waited from before it was called."""
    result = backend.result(str(uuid4()))
    waiter = asyncio.ensure_future(backend.wait_for(str(result.id)))
    await settled(backend, 1)
    await asyncio.to_thread(app.send_task, name, args, task_id=result.id)
    assert (await waiter).ready
    return result


async def test_a_result_is_pushed(backend: PostgresBackend, app: Celery) -> None:
    result = await ended(backend, app, "django.add", 2, 3)
    assert await result == 5
    meta = await result.fetch()
    assert (meta.name, meta.args, meta.status) == ("django.add", "(2, 3)", "SUCCESS")
    assert meta.worker is not None
    assert meta.date_done is not None
    assert [child.id for child in await result.children()] == ["a child"]


async def test_a_failure_is_raised_as_what_it_was(backend: PostgresBackend, app: Celery) -> None:
    result = await ended(backend, app, "django.fail")
    with pytest.raises(CardDeclined, match="4242"):
        await result
    traceback = await result.traceback()
    assert traceback is not None
    assert "CardDeclined" in traceback


async def test_a_group_that_django_saved(backend: PostgresBackend, app: Celery) -> None:
    one, other = await ended(backend, app, "django.add", 1, 1), await ended(backend, app, "django.add", 2, 2)
    await ended(backend, app, "django.save", "g", one.id, other.id)
    group = await backend.restore_group("g")
    assert group is not None
    assert await group == [2, 4]
    assert await backend.restore_group("none") is None
    await backend.delete_group("g")
    assert await backend.restore_group("g") is None


async def put(admin: asyncpg.Connection[Any], task_id: str, encoding: str, result: str | None) -> None:
    await admin.execute(
        f"INSERT INTO {TABLE} (task_id, status, content_type, content_encoding, result, date_created, date_done, meta) "
        "VALUES ($1, 'SUCCESS', '', $2, $3, now(), now(), NULL)",
        task_id,
        encoding,
        result,
    )


async def test_what_the_columns_may_hold(url: str, admin: asyncpg.Connection[Any]) -> None:
    """Pickles in base64, ids longer than Celery's own, and what cannot be read."""
    long = "x" * 255
    async with PostgresBackend(url, table=TABLE, create=True, accept=["json", "pickle"]) as backend:
        await put(admin, "pickled", "binary", base64.b64encode(pickle.dumps({"a": (1, 2)})).decode())
        await put(admin, long, "utf-8", '{"a": "é"}')
        await put(admin, "none", "utf-8", None)
        await put(admin, "odd", "binary", "not base64")
        found = await backend.get_outcomes(["pickled", long, "none", "odd", "unknown"])
        assert [meta.result for meta in found if not isinstance(meta, Exception)] == [
            {"a": (1, 2)},
            {"a": "é"},
            None,
            None,
        ]
        assert isinstance(found[3], DecodeError)
        for task_id in ("pickled", long, "none", "odd"):
            await backend.forget(task_id)
            assert not await backend.exists(task_id)
    assert await admin.fetchval(f"SELECT count(*) FROM {TABLE} WHERE task_id = $1", long) == 0


async def test_it_is_read_and_not_written(backend: PostgresBackend, admin: asyncpg.Connection[Any]) -> None:
    before = await admin.fetchval(f"SELECT count(*) FROM {TABLE}")
    for attempt in (
        backend.mark_as_done("a", 1),
        backend.mark_as_pending("a"),
        backend.save_group("g", backend.group(["a"])),
        backend.create_chord("c", size=2),
        backend.on_chord_part_return("c", "a", "SUCCESS", 1),
    ):
        with pytest.raises(BackendRefusedError, match="only reads"):
            await attempt
    assert await backend.cleanup() == 0
    assert await admin.fetchval(f"SELECT count(*) FROM {TABLE}") == before
    ours = "SELECT count(*) FROM pg_class WHERE relkind = 'r' AND relname LIKE 'celery%'"
    assert await admin.fetchval(ours) == 0


async def test_the_tables_are_found_and_the_trigger_is_asked_for(url: str, admin: asyncpg.Connection[Any]) -> None:
    await admin.execute(f"DROP TRIGGER IF EXISTS aioresult_notify ON {TABLE}")
    await put(admin, "before", "utf-8", "1")
    with pytest.raises(BackendRefusedError, match="create_schema"):
        await PostgresBackend(url).open()
    await PostgresBackend(url).create_schema()
    async with aioresult.connect(url) as backend:
        await put(admin, "found", "utf-8", "7")
        assert await backend.result("found") == 7


async def test_tables_that_django_does_not_use_are_left_alone(own_postgres: PostgresServer, url: str) -> None:
    """django-celery-results is installed, and the results are elsewhere: the backend makes Celery's tables."""
    own = await asyncpg.connect(own_postgres.url)
    await own.execute("CREATE DATABASE unused TEMPLATE template0")
    unused = urlsplit(url)._replace(path="/unused").geturl()
    try:
        made = await asyncpg.connect(unused)
        await made.execute(f"CREATE TABLE {TABLE} (task_id varchar(255), status varchar(50))")
        await made.close()
        async with aioresult.connect(unused) as backend:
            assert await backend.mark_as_done("a", 1)
    finally:
        await own.execute("DROP DATABASE unused WITH (FORCE)")
        await own.close()
