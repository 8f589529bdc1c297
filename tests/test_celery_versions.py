"""Both ways between Celery 5.4 and this library: real workers of that release, from an environment of their own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import venv
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from celery import chord, group

import aioresult
from aioresult import AsyncResult, Backend, GroupResult
from aioresult.backends.postgres import schema_sql
from aioresult.celery import result_from_celery

from .celery_app import CardDeclined
from .celery_worker import GUARD, Worker, celery_workers, reaches
from .harness import until
from .servers import PostgresServer

_ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.xdist_group("celery-versions"),
    pytest.mark.timeout(180),  # packages are installed
    pytest.mark.filterwarnings("ignore:Call to deprecated setex"),  # of redis-py, about Celery
]

#: What Celery 5.4 says of the tasks named to it, and of the group ``ours`` on Redis.
READER = """
import json, sys
import celery
from tests.celery_app import make_app

assert celery.__version__.startswith("5.4.")
backend, *names = sys.argv[1:]
app = make_app(None, backend, accept_content=["json", "pickle"])
said = []
for name in names:
    result = app.AsyncResult(name)
    value = result.get(timeout=20, propagate=False)
    said.append([result.state, [type(value).__name__, *value.args] if isinstance(value, Exception) else value])
if backend.startswith("redis"):  # in a database, it takes a group for one only if Celery has pickled it
    said.append(app.GroupResult.restore("ours").get(timeout=20))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def old_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with Celery 5.4 and what it needs."""
    folder = tmp_path_factory.mktemp("celery-5.4")
    venv.create(folder, symlinks=True)
    python = str(folder / "bin" / "python")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--disable-pip-version-check"]
    command += ["celery[redis,sqlalchemy]==5.4.0", "kombu<5.4", "psycopg[binary]", "pytest"]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    if installed.returncode:
        pytest.skip(f"pip cannot install Celery 5.4 here: {installed.stderr.strip().splitlines()[-1:]}")
    return python


@pytest.fixture(scope="module", params=["redis", "postgres"])
def worker(
    request: pytest.FixtureRequest, old_python: str, shared_redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Worker]:
    """A worker of Celery 5.4; in PostgreSQL the tables are those that it has made itself."""
    with celery_workers(shared_redis_url, tmp_path_factory.mktemp("celery")) as start:
        if request.param == "redis":
            yield start("redis", shared_redis_url, {}, python=old_python)
            return
        server: PostgresServer = request.getfixturevalue("own_postgres")
        url = urlsplit(server.url)._replace(path="/celery_5_4").geturl()
        with psycopg.connect(server.url, autocommit=True) as admin:
            admin.execute("CREATE DATABASE celery_5_4")
            try:
                celerys = url.replace("postgresql:", "db+postgresql+psycopg:")
                old = start("postgres", celerys, {}, apart=True, python=old_python)
                asyncio.run(_tables_are_made(old, url))
                yield old
            finally:
                admin.execute("DROP DATABASE celery_5_4 WITH (FORCE)")


async def _tables_are_made(worker: Worker, url: str) -> None:
    with psycopg.connect(url, autocommit=True) as client:
        worker.call("echo", 1)

        def made() -> bool:
            worker.check()
            row = client.execute("SELECT to_regclass('celery_taskmeta'), to_regclass('celery_tasksetmeta')").fetchone()
            return row is not None and None not in row

        async with asyncio.timeout(GUARD):
            await until(made)
        columns = client.execute("SELECT column_name FROM information_schema.columns WHERE table_name LIKE 'celery_%'")
        assert {"children", "stamps"}.isdisjoint(name for (name,) in columns)
        client.execute(schema_sql())


@pytest.fixture
async def backend(worker: Worker) -> AsyncIterator[Backend]:
    # Up to 5.6, Celery keeps pickles in a database.
    options: dict[str, Any] = {}
    if worker.backend.startswith("db+"):
        options = {"serializer": "pickle", "accept": ("json", "pickle")}
    async with aioresult.connect(worker.backend, **options) as backend, asyncio.timeout(GUARD):
        yield backend
    worker.check()


async def test_its_results_and_failures_are_pushed(worker: Worker, backend: Backend) -> None:
    result: AsyncResult[Any] = backend.result(worker.call("gated", "gate").id)
    waiter = asyncio.ensure_future(result.get())
    await reaches(result, "STARTED")
    worker.open("gate", "through")
    assert await waiter == "through"
    assert await backend.result(worker.call("echo", {"n": [1, None]}).id) == {"n": [1, None]}
    with pytest.raises(CardDeclined) as caught:
        await backend.result(worker.call("fail", "custom").id)
    assert caught.value.args == ("4242", 17, {"größe": [1]})


async def test_its_groups_and_chords_are_awaited(worker: Worker, backend: Backend) -> None:
    parts = [worker.signature("add", number, 1) for number in range(3)]
    assert await result_from_celery(group(parts)(), backend) == [1, 2, 3]
    if worker.app.conf.result_backend:  # the app of the worker with the database has none, and cannot send a chord
        assert await result_from_celery(chord(parts, worker.signature("total"))(), backend) == 6


async def test_it_reads_what_we_store(worker: Worker, backend: Backend, old_python: str) -> None:
    await backend.mark_as_done("ours-done", {"n": [1, "zwei"]})
    await backend.mark_as_failure("ours-failed", CardDeclined("4242", 17), traceback="Traceback:\n")
    await backend.mark_as_revoked("ours-revoked", "no longer wanted")
    await backend.mark_as_failure("ours-late", aioresult.TimeoutError("too late"))
    members = [AsyncResult[Any](f"ours-{number}", backend) for number in range(2)]
    await asyncio.gather(*(backend.mark_as_done(member.id, member.id) for member in members))
    await backend.save_group("ours", GroupResult("ours", members))
    names = ["ours-done", "ours-failed", "ours-revoked", "ours-late"]
    command = [old_python, "-c", READER, worker.backend, *names]
    run = await asyncio.to_thread(subprocess.run, command, cwd=_ROOT, capture_output=True, text=True, timeout=GUARD)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [
        ["SUCCESS", {"n": [1, "zwei"]}],
        ["FAILURE", ["CardDeclined", "4242", 17]],
        ["REVOKED", ["TaskRevokedError", "no longer wanted"]],
        ["FAILURE", ["TimeoutError", "too late"]],
        *([["ours-0", "ours-1"]] if worker.backend.startswith("redis") else []),
    ]
