"""Servers that may be broken: what a test of faults, or the soak, needs to know of each kind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
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

#: Something that goes wrong, and is over by itself. It must not be cancelled in the middle.
Trouble = Callable[[], Awaitable[None]]


class Place:
    """What the soak needs to know of a server, or of servers that work together."""

    name: str
    #: Whether a crash, as the soak causes it, may lose what has been confirmed of an output.
    may_lose = False

    def start(self) -> None:
        """Blocks until it can be used."""
        raise NotImplementedError

    def remove(self) -> None:
        raise NotImplementedError

    def ports(self) -> Sequence[int]:
        """Of everything that a backend connects to."""
        raise NotImplementedError

    def through(self, proxies: Mapping[int, int]) -> tuple[str, dict[str, Any]]:
        """The URL and the options, as JSON can hold them, of a backend that connects to proxies, given by port."""
        raise NotImplementedError

    def backend(self) -> Backend:
        """A backend that is not open yet, and connects without proxies."""
        raise NotImplementedError

    def troubles(self, chance: random.Random) -> Sequence[Trouble]:
        """What may happen to the servers. The network is not among it."""
        raise NotImplementedError

    def rearrangements(self, chance: random.Random, ids: Callable[[], Sequence[str]]) -> Sequence[Trouble]:
        """What an operator does to servers that work together, one after the other, whatever else happens meanwhile.

        ``ids`` gives tasks that are under way.
        """
        return []

    async def connections(self) -> int:
        """How many there are, but for ours."""
        raise NotImplementedError

    async def without_expiry(self) -> int:
        """How many results are kept for ever."""
        raise NotImplementedError


class Site(Place):
    """A server of the test's own, and how to look at it and trouble it from outside the library."""

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

    def start(self) -> None:
        self.server.start()

    def stop(self, how: str) -> None:
        raise NotImplementedError

    def remove(self) -> None:
        self.server.remove()

    def ports(self) -> Sequence[int]:
        return [self.server.port]

    def through(self, proxies: Mapping[int, int]) -> tuple[str, dict[str, Any]]:
        return self.url(proxies[self.server.port]), {}

    def troubles(self, chance: random.Random) -> Sequence[Trouble]:
        async def kill() -> None:
            await self.kill(chance.choice(["all", "commands", "subscriptions"]))

        async def freeze() -> None:
            self.server.freeze()
            await asyncio.sleep(chance.uniform(0.1, 1.5))
            self.server.thaw()

        async def restart() -> None:
            await asyncio.to_thread(self.stop, chance.choice(self.stops))
            await asyncio.sleep(chance.uniform(0.1, 1))
            await asyncio.to_thread(self.start)

        return [kill, freeze, restart]

    async def empty(self) -> None:
        """Nothing is stored."""
        raise NotImplementedError

    async def subscriptions(self, of: Backend) -> int:
        """How many channels a backend listens to, as the server counts them."""
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
    may_lose = True

    def __init__(self) -> None:
        self.server = PostgresServer(durable=True)

    def url(self, port: int | None = None, of: str = "commands") -> str:
        return (
            f"postgresql://postgres@127.0.0.1:{port or self.server.port}/postgres?sslmode=disable&application_name={of}"
        )

    def backend(self, port: int | None = None, **options: Any) -> Backend:
        # The name lets `kill` find it; else it is the connection that is made anyhow.
        return super().backend(port, listen_dsn=self.url(port, "subscriptions"), **options)

    def through(self, proxies: Mapping[int, int]) -> tuple[str, dict[str, Any]]:
        port = proxies[self.server.port]
        return self.url(port), {"listen_dsn": self.url(port, "subscriptions")}

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
