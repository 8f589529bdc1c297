"""Chords where a server is needed that can be broken or looked into, and where the store counts no chords at all."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self

import asyncpg
import pytest
import redis.asyncio

import aioresult
from aioresult import Backend, TaskRequest, UsageError
from aioresult.backends.keyvalue import KeyValueStoreBackend
from aioresult.backends.memory import MemoryBackend
from aioresult.chord import ReadyChord
from aioresult.states import SUCCESS

from .harness import Harness, RedisHarness, count_calls, until
from .servers import PostgresServer, RedisServer, TcpProxy

#: A chord is in one shard of a cluster.
BACKENDS = ["memory", "redis", "postgres"]

Client = redis.asyncio.Redis


class Server:
    """A server of the tests' own, and a proxy in front of it."""

    def __init__(self, server: RedisServer | PostgresServer, proxy: TcpProxy) -> None:
        self.url = server.url
        self.url_of_proxy = server.url.replace(str(server.port), str(proxy.port))
        self.proxy = proxy

    async def kill_others(self) -> None:
        """End every connection, as an administrator would."""
        if self.url.startswith("redis"):
            async with Client.from_url(self.url) as client:
                for kind in ("pubsub", "normal"):
                    await client.client_kill_filter(_type=kind, skipme=True)
        else:
            connection = await asyncpg.connect(self.url)
            try:
                await connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
                )
            finally:
                await connection.close()


@pytest.fixture(params=["redis", "postgres"])
def own_server(request: pytest.FixtureRequest) -> Any:
    request.getfixturevalue(f"{request.param}_url")  # which empties it
    return request.getfixturevalue(f"own_{request.param}")


@pytest.fixture
async def server(own_server: RedisServer | PostgresServer) -> AsyncIterator[Server]:
    async with TcpProxy(own_server.port) as proxy:
        yield Server(own_server, proxy)


async def part(backend: Backend, index: int, group_id: str = "g", **options: Any) -> ReadyChord | None:
    return await backend.on_chord_part_return(group_id, f"t{index}", SUCCESS, index, index, **options)


# -- what is lost on the way ----------------------------------------------------------------------------------------


def lose_a_reply(proxy: TcpProxy) -> Callable[[], bool]:
    """The next thing that the server says is lost, and the connection with it; returns whether that has happened."""
    lost = False

    def lose(data: bytes, to_server: bool) -> bytes:
        nonlocal lost
        if to_server or lost:
            return data
        lost = True
        proxy.cut()
        return b""

    proxy.filter = lose
    return lambda: lost


async def test_no_reply_that_is_lost_loses_a_claim(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    async with aioresult.connect(server.url_of_proxy) as backend, aioresult.connect(server.url) as other:
        await backend.create_chord("warm up, so that no statement is left to prepare", size=2)

        lost = lose_a_reply(server.proxy)
        chord = await backend.create_chord("g", body="body", size=2)
        assert lost()
        lost = lose_a_reply(server.proxy)
        assert await part(backend, 0) is None
        assert lost()
        lost = lose_a_reply(server.proxy)
        ready = await part(backend, 1)
        assert lost()
        assert ready is not None
        assert await other.chord("g").claim() is None

        lost = lose_a_reply(server.proxy)  # the reply to the renewal
        with contextlib.suppress(ConnectionRefusedError):
            async with ready:
                assert lost()
                lost = lose_a_reply(server.proxy)  # and the one to giving it back
                raise ConnectionRefusedError
        assert lost()

        lost = lose_a_reply(server.proxy)
        again = await chord.claim()
        assert lost()
        assert again is not None
        async with again:
            assert (again.body, again.results) == ("body", [0, 1])
            lost = lose_a_reply(server.proxy)
        assert lost()
        assert await other.chord("g").claim() is None

        lost = lose_a_reply(server.proxy)
        sized = await backend.set_chord_size("of unknown size", 0)
        assert lost()
        assert sized is not None
    assert "its callback may be dispatched twice" not in caplog.text


class Dispatcher:
    """Dispatches all that is ready, inside ``async with``; `next` gives the id of what it has dispatched."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._dispatched: asyncio.Queue[str] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._dispatch())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _dispatch(self) -> None:
        async with contextlib.aclosing(self._backend.ready_chords()) as chords:
            async for ready in chords:
                async with ready:
                    self._dispatched.put_nowait(ready.id)

    async def next(self) -> str:
        """Raises what the dispatcher died of, if it did."""
        getting = asyncio.create_task(self._dispatched.get())
        await asyncio.wait({getting, self._task}, return_when=asyncio.FIRST_COMPLETED)
        if not getting.done():
            getting.cancel()
            await self._task
        return await getting


@pytest.mark.parametrize("how", ["killed", "away"])
async def test_a_dispatcher_finds_what_completed_while_its_connections_were_gone(server: Server, how: str) -> None:
    async with aioresult.connect(server.url_of_proxy) as backend, Dispatcher(backend) as dispatcher:
        async with aioresult.connect(server.url) as worker:
            await worker.create_chord("before", size=0)
        assert await dispatcher.next() == "before"
        for n in range(3):
            if how == "killed":
                await server.kill_others()
            else:
                server.proxy.refuse()
                server.proxy.cut()
            async with aioresult.connect(server.url) as worker:
                await worker.create_chord(f"g{n}", size=1)
                await part(worker, 0, f"g{n}", lease=0)
            server.proxy.refuse(False)
            assert await dispatcher.next() == f"g{n}"


async def test_who_waits_finds_what_completed_while_its_connections_were_gone(server: Server) -> None:
    async with aioresult.connect(server.url_of_proxy) as reader, aioresult.connect(server.url) as worker:
        await worker.create_chord("g", size=1)
        waiting = asyncio.create_task(reader.chord("g").get())
        await until(
            lambda: (
                bool(reader._shards[0].hub._topics)
                and not reader._shards[0].hub._to_read_first
                and not reader._shards[0].hub._to_subscribe
            )
        )
        server.proxy.refuse()
        server.proxy.cut()
        await part(worker, 0)
        server.proxy.refuse(False)
        assert await waiting == [0]


# -- what it costs --------------------------------------------------------------------------------------------------


async def test_a_hundred_thousand_parts(harness: Harness) -> None:
    count = 100_000 if os.environ.get("AIORESULT_TEST_ALL") else 20_000  # each further chunk costs the same
    worker, reader = await harness.pair()
    await worker.create_chord("g", body="body", size=count)
    waiting = asyncio.create_task(reader.chord("g").get())
    readies: list[ReadyChord | None] = []
    for first in range(0, count, 5000):
        readies += await asyncio.gather(*(part(worker, index) for index in range(first, first + 5000)))
    (ready,) = (ready for ready in readies if ready is not None)
    async with ready:
        assert ready.results == list(range(count))
    assert await waiting == ready.results
    assert await reader.chord("g").progress() == (count, count)


@pytest.mark.parametrize("in_a_row", [True, False])
async def test_the_cost_of_a_part_is_the_same_in_a_large_group(harness: Harness, in_a_row: bool) -> None:
    costs = []
    for count in (200, 1600):
        backend = harness.make()
        calls = count_calls(backend)
        await harness.open(backend)
        await backend.create_chord(f"g{count}", size=count)
        before = await server_side(harness)
        parts = (part(backend, index, f"g{count}") for index in range(count))
        if in_a_row:
            for each in parts:
                await each
        else:
            await asyncio.gather(*parts)
        costs.append((calls["_chord_steps"], await server_side(harness) - before))
    (few_calls, few), (many_calls, many) = costs
    assert many_calls <= 8 * few_calls
    assert many <= 8.1 * few  # and now and then a heartbeat


async def server_side(harness: Harness) -> int:
    """How many commands the server has run, those of scripts included, or how many rows there are; more or less."""
    if isinstance(harness, RedisHarness):
        stats: dict[str, dict[str, int]] = await harness.client.info("commandstats")
        return sum(values["calls"] for values in stats.values())
    return len(await harness.holdings())


async def test_a_large_body_travels_once_in_each_direction(server: Server) -> None:
    body = "b" * 2**20
    bytes_passed = {True: 0, False: 0}

    def count(data: bytes, to_server: bool) -> bytes:
        bytes_passed[to_server] += len(data)
        return data

    server.proxy.filter = count
    async with aioresult.connect(server.url_of_proxy) as backend:
        await backend.create_chord("g", body=body, size=100)
        for index in range(100):
            ready = await part(backend, index)
        assert ready is not None
        assert ready.body == body
        await backend.chord("g")
        async with ready:
            pass
    assert max(bytes_passed.values()) < 1.5 * len(body)


# -- what only one of the servers has -------------------------------------------------------------------------------


async def test_chords_that_expire_without_a_dispatcher_do_not_pile_up(redis_url: str, redis_client: Client) -> None:
    async with aioresult.connect(redis_url, expires=0.05) as short, aioresult.connect(redis_url) as backend:
        await backend.create_chord("lives", size=2)
        for n in range(10):
            await short.create_chord(f"g{n}", size=1)

        async def expired() -> bool:
            return await redis_client.keys("*-g?.s") == []

        await until(expired)
        await part(backend, 0, "lives")
        assert await redis_client.zrange("aioresult-chords", 0, -1) == [b"lives"]


async def test_a_dispatcher_forgets_what_has_expired(redis_url: str, redis_client: Client) -> None:
    async with aioresult.connect(redis_url) as backend:
        await backend.create_chord("evicted", size=1)
        await redis_client.delete(*await redis_client.keys("celery-taskset-meta-evicted*"))

        async def forgotten() -> bool:
            return not await redis_client.exists("aioresult-chords")

        async with Dispatcher(backend):
            await until(forgotten)


async def test_the_keys_are_celerys_and_two_more(redis_url: str, redis_client: Client) -> None:
    async with aioresult.connect(redis_url, global_keyprefix="shop") as backend:
        await backend.create_chord("g", size=2)
        await part(backend, 0)
        key = "shop_celery-taskset-meta-g"
        assert set(await redis_client.keys()) == {
            *(f"{key}.{suffix}".encode() for suffix in "sjda"),
            b"shop_aioresult-chords",
        }
        assert await redis_client.get(f"{key}.s") == b"2"
        assert await redis_client.zrange(f"{key}.j", 0, -1, withscores=True) == [(b'[1, "t0", "SUCCESS", 0]', 0.0)]
        assert await redis_client.smembers(f"{key}.d") == {b"t0:0"}


async def test_prefixes_keep_chords_apart(redis_url: str) -> None:
    async with (
        aioresult.connect(redis_url, global_keyprefix="one") as one,
        aioresult.connect(redis_url, global_keyprefix="two") as two,
        Dispatcher(two) as dispatcher,
    ):
        await one.create_chord("of one", size=0)
        await two.create_chord("of two", size=0)
        assert await dispatcher.next() == "of two"
        assert await one.chord("of one").claim() is not None


async def test_tables_keep_chords_apart(postgres_url: str) -> None:
    tables: aioresult.ConnectOptions = {"table": "results", "group_table": "groups", "create": True}
    async with aioresult.connect(postgres_url) as one, aioresult.connect(postgres_url, **tables) as two:
        for backend in (one, two):
            chord = await backend.create_chord("g", size=1)
            assert await chord.progress() == (0, 1)
            waiting = asyncio.create_task(chord.get())
            await until(lambda backend=backend: bool(backend._waiting))
            assert await part(backend, 0) is not None
            assert await waiting == [0]


# -- a store that counts no chords ----------------------------------------------------------------------------------


class Plain(MemoryBackend):
    """Its author has written the six methods and no more."""

    _chord_steps = KeyValueStoreBackend._chord_steps  # type: ignore[assignment]
    _active_chords = KeyValueStoreBackend._active_chords  # type: ignore[assignment]


@pytest.mark.parametrize(
    "attempt",
    [
        lambda backend: backend.create_chord("g", size=1),
        lambda backend: backend.set_chord_size("g", 1),
        lambda backend: part(backend, 0),
        lambda backend: backend.chord("g").get(),
        lambda backend: backend.chord("g").progress(),
        lambda backend: backend.chord("g").claim(),
        lambda backend: anext(backend.ready_chords()),
        lambda backend: backend.mark_as_done("t", 1, TaskRequest(id="t", group="g", chord=True)),
    ],
)
async def test_a_store_without_chords_says_so_and_serves_everybody_else(
    attempt: Callable[[Backend], Awaitable[object]],
) -> None:
    async with Plain() as backend:
        waiting = asyncio.create_task(backend.result("other").get())
        await until(lambda: len(backend._channels) == 1)
        with pytest.raises(UsageError, match=r"^Plain does not count chords$"):
            await attempt(backend)
        await backend.mark_as_done("other", 1)
        assert await waiting == 1
