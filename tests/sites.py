"""Servers that may be broken: what a test of faults, or the soak, needs to know of each kind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import shutil
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import redis.asyncio

import aioresult
from aioresult import Backend
from aioresult.backends.postgres import PostgresBackend

from .fault_proxy import postgres_frame, resp_frame
from .servers import PostgresServer, RedisServer


class Site:
    """A server of the test's own, and how to look at it and trouble it from outside the library."""

    name: str
    server: RedisServer | PostgresServer
    #: How many connections two backends, one of which only stores, may have between them.
    connections_of_two: int
    #: How long the first frame of what the server sends is.
    frame: Callable[[bytes], int | None]
    #: Ways to stop it, by name.
    stops: tuple[str, ...]

    def url(self, port: int | None = None) -> str:
        raise NotImplementedError

    def backend(self, port: int | None = None, **options: Any) -> Backend:
        """A backend that is not open yet; ``port`` is a proxy's. It is quick to notice and to recover."""
        return aioresult.connect(self.url(port), **{"heartbeat": 0.5, **options})

    def stop(self, how: str) -> None:
        raise NotImplementedError

    async def empty(self) -> None:
        """Nothing is stored."""
        raise NotImplementedError

    async def connections(self) -> int:
        """How many there are, but for ours."""
        raise NotImplementedError

    async def subscriptions(self, of: Backend) -> int:
        """How many channels a backend listens to, as the server counts them."""
        raise NotImplementedError

    async def without_expiry(self) -> int:
        """How many results are kept for ever."""
        raise NotImplementedError

    async def kill(self, which: str) -> None:
        """End connections from the server's side: ``subscriptions``, ``commands`` or ``all``."""
        raise NotImplementedError


class RedisSite(Site):
    name = "redis"
    connections_of_two = 3
    frame = staticmethod(resp_frame)
    stops = ("orderly",)

    def __init__(self) -> None:
        self.server = RedisServer("--appendonly", "yes")

    def url(self, port: int | None = None) -> str:
        return f"redis://127.0.0.1:{port or self.server.port}/0"

    @asynccontextmanager
    async def client(self) -> AsyncIterator[redis.asyncio.Redis]:
        # redis-py gives up after five seconds; the event loop may be busy with ten thousand waiters for longer.
        async with redis.asyncio.Redis.from_url(self.url(), socket_timeout=60, socket_connect_timeout=60) as client:
            yield client

    def stop(self, how: str) -> None:
        self.server.stop()

    def forget(self) -> None:
        """Start it anew, without its data."""
        self.server.stop()
        shutil.rmtree(self.server.folder / "appendonlydir")
        self.server.start()

    async def empty(self) -> None:
        async with self.client() as client:
            await client.flushall()

    async def connections(self) -> int:
        async with self.client() as client:
            return len(await client.client_list()) - 1

    async def subscriptions(self, of: Backend) -> int:
        async with self.client() as client:
            return len(await client.pubsub_channels())

    async def without_expiry(self) -> int:
        async with self.client() as client:
            keys = [key async for key in client.scan_iter(count=1000) if key != b"aioresult-workers"]
            return sum([await client.ttl(key) == -1 for key in keys])

    async def kill(self, which: str) -> None:
        async with self.client() as client:
            if which in ("subscriptions", "all"):
                await client.client_kill_filter(_type="pubsub", skipme=True)
            if which in ("commands", "all"):
                await client.client_kill_filter(_type="normal", skipme=True)


class PostgresSite(Site):
    name = "postgres"
    connections_of_two = 13  # two pools of six, and a listener
    frame = staticmethod(postgres_frame)
    stops = ("fast", "immediate")

    def __init__(self) -> None:
        self.server = PostgresServer(durable=True)

    def url(self, port: int | None = None, of: str = "commands") -> str:
        return (
            f"postgresql://postgres@127.0.0.1:{port or self.server.port}/postgres?sslmode=disable&application_name={of}"
        )

    def backend(self, port: int | None = None, **options: Any) -> Backend:
        # The name lets `kill` find it; else it is the connection that is made anyhow.
        return super().backend(port, listen_dsn=self.url(port, "subscriptions"), **options)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[asyncpg.Connection[Any]]:
        connection = await asyncpg.connect(self.url(of="test"))
        try:
            yield connection
        finally:
            await connection.close()

    def stop(self, how: str) -> None:
        assert isinstance(self.server, PostgresServer)
        self.server.stop(signal.SIGQUIT if how == "immediate" else signal.SIGINT)

    async def empty(self) -> None:
        async with self.client() as client:
            await client.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")

    async def _value(self, sql: str, *args: Any) -> Any:
        async with self.client() as client:
            return await client.fetchval(sql, *args)

    async def connections(self) -> int:
        return int(
            await self._value(
                """
                SELECT count(*) FROM pg_stat_activity
                WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
                """
            )
        )

    async def subscriptions(self, of: Backend) -> int:
        assert isinstance(of, PostgresBackend)
        listener = of._listener
        if listener is None or listener.lost:
            return 0
        # Only the session itself can say.
        return int(
            await listener._ask(lambda: listener._connection.fetchval("SELECT count(*) FROM pg_listening_channels()"))
        )

    async def without_expiry(self) -> int:
        return int(await self._value("SELECT count(*) FROM celery_taskmeta_expiry WHERE expires_at = 'infinity'"))

    async def kill(self, which: str) -> None:
        await self._value(
            """
            SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
            WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND application_name <> 'test'
              AND $1 IN ('all', application_name)
            """,
            which,
        )


async def eventually(condition: Callable[[], Any], seconds: float = 100.0) -> None:
    """As `tests.harness.until`, at the pace of servers, and with a bound."""
    async with asyncio.timeout(seconds):
        while True:
            with contextlib.suppress(OSError, asyncpg.PostgresError, redis.RedisError):
                if await condition():
                    return
            await asyncio.sleep(0.02)


# -- what is to be as it was --------------------------------------------------------------------------------------


def objects() -> Counter[str]:
    """The instances of this library's classes that are alive."""
    gc.collect()
    mine = (type(each) for each in gc.get_objects() if not issubclass(type(each), type))
    return Counter(cls.__qualname__ for cls in mine if cls.__module__.startswith("aioresult"))


async def no_subscription(site: Site, web: Backend) -> None:
    await eventually(lambda: equal(site.subscriptions(web), 0))


async def no_more_connections(site: Site, than: int) -> None:
    await eventually(lambda: at_most(site.connections(), than))


async def equal(left: Awaitable[int], right: int) -> bool:
    return await left == right


async def at_most(left: Awaitable[int], right: int) -> bool:
    return await left <= right


async def certain(number: int) -> int:
    """A number that need not be asked for."""
    return number


@asynccontextmanager
async def child(module: str, *args: str, strict: bool = True) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that runs ``module``, and is gone at the end, whatever comes of the test."""
    command = [sys.executable, *(("-X", "dev", "-W", "error") if strict else ()), "-m", module, *args]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=Path(__file__).parent.parent
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
