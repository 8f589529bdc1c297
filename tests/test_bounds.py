"""What is bounded, and by what: attempts, bytes, steps, memory; and what is told to a waiter that comes late."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Self

import pytest

import aioresult
from aioresult import Backend, BackendClosedError, BackendConnectionError, ChordError, TaskMeta
from aioresult.backends.memory import MemoryStore
from aioresult.backends.postgres import PostgresBackend
from aioresult.backends.redis import RedisBackend
from aioresult.chord import ChordOp, ChordStep
from aioresult.completion import _Inbox
from aioresult.hub import Hub
from aioresult.record import Record
from aioresult.states import FAILURE, SUCCESS
from aioresult.waiter import Outcome

from .harness import Gate, Harness, MemoryHarness, commands_of, count_calls, hub_of, intercept, topics_of, until
from .servers import PostgresServer, RedisServer, TcpProxy
from .test_hub import ScriptedSource, settle

#: A cluster has these bounds in each shard, and sentinels change nothing of them.
BACKENDS = ["memory", "redis", "postgres"]
PROGRESS = "PROGRESS"
Primitive = Callable[..., Awaitable[Any]]

memory_only = pytest.mark.parametrize("store_name", ["memory"], indirect=True)


class Ticker:
    """A task that counts its turns in the event loop."""

    def __init__(self) -> None:
        self.turns = 0

    async def _tick(self) -> None:
        while True:
            self.turns += 1
            await asyncio.sleep(0)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._tick())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


# -- one attempt to connect, shared by all --------------------------------------------------------------------------


class Line:
    """A server, and a proxy on the way to it."""

    def __init__(self, server: RedisServer | PostgresServer, proxy: TcpProxy) -> None:
        self.server = server
        self.proxy = proxy
        self.url = server.url.replace(str(server.port), str(proxy.port))
        if isinstance(server, RedisServer):
            self.url += "?socket_timeout=0.6&socket_connect_timeout=0.6"

    @asynccontextmanager
    async def connected(self, **options: Any) -> AsyncIterator[Backend]:
        """A backend whose batches are small, so that there are many."""
        backend = aioresult.connect(self.url, **options)
        backend.store_chunk = 5
        async with backend:
            await asyncio.gather(*(backend.mark_as_done(f"warm up {number}", 1) for number in range(20)))
            yield backend


@pytest.fixture(params=["redis", "postgres"])
def own_server(request: pytest.FixtureRequest) -> RedisServer | PostgresServer:
    request.getfixturevalue(f"{request.param}_url")  # which empties it
    server: RedisServer | PostgresServer = request.getfixturevalue(f"own_{request.param}")
    return server


@pytest.fixture
async def line(own_server: RedisServer | PostgresServer) -> AsyncIterator[Line]:
    async with TcpProxy(own_server.port) as proxy:
        yield Line(own_server, proxy)


@asynccontextmanager
async def frozen(server: RedisServer | PostgresServer) -> AsyncIterator[None]:
    server.freeze()
    try:
        yield
    finally:
        server.thaw()


def calls_of_each_kind(backend: Backend, count: int) -> list[Coroutine[Any, Any, Any]]:
    calls: list[Coroutine[Any, Any, Any]] = []
    for number in range(count):
        calls += [
            backend.mark_as_done(f"t{number}", 1),
            backend.get_task_meta(f"t{number}"),
            backend.get_many([f"t{number}"]),
            backend.forget(f"f{number}"),
            backend.restore_group(f"g{number}"),
            backend.chord(f"g{number}").progress(),
        ]
    return calls


async def outcomes_of(calls: Sequence[Awaitable[Any]]) -> set[type]:
    async with asyncio.timeout(25):
        return {type(outcome) for outcome in await asyncio.gather(*calls, return_exceptions=True)}


@pytest.mark.parametrize("retry_for", [0.3, 1.5], ids=["less than an attempt", "some attempts"])
async def test_a_thousand_stores_fail_after_a_few_attempts_while_the_server_is_frozen(
    line: Line, retry_for: float
) -> None:
    async with line.connected(heartbeat=0.3, retry_for=retry_for) as backend:
        async with frozen(line.server):
            before = line.proxy.accepted
            stores = [backend.mark_as_done(f"t{number}", 1) for number in range(1000)]
            assert await outcomes_of(stores) == {BackendConnectionError}
            assert line.proxy.accepted - before <= 10  # for two hundred batches
            # The outage is known: further calls share attempts, and have one each. A call that a busy machine begins
            # late, when an attempt has failed already, has the next one.
            before = line.proxy.accepted
            assert await outcomes_of(calls_of_each_kind(backend, 20)) == {BackendConnectionError}
            assert line.proxy.accepted - before <= 10  # for 120 calls
        assert await backend.mark_as_done("afterwards", 1) is True


@pytest.mark.parametrize("how", ["refused", "unanswered"])
async def test_calls_of_every_kind_share_one_attempt_that_fails(line: Line, how: str) -> None:
    async with line.connected(heartbeat=0.3, retry_for=0) as backend:
        line.proxy.cut()
        await until(lambda: not line.proxy._writers)
        if how == "refused":
            line.proxy.refuse()
        else:
            line.proxy.stall()
        # The first finds the connections dead that it had; what comes then has to connect.
        await outcomes_of([backend.get_task_meta("t")])
        before = line.proxy.accepted
        assert await outcomes_of(calls_of_each_kind(backend, 50)) == {BackendConnectionError}
        assert line.proxy.accepted - before <= 10  # some calls only begin when the first attempt has failed already
        line.proxy.refuse(False)
        line.proxy.resume()
        assert await backend.mark_as_done("afterwards", 1) is True


async def test_a_caller_that_leaves_does_not_end_the_attempt_for_the_others(line: Line) -> None:
    async with line.connected(heartbeat=5) as backend:
        line.proxy.cut()
        await until(lambda: not line.proxy._writers)
        line.proxy.stall()
        before = line.proxy.accepted
        calls = [asyncio.create_task(backend.get_many([f"warm up {number}"])) for number in range(5)]
        await until(lambda: line.proxy.accepted > before)
        calls[0].cancel()
        await asyncio.wait(calls[:1])
        line.proxy.resume()
        assert [meta.result for metas in await asyncio.gather(*calls[1:]) for meta in metas] == [1] * 4


async def test_an_attempt_that_succeeds_is_shared_too(redis_url: str, own_redis: RedisServer) -> None:
    async with TcpProxy(own_redis.port) as proxy:
        async with Line(own_redis, proxy).connected() as backend:
            proxy.cut()
            await until(lambda: not proxy._writers)
            before = proxy.accepted
            await asyncio.gather(*calls_of_each_kind(backend, 50))
            assert proxy.accepted - before == 1


# -- a connection is dead when nothing moves ------------------------------------------------------------------------

HEARTBEAT = 0.3
#: Seconds between two pieces of data: too short for a dead line.
STEP = 0.06


class SlowLine(TcpProxy):
    """Passes a piece of data at a time, in one direction, and keeps little on the way."""

    slow_to_server = False
    slow_from_server = False
    piece = 65536
    #: Pieces that were slow.
    pieces = 0

    async def __aenter__(self) -> Self:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        listening.bind(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self._server = await asyncio.start_server(self._serve, sock=listening, limit=32768)
        return self

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to_server: bool) -> None:
        try:
            while data := await reader.read(self.piece):
                if self.slow_to_server if to_server else self.slow_from_server:
                    self.pieces += len(data) > 1000
                    await asyncio.sleep(STEP)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass


def keep_little_on_the_way(backend: Backend) -> None:
    """The system's own buffers would take megabytes at once."""
    if isinstance(backend, RedisBackend):
        transports = [commands_of(backend)._transport]
    else:
        assert isinstance(backend, PostgresBackend)
        made: list[Any] = list(backend._connections._made)
        transports = [connection._transport for connection in made]
    for transport in transports:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)


@pytest.fixture
async def slow_line(own_server: RedisServer | PostgresServer) -> AsyncIterator[tuple[SlowLine, Line]]:
    async with SlowLine(own_server.port) as proxy:
        yield proxy, Line(own_server, proxy)


async def test_a_reply_that_takes_long_to_arrive_is_waited_for(slow_line: tuple[SlowLine, Line]) -> None:
    proxy, line = slow_line
    value = "v" * 2_000_000
    async with aioresult.connect(line.server.url) as worker, line.connected(heartbeat=HEARTBEAT) as backend:
        await worker.mark_as_done("large", value)
        before, proxy.slow_from_server = proxy.accepted, True
        assert (await backend.get_task_meta("large")).result == value
        assert proxy.accepted == before
        assert proxy.pieces * STEP > 3 * HEARTBEAT


async def test_a_store_that_takes_long_to_leave_is_waited_for(slow_line: tuple[SlowLine, Line]) -> None:
    proxy, line = slow_line
    value = "v" * 2_000_000
    async with aioresult.connect(line.server.url) as reader, line.connected(heartbeat=HEARTBEAT) as backend:
        keep_little_on_the_way(backend)
        before, proxy.slow_to_server = proxy.accepted, True
        assert await backend.mark_as_done("large", value) is True
        assert proxy.accepted == before
        assert proxy.pieces * STEP > 3 * HEARTBEAT
        assert (await reader.get_task_meta("large")).result == value


# -- batches are bounded by bytes -----------------------------------------------------------------------------------

CHUNK = 10_000
VALUE = "v" * 1000


async def in_small_chunks(
    harness: Harness, primitive: str, size: Callable[[Sequence[Any], Any], int]
) -> tuple[Backend, list[int]]:
    """A backend, and the bytes of each call of ``primitive`` from now on."""
    backend = harness.make()
    backend.chunk_bytes = CHUNK
    sizes: list[int] = []

    async def around(original: Primitive, items: Sequence[Any], *more: Any) -> Any:
        outcome = await original(items, *more)
        sizes.append(size(items, outcome))
        return outcome

    intercept(backend, primitive, around)
    await harness.open(backend)
    for shard in backend._shards:
        shard._value_size = CHUNK  # the first read has no more ids than a chunk of large values
    return backend, sizes


def fits(sizes: Sequence[int], total: int) -> bool:
    """Whether they are neither larger than a chunk nor much smaller than needs be."""
    return max(sizes) <= CHUNK and len(sizes) <= 2 + 2 * total // CHUNK


def bytes_of_records(backend: Backend, records: Sequence[Record]) -> int:
    return sum(backend._payload_size(record.payload) for record in records)


async def test_a_batch_of_stores_is_bounded_by_bytes(harness: Harness) -> None:
    backend, sizes = await in_small_chunks(harness, "_store", lambda records, _: bytes_of_records(backend, records))
    await asyncio.gather(*(backend.mark_as_done(f"t{number}", VALUE) for number in range(100)))
    assert sum(sizes) >= 100 * len(VALUE)
    assert fits(sizes, sum(sizes))
    await backend.mark_as_done("one that is larger than a chunk", VALUE * 20)
    assert max(sizes) > CHUNK


@pytest.mark.parametrize("how", ["get_many", "one by one", "waited for"])
async def test_a_read_is_bounded_by_bytes(harness: Harness, how: str) -> None:
    backend, sizes = await in_small_chunks(
        harness, "_fetch", lambda _, found: sum(backend._stored_size(value) for value in found if value is not None)
    )
    ids = [f"t{number}" for number in range(200)]
    await asyncio.gather(*(backend.mark_as_done(task_id, VALUE) for task_id in ids))
    if how == "get_many":
        metas: Sequence[TaskMeta] = await backend.get_many(ids)
    else:
        read = backend.get_task_meta if how == "one by one" else backend.wait_for
        metas = await asyncio.gather(*(read(task_id) for task_id in ids))
    assert [meta.result for meta in metas] == [VALUE] * 200
    assert max(sizes) <= CHUNK
    assert len(sizes) < len(ids) // 2  # although nothing was known of them at first


async def test_a_batch_of_chord_steps_is_bounded_by_bytes(harness: Harness) -> None:
    backend, sizes = await in_small_chunks(
        harness, "_chord_steps", lambda steps, _: sum(len(step.part) + len(step.body or b"") for step in steps)
    )
    await backend.create_chord("g", size=100)
    await asyncio.gather(
        *(backend.on_chord_part_return("g", f"t{number}", SUCCESS, VALUE, number) for number in range(100))
    )
    assert sum(sizes) >= 100 * len(VALUE)
    assert fits(sizes, sum(sizes))


async def test_a_large_group_is_forgotten_in_few_round_trips(harness: Harness) -> None:
    backend = harness.make()
    calls = count_calls(backend)
    await harness.open(backend)
    ids = [f"t{number}" for number in range(2000)]
    await asyncio.gather(*(backend.mark_as_done(task_id, 1) for task_id in ids))
    await backend.group(ids).forget()
    assert calls["_delete"] <= 2000 // min(backend.store_chunk, backend.fetch_chunk)
    assert not any(meta.ready for meta in await backend.get_many(ids))


# -- back-pressure --------------------------------------------------------------------------------------------------


class Pressed:
    """A backend that may keep ten values, and stores none of them while its gate is closed."""

    def __init__(self, harness: Harness) -> None:
        self._harness = harness
        self.backend = harness.make(max_pending_bytes=10 * len(VALUE))
        self.encoded = 0
        self.order: list[Any] = []
        self._encode = self.backend._encode
        self.backend._encode = self._counting  # type: ignore[method-assign]
        intercept(self.backend, "_store", self._noting)
        self.gate = Gate(self.backend, "_store")
        self.backend._store_at_once = lambda record, done: False  # type: ignore[method-assign]

    def _counting(self, meta: TaskMeta) -> Any:
        self.encoded += 1
        return self._encode(meta)

    async def _noting(self, original: Primitive, records: Sequence[Record]) -> Any:
        self.order += [record.task_id for record in records]
        return await original(records)

    async def storing(self, ids: Sequence[str]) -> list[asyncio.Task[bool]]:
        """Calls that have got as far as they can."""
        await self._harness.open(self.backend)
        tasks = [asyncio.create_task(self.backend.mark_as_done(task_id, VALUE)) for task_id in ids]
        await self.gate.reached.wait()
        await settle()
        return tasks


IDS = [f"t{number}" for number in range(50)]


async def test_stores_beyond_the_bound_wait_and_are_not_even_encoded(harness: Harness) -> None:
    pressed = Pressed(harness)
    tasks = await pressed.storing(IDS)
    assert 5 <= pressed.encoded <= 11
    assert not any(task.done() for task in tasks)
    pressed.gate.open.set()
    assert all(await asyncio.gather(*tasks))
    assert sorted(pressed.order) == sorted(IDS)
    assert pressed.encoded == len(IDS)


async def test_the_parts_of_a_chord_wait_for_room_as_well(harness: Harness) -> None:
    backend = harness.make(max_pending_bytes=5_000)
    gate = Gate(backend, "_chord_steps")
    await harness.open(backend)
    parts = [
        asyncio.create_task(backend.on_chord_part_return("g", task_id, "SUCCESS", "x" * 1_000, number))
        for number, task_id in enumerate(IDS)
    ]
    await gate.reached.wait()
    for _ in range(5):  # as far as they come
        await asyncio.sleep(0)
    assert 0 < len(backend._shard_of("\x00chord g").steps._waiting) < len(IDS)
    gate.open.set()
    await asyncio.gather(*parts)
    assert (await backend.chord("g").progress()).done == len(IDS)


@memory_only
async def test_stores_that_had_to_wait_are_sent_in_their_order(harness: Harness) -> None:
    pressed = Pressed(harness)
    pressed.backend.store_parallel = 1
    tasks = await pressed.storing(IDS)
    pressed.gate.open.set()
    assert all(await asyncio.gather(*tasks))
    assert pressed.order == IDS


async def test_stores_of_one_id_that_had_to_wait_keep_their_order(harness: Harness) -> None:
    pressed = Pressed(harness)
    await harness.open(pressed.backend)
    calls = [asyncio.create_task(pressed.backend.store_result("t", [number, VALUE], PROGRESS)) for number in range(30)]
    await pressed.gate.reached.wait()
    pressed.gate.open.set()
    # One that comes as soon as there is room does not overtake those that wait for it.
    await calls[0]
    calls.append(asyncio.create_task(pressed.backend.store_result("t", [30, VALUE], PROGRESS)))
    await asyncio.gather(*calls)
    assert (await pressed.backend.get_task_meta("t")).result[0] == 30


async def test_a_caller_that_leaves_while_it_waits_for_room_holds_up_nobody(harness: Harness) -> None:
    pressed = Pressed(harness)
    tasks = await pressed.storing(IDS)
    for task in tasks[20:40]:
        task.cancel()
    await asyncio.wait(tasks[20:40])
    pressed.gate.open.set()
    assert all(await asyncio.gather(*tasks[:20], *tasks[40:]))
    assert sorted(pressed.order) == sorted(IDS[:20] + IDS[40:])


async def test_a_store_that_is_larger_than_the_bound_is_stored(harness: Harness) -> None:
    backend = await harness.connect(max_pending_bytes=1)
    assert all(await asyncio.gather(*(backend.mark_as_done(task_id, VALUE) for task_id in IDS)))
    assert [meta.result for meta in await backend.get_many(IDS)] == [VALUE] * len(IDS)


async def test_closing_fails_by_name_the_stores_that_wait_for_room(harness: Harness) -> None:
    pressed = Pressed(harness)
    tasks = await pressed.storing(IDS)
    await pressed.backend.aclose()
    assert await outcomes_of(tasks) == {BackendClosedError}
    assert pressed.encoded <= 11


async def test_an_outage_fails_by_name_the_stores_that_wait_for_room(harness: Harness) -> None:
    """With the very attempt that those before them waited for, and not with one of their own."""
    pressed = Pressed(harness)
    attempts = 0

    async def fail(original: Primitive, records: Sequence[Record]) -> Any:
        nonlocal attempts
        attempts += 1
        await original([])  # which stops at the gate
        raise BackendConnectionError("away")

    intercept(pressed.backend, "_store", fail)
    pressed.backend.retry_for = 0
    pressed.backend.store_parallel = 1
    tasks = await pressed.storing(IDS)
    pressed.gate.open.set()
    assert await outcomes_of(tasks) == {BackendConnectionError}
    assert attempts == 1
    assert pressed.encoded <= 11


async def test_no_more_than_a_batch_waits_in_the_buffer_of_a_slow_connection(
    redis_url: str, own_redis: RedisServer
) -> None:
    async with TcpProxy(own_redis.port) as proxy:
        async with Line(own_redis, proxy).connected(heartbeat=60) as backend:
            assert isinstance(backend, RedisBackend)
            connection, post, unsent = commands_of(backend), commands_of(backend)._post, [0]

            def noting(*args: Any, **options: Any) -> Any:
                future = post(*args, **options)
                unsent.append(connection._transport.get_write_buffer_size())
                return future

            connection._post = noting  # type: ignore[method-assign]
            proxy.stall()
            value = "v" * 500_000
            tasks = [asyncio.create_task(backend.mark_as_done(f"t{number}", value)) for number in range(60)]
            await until(lambda: not connection.ready)
            async with Ticker() as ticker:
                await until(lambda: ticker.turns > 100)
            proxy.resume()
            assert all(await asyncio.gather(*tasks))
            assert max(unsent) < 3 * backend.chunk_bytes  # of 30 MB


# -- no single step holds the event loop ----------------------------------------------------------------------------


class Comparing:
    """A waiter that counts how often one is compared with another."""

    comparisons = 0

    def receive(self, task_id: str, outcome: Outcome) -> None:
        """It does not care."""

    def __eq__(self, other: object) -> bool:
        Comparing.comparisons += 1
        return self is other

    __hash__ = object.__hash__


ORDERS: dict[str, Callable[[list[Any]], Sequence[Any]]] = {
    "in order": list,
    "in reverse": lambda waiters: waiters[::-1],
    "from the middle": lambda waiters: waiters[len(waiters) // 2 :] + waiters[: len(waiters) // 2],
}


@memory_only
@pytest.mark.parametrize("order", ORDERS)
async def test_leaving_costs_the_same_however_many_wait(harness: Harness, order: str) -> None:
    backend = await harness.connect()
    waiters = [Comparing() for _ in range(5000)]
    for waiter in waiters:
        backend.watch("t", waiter)
    await harness.subscribed(1)
    Comparing.comparisons = 0
    for waiter in ORDERS[order](waiters):
        backend.unwatch("t", waiter)
    assert Comparing.comparisons <= len(waiters)
    await harness.subscribed(0)


@memory_only
@pytest.mark.parametrize("order", ORDERS)
async def test_joins_that_are_cancelled_compare_no_waiters(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    comparisons = 0

    def equal(self: object, other: object) -> bool:
        nonlocal comparisons
        comparisons += 1
        return self is other

    monkeypatch.setattr(_Inbox, "__eq__", equal)
    backend = await harness.connect()
    ids = [f"t{number}" for number in range(20)]
    joins = [asyncio.create_task(backend.group(ids).get()) for _ in range(300)]
    await harness.subscribed(20)
    comparisons = 0
    for join in ORDERS[order](joins):
        join.cancel()
    await asyncio.wait(joins)
    await harness.subscribed(0)
    assert comparisons <= len(joins) * len(ids)
    assert len(topics_of(backend)) == 0


class ComparingFuture(asyncio.Future[Any]):
    """A future that counts how often one is compared with another."""

    comparisons = 0

    def __eq__(self, other: object) -> bool:
        ComparingFuture.comparisons += 1
        return self is other

    __hash__ = asyncio.Future.__hash__


@memory_only
@pytest.mark.parametrize("order", [None, *ORDERS])
async def test_waiting_for_room_costs_the_same_however_many_wait(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, order: str | None
) -> None:
    """Whether those that wait have their turn in the end, or leave."""
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "create_future", lambda: ComparingFuture(loop=loop))
    pressed = Pressed(harness)
    tasks = await pressed.storing([f"t{number}" for number in range(1000)])
    ComparingFuture.comparisons = 0
    for task in ORDERS[order](tasks) if order else ():
        task.cancel()
    pressed.gate.open.set()
    await asyncio.wait(tasks)
    assert ComparingFuture.comparisons <= 10 * len(tasks)


SLOWLY = 0.006


@pytest.mark.parametrize("how", ["get_many", "one by one", "waited for", "joined", "pushed"])
async def test_decoding_many_results_gives_others_their_turn(harness: Harness, how: str) -> None:
    worker, backend = await harness.pair()
    decode = backend._decode
    async with Ticker() as ticker:
        seen: list[int] = []

        def decode_slowly(task_id: str, stored: Any) -> TaskMeta:
            seen.append(ticker.turns)
            time.sleep(SLOWLY)  # stands for a large value, and is more than a step may take
            return decode(task_id, stored)

        backend._decode = decode_slowly  # type: ignore[method-assign]
        storing = [worker.mark_as_done(task_id, 1) for task_id in IDS]
        if how == "pushed":
            waiting = [asyncio.create_task(backend.wait_for(task_id)) for task_id in IDS]
            await harness.subscribed(len(IDS))
            await asyncio.gather(*storing)
            await asyncio.gather(*waiting)
        else:
            await asyncio.gather(*storing)
            if how == "get_many":
                await backend.get_many(IDS)
            elif how == "joined":
                await backend.group(IDS).get()
            else:
                read = backend.get_task_meta if how == "one by one" else backend.wait_for
                await asyncio.gather(*(read(task_id) for task_id in IDS))
        assert len(seen) >= len(IDS)
        assert len(set(seen)) >= 0.8 * len(seen)


@pytest.mark.parametrize("ids", [1, 5000])
async def test_closing_with_thousands_of_waiters_gives_others_their_turn(ids: int) -> None:
    told: list[int] = []
    async with Ticker() as ticker:

        class Waiting:
            def receive(self, task_id: str, outcome: Outcome) -> None:
                told.append(ticker.turns)

        hub = Hub(ScriptedSource())
        for number in range(5000):
            hub.watch(f"t{number % ids}", Waiting())
        await hub.close(BackendClosedError("closed"))
    assert len(told) == 5000
    assert max(map(told.count, set(told))) <= 1000
    assert len(hub) == 0


async def test_a_result_with_thousands_of_waiters_gives_others_their_turn(harness: Harness) -> None:
    worker, backend = await harness.pair()
    told: list[int] = []
    async with Ticker() as ticker:

        class Waiting:
            def receive(self, task_id: str, outcome: Outcome) -> None:
                told.append(ticker.turns)

        waiters = [Waiting() for _ in range(5000)]
        for waiter in waiters:
            backend.watch("t", waiter)
        await harness.subscribed(1)
        await worker.mark_as_done("t", 1)
        await until(lambda: len(told) == 5000)
    assert max(map(told.count, set(told))) <= 1000


# -- dispatchers ----------------------------------------------------------------------------------------------------

OPEN = 2000


class Steps:
    """Notes the steps of a backend, and lets a test act before the first of a kind."""

    def __init__(self, backend: Backend) -> None:
        self.taken: list[ChordStep] = []
        self.announced: set[str] = set()
        self.listening = asyncio.Event()
        self.before_the_first: Callable[[], Awaitable[None]] | None = None
        self._chord_news = backend._chord_news
        backend._chord_news = self._hear  # type: ignore[method-assign]
        intercept(backend, "_chord_steps", self._around)
        intercept(backend, "_subscribe", self._listen)

    async def _listen(self, original: Primitive, topics: Sequence[str]) -> Any:
        refused = await original(topics)
        self.listening.set()
        return refused

    def _hear(self, group_id: str, ready: bool) -> None:
        self._chord_news(group_id, ready)
        if ready:
            self.announced.add(group_id)

    async def _around(self, original: Primitive, steps: Sequence[ChordStep]) -> Any:
        if (act := self.before_the_first) is not None:
            self.before_the_first = None
            await act()
        self.taken += steps
        return await original(steps)

    def before(self, op: ChordOp, group_id: str) -> int:
        """How many steps came before that one."""
        return next(n for n, step in enumerate(self.taken) if (step.op, step.group_id) == (op, group_id))


async def open_chords(backend: Backend) -> None:
    await asyncio.gather(*(backend.create_chord(f"open {number}", size=2) for number in range(OPEN)))


async def complete(backend: Backend, group_id: str) -> None:
    """A chord that is left to the dispatchers."""
    await backend.create_chord(group_id, size=1)
    assert await backend.on_chord_part_return(group_id, "t", SUCCESS, 1, 0, lease=0) is None


async def dispatch_one(backend: Backend) -> str:
    async with aclosing(backend.ready_chords()) as chords:
        async for ready in chords:
            async with ready:
                return ready.id
    raise AssertionError("it ended")


@pytest.mark.parametrize("store_name", ["memory", "redis"], indirect=True)  # PostgreSQL lists complete chords only
async def test_a_chord_that_is_announced_is_claimed_before_the_open_ones_are_looked_at(harness: Harness) -> None:
    worker, backend = await harness.connect(), harness.make()
    steps = Steps(backend)
    await harness.open(backend)
    await open_chords(worker)

    async def announce() -> None:
        """While the dispatcher has just begun to look through the open chords."""
        await steps.listening.wait()
        await complete(worker, "ready")
        await until(lambda: "ready" in steps.announced)

    steps.before_the_first = announce
    assert await dispatch_one(backend) == "ready"
    assert steps.before(ChordOp.CLAIM, "ready") < OPEN


async def test_a_dispatcher_claims_what_is_complete_and_only_looks_at_the_rest(harness: Harness) -> None:
    worker, backend = await harness.connect(), harness.make()
    steps, calls = Steps(backend), count_calls(backend)
    await harness.open(backend)
    await open_chords(worker)
    await complete(worker, "ready")
    assert await dispatch_one(backend) == "ready"
    assert [step.group_id for step in steps.taken if step.op is ChordOp.CLAIM] == ["ready"]
    assert calls["_chord_steps"] <= 20  # for so many open ones


# -- memory keeps nothing -------------------------------------------------------------------------------------------


def store_of(harness: Harness) -> MemoryStore:
    assert isinstance(harness, MemoryHarness)
    return harness.store


@memory_only
async def test_memory_keeps_nothing_for_what_is_no_longer_stored(harness: Harness) -> None:
    backend, store = await harness.connect(), store_of(harness)
    for number in range(2000):
        await backend.mark_as_done(f"t{number}", number)
        await backend.mark_as_started("one", number=number)
        await backend.forget(f"t{number}")
    assert len(store.values) == 1
    assert len(store._queue) <= 200
    assert len(store._expiry) == 1


@memory_only
async def test_memory_keeps_nothing_for_values_that_expired_or_came_to_live_for_ever(harness: Harness) -> None:
    backend, store = await harness.connect(), store_of(harness)
    for number in range(1000):
        await backend.store_result(f"t{number}", 1, PROGRESS, expires=1000)
        await backend.store_result(f"t{number}", 1, PROGRESS, expires=0)
        await backend.store_result(f"short {number}", 1, PROGRESS, expires=0.000001)
    await backend.cleanup()
    assert len(store.values) == 1000
    assert len(store._queue) <= 200
    assert store._expiry == {}


# -- late joiners ----------------------------------------------------------------------------------------------------


class Recorder:
    """A waiter that keeps the states that it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def receive(self, task_id: str, outcome: Outcome) -> None:
        assert isinstance(outcome, TaskMeta)
        self.told.append((outcome.status, outcome.result))

    async def heard(self, *told: tuple[str, Any]) -> None:
        """Return once it was told as much. Raises if it was told something else."""
        await until(lambda: len(self.told) >= len(told))
        assert self.told == list(told)


async def test_each_watcher_is_told_the_present_state_once_and_then_each_change_once(harness: Harness) -> None:
    worker, web = await harness.pair()
    first, second, third = Recorder(), Recorder(), Recorder()
    states = [(PROGRESS, number) for number in range(4)]
    await worker.store_result("t", 0, PROGRESS)
    web.watch("t", first)
    await harness.subscribed(1)
    await first.heard(states[0])
    await worker.store_result("t", 1, PROGRESS)
    await first.heard(*states[:2])
    web.watch("t", second)
    await second.heard(states[1])
    await worker.store_result("t", 2, PROGRESS)
    await second.heard(*states[1:3])
    await first.heard(*states[:3])
    web.watch("t", third, read_first=False)
    await third.heard(states[2])
    await worker.store_result("t", 3, PROGRESS)
    for recorder, since in ((first, 0), (second, 1), (third, 2)):
        await recorder.heard(*states[since:])
    await worker.mark_as_done("t", "end")
    for recorder, since in ((first, 0), (second, 1), (third, 2)):
        await recorder.heard(*states[since:], (SUCCESS, "end"))
    await harness.subscribed(0)


async def test_watchers_that_come_in_the_same_moment_are_each_told_once(harness: Harness) -> None:
    worker, web = await harness.pair()
    await worker.store_result("t", 0, PROGRESS)
    recorders = [Recorder() for _ in range(6)]
    for recorder in recorders:
        web.watch("t", recorder)
        await asyncio.sleep(0)
    await harness.subscribed(1)
    await worker.store_result("t", 1, PROGRESS)
    for recorder in recorders:
        await recorder.heard((PROGRESS, 0), (PROGRESS, 1))
        web.unwatch("t", recorder)


async def test_a_state_that_a_reconnect_finds_again_is_not_told_again(harness: Harness) -> None:
    worker, web = await harness.connect(), harness.make()
    calls = count_calls(web)
    await harness.open(web)
    await worker.store_result("t", 0, PROGRESS)
    recorder = Recorder()
    web.watch("t", recorder)
    await harness.subscribed(1)
    await recorder.heard((PROGRESS, 0))
    for count in range(2, 5):
        hub_of(web, "t").lost()
        await until(lambda count=count: calls["_subscribe"] == count)
    await worker.store_result("t", 1, PROGRESS)
    await recorder.heard((PROGRESS, 0), (PROGRESS, 1))
    web.unwatch("t", recorder)


async def test_a_watcher_that_came_late_and_left_at_once_is_told_nothing(harness: Harness) -> None:
    worker, web = await harness.pair()
    await worker.store_result("t", 0, PROGRESS)
    stays, leaves = Recorder(), Recorder()
    web.watch("t", stays)
    await stays.heard((PROGRESS, 0))
    web.watch("t", leaves)
    web.unwatch("t", leaves)
    await worker.mark_as_done("t", 1)
    await stays.heard((PROGRESS, 0), (SUCCESS, 1))
    assert leaves.told == []


class Numbering:
    """A waiter that keeps the numbers of the states that it is told."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def receive(self, task_id: str, outcome: Outcome) -> None:
        if isinstance(outcome, TaskMeta):
            self.told.append(outcome.result)


def stories(length: int) -> Iterator[tuple[str, ...]]:
    for steps_before in range(5):
        for actions in itertools.product(("store", "advance", "lose", "fail", "watch"), repeat=length):
            yield (*("advance",) * steps_before, *actions)


async def tell(story: Sequence[str]) -> None:
    """Every watcher is told the last state last, none twice, and none that is older than one it was told before."""
    source = ScriptedSource()
    source.hub.start()
    numbers = itertools.count()

    def store() -> None:
        source.stored["a"] = meta = TaskMeta("a", PROGRESS, next(numbers))
        if "a" in source.subscribed:
            source.hub.receive("a", meta, id(meta))

    def join() -> None:
        watchers.append(Numbering())
        source.hub.watch("a", watchers[-1])

    watchers: list[Numbering] = []
    join()
    for action in story:
        match action:
            case "store":
                store()
            case "watch":
                join()
            case "advance":
                await source.advance()
            case "lose":
                source.lose()
            case "fail":
                source.fail()
    await source.drain()
    if "a" in source.stored:
        last = source.stored["a"].result
        for watcher in watchers:
            assert watcher.told[-1:] == [last], f"a watcher missed the last state after {story}"
            assert sorted(set(watcher.told)) == watcher.told, f"a watcher was told {watcher.told} after {story}"
    await source.hub.close(BackendClosedError("closed"))


@pytest.fixture
def quiet() -> Iterator[None]:
    """Without warnings: thousands of lost connections, each of them expected."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


async def test_no_order_of_events_tells_a_watcher_a_state_twice_or_an_old_one_late(quiet: None) -> None:
    """Exhaustively: every four actions, at each step of the start of a wait."""
    for story in stories(4):
        await tell(story)


async def test_a_second_waiter_of_a_failed_chord_gets_its_error(harness: Harness) -> None:
    worker, web = await harness.pair()
    await worker.create_chord("g", size=2)
    patient = asyncio.create_task(web.chord("g").get(propagate=False))
    await harness.subscribed(1)
    await worker.on_chord_part_return("g", "t0", FAILURE, ValueError("boom"), 0)
    async with asyncio.timeout(20):
        for _ in range(2):
            with pytest.raises(ChordError) as caught:
                await web.chord("g").get()
            assert repr(caught.value.__cause__) == "ValueError('boom')"
    assert not patient.done()
    await worker.on_chord_part_return("g", "t1", SUCCESS, 1, 1)
    assert list(map(str, await patient)) == ["boom", "1"]


async def test_a_second_dispatcher_in_the_process_finds_a_chord_that_is_ready_already(harness: Harness) -> None:
    worker, web = await harness.pair()
    async with asyncio.timeout(20), aclosing(web.ready_chords()) as first, aclosing(web.ready_chords()) as second:
        await complete(worker, "one")
        one = await anext(first)  # and it is busy with that from now on
        await complete(worker, "two")
        two = await anext(second)
        assert (one.id, two.id) == ("one", "two")
        for ready in (one, two):
            async with ready:
                pass
