"""The faults of running tasks: real servers and connections are broken under producers, readers, workers and revokes.

Each reader gets what was sent, each chunk once and in order, or an error that says what is missing; each task ends in
one state; what dies is told to be dead, and nothing else is; and nothing is left over.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from asyncio import create_task, gather
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aioresult
from aioresult import (
    AioResultError,
    Backend,
    BackendStoreError,
    DecodeError,
    InvalidCursor,
    Keep,
    OutputError,
    OutputGap,
    OutputRestarted,
    TaskRevokedError,
    WorkerLostError,
)
from aioresult.backends.redis import RedisBackend
from aioresult.log import TAIL
from aioresult.run import RunOp, RunState, RunStep

from .fault_proxy import FaultProxy, cut_anywhere, die_after, late_subscriptions, trickle
from .harness import node_of, until
from .running_child import LEASE, READERS, complaint, lines, reader_of
from .sites import (
    RedisSite,
    Site,
    at_most,
    certain,
    child,
    eventually,
    no_more_connections,
    objects,
)

pytestmark = pytest.mark.usefixtures("calm")

#: A guard against hanging.
BOUND = 60.0


async def connected(backend: Backend) -> None:
    """Return once all that is waited for is subscribed, and the hub has nothing left to do."""
    hub = backend._shards[0].hub

    def idle() -> bool:
        topics = hub._topics.values()
        return bool(topics) and all(topic.subscribed for topic in topics) and bool(hub._work._waiters)

    await until(idle)


async def settled(*backends: Backend) -> None:
    """Return once nobody is told anything by these: no topic, no subscription, no watched task."""
    for backend in backends:
        await until(
            lambda backend=backend: not backend._shards[0].hub._topics and not backend._shards[0].hub._to_unsubscribe
        )
        assert backend._streams._tails == {}
        assert backend.liveness._watched == {}


# -- 1: a producer and a hundred readers in processes of their own ---------------------------------------------------


async def test_a_hundred_readers_elsewhere_while_connections_are_killed(site: Site) -> None:
    """Each gets what was sent, whether the output has an end mark or the result alone says that it is over."""
    each, a_round, count = 25, 40, 0
    tasks = ("marked", "unmarked")
    async with contextlib.AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(FaultProxy(site.server.port))

        async def start(what: str, *args: str) -> asyncio.subprocess.Process:
            running = child("tests.running_child", what, site.url(proxy.port), *args, *tasks, strict=False)
            process = await stack.enter_async_context(running)
            assert process.stdout is not None
            assert await process.stdout.readline() == b"ready\n"
            return process

        seeds = [str(random.getrandbits(32)) for _ in range(4)]
        producer, *readers = await gather(start("produce"), *(start("read", seed, str(each)) for seed in seeds))
        assert producer.stdin is not None
        while proxy.accepted < 150 or count < 1000:
            producer.stdin.write(b"%d\n" % a_round)
            count += a_round
            await site.kill("all")
            await asyncio.sleep(0.03)
        producer.stdin.close()
        async with asyncio.timeout(BOUND):
            got = [said for process in readers async for said in lines(process)]
            _, trouble = await producer.communicate()
        assert producer.returncode == 0, trouble.decode()
    assert sorted(number for number, _ in got) == sorted([*range(each)] * len(readers))
    assert {complaint(number, chunks, count) for number, chunks in got} == {""}


# -- 2: a server, and a network, that fail in the middle of a stream ------------------------------------------------


class Streaming:
    """One task that sends numbers until the fault is over, and readers of every kind."""

    def __init__(self, site: Site, proxy: FaultProxy, web: Backend, worker: Backend) -> None:
        self.site, self.proxy, self.web, self.worker = site, proxy, web, worker
        self.chance = random.Random(random.getrandbits(64))
        self.over = False
        self.sent = 0
        #: What sending was refused with.
        self.refusals: list[str] = []

    async def produce(self) -> None:
        async with self.worker.running("t") as task:
            while not self.over:
                try:
                    await task.output.send(self.sent)
                    self.sent += 1
                except BackendStoreError as exc:
                    self.refusals.append(str(exc))
                await asyncio.sleep(0.001)
            with contextlib.suppress(BackendStoreError):  # what the last flush was refused with
                await task.output.flush()
            task.value = self.sent

    async def flow(self) -> None:
        """Return when a hundred more have been sent."""
        enough = self.sent + 100
        await until(lambda: self.sent >= enough)


async def survive(
    site: Site, fault: Callable[[Streaming], Awaitable[None]], each: int = 4, **options: Any
) -> list[str]:
    """Have ``fault`` happen to an output. Every reader gets all of it. Returns what sending was refused with."""
    connections, instances = await site.connections(), objects()
    async with FaultProxy(site.server.port) as proxy:
        web, worker = site.backend(proxy.port, **options), site.backend(proxy.port, **options)
        async with web, worker:
            load = Streaming(site, proxy, web, worker)
            numbers = range(each * len(READERS))
            readers = [create_task(reader_of(number)(web, "t", load.chance)) for number in numbers]
            producing = create_task(load.produce())
            await load.flow()
            await fault(load)
            proxy.behaviour = None
            await load.flow()
            load.over = True
            async with asyncio.timeout(BOUND):
                await producing
                got = await gather(*readers)
                assert await web.result("t").get(timeout=BOUND) == load.sent
            assert {complaint(number, chunks, load.sent) for number, chunks in zip(numbers, got, strict=True)} == {""}
            await settled(web)
    refusals = load.refusals
    del load, web, worker, producing, readers
    await no_more_connections(site, connections)
    assert objects() <= instances
    return refusals


@pytest.mark.parametrize("which", ["subscriptions", "commands", "all"])
async def test_connections_killed_under_a_stream(site: Site, which: str) -> None:
    async def kill(load: Streaming) -> None:
        enough = load.proxy.accepted + 12
        while load.proxy.accepted < enough:
            await site.kill(which)
            await asyncio.sleep(0.03)

    await survive(site, kill)


async def test_a_server_frozen_under_a_stream(site: Site) -> None:
    async def freeze(load: Streaming) -> None:
        reconnecting = load.proxy.accepted + 2
        site.server.freeze()
        try:
            await eventually(lambda: at_most(certain(reconnecting), load.proxy.accepted))
        finally:
            site.server.thaw()

    await survive(site, freeze, heartbeat=0.2)


async def test_a_black_hole_under_a_stream(site: Site) -> None:
    async def swallow(load: Streaming) -> None:
        swallowed = load.proxy.accepted
        load.proxy.swallow()
        await eventually(lambda: at_most(certain(swallowed + 2), load.proxy.accepted))

    await survive(site, swallow, heartbeat=0.2)


@pytest.mark.parametrize("behaviour", ["cut", "trickle", "late subscriptions"])
async def test_a_bad_network_under_a_stream(site: Site, behaviour: str) -> None:
    async def trouble(load: Streaming) -> None:
        match behaviour:
            case "cut":
                load.proxy.behaviour = cut_anywhere(load.chance, 4_000)
                await eventually(lambda: at_most(certain(10), load.proxy.cuts))
            case "trickle":
                load.proxy.behaviour = trickle(load.chance, 50)
                await site.kill("all")
                await load.flow()
            case _:
                load.proxy.behaviour = late_subscriptions(0.1)
                for _ in range(2):
                    await site.kill("subscriptions")
                    await load.flow()

    await survive(site, trouble)


async def test_a_server_restarted_under_a_stream(redis_site: RedisSite) -> None:
    """With its data: nobody misses anything."""
    await redis_site.empty()

    async def restart(load: Streaming) -> None:
        redis_site.stop("orderly")
        await asyncio.to_thread(redis_site.server.start)

    await survive(redis_site, restart)


# -- 3: a worker is killed ------------------------------------------------------------------------------------------


async def attempt(backend: Backend, task_id: str) -> None:
    """All that a worker may do in its life; it is over when the server has confirmed each part."""
    async with backend.running(task_id) as task:
        for half in range(2):
            for number in range(3):
                await task.output.send([half, number])
            await task.output.flush()
            task.progress(half)
        await connected(backend)
        task.value = "first"


async def again(backend: Backend, task_id: str) -> None:
    async with backend.running(task_id) as task:
        for number in range(5):
            await task.output.send(number)
        task.value = "second"


class Victim:
    """A worker whose process dies when the server has got so many bytes of what it sends, as the server sees it."""

    def __init__(self, site: Site, task_id: str, limit: int) -> None:
        self.task_id = task_id
        self.sent: list[int] = []
        self._site, self._limit = site, limit

    async def live(self) -> None:
        async with FaultProxy(self._site.server.port) as proxy:
            async with self._site.backend(proxy.port, lease=LEASE, retry_for=0.05) as backend:
                living = create_task(attempt(backend, self.task_id))
                proxy.behaviour = die_after(proxy, self._limit, self.sent, living.cancel)
                with contextlib.suppress(AioResultError, asyncio.CancelledError):
                    await living


class Waiting:
    """Waiters for one task, of every kind."""

    def __init__(self, web: Backend, task_id: str) -> None:
        self.task_id = task_id
        self.read: list[Any] = []
        self.read_on: list[Any] = []
        self.stream = web.result(task_id).stream()
        self.patient = web.result(task_id).stream(on_lost="wait")
        self.steady = web.result(task_id).stream(on_lost="wait", on_restart="continue")
        self.impatient = [
            create_task(self._follow(self.stream, self.read)),
            create_task(web.result(task_id).get(on_lost="raise")),
            create_task(self._last_of(web.result(task_id).updates())),
        ]
        self.others = [
            create_task(self._follow(self.patient, [])),
            create_task(self._follow(self.steady, self.read_on)),
            create_task(web.result(task_id).get()),
        ]

    async def leave(self) -> None:
        for task in self.others:
            task.cancel()
        await gather(*self.others, return_exceptions=True)
        for stream in (self.patient, self.steady):
            await stream.aclose()

    async def _follow(self, stream: aioresult.OutputStream[Any], into: list[Any]) -> str:
        async for chunk in stream:
            into.append(chunk)  # noqa: PERF401 - it may raise in the middle
        return "the end"

    async def _last_of(self, updates: aioresult.Updates) -> Any:
        return [meta.result async for meta in updates][-1]


async def note_of(backend: Backend, task_id: str) -> RunState:
    return await backend.submit_run_step(RunStep(RunOp.READ, task_id))


async def log_of(backend: Backend, task_id: str) -> list[Any]:
    return (await backend.result(task_id).read_output()).chunks


FIRST = [[half, number] for half in range(2) for number in range(3)]


async def test_a_worker_killed_between_any_two_of_its_commands_and_within_each(site: Site) -> None:
    """The waiters that asked are told within a lease and a beat, behind every chunk. The next attempt begins anew."""
    async with site.backend(lease=LEASE) as web, site.backend() as worker:
        connections = await site.connections()
        healthy = Victim(site, "t00", 10**9)
        await healthy.live()
        await no_more_connections(site, connections)
        assert await web.result("t00") == "first"
        ends = [sum(healthy.sent[: index + 1]) for index in range(len(healthy.sent))]
        cuts = [cut for end, size in zip(ends, healthy.sent, strict=True) for cut in (end - size // 2, end)]
        # On a busy machine they send other pieces. One dies before it has sent anything, and one lives, in any case.
        cuts = [0, *sorted(random.sample(cuts, min(len(cuts), 38))), 10**9]
        waiting = [Waiting(web, f"t{number + 10}") for number in range(len(cuts))]
        await connected(web)
        connections = await site.connections()
        victims = [Victim(site, each.task_id, cut) for each, cut in zip(waiting, cuts, strict=True)]
        room = asyncio.Semaphore(5)  # a server has so many connections

        async def live(victim: Victim) -> None:
            async with room:
                await victim.live()

        await gather(*map(live, victims))
        await no_more_connections(site, connections)
        died = asyncio.get_running_loop().time()
        under_way = [each for each in waiting if (await note_of(worker, each.task_id)).worker]
        over = [each for each in waiting if (await worker.get_task_meta(each.task_id)).ready]
        pending = [each for each in waiting if each not in under_way and each not in over]
        assert min(len(under_way), len(over), len(pending)) > 0
        assert len(under_way) > 5

        async with asyncio.timeout(BOUND):
            for each in under_way:
                outcomes = await gather(*each.impatient, return_exceptions=True)
                assert [type(outcome) for outcome in outcomes] == [WorkerLostError] * 3
                assert each.read == await log_of(worker, each.task_id) == FIRST[: len(each.read)]
            assert asyncio.get_running_loop().time() - died < LEASE * 4 / 3 + 10
            for each in over:
                assert await gather(*each.impatient) == ["the end", "first", "first"]
                assert await gather(*each.others) == ["the end", "the end", "first"]
                assert each.read == each.read_on == FIRST
        assert not any(task.done() for each in pending for task in each.impatient)
        assert not any(task.done() for each in (*pending, *under_way) for task in each.others)

        await gather(*(again(worker, each.task_id) for each in (*pending, *under_way)))
        second = list(range(5))
        async with asyncio.timeout(BOUND):
            for each in pending:
                assert await gather(*each.impatient) == ["the end", "second", "second"]
                assert each.read == second
            for each in (*pending, *under_way):
                patient, steady, value = await gather(*each.others, return_exceptions=True)
                assert (steady, value) == ("the end", "second")
                assert each.read_on == each.read * (each in under_way) + second
                if each in under_way and each.read:
                    assert isinstance(patient, OutputRestarted)
                    assert [chunk async for chunk in web.result(each.task_id).stream(patient.cursor)] == second
                    with pytest.raises(OutputRestarted):
                        await anext(web.result(each.task_id).stream(each.stream.cursor))
                else:
                    assert patient == "the end"
        await settled(web)


async def test_a_killed_process_is_told_to_those_that_wait_for_its_tasks(site: Site) -> None:
    count = 20
    async with site.backend(lease=LEASE) as web:
        async with child("tests.running_child", "work", site.url(), "t", str(count), strict=False) as process:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"ready\n"
            waiting = [Waiting(web, f"t{number}") for number in range(count)]
            await until(lambda: all(each.read for each in waiting))
            process.kill()
            async with asyncio.timeout(BOUND):
                outcomes = await gather(*(task for each in waiting for task in each.impatient), return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {WorkerLostError}
            assert [each.read for each in waiting] == [[number] for number in range(count)]
        others = [task for each in waiting for task in each.others]
        assert not any(task.done() for task in others)
        await gather(*(each.leave() for each in waiting))
        await settled(web)


# -- 4: a server that comes back, with its data and without ----------------------------------------------------------


async def get_on(stream: aioresult.OutputStream[Any], chunks: list[Any]) -> None:
    async for chunk in stream:
        chunks.append(chunk)  # noqa: PERF401 - it may raise in the middle


async def test_a_server_that_lost_its_data_leaves_a_gap_of_what_was_not_read(redis_site: RedisSite) -> None:
    await redis_site.empty()
    async with (
        FaultProxy(redis_site.server.port) as proxy,
        redis_site.backend(proxy.port) as web,
        redis_site.backend() as worker,
        redis_site.backend() as near,
        worker.running("t") as task,
    ):

        async def send(*chunks: int) -> None:
            for chunk in chunks:
                await task.output.send(chunk)
            await task.output.flush()

        streams = [web.result("t").stream() for _ in range(3)]
        skipping = web.result("t").stream(on_gap="skip")
        got: list[list[Any]] = [[] for _ in range(3)]
        skipped: list[Any] = []
        all_of_it: list[Any] = []
        reading = [create_task(get_on(stream, chunks)) for stream, chunks in zip(streams, got, strict=True)]
        others = [create_task(get_on(skipping, skipped)), create_task(get_on(near.result("t").stream(), all_of_it))]
        await send(*range(10))
        await until(lambda: {len(each) for each in (*got, skipped, all_of_it)} == {10})
        proxy.refuse()
        proxy.cut()
        await send(*range(10, 20))
        await until(lambda: len(all_of_it) == 20)
        await asyncio.to_thread(redis_site.forget)
        await send(*range(20, 25))
        proxy.refuse(False)
        async with asyncio.timeout(BOUND):
            for read, stream, chunks in zip(reading, streams, got, strict=True):
                with pytest.raises(OutputGap) as gap:
                    await read
                assert (gap.value.missed, chunks) == (10, list(range(10)))
                assert gap.value.cursor == f"{stream.cursor.split('-')[0]}-20"
                with pytest.raises(OutputGap) as same:
                    await anext(web.result("t").stream(stream.cursor))
                assert (same.value.missed, same.value.cursor) == (10, gap.value.cursor)
            with pytest.raises(OutputGap) as later:
                await anext(near.result("t").stream())
            assert (later.value.missed, later.value.cursor) == (20, gap.value.cursor)
            rest: list[Any] = []
            going_on = create_task(get_on(near.result("t").stream(gap.value.cursor), rest))
            await send(25)
            await until(lambda: (len(all_of_it), len(skipped), len(rest)) == (26, 16, 6))
            task.output.stop()
            for each in (*others, going_on):
                each.cancel()
            await gather(*others, going_on, return_exceptions=True)
    assert all_of_it == list(range(26))
    assert skipped == [*range(10), *range(20, 26)]
    assert rest == list(range(20, 26))


@pytest.mark.parametrize(
    ("lease", "leases", "kept", "beats"), [(0.9, 1.3, True, 2), (0.6, 3, True, 1), (0.6, 3, False, 1)]
)
async def test_nobody_is_declared_lost_by_an_outage(
    redis_site: RedisSite, lease: float, leases: float, kept: bool, beats: int
) -> None:
    """Of some leases, with the data kept or not; the workers come back after so many beats of a waiter."""
    await redis_site.empty()
    at = partial(redis_site.backend, lease=lease)
    async with (
        FaultProxy(redis_site.server.port) as proxy,
        at() as web,
        at(proxy.port) as worker,
        at(proxy.port) as other,
    ):
        let_go = asyncio.Event()

        async def body(backend: Backend, task_id: str) -> None:
            async with backend.running(task_id) as task:
                await task.output.send(1)
                await let_go.wait()
                await task.output.send(2)
                task.value = "done"

        ids = {f"t{number}": (worker, other)[number % 2] for number in range(10)}
        tasks = [create_task(body(backend, task_id)) for task_id, backend in ids.items()]
        waiting = [Waiting(web, task_id) for task_id in ids]
        await until(lambda: all(each.read for each in waiting))
        await asyncio.to_thread(redis_site.server.stop)
        await asyncio.sleep(leases * lease)
        proxy.refuse()
        await asyncio.to_thread(redis_site.server.start if kept else redis_site.forget)
        for _ in range(beats):
            last = web.liveness._beats._last
            await until(lambda last=last: web.liveness._beats._last != last)
        proxy.refuse(False)  # the workers come back after somebody who looks for the dead
        judges = (web, worker, other)
        await until(lambda: all(judge.liveness._beats.last is not None for judge in judges))
        lasts = [judge.liveness._beats._last for judge in judges]
        await until(lambda: all(judge.liveness._beats._last != last for judge, last in zip(judges, lasts, strict=True)))
        assert await web.alive([worker.liveness.worker, other.liveness.worker]) == [True, True]
        assert not any(task.done() for each in waiting for task in (*each.impatient, *each.others))
        let_go.set()
        async with asyncio.timeout(BOUND):
            await gather(*tasks)
            for each in waiting:
                stream, *values = await gather(*each.impatient, *each.others)
                assert (stream, {*values}) == ("the end", {"the end", "done"})
                assert each.read == each.read_on == [1, 2]
        await settled(web)


# -- 5: a Redis that forgets, or has no room -------------------------------------------------------------------------

OUT, RUN = "{celery-task-meta-t}.out", "{celery-task-meta-t}.run"


@asynccontextmanager
async def redis_pair(site: RedisSite, **options: Any) -> AsyncIterator[tuple[Backend, Backend, redis.asyncio.Redis]]:
    """A reader's backend, a worker's, and a client to trouble the server with."""
    await site.empty()
    async with site.client() as client, site.backend(**options) as web, site.backend(**options) as worker:
        yield web, worker, client


async def test_an_evicted_log_is_a_gap_for_those_that_come_later(redis_site: RedisSite) -> None:
    async with redis_pair(redis_site) as (web, worker, client):
        got: list[Any] = []
        reader = create_task(get_on(web.result("t").stream(), got))
        async with worker.running("t") as task:
            for chunk in range(5):
                await task.output.send(chunk)
            await task.output.flush()
            await until(lambda: len(got) == 5)
            assert await client.delete(OUT) == 1
            await task.output.send(5)
            await task.output.flush()
            with pytest.raises(OutputGap) as gap:
                await anext(web.result("t").stream())
            assert gap.value.missed == 5
        async with asyncio.timeout(BOUND):
            await reader
        assert got == list(range(6))
        assert [chunk async for chunk in web.result("t").stream(gap.value.cursor)] == [5]


async def test_an_evicted_note_of_a_run_is_no_death_and_no_end(redis_site: RedisSite) -> None:
    """What the run stores counts, also its failure; a revoke takes the task for one that nobody runs."""
    async with redis_pair(redis_site, lease=0.3) as (web, worker, client):

        async def body(waiting: Waiting) -> None:
            task = aioresult.current_task()
            assert task is not None
            await task.output.send(1)
            await until(lambda: waiting.read == [1])
            assert await client.delete(f"{{celery-task-meta-{task.task_id}}}.run") == 1
            web.liveness._check(task.task_id)
            beat = web.liveness._beats._last
            await until(lambda: web.liveness._beats._last != beat)
            if task.task_id == "revoked":
                assert await web.result("revoked").revoke()
            await task.output.send(2)
            await task.output.flush()
            raise KeyError("why")

        for task_id, error in (("t", KeyError), ("revoked", TaskRevokedError)):
            waiting = Waiting(web, task_id)
            async with asyncio.timeout(BOUND):
                with pytest.raises(KeyError):
                    await worker.run(task_id, body, waiting)
                ends = await gather(*waiting.impatient, *waiting.others, return_exceptions=True)
            assert len(ends) == 6
            assert all(isinstance(end, error) for end in ends), ends
            assert waiting.read in ([1], [1, 2])
        assert (await worker.get_task_meta("t")).status == "FAILURE"
        await settled(web)


async def test_evicted_leases_are_given_again_before_anybody_is_declared_lost(redis_site: RedisSite) -> None:
    async with redis_pair(redis_site, lease=0.6) as (web, worker, client):
        async with worker.running("t") as task:
            waiting = Waiting(web, "t")
            await task.output.send(1)
            await until(lambda: waiting.read == [1])
            for _ in range(3):
                assert await client.delete("aioresult-workers") == 1
                # What seems missing is looked at, as after a reconnect.
                web.liveness._check("t")
                await eventually(lambda: client.zscore("aioresult-workers", worker.liveness.worker))
            await until(lambda: web.liveness._beats.last is not None)
            task.value = "done"
        async with asyncio.timeout(BOUND):
            assert await gather(*waiting.impatient) == ["the end", "done", "done"]
            await gather(*waiting.others)


async def test_a_full_server_is_told_to_the_producer_and_what_was_sent_is_kept(redis_site: RedisSite) -> None:
    await redis_site.empty()

    async def fill(load: Streaming) -> None:
        async with redis_site.client() as client:
            await client.config_set("maxmemory", "1")
            try:
                await until(lambda: len(load.refusals) > 3)
            finally:
                await client.config_set("maxmemory", "0")

    refusals = await survive(redis_site, fill)
    assert all("OOM" in each for each in refusals)


async def test_trimming_under_a_slow_reader_is_a_gap_of_what_it_has_not_read(redis_site: RedisSite) -> None:
    async with redis_pair(redis_site) as (web, worker, client):
        await client.config_set("stream-node-max-entries", "10")
        output = worker.output("t", keep=Keep(chunks=50))
        stream, skipping = web.result("t").stream(), web.result("t").stream(on_gap="skip")
        first = {}
        for chunk in range(20):
            await output.send(chunk)
        await output.flush()
        for each in (stream, skipping):
            first[each] = [await anext(each) for _ in range(5)]
        for chunk in range(20, 400):
            await output.send(chunk)
            await output.flush()  # an entry each
        await output.close()
        got: list[list[int]] = [first[stream], []]
        with pytest.raises(OutputGap) as gap:
            await get_on(stream, got[0])
        await get_on(web.result("t").stream(gap.value.cursor), got[1])
        read = len(got[0])
        assert 5 <= read < 350 - gap.value.missed
        assert got == [list(range(read)), list(range(read + gap.value.missed, 400))]
        assert 50 <= len(got[1]) <= 50 + 10
        await get_on(skipping, first[skipping])
        assert first[skipping][: len(got[0])] == got[0]
        assert first[skipping][-len(got[1]) :] == got[1]
        await client.config_set("stream-node-max-entries", "100")


# -- 6: a listener that is cut for its output buffer -----------------------------------------------------------------


async def test_a_listener_cut_at_each_message_gets_everything(redis_site: RedisSite) -> None:
    async with redis_pair(redis_site) as (web, worker, client):
        chunks = [[number, "x" * 16_370] for number in range(12)]  # as much as a message carries: more than is let wait
        all_of_it: list[list[Any]] = [[], [], []]
        readers = [create_task(get_on(web.result("t").stream(), got)) for got in all_of_it]
        async with worker.running("t") as task:
            await connected(web)
            await client.config_set("client-output-buffer-limit", "pubsub 1kb 0 0")
            try:
                for chunk in chunks:
                    await connected(web)
                    await task.output.send(chunk)
                    await until(lambda chunk=chunk: all(got and got[-1] == chunk for got in all_of_it))
            finally:
                await client.config_set("client-output-buffer-limit", "pubsub 33554432 8388608 60")
        async with asyncio.timeout(BOUND):
            await gather(*readers)
        assert all_of_it == [chunks] * 3
        assert (await client.info("stats"))["client_output_buffer_limit_disconnections"] > 3


# -- 7: the clock of the server is set back --------------------------------------------------------------------------


async def test_an_attempt_after_the_clock_was_set_back_is_newer_all_the_same(redis_site: RedisSite) -> None:
    future = 10**13
    async with redis_pair(redis_site) as (web, worker, client):
        with contextlib.suppress(aioresult.Retry):
            async with worker.running("t") as task:
                await task.output.send("first")
                raise aioresult.Retry
        reading = web.result("t").stream()
        assert await anext(reading) == "first"
        await client.xadd(OUT, {"d": '["ahead"]'}, f"{future}-1")  # an attempt of the time before that
        await client.publish(OUT, f'{future}-1 ["ahead"]')
        with pytest.raises(OutputRestarted) as ahead:
            await anext(reading)
        stream = web.result("t").stream(ahead.value.cursor)
        assert await anext(stream) == "ahead"
        async with worker.running("t") as task:
            await task.output.send("second")
            await task.output.flush()
            with pytest.raises(OutputRestarted) as restarted:
                await anext(stream)
            assert restarted.value.cursor == f"{future + 1}-0"
            assert await anext(web.result("t").stream(restarted.value.cursor)) == "second"
        # The log is lost, and the next attempt has an epoch below the one that readers know.
        await client.delete(OUT, RUN, "celery-task-meta-t")
        left = web.result("t").stream(restarted.value.cursor)
        waits = create_task(anext(left))
        await connected(web)
        async with worker.running("t") as task:
            await task.output.send("third")
            with pytest.raises(OutputRestarted) as behind:
                await waits
            third = web.result("t").stream(behind.value.cursor)
            assert await anext(third) == "third"
            await third.aclose()
        assert int(behind.value.cursor.split("-")[0]) < future


# -- 8: a storm of revokes -------------------------------------------------------------------------------------------


class Storm:
    """Tasks of some kinds in two workers, each revoked at some moment of its life, or before it, or after it."""

    def __init__(self, workers: Sequence[Backend], web: Backend, count: int, kinds: Sequence[str], runs: int) -> None:
        self.chance = random.Random(random.getrandbits(64))
        self.web = web
        self.kinds = dict.fromkeys((f"t{number}" for number in range(count)), "")
        for task_id in self.kinds:
            self.kinds[task_id] = self.chance.choice(kinds)
        self._runs = runs
        #: How each ended in its workers; those that began, and those that are about to.
        self.outcomes: dict[str, list[str]] = {task_id: [] for task_id in self.kinds}
        self.began: set[str] = set()
        self.entering: set[str] = set()
        #: What `revoke` returned, and which tasks no worker had got by then.
        self.revoked: dict[str, bool] = {}
        self.never: set[str] = set()
        self._workers = workers

    async def body(self, task_id: str, task: aioresult.Running) -> str:
        kind = self.kinds[task_id]
        for _ in range(0 if kind == "quick" else self.chance.randrange(20)):
            await asyncio.sleep(0)
        if kind == "fails":
            raise KeyError(task_id)
        try:
            if kind in ("endless", "swallow", "fails late"):
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            if kind == "endless":
                raise
            if kind == "fails late":
                raise KeyError(task_id) from None
        return kind

    async def deliver(self, task_id: str) -> None:
        """Once, or as often as a queue may."""
        self.entering.add(task_id)
        await gather(*(self._run(task_id) for _ in range(self._runs)))

    async def _run(self, task_id: str) -> None:
        try:
            async with self.chance.choice(self._workers).running(task_id) as task:
                self.began.add(task_id)
                task.value = await self.body(task_id, task)
        except TaskRevokedError:
            self.outcomes[task_id].append("REVOKED")
        except KeyError:
            self.outcomes[task_id].append("FAILURE")
        else:
            self.outcomes[task_id].append("SUCCESS")

    async def revoke(self, task_id: str) -> None:
        self.revoked[task_id] = await self.web.result(task_id).revoke("storm")
        if task_id not in self.entering:
            self.never.add(task_id)

    async def _some_at_once(self, what: Callable[[str], Awaitable[None]], at_once: int) -> None:
        left = list(self.kinds)
        self.chance.shuffle(left)

        async def one_after_the_other() -> None:
            while left:
                await what(left.pop())
                await asyncio.sleep(0)

        await gather(*(one_after_the_other() for _ in range(at_once)))

    async def pass_by(self, site: Site) -> tuple[dict[str, str], dict[str, str]]:
        """It all happens while connections are killed. What the waiters heard, and what is stored in the end."""
        waiting = {task_id: create_task(self.web.wait_for(task_id)) for task_id in self.kinds}
        work = create_task(self._some_at_once(self.deliver, 60))
        revokes = create_task(self._some_at_once(self.revoke, 30))
        async with asyncio.timeout(BOUND):
            while not (work.done() and revokes.done()):
                await site.kill("subscriptions")
                await asyncio.wait([work, revokes], timeout=0.1)
            await gather(work, revokes)
            heard = {task_id: (await wait).status for task_id, wait in waiting.items()}
        stored = {meta.task_id: meta.status for meta in await self.web.get_many(list(self.kinds))}
        assert self.never & self.began == set(), "a body ran after its task was revoked"
        assert min(len(self.never), len(self.began)) > 10
        await settled(self.web)
        assert [worker._running._runs for worker in self._workers] == [{}, {}]
        return heard, stored


async def test_a_storm_of_revokes(site: Site) -> None:
    """Each task ends in one state, which its worker, its waiters and the store agree on; nobody misses a revoke."""
    async with site.backend() as web, site.backend() as one, site.backend() as two:
        kinds = ["quick", "slow", "endless", "swallow", "fails", "fails late"]
        storm = Storm((one, two), web, 1000, kinds, runs=1)
        heard, stored = await storm.pass_by(site)
        outcomes = {task_id: outcome for task_id, (outcome,) in storm.outcomes.items()}
        assert stored == heard == outcomes
        for task_id, outcome in outcomes.items():
            kind, revoked = storm.kinds[task_id], storm.revoked[task_id]
            if not revoked:
                assert (kind in ("quick", "slow") and outcome == "SUCCESS") or (kind, outcome) == ("fails", "FAILURE")
            elif task_id not in storm.began:
                assert outcome == "REVOKED"
            else:
                # A body that nothing cancels while it waits may end by itself, between two of its steps.
                may = {"endless": {"REVOKED"}, "swallow": {"SUCCESS", "REVOKED"}, "fails late": {"FAILURE", "REVOKED"}}
                assert outcome in may.get(kind, {"SUCCESS", "FAILURE", "REVOKED"})
        assert {*outcomes.values()} == {"SUCCESS", "FAILURE", "REVOKED"}


async def test_a_storm_of_revokes_of_tasks_that_are_delivered_twice(site: Site) -> None:
    """Any success counts; without one the task ends as one of its runs did."""
    async with site.backend() as web, site.backend() as one, site.backend() as two:
        storm = Storm((one, two), web, 300, ["quick", "slow", "fails"], runs=2)
        heard, stored = await storm.pass_by(site)
        for task_id, outcomes in storm.outcomes.items():
            assert len(outcomes) == 2
            assert heard[task_id] in outcomes
            assert stored[task_id] in ({"SUCCESS"} if "SUCCESS" in outcomes else {*outcomes})
        assert {*stored.values()} == {"SUCCESS", "FAILURE", "REVOKED"}


# -- 9: readers that leave at any moment -----------------------------------------------------------------------------


async def come_and_go(site: Site) -> None:
    chance = random.Random(random.getrandbits(64))
    async with site.backend() as web, site.backend() as worker:
        over = asyncio.Event()

        async def produce(task_id: str) -> None:
            async with worker.running(task_id) as task:
                while not over.is_set():
                    await task.output.send("x")
                    task.progress(1)
                    await asyncio.sleep(0.01)

        async def visit(number: int) -> None:
            result = web.result(f"t{number % 25}")  # five of them never begin
            unused = result.stream(), result.updates(), result.stream().batches()
            match number % 7:
                case 0:
                    async for _ in result.stream():
                        break
                case 1:
                    async for _ in result.stream().batches():
                        break
                case 2:
                    async for _ in result.updates():
                        break
                case 3:
                    async for _ in result.updates():
                        pass
                case 4:
                    await result.read_output(aioresult.TAIL, wait=60)
                case 5:
                    await result.get(on_lost="raise")
                case _:
                    async for _ in result.stream():
                        pass
            del unused

        producers = [create_task(produce(f"t{number}")) for number in range(20)]
        loop = asyncio.get_running_loop()
        visitors = [create_task(visit(number)) for number in range(2000)]
        for visitor in visitors:
            loop.call_later(chance.uniform(0, 0.8), visitor.cancel)
        for _ in range(3):
            await site.kill(chance.choice(["subscriptions", "all"]))
            await asyncio.wait(visitors, timeout=0.25)
        async with asyncio.timeout(BOUND):
            outcomes = await gather(*visitors, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} <= {asyncio.CancelledError, type(None)}
        del visitors, visitor, outcomes  # whose tracebacks hold the streams
        gc.collect()
        await settled(web)
        over.set()
        await gather(*producers)
        assert worker._running._runs == {}


async def test_readers_that_leave_at_any_moment_leave_nothing_behind(site: Site) -> None:
    connections, instances = await site.connections(), objects()
    await come_and_go(site)
    await no_more_connections(site, connections)
    assert objects() <= instances


# -- 10: strangers ---------------------------------------------------------------------------------------------------

#: What anybody may publish, or put into a log.
JUNK = (
    *(b"", b" ", b"\x00", b"\xff\xfe", b"-", b"1-", b"-1 []", b"1-1", b"1-1 ", b"0-0 []", b"0-1 [1]", b"null", b"{}"),
    *(b"99999999999999999999-99999999999999999999 [1]", b"9999999999999-5 [1]", b"9" * 4400 + b"-1 [1]", b"x" * 20_000),
    *(b"1-1 [", b"1-1 {}", b'1-1 "a"', b"1-1 \xff", b"1-1 [1] [2]", b"1-1 " + b"[" * 5000, b"SUCCESS", b"revoke t"),
)


async def test_messages_of_strangers_only_cause_a_look(redis_site: RedisSite) -> None:
    """On the output's channel, on that of the workers, and on that of one worker."""
    async with redis_pair(redis_site, lease=LEASE) as (web, worker, client):
        async with worker.running("t") as task:
            waiting = Waiting(web, "t")
            me = worker.liveness.worker
            await connected(web)
            await connected(worker)
            assert isinstance(web, RedisBackend)
            assert isinstance(worker, RedisBackend)
            listeners = node_of(web).listener, node_of(worker).listener
            for number in range(50):
                await task.output.send(number)
                epoch = waiting.stream.cursor.split("-")[0].encode()
                near = [
                    b"%s-%d %s" % (epoch, last, data) for last in (0, 1, 2**63, 10**19) for data in (b"", b"[", b"1")
                ]
                for junk in (*JUNK, *near)[number % 3 :: 3]:
                    await client.publish(OUT, junk)
                    await client.publish("aioresult-workers", junk)
                    await client.publish(f"aioresult-worker-{me}", junk)
                await client.publish("aioresult-workers", me)  # a forged death
            await task.output.flush()
            await until(lambda: len(waiting.read) == len(waiting.read_on) == 50)
            await connected(web)
            now = node_of(web).listener, node_of(worker).listener
            assert now == listeners, "it was an error that ended a connection"
            assert not task.revoked
            assert not any(each.done() for each in (*waiting.impatient, *waiting.others))
            task.value = "done"
        async with asyncio.timeout(BOUND):
            ends = await gather(*waiting.impatient, *waiting.others)
        assert ends == ["the end", "done", "done", "the end", "the end", "done"]
        assert waiting.read == waiting.read_on == list(range(50))
        await settled(web)


@pytest.mark.parametrize(
    "fields",
    [{"x": "y"}, {"d": ""}, {"d": "{}"}, {"d": "["}, {"d": b"\xff"}, {"d": "1"}, {"d": "[" * 5000}, {"e": b"\xff"}],
    ids=lambda fields: repr(fields)[:20],
)
async def test_an_entry_of_a_stranger_is_an_error_of_those_that_read_it(
    redis_site: RedisSite, fields: dict[Any, Any]
) -> None:
    """By name, for the readers alone: the task and its waiters go on."""
    async with redis_pair(redis_site) as (web, worker, client):
        async with worker.running("t") as task:
            await task.output.send(1)
            await task.output.flush()
            stream = web.result("t").stream()
            assert await anext(stream) == 1
            await client.xadd(OUT, fields, f"{stream.cursor.split('-')[0]}-2")
            for reading in (anext(stream), web.result("t").read_output(), get_on(web.result("t").stream(), [])):
                with pytest.raises(DecodeError):
                    await asyncio.wait_for(reading, BOUND)
            task.value = "done"
        assert await web.result("t").get(timeout=BOUND) == "done"
        await stream.aclose()
        await settled(web)


async def test_keys_of_another_kind_are_an_error_by_name_for_those_that_need_them(redis_site: RedisSite) -> None:
    async with redis_pair(redis_site) as (web, worker, client):
        await client.set(OUT, "x")
        with pytest.raises(AioResultError, match="WRONGTYPE"):
            await asyncio.wait_for(anext(web.result("t").stream()), BOUND)

        async def body() -> str:
            task = aioresult.current_task()
            assert task is not None
            await task.output.send(1)
            return "done"

        with pytest.raises(BackendStoreError, match="WRONGTYPE"):
            await worker.run("t", body)
        assert await web.result("t").get(timeout=BOUND) == "done"  # the output is lost, and nothing else
        await client.set("{celery-task-meta-u}.run", "x")
        with pytest.raises(BackendStoreError, match="WRONGTYPE"):
            async with worker.running("u"):
                pytest.fail("it has no note")
        with pytest.raises(BackendStoreError, match="WRONGTYPE"):
            await web.result("u").revoke()
        await worker.mark_as_done("u", 1)
        assert await web.result("u") == 1
        await client.delete("aioresult-workers")
        await client.set("aioresult-workers", "x")
        async with redis_site.backend() as late:
            with pytest.raises(BackendStoreError, match="WRONGTYPE"):
                async with late.running("v"):
                    pytest.fail("it has no lease")
        await settled(web)


CURSORS = st.one_of(
    st.text(max_size=45),
    st.from_regex(r"\d{1,21}-\d{1,21}", fullmatch=True),
    st.builds("{}-{}".format, st.integers(0, 10**20), st.integers(0, 10**20)),
    st.builds("{}-{}".format, st.sampled_from([0, 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64]), st.integers(0, 2**64)),
    st.builds(lambda seq: f"EPOCH-{seq}", st.integers(0, 30)),
)


async def test_any_cursor_is_refused_by_name_or_begins_a_stream(site: Site) -> None:
    count = 20
    async with site.backend() as worker, site.backend() as backend:
        async with worker.running("t") as task:
            for chunk in range(count):
                await task.output.send(chunk)
            await task.output.flush()
            epoch = int(task.output.cursor.split("-")[0])
        loop = asyncio.get_running_loop()

        async def follow(cursor: str) -> None:
            try:
                stream = backend.result("t").stream(cursor)
            except InvalidCursor:
                with pytest.raises(InvalidCursor):
                    await backend.result("t").read_output(cursor)
                return
            chunks: list[Any] = []
            after, seq = (0, 0) if cursor == TAIL else map(int, cursor.split("-"))
            try:
                await get_on(stream, chunks)
            except OutputRestarted as exc:
                restarted = exc.cursor
            except OutputError as exc:
                pytest.fail(f"{cursor}: {exc!r}")
            else:
                restarted = ""
            if after not in (0, epoch):
                assert (restarted, chunks) == (f"{epoch}-0", [])
            else:
                assert restarted == ""
                assert chunks == ([] if cursor == TAIL else list(range(seq if after == epoch else 0, count)))

        @settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(CURSORS)
        def any_cursor(cursor: str) -> None:
            cursor = cursor.replace("EPOCH", str(epoch))
            asyncio.run_coroutine_threadsafe(asyncio.wait_for(follow(cursor), BOUND), loop).result()

        await asyncio.to_thread(any_cursor)
        await settled(backend)
