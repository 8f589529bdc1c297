"""Nothing is lost: real servers and real connections are broken while a thousand wait and results are stored.

Each test is one fault, a coroutine that `survive` runs in the middle of it all. Afterwards every waiter has its value,
what was reported as stored is stored, and connections, subscriptions, tasks and objects are back where they began.

Chance is the one of pytest-randomly, whose seed is printed with every run: ``-p "randomly_seed=…"`` repeats it. With
``AIORESULT_TEST_THOROUGH=1`` faults last as long as in real life.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
import random
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis

import aioresult
from aioresult import (
    Backend,
    BackendClosedError,
    BackendRefusedError,
    BackendStoreError,
)

from .fault_child import value_of
from .fault_proxy import FaultProxy, Wire, cut_anywhere, eat_messages, late_subscriptions, trickle
from .sites import (
    PostgresSite,
    RedisSite,
    Site,
    at_most,
    certain,
    child,
    equal,
    eventually,
    no_more_connections,
    no_subscription,
    objects,
)

THOROUGH = os.environ.get("AIORESULT_TEST_THOROUGH") == "1"
pytestmark = pytest.mark.usefixtures("calm")

#: A guard against hanging, far above what docs/guarantees.md promises with the heartbeat used here.
BOUND = 60.0
WAITERS = 1000


def seconds(here: float, thorough: float) -> float:
    return thorough if THOROUGH else here


# -- a server under load --------------------------------------------------------------------------------------------


class Load:
    """``web`` waits for a thousand ids, each of which ``worker`` stores in time; some leave and come back."""

    def __init__(self, site: Site, proxy: FaultProxy, web: Backend, worker: Backend, size: int, waiters: int) -> None:
        self.site, self.proxy, self.web, self.worker = site, proxy, web, worker
        self.chance = random.Random(random.getrandbits(64))
        #: Set when the fault is over: what is left is stored as fast as may be.
        self.over = False
        self.acknowledged: set[str] = set()
        #: What stores were refused with.
        self.refusals: list[str] = []
        self._padding = "x" * size
        self._ids = [f"t{number}" for number in range(waiters)]
        self.waiting = {task_id: self._wait(task_id) for task_id in self._ids}

    def _wait(self, task_id: str) -> asyncio.Task[Any]:
        return asyncio.create_task(self.web.result(task_id).get())

    def value(self, task_id: str) -> Any:
        return [task_id, self._padding]

    async def keep_storing(self) -> None:
        left = [*self._ids, *(f"late{number}" for number in range(len(self._ids) // 5))]
        self.chance.shuffle(left)

        async def storer() -> None:
            while left:
                task_id = left.pop()
                if task_id.startswith("late") and task_id not in self.waiting:
                    self.waiting[task_id] = self._wait(task_id)
                if not await self._store(task_id):
                    left.insert(0, task_id)
                if not self.over:
                    await asyncio.sleep(0.02)

        await asyncio.gather(*(storer() for _ in range(8)))

    async def _store(self, task_id: str) -> bool:
        try:
            await self.worker.mark_as_done(task_id, self.value(task_id))
        except BackendStoreError as exc:
            self.refusals.append(str(exc))
            return False
        self.acknowledged.add(task_id)
        return True

    async def keep_leaving(self) -> None:
        """Waiters are cancelled at random, and the same ids waited for again at once."""
        while not self.over:
            task_id = self.chance.choice(self._ids)
            if not self.waiting[task_id].done():
                self.waiting[task_id].cancel()
                self.waiting[task_id] = self._wait(task_id)
            await asyncio.sleep(0.002)


async def subscribed(web: Backend, count: int) -> None:
    """Return once so many are, and the hub has nothing left to do."""
    hub = web._shards[0].hub

    async def all_live() -> bool:
        idle = bool(hub._work._waiters)
        return idle and sum(topic.subscribed for topic in hub._topics.values()) == count

    await eventually(all_live)


async def _mostly_subscribed(web: Backend) -> bool:
    hub = web._shards[0].hub
    return sum(topic.subscribed for topic in hub._topics.values()) > 0.9 * len(hub) and not hub._to_subscribe


Fault = Callable[[Load], Awaitable[None]]


async def survive(
    site: Site,
    fault: Fault,
    *,
    error: type[Exception] | None = None,
    size: int = 0,
    waiters: int = WAITERS,
    **options: Any,
) -> list[str]:
    """Have ``fault`` happen to a server under load. Every waiter gets its value, or ``error`` if there is to be one.

    Returns what stores were refused with.
    """
    connections, instances = await site.connections(), objects()
    async with FaultProxy(site.server.port) as proxy:
        web, worker = site.backend(proxy.port, **options), site.backend(proxy.port, **options)
        async with web, worker:
            load = Load(site, proxy, web, worker, size, waiters)
            await subscribed(web, waiters)
            outcomes = await live_through(load, fault)
            for task_id, outcome in outcomes.items():
                if not (error and isinstance(outcome, error)):
                    assert outcome == load.value(task_id), f"{task_id}: {outcome!r}"
            assert len(web._shards[0].hub) == 0
            await no_subscription(site, web)
            await no_more_connections(site, connections + site.connections_of_two)
    async with site.backend() as reader:
        metas = await reader.get_many(load.acknowledged)
    assert {meta.task_id: meta.result for meta in metas} == {name: load.value(name) for name in load.acknowledged}
    assert len(load.acknowledged) == waiters + waiters // 5
    refusals = load.refusals
    del load, web, worker, reader, outcomes, metas
    await no_more_connections(site, connections)
    assert objects() <= instances
    return refusals


async def live_through(load: Load, fault: Fault) -> dict[str, Any]:
    """What became of every wait."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load.keep_storing())
        tasks.create_task(load.keep_leaving())
        await fault(load)
        load.over, load.proxy.behaviour = True, None
        over = asyncio.get_running_loop().time()
    async with asyncio.timeout_at(over + BOUND):
        outcomes = await asyncio.gather(*load.waiting.values(), return_exceptions=True)
    return dict(zip(load.waiting, outcomes, strict=True))


# -- 1: connections killed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["subscriptions", "commands", "all"])
async def test_connections_killed_over_and_over(site: Site, which: str) -> None:
    async def kill(load: Load) -> None:
        times = round(seconds(0.6, 5) / 0.05)
        enough = load.proxy.accepted + times / 3
        while times > 0 or load.proxy.accepted < enough:
            await site.kill(which)
            await asyncio.sleep(0.05)
            times -= 1

    await survive(site, kill)


# -- 2: the server gone, and back -----------------------------------------------------------------------------------


async def down_and_up(load: Load, how: str) -> None:
    load.site.stop(how)
    await asyncio.sleep(seconds(1, 10))
    await asyncio.to_thread(load.site.server.start)


@pytest.mark.parametrize(
    ("site", "how"), [("redis", "orderly"), ("postgres", "fast"), ("postgres", "immediate")], indirect=["site"]
)
async def test_a_server_stopped_and_started(site: Site, how: str) -> None:
    await survive(site, lambda load: down_and_up(load, how))


# -- 3: silence -----------------------------------------------------------------------------------------------------


async def test_a_server_frozen(site: Site) -> None:
    async def freeze(load: Load) -> None:
        site.server.freeze()
        try:
            await asyncio.sleep(seconds(2, 20))
        finally:
            site.server.thaw()

    await survive(site, freeze)


async def test_a_black_hole(site: Site) -> None:
    """It never ends: only who finds out that nobody answers, and connects anew, gets on."""

    async def swallow(load: Load) -> None:
        swallowed = load.proxy.accepted
        load.proxy.swallow()
        await eventually(lambda: at_most(certain(swallowed + 2), load.proxy.accepted))

    await survive(site, swallow)


# -- 4: a bad network -----------------------------------------------------------------------------------------------


async def test_connections_cut_in_the_middle_of_anything(site: Site) -> None:
    async def cut(load: Load) -> None:
        load.proxy.behaviour = cut_anywhere(load.chance)
        await asyncio.sleep(seconds(1, 20))
        await eventually(lambda: at_most(certain(3), load.proxy.cuts))

    await survive(site, cut)


@pytest.mark.parametrize("behaviour", ["trickle", "late subscriptions"])
async def test_a_slow_network(site: Site, behaviour: str) -> None:
    async def slow_down(load: Load) -> None:
        load.proxy.behaviour = trickle(load.chance) if behaviour == "trickle" else late_subscriptions(0.2)
        await site.kill("subscriptions")  # so that everybody subscribes anew, slowly, while results come quickly
        await asyncio.sleep(seconds(1, 20))

    await survive(site, slow_down)


async def test_subscribing_takes_few_round_trips_however_many_wait(site: Site) -> None:
    """On a slow network each costs its delay, and results wait for the subscription of those that came before."""
    sent: list[bytes] = []

    async def count(wire: Wire, data: bytes, to_server: bool) -> AsyncIterator[bytes]:
        if wire.subscribes and to_server:
            sent.append(data)
        yield data

    async with FaultProxy(site.server.port) as proxy:
        async with site.backend(proxy.port, heartbeat=30) as web:
            proxy.behaviour = count
            waiting = [asyncio.create_task(web.wait_for(f"t{number}")) for number in range(WAITERS)]
            await subscribed(web, WAITERS)
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
            await no_subscription(site, web)
    assert 0 < len(sent) < 40


# -- 5 and 6: a server that says no ---------------------------------------------------------------------------------


async def test_a_subscriber_that_falls_behind_is_disconnected(redis_site: RedisSite) -> None:
    """For its output buffer; here by many large messages of one script, which the server cannot send in between."""
    await redis_site.empty()
    progress = '{"status": "PROGRESS", "result": "' + "x" * 50_000 + '"}'

    async def restrict(load: Load) -> None:
        async with redis_site.client() as client:
            await client.config_set("client-output-buffer-limit", "pubsub 200kb 0 0")
            for _ in range(10):
                await eventually(lambda: _mostly_subscribed(load.web))
                await client.eval(
                    "for n = 0, 999 do redis.call('PUBLISH', KEYS[1] .. n, ARGV[1]) end",
                    1,
                    "celery-task-meta-t",
                    progress,
                )
            await client.config_set("client-output-buffer-limit", "pubsub 33554432 8388608 60")
            assert (await client.info("stats"))["client_output_buffer_limit_disconnections"] >= 3

    await survive(redis_site, restrict)


async def out_of_memory(load: Load, client: redis.asyncio.Redis) -> None:
    await client.config_set("maxmemory", "1")
    await asyncio.sleep(0.5)
    await client.config_set("maxmemory", "0")


async def a_failover(load: Load, client: redis.asyncio.Redis) -> None:
    await client.replicaof("127.0.0.1", 1)  # a master that never answers: this one is READONLY meanwhile
    await asyncio.sleep(0.5)
    await client.replicaof("NO", "ONE")


async def busy_scripts(load: Load, client: redis.asyncio.Redis) -> None:
    await client.config_set("busy-reply-threshold", "1")
    for _ in range(5):
        looping = asyncio.ensure_future(client.eval("while true do end", 0))
        await asyncio.sleep(0.1)
        async with redis.asyncio.Redis.from_url(load.site.url()) as other:
            await other.script_kill()
        with contextlib.suppress(redis.ResponseError):
            await looping
    await client.config_set("busy-reply-threshold", "5000")


async def scripts_flushed(load: Load, client: redis.asyncio.Redis) -> None:
    for _ in range(100):
        await client.script_flush()
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("trouble", "refusal"), [(out_of_memory, "OOM"), (a_failover, ""), (busy_scripts, ""), (scripts_flushed, "")]
)
async def test_a_redis_that_will_not(
    redis_site: RedisSite, trouble: Callable[[Load, redis.asyncio.Redis], Awaitable[None]], refusal: str
) -> None:
    """What it may do later is done later; what it refuses is told to the storer, and stored when it is tried again."""
    await redis_site.empty()

    async def make_trouble(load: Load) -> None:
        async with redis_site.client() as client:
            await trouble(load, client)

    refusals = await survive(redis_site, make_trouble)
    assert bool(refusals) == bool(refusal)
    assert all(refusal in each for each in refusals)


SLOW_LOADING = ("--key-load-delay", "75", "--loading-process-events-interval-bytes", "1024")


async def test_a_redis_that_is_loading_its_data() -> None:
    redis_site = RedisSite()

    async def restart_slowly(load: Load) -> None:
        async with redis_site.client() as client:
            async with client.pipeline(transaction=False) as pipeline:
                for number in range(6_000):
                    pipeline.set("padding", number)
                await pipeline.execute()
        redis_site.server.stop()
        starting = asyncio.ensure_future(asyncio.to_thread(redis_site.server.start, *SLOW_LOADING))
        refused = 0
        while not starting.done():
            with contextlib.suppress(redis.ConnectionError, OSError):
                async with redis_site.client() as client:
                    try:
                        await client.get("a")
                    except redis.exceptions.BusyLoadingError:
                        refused += 1
            await asyncio.sleep(0.05)
        await starting
        assert refused

    try:
        redis_site.server.start()
        await survive(redis_site, restart_slowly)
    finally:
        redis_site.server.remove()


async def test_a_node_of_a_cluster_fails_everyone_at_once_by_name() -> None:
    """What a retry cannot mend is not waited for; a server of a few lines will do, for it only ever says no."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while count := int((await reader.readuntil(b"\r\n"))[1:]):
                words = [await _bulk(reader) for _ in range(count)]
                writer.write(b"-MOVED 3999 127.0.0.1:6381\r\n" if words[0] in (b"GET", b"EVALSHA") else b"+OK\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with aioresult.connect(f"redis://127.0.0.1:{port}/0?protocol=2") as backend:
            waiting = [asyncio.ensure_future(backend.result(f"t{n}").get()) for n in range(WAITERS)]
            storing = [asyncio.ensure_future(backend.mark_as_done(f"t{n}", n)) for n in range(WAITERS)]
            async with asyncio.timeout(BOUND):
                outcomes = await asyncio.gather(*waiting, *storing, return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {BackendRefusedError}
            assert "Redis Cluster" in str(outcomes[0])
            assert len(backend._shards[0].hub) == 0


async def _bulk(reader: asyncio.StreamReader) -> bytes:
    length = int((await reader.readuntil(b"\r\n"))[1:])
    return (await reader.readexactly(length + 2))[:-2]


async def full_of_clients(load: Load, client: asyncpg.Connection[Any]) -> None:
    """Every connection that the server allows is somebody else's."""
    others: list[asyncpg.Connection[Any]] = []
    await load.site.kill("all")
    try:
        with contextlib.suppress(asyncpg.TooManyConnectionsError):
            while True:
                others.append(await asyncpg.connect(load.site.url(), server_settings={"application_name": "test"}))
        await client.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name <> 'test'")
        await asyncio.sleep(0.5)
    finally:
        for other in others:
            await other.close()


_FAILING = """
    CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF random() < {chance} THEN
            RAISE EXCEPTION 'trouble' USING ERRCODE = (ARRAY[{codes}])[1 + floor(random() * {count})::int];
        END IF;
        RETURN NULL;
    END $$;
    CREATE CONSTRAINT TRIGGER fail AFTER INSERT OR UPDATE ON celery_taskmeta DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION fail()"""


async def _failing(client: asyncpg.Connection[Any], chance: float, *codes: str) -> None:
    listed = ", ".join(f"'{code}'" for code in codes)
    await client.execute(_FAILING.format(chance=chance, codes=listed, count=len(codes)))
    await asyncio.sleep(0.5)
    await client.execute("DROP FUNCTION fail CASCADE")


async def disk_full(load: Load, client: asyncpg.Connection[Any]) -> None:
    await _failing(client, 1, "53100")


async def bad_luck(load: Load, client: asyncpg.Connection[Any]) -> None:
    """Deadlock, serialization failure, statement timeout, lock timeout."""
    await _failing(client, 0.3, "40P01", "40001", "57014", "55P03")


@pytest.mark.parametrize(("trouble", "refusal"), [(full_of_clients, ""), (disk_full, "53100"), (bad_luck, "")])
async def test_a_postgres_that_will_not(
    postgres_site: PostgresSite, trouble: Callable[[Load, asyncpg.Connection[Any]], Awaitable[None]], refusal: str
) -> None:
    await postgres_site.empty()

    async def make_trouble(load: Load) -> None:
        async with postgres_site.client() as client:
            await trouble(load, client)

    refusals = await survive(postgres_site, make_trouble)
    assert bool(refusals) == bool(refusal)
    assert all(refusal in each for each in refusals)


# -- 7 and 8: everybody leaves --------------------------------------------------------------------------------------

CROWD = 10_000


async def visit(load: Load, task_id: str) -> Any:
    """Wait for a while, be cancelled or run out of time, come back at once; and in the end stay, if it may come."""
    for _ in range(2):
        patience = load.chance.uniform(0, 1)
        with contextlib.suppress(builtins.TimeoutError):
            if load.chance.random() < 0.5:
                return await load.web.result(task_id).get(timeout=patience)
            async with asyncio.timeout(patience):
                return await load.web.result(task_id)
    return await load.web.result(task_id) if comes(task_id) else load.value(task_id)


def comes(task_id: str) -> bool:
    """Whether the result of ``task_id`` is ever stored."""
    return not task_id.endswith("9")


async def crowd(load: Load, stores: bool) -> list[Any]:
    """What became of all visitors, two to an id, while connections are killed, and perhaps results stored."""
    visitors = [asyncio.create_task(visit(load, f"t{number // 2}")) for number in range(CROWD)]
    for _ in range(6):
        await load.site.kill(load.chance.choice(["subscriptions", "commands", "all"]))
        await asyncio.sleep(0.1)
    if stores:
        ids = filter(comes, (f"t{number}" for number in range(CROWD // 2)))
        await asyncio.gather(*(load.worker.mark_as_done(task_id, load.value(task_id)) for task_id in ids))
    else:
        await load.web.aclose()
    async with asyncio.timeout(BOUND):
        return await asyncio.gather(*visitors, return_exceptions=True)


@pytest.mark.parametrize("end", ["stored", "closed"])
async def test_a_storm_of_cancellations(site: Site, end: str) -> None:
    connections, instances = await site.connections(), objects()
    async with FaultProxy(site.server.port) as proxy:
        async with site.backend(proxy.port) as web, site.backend(proxy.port) as worker:
            load = Load(site, proxy, web, worker, 0, 0)
            outcomes = await crowd(load, end == "stored")
            expected = [load.value(f"t{number // 2}") for number in range(CROWD)]
            assert len(web._shards[0].hub) == 0
            if end == "stored":
                assert outcomes == expected
                await no_subscription(site, web)
            else:
                closed = [isinstance(outcome, BackendClosedError) for outcome in outcomes]
                assert [each for each, gone in zip(outcomes, closed, strict=True) if not gone] == [
                    each for each, gone in zip(expected, closed, strict=True) if not gone
                ]
                assert sum(closed) > CROWD / 10
    del load, web, worker, outcomes
    await no_more_connections(site, connections)
    assert objects() <= instances


@pytest.mark.parametrize("moment", ["at peace", "during a reconnect", "while the server is frozen"])
async def test_closing_while_ten_thousand_wait(site: Site, moment: str) -> None:
    connections, instances = await site.connections(), objects()
    async with FaultProxy(site.server.port) as proxy:
        web = await site.backend(proxy.port).open()
        waiting = [asyncio.create_task(web.wait_for(f"t{number}")) for number in range(CROWD)]
        await subscribed(web, CROWD)
        try:
            if moment == "during a reconnect":
                proxy.refuse()
                proxy.cut()
                accepted = proxy.accepted
                await eventually(lambda: at_most(certain(accepted + 2), proxy.accepted))
            elif moment == "while the server is frozen":
                site.server.freeze()
            storing = [asyncio.create_task(web.mark_as_done(f"s{number}", number)) for number in range(100)]
            await asyncio.sleep(0)
            async with asyncio.timeout(BOUND):
                await web.aclose()
                outcomes = await asyncio.gather(*waiting, return_exceptions=True)
                stored = await asyncio.gather(*storing, return_exceptions=True)
        finally:
            site.server.thaw()
        assert {type(outcome) for outcome in outcomes} == {BackendClosedError}
        assert {type(outcome) for outcome in stored} <= {BackendClosedError, bool}
        assert len(web._shards[0].hub) == 0
    del web, outcomes, stored, waiting, storing
    await no_more_connections(site, connections)
    assert objects() <= instances


async def test_ctrl_c_ends_a_process_in_which_a_thousand_wait_without_a_fuss(site: Site) -> None:
    connections = await site.connections()
    async with child("tests.fault_child", "wait", site.url(), "t", str(WAITERS)) as process, asyncio.timeout(BOUND):
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        _, said = await process.communicate()
    assert process.returncode in (130, -signal.SIGINT)
    lines = said.decode().splitlines()
    assert lines[-1] == "KeyboardInterrupt"
    for noise in ("destroyed", "never", "Unclosed", "unclosed", "Exception ignored", "Error in"):
        assert noise not in said.decode()
    await no_more_connections(site, connections)


# -- 9: who stores is killed ----------------------------------------------------------------------------------------


async def test_a_killed_process_has_stored_all_or_nothing_of_each_result(site: Site) -> None:
    """What one waiter saw every later reader sees; what was reported as stored is there; nothing is half-written."""
    chance, count = random.Random(random.getrandbits(64)), 2000
    async with site.backend() as web:
        for attempt in range(round(seconds(1, 10))):
            ids = [f"{attempt}-{number}" for number in range(count)]
            waiting = {task_id: asyncio.create_task(web.wait_for(task_id)) for task_id in ids}
            await subscribed(web, count)
            connections = await site.connections()
            async with child("tests.fault_child", "store", site.url(), f"{attempt}-", str(count)) as process:
                assert process.stdout is not None
                reported = [int(await process.stdout.readline()) for _ in range(chance.randrange(1, count // 4))]
                process.kill()
                rest, _ = await process.communicate()
            reported += [int(line) for line in rest.split(b"\n")[:-1]]
            # What it had sent by then is the server's to carry out.
            await no_more_connections(site, connections)
            async with site.backend() as reader:
                metas = {meta.task_id: meta for meta in await reader.get_many(ids) if meta.ready}
                again = {meta.task_id for meta in await reader.get_many(ids) if meta.ready}
            assert metas.keys() == again, "a result was stored after its process had died"
            assert {ids[number] for number in reported} <= metas.keys()
            assert len(metas) < count
            for task_id, meta in metas.items():
                assert meta.result == value_of(ids.index(task_id))
                async with asyncio.timeout(BOUND):
                    assert await waiting.pop(task_id) == meta
            assert not any(task.done() for task in waiting.values()), "somebody saw what is not there"
            for task in waiting.values():
                task.cancel()
            await asyncio.gather(*waiting.values(), return_exceptions=True)


# -- 10: messages lost, and nothing else ----------------------------------------------------------------------------


async def test_lost_messages_are_made_up_for_by_a_recheck(site: Site) -> None:
    eaten: list[bytes] = []

    async def eat(load: Load) -> None:
        load.proxy.behaviour = eat_messages(site.frame, eaten)
        await eventually(lambda: at_most(certain(200), len(eaten)))
        stored = list(load.acknowledged)
        async with asyncio.timeout(BOUND):
            await asyncio.wait([load.waiting[task_id] for task_id in stored])
        assert load.proxy.accepted <= site.connections_of_two  # no reconnect helped

    await survive(site, eat, recheck=0.3, heartbeat=30)


async def test_without_a_recheck_a_lost_message_is_made_up_for_by_the_next_reconnect(site: Site) -> None:
    eaten: list[bytes] = []
    async with FaultProxy(site.server.port) as proxy:
        async with site.backend(proxy.port) as web, site.backend() as worker:
            waiting = asyncio.create_task(web.result("t").get())
            await subscribed(web, 1)
            proxy.behaviour = eat_messages(site.frame, eaten)
            await worker.mark_as_done("t", 1)
            await eventually(lambda: equal(certain(len(eaten)), 1))
            await web.get_task_meta("t")
            assert not waiting.done()
            proxy.behaviour = None
            await site.kill("subscriptions")
            assert await waiting == 1


def test_every_test_that_the_guarantees_name_is_there() -> None:
    here = Path(__file__).parent
    named = set(re.findall(r"test_\w+(?=`)", (here.parent / "docs" / "guarantees.md").read_text(encoding="utf-8")))
    written = "".join(path.read_text(encoding="utf-8") for path in here.rglob("test_*.py"))
    assert len(named) > 20
    assert {name for name in named if f"def {name}(" not in written} == set()
