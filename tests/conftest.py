"""Fixtures. A server is started by the first test that asks for it, and gone when the session ends."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator
from functools import cache
from importlib import metadata
from typing import Any

import asyncpg
import pytest
import redis
import redis.asyncio

from aioresult.backends.redis.connection import RedisConnection
from aioresult.retry import Backoff

from .cluster_servers import RedisCluster, SentinelSetup, redis_cluster, sentinel_setup
from .guard import pytest_configure, pytest_exception_interact, pytest_runtest_protocol  # noqa: F401 - for pytest
from .harness import ClusterHarness, Harness, MemoryHarness, RedisHarness, SentinelHarness
from .postgres_harness import PostgresHarness
from .servers import PostgresServer, RedisServer, postgres_server, redis_server
from .sites import PostgresSite, RedisSite, Site

# redis-py 8 parses the metadata of its own package for each connection, which takes longer than to connect.
metadata.version = cache(metadata.version)

#: Where the conformance suite runs. A module whose tests need not run on all of these has such a list of its own.
BACKENDS = ["memory", "redis", "postgres", "cluster", "sentinel"]

#: The modules that run behind sentinels, too; with ``AIORESULT_TEST_ALL`` set, all do. There a backend differs from
#: that for one Redis only in how it connects.
CORE = ("test_storing", "test_waiting", "test_chords", "test_streams", "test_lifecycle", "test_operations")

#: Processes that share the whole suite. More than a small machine has cores, because most tests mostly wait.
_PROCESSES = 4


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Share the whole suite among processes, each with servers of its own. ``-n`` and ``-p no:xdist`` take precedence.

    A run of single files stays in one process: the others would take longer to start than the tests to run.
    """
    option = config.option
    if not config.pluginmanager.has_plugin("xdist") or "PYTEST_XDIST_WORKER" in os.environ:
        return  # a process that shares the tests calls this too, and must not start further ones
    if option.numprocesses is None and config.args_source is pytest.Config.ArgsSource.TESTPATHS and not option.usepdb:
        option.numprocesses = _PROCESSES
    if option.numprocesses and option.dist == "no":
        option.dist = "loadgroup"  # the tests of one Celery worker stay together, or every process starts that worker


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a module with the mark ``xdist_group`` in one process.

    xdist 3.8 does so by names that it gives to the tests, and pytest 9.2 passes those over.
    """
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def is_group(module: str) -> bool:
        return "pytest.mark.xdist_group" in (config.rootpath / module).read_text(encoding="utf-8")

    class Scheduler(LoadScopeScheduling):  # type: ignore[misc] # it has no annotations
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return module if is_group(module) else nodeid

    return Scheduler(config, log) if config.option.dist == "loadgroup" else None


#: It is a Django project as soon as it is imported.
collect_ignore = ["django_app.py"]


@pytest.fixture(scope="session")
def own_redis() -> Iterator[RedisServer]:
    """A Redis of the tests' own, which they may stop, freeze and configure as long as they put it right again."""
    with redis_server() as server:
        yield server


@pytest.fixture(scope="session")
def shared_redis_url(request: pytest.FixtureRequest) -> str:
    return os.environ.get("AIORESULT_TEST_REDIS_URL") or request.getfixturevalue("own_redis").url


@pytest.fixture
def redis_url(shared_redis_url: str) -> str:
    """The URL of a Redis without keys, and without connections that another program's pool has kept."""
    with redis.Redis.from_url(shared_redis_url) as client:
        client.flushall()
        client.client_kill_filter(_type="normal", skipme=True)
    return shared_redis_url


@pytest.fixture
async def redis_client(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    """A plain client on that Redis, to see what the library has done there."""
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture(scope="session")
def own_cluster() -> Iterator[RedisCluster]:
    """A cluster of 3 masters and 3 replicas that all tests share, whose slots and masters remain as they are.

    Its timeout is that of servers in earnest: a busy machine must not have a master replaced.
    """
    with redis_cluster(node_timeout=15_000) as cluster:
        yield cluster


@pytest.fixture
def cluster_url(own_cluster: RedisCluster) -> str:
    """The URL of a cluster without keys."""
    own_cluster.flush()
    return own_cluster.url


@pytest.fixture(scope="session")
def own_sentinel() -> Iterator[SentinelSetup]:
    """A master, a replica and a sentinel under the same terms as `own_cluster`."""
    with sentinel_setup(sentinels=1, down_after=30_000) as setup:
        yield setup


@pytest.fixture
def sentinel_url(own_sentinel: SentinelSetup) -> str:
    """The URL, as Celery writes it, of sentinels whose master has no keys."""
    own_sentinel.flush()
    return own_sentinel.url


@pytest.fixture(scope="session")
def own_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL of the tests' own, under the same terms as `own_redis`."""
    with postgres_server() as server:
        yield server


@pytest.fixture
def postgres_url(own_postgres: PostgresServer) -> str:
    """The URL of a PostgreSQL database without tables."""
    own_postgres.keeps_tables = False
    asyncio.run(_run(own_postgres.url, _NO_TABLES))
    return own_postgres.url


@pytest.fixture
def empty_postgres_url(own_postgres: PostgresServer) -> str:
    """The URL of the same database, where the tables of the last test may be left, without rows.

    For tests that know the tables through the library alone: to make them takes longer than most of those tests.
    """
    asyncio.run(_run(own_postgres.url, _NO_ROWS if own_postgres.keeps_tables else _NO_TABLES))
    own_postgres.keeps_tables = True
    return own_postgres.url


@pytest.fixture
async def admin(postgres_url: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """A plain connection to that database, to see what the library has done, and to get in its way."""
    connection = await asyncpg.connect(postgres_url)
    yield connection
    await connection.close()


_NO_TABLES = "DROP SCHEMA public CASCADE; CREATE SCHEMA public"
_NO_ROWS = """
    DO $$
    DECLARE name text;
    BEGIN
        FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' LOOP
            EXECUTE format('DELETE FROM public.%I', name);
        END LOOP;
    END $$
"""


async def _run(url: str, sql: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(sql)
    finally:
        await connection.close()


@pytest.fixture(scope="module")
def redis_site() -> Iterator[RedisSite]:
    """A Redis for the faults of one module; each test leaves it running."""
    site = RedisSite()
    try:
        site.server.start()
        yield site
    finally:
        site.server.remove()


@pytest.fixture(scope="module")
def postgres_site() -> Iterator[PostgresSite]:
    site = PostgresSite()
    try:
        site.server.start()
        yield site
    finally:
        site.server.remove()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that asks for a store on the backends of its module, unless its marks name others."""
    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "store_name" in metafunc.fixturenames and "store_name" not in named:
        names = getattr(metafunc.module, "BACKENDS", BACKENDS)
        if not (os.environ.get("AIORESULT_TEST_ALL") or metafunc.module.__name__.rpartition(".")[2] in CORE):
            names = [name for name in names if name != "sentinel"]
        metafunc.parametrize("store_name", names, indirect=True)


@pytest.fixture
def store_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def new_harness(request: pytest.FixtureRequest, store_name: str) -> Harness:
    if store_name == "postgres":
        # To make the tables is a part of what the tests of the lifecycle cancel and break.
        no_tables = "postgres_url" in request.fixturenames or request.module.__name__.endswith("test_lifecycle")
        return PostgresHarness(request.getfixturevalue("postgres_url" if no_tables else "empty_postgres_url"))
    if store_name == "redis":
        return RedisHarness(request.getfixturevalue("redis_url"))
    if store_name == "cluster":
        request.getfixturevalue("cluster_url")
        return ClusterHarness(request.getfixturevalue("own_cluster"))
    if store_name == "sentinel":
        request.getfixturevalue("sentinel_url")
        return SentinelHarness(request.getfixturevalue("own_sentinel"))
    return MemoryHarness()


@pytest.fixture
async def harness(new_harness: Harness) -> AsyncIterator[Harness]:
    """Every test that asks for this runs once per backend; only the server of that backend is started."""
    yield new_harness
    await new_harness.close()


@pytest.fixture(autouse=True)
async def nothing_left_running() -> AsyncIterator[None]:
    """After each test, no task is left in its event loop."""
    yield
    mine = asyncio.current_task()
    assert {task for task in asyncio.all_tasks() if task is not mine} == set()


@pytest.fixture
def trips(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each round trip to the server, how many replies it brings."""
    wanted: list[int] = []
    post = RedisConnection._post

    def counted(self: RedisConnection, data: bytes, want: int) -> asyncio.Future[list[Any]]:
        wanted.append(want)
        return post(self, data, want)

    monkeypatch.setattr(RedisConnection, "_post", counted)
    return wanted


@pytest.fixture(params=["redis", "postgres"])
async def site(request: pytest.FixtureRequest) -> Site:
    """A server to break, empty; only the one that the test asks for is started."""
    found: Site = request.getfixturevalue(f"{request.param}_site")
    await found.empty()
    return found


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hundreds of reconnects in seconds: pauses grow less, and the warnings, which hold errors alive, are dropped."""
    monkeypatch.setattr(Backoff.__init__, "__defaults__", (0.02, 0.2))
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
