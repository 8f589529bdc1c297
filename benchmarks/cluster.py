"""What a Redis Cluster costs beside a single server: ``python -m benchmarks cluster``. See docs/benchmarks.md.

All servers come from the same binary and run at the same time, and the measurements take turns on them: a single
server, a cluster of three masters, and a cluster of three masters with a replica each. Ratios are medians of those of
neighbours.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from statistics import median, quantiles
from time import perf_counter
from typing import Any, NamedTuple

import redis

import aioresult
from aioresult import Backend
from tests.cluster_servers import ClusterNode, RedisCluster, redis_cluster, slot_of

from .channel import spawn
from .servers import Server
from .storer import RemoteStorer
from .subject import new_ids, text

__all__ = ["Row", "measure", "table"]

_ROOT = Path(__file__).resolve().parent.parent
_OURS = "benchmarks.ours:Ours"
_VALUE = text(100)
_TIME_LIMIT = 300.0
#: Milliseconds after which the masters of the clusters to be broken count as dead.
_NODE_TIMEOUT = 1000
#: Seconds between heartbeats while a master is frozen.
_HEARTBEAT = 1.0
#: Seconds for which a slot that migrates is held open.
_HELD = 0.5


class Row(NamedTuple):
    """A line of the table. A ratio is to the single server."""

    work: str
    goal: str
    unit: str
    single: float | None
    masters: float | None
    replicated: float | None
    ratio: float | None = None
    replicated_ratio: float | None = None


# -- servers ----------------------------------------------------------------------------------------------------------


class _Target:
    """A single server, or a cluster: where to connect, and what can be asked of it from outside."""

    def __init__(self, url: str, ask: Sequence[Callable[..., Any]], pids: Sequence[int] = ()) -> None:
        self.url = url
        self._ask = ask
        self._pids = pids

    @classmethod
    def of_server(cls, server: Server) -> _Target:
        return cls(server.url, [redis.Redis.from_url(server.url).execute_command])

    @classmethod
    def of_cluster(cls, cluster: RedisCluster) -> _Target:
        return cls(cluster.url, [node.ask for node in cluster.nodes], [node.pid for node in cluster.nodes])

    def _sum(self, section: str, *fields: str) -> float:
        return sum(float(_info(ask, section).get(field, 0)) for ask in self._ask for field in fields)

    def cpu(self) -> float:
        """Seconds of CPU that all processes have used."""
        return self._sum("cpu", "used_cpu_sys", "used_cpu_user")

    def bus(self) -> float:
        """Bytes that all nodes have written for each other, without those of replication."""
        try:
            written = sum(_written(pid) for pid in self._pids)
        except OSError:  # only Linux says
            return 0.0
        return written - self._sum("stats", "total_net_output_bytes") if self._pids else 0.0

    def channels(self) -> int:
        """How many channels have a subscriber."""
        return int(self._sum("stats", "pubsub_channels", "pubsubshard_channels"))

    def flush(self) -> None:
        for ask in self._ask:
            with contextlib.suppress(redis.ReadOnlyError):
                ask("FLUSHALL")


def _info(ask: Callable[..., Any], section: str) -> dict[str, Any]:
    told = ask("INFO", section)
    if isinstance(told, dict):
        return told
    return dict(line.split(":", 1) for line in told.splitlines() if ":" in line)


def _written(pid: int) -> int:
    for line in Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines():
        if line.startswith("wchar:"):
            return int(line.split()[1])
    return 0


# -- cost, and latency ------------------------------------------------------------------------------------------------


class _Cost(NamedTuple):
    """Per store: µs of the servers' CPU, and bytes, without those of servers that are idle for as long."""

    alone: float
    bus: float
    waited: float
    waited_bus: float


class _Side:
    """The figures without faults."""

    def __init__(self, targets: Sequence[_Target], quick: bool) -> None:
        self._targets = targets
        self._times = 3 if quick else 7
        self._stores = 5_000 if quick else 20_000
        self._samples = 100 if quick else 500

    async def _turns(self, measured: Callable[[_Target], Awaitable[Any]]) -> list[list[Any]]:
        """By target, what was measured each time."""
        found: list[list[Any]] = [[] for _ in self._targets]
        for _ in range(self._times):
            for target, figures in zip(self._targets, found, strict=True):
                target.flush()
                figures.append(await measured(target))
        return found

    async def costs(self) -> list[Row]:
        async with contextlib.AsyncExitStack() as stack:
            storers = {}
            for target in self._targets:
                spec = {"subject": _OURS, "url": target.url, "options": {}}
                storers[target] = await RemoteStorer.start(spec)
                stack.push_async_callback(storers[target].close)
                await storers[target].store_many(new_ids(3000), _VALUE, 1000)

            async def cost(target: _Target) -> _Cost:
                return await self._cost(target, storers[target])

            found = await self._turns(cost)
        figures = ("alone", "waited", "bus", "waited_bus")
        values = {name: [[getattr(each, name) for each in some] for some in found] for name in figures}
        return [
            _row("server CPU, a store", "≤ 1.7", "µs", values["alone"]),
            _row("… and a waiter of each", "", "µs", values["waited"]),
            _row("bus, a store", "0", "B", values["bus"]),
            _row("… and a waiter of each", "0", "B", values["waited_bus"]),
        ]

    async def _cost(self, target: _Target, storer: RemoteStorer) -> _Cost:
        began, idle = perf_counter(), (target.cpu(), target.bus())
        await asyncio.sleep(1.0)
        seconds = perf_counter() - began
        cpu_idle, bus_idle = (target.cpu() - idle[0]) / seconds, (target.bus() - idle[1]) / seconds

        async def store(ids: list[str]) -> tuple[float, float]:
            cpu, bus, began = target.cpu(), target.bus(), perf_counter()
            await storer.store_many(ids, _VALUE, 1000)
            seconds = perf_counter() - began
            cpu, bus = target.cpu() - cpu - cpu_idle * seconds, target.bus() - bus - bus_idle * seconds
            return cpu / len(ids) * 1e6, max(bus, 0) / len(ids)

        alone, bus = await store(new_ids(self._stores))
        async with aioresult.connect(target.url) as backend:
            ids = new_ids(self._stores)
            waiters = [asyncio.ensure_future(backend.result(task_id).get()) for task_id in ids]
            await _until(lambda: target.channels() >= len(ids))
            await asyncio.sleep(0.5)  # for what is still to be read
            waited, waited_bus = await store(ids)
            await asyncio.gather(*waiters)
        return _Cost(alone, bus, waited, waited_bus)

    async def latencies(self) -> list[Row]:
        found = await self._turns(lambda target: _child(target, "latency", samples=self._samples, idle=0))
        return [
            _row(f"store → wake, {name}", goal, "ms", [[figures[name] for figures in some] for some in found])
            for name, goal in (("p50", "≤ 1.3"), ("p99", ""))
        ]

    async def clients(self, count: int) -> list[Row]:
        """What the waiting process spends."""
        found = await self._turns(lambda target: _child(target, "wake", count=count))
        rows = [
            _row(f"client CPU, {what}", "", "µs", [[figures[key] for figures in some] for some in found])
            for what, key in (("to begin to wait", "cpu_to_wait"), ("to be woken", "cpu_to_wake"))
        ]
        memory = [[(await _child(target, "memory", count=count))["allocated"]] for target in self._targets]
        return [*rows, _row("client memory, a waiter", "", "B", memory)]


async def _child(target: _Target, work: str, **params: Any) -> dict[str, Any]:
    """One of `benchmarks.work`, in a process of its own."""
    spec = {"subject": _OURS, "url": target.url, "options": {}, "work": work, "params": params}
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    process, channel = await spawn([sys.executable, "-m", "benchmarks.child", json.dumps(spec)], env=environment)
    try:
        async with asyncio.timeout(_TIME_LIMIT):
            answer: dict[str, Any] = await channel.receive()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    if "figures" not in answer:
        raise RuntimeError(f"{work} on {target.url} failed: {answer}")
    figures: dict[str, Any] = answer["figures"]
    return figures


def _row(work: str, goal: str, unit: str, values: Sequence[Sequence[float]]) -> Row:
    single, masters, replicated = values
    ratios = [
        median(of / to for of, to in zip(some, single, strict=True)) if all(single) else None
        for some in (masters, replicated)
    ]
    return Row(work, goal, unit, median(single), median(masters), median(replicated), *ratios)


# -- faults -----------------------------------------------------------------------------------------------------------


class _Told(NamedTuple):
    """A store, and the wake-up of its waiter, as `perf_counter` says."""

    began: float
    stored: float
    woken: float


async def _told(storer: Backend, waiter: Backend, task_id: str, pause: float) -> _Told:
    """The waiter waits for ``pause`` seconds before the result is stored."""

    async def wait() -> float:
        await waiter.result(task_id)
        return perf_counter()

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(pause)
    began = perf_counter()
    await storer.mark_as_done(task_id, _VALUE)
    stored = perf_counter()
    return _Told(began, stored, await waiting)


class _Faults:
    """What a cluster of three masters with a replica each does to its waiters and storers when something happens."""

    def __init__(self, cluster: RedisCluster, quick: bool) -> None:
        self._cluster = cluster
        self._quick = quick
        self._chance = Random(13)

    @contextlib.asynccontextmanager
    async def _backends(self, **options: Any) -> Any:
        url = self._cluster.url
        async with aioresult.connect(url, **options) as storer, aioresult.connect(url, **options) as waiter:
            yield storer, waiter

    async def migration(self) -> list[Row]:
        """Slots migrate and are held open, while results of their tasks are stored at random moments."""
        cluster = self._cluster
        told: list[_Told] = []
        plain: list[_Told] = []
        async with self._backends() as (storer, waiter):
            for number in range(3 if self._quick else 8):
                ids = [f"{{m{number}}}-{index}" for index in range(200)]
                slot = slot_of(ids[0])
                owner = await asyncio.to_thread(cluster.master_of, slot)
                to = next(node for node in cluster.masters() if node is not owner)
                for found, ids_of in ((plain, ids[:100]), (told, ids[100:])):
                    pauses = [0.3 + self._chance.uniform(0, _HELD) for _ in ids_of]
                    work = [_told(storer, waiter, *each) for each in zip(ids_of, pauses, strict=True)]
                    telling = asyncio.gather(*work)
                    await asyncio.sleep(0.3)
                    if found is told:
                        await asyncio.to_thread(cluster.migrate, slot, to, partial(_is_past, perf_counter() + _HELD))
                    found += await telling
        late = sorted(each.woken - each.began for each in told)
        usual = sorted(each.woken - each.began for each in plain)
        return [
            _single("store → wake, no migration, p95", "", "ms", _quantile(usual, 95) * 1e3),
            _single(f"… while its slot is held open {_HELD:g} s, p95", "", "ms", _quantile(late, 95) * 1e3),
            _single("… the longest", "≤ 100", "ms", late[-1] * 1e3),
        ]

    async def kill(self, full_coverage: bool) -> list[Row]:
        """A master is killed. The figures are of the other shards."""
        cluster = self._cluster
        said = "yes" if full_coverage else "no"
        for node in cluster.nodes:
            node.ask("CONFIG", "SET", "cluster-require-full-coverage", said)
        victim, *others = cluster.masters()
        count = 2000
        ids = iter(
            [task_id for pair in zip(*(self._ids(node, count) for node in others), strict=True) for task_id in pair]
        )
        async with self._backends() as (storer, waiter):
            before = await self._paced(storer, waiter, ids, asyncio.create_task(asyncio.sleep(2.0)))
            began = perf_counter()
            hit = asyncio.create_task(_told(storer, waiter, self._ids(victim, 1)[0], 0.05))
            await asyncio.to_thread(victim.kill)
            replaced = asyncio.create_task(asyncio.to_thread(cluster.wait_replaced, victim))
            during = await self._paced(storer, waiter, ids, replaced)
            outage = perf_counter() - began
            stored = (await hit).stored - began
        await asyncio.to_thread(cluster.restore)
        rows = [
            _single(f"{name}, {when}, p99", goal, "ms", _quantile(sorted(values), 99) * 1e3)
            for when, told, goal in (("all is well", before, ""), ("a master killed", during, "≤ 50"))
            for name, values in (
                ("healthy shards: store", [each.stored - each.began for each in told]),
                ("healthy shards: store → wake", [each.woken - each.began for each in told]),
            )
        ]
        if full_coverage:
            rows = [row._replace(work=f"coverage yes: {row.work}", goal="") for row in rows[2:]]
        return [
            *rows,
            _single("… until the cluster has a new master", "", "s", outage),
            _single("… until a store to its shard is acknowledged", "", "s", stored),
        ]

    def _ids(self, node: ClusterNode, count: int) -> list[str]:
        return self._cluster.ids_on(node, count, prefix=new_ids(1)[0])

    async def _paced(
        self, storer: Backend, waiter: Backend, ids: Iterator[str], over: asyncio.Task[None], rate: float = 100.0
    ) -> list[_Told]:
        """Stores for waiters, so many a second, until ``over``."""
        telling = []
        at = perf_counter()
        while not over.done():
            telling.append(asyncio.create_task(_told(storer, waiter, next(ids), 0.1)))
            at += 1 / rate
            await asyncio.sleep(max(at - perf_counter(), 0))
        await over
        return await asyncio.gather(*telling)

    async def freeze(self) -> list[Row]:
        cluster = self._cluster
        victim = cluster.masters()[0]
        noticed: asyncio.Future[float] = asyncio.get_running_loop().create_future()

        class Notice(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if not noticed.done():
                    noticed.set_result(perf_counter())

        logger = logging.getLogger("aioresult")
        logger.addHandler(handler := Notice())
        try:
            async with self._backends(heartbeat=_HEARTBEAT) as (storer, waiter):
                waiting = [asyncio.ensure_future(waiter.result(each).get()) for each in self._ids(victim, 100)]
                first, second = self._ids(victim, 2)
                await _told(storer, waiter, first, 0.1)
                victim.freeze()
                began = perf_counter()
                storing = asyncio.create_task(_told(storer, waiter, second, 0.1))
                replaced = asyncio.create_task(asyncio.to_thread(cluster.wait_replaced, victim))
                seen = await noticed - began
                stored = (await storing).stored - began
                await replaced
                outage = perf_counter() - began
                for each in waiting:
                    each.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
        finally:
            logger.removeHandler(handler)
        victim.thaw()
        await asyncio.to_thread(cluster.restore)
        return [
            _single("a frozen master: the cluster has a new one", "", "s", outage),
            _single(f"… the waiters' connection dropped, heartbeat {_HEARTBEAT:g} s", "≤ 1.5 h + f", "s", seen),
            _single("… a store to its shard is acknowledged", "", "s", stored),
        ]


class _Crowd:
    """As many waiters as a process has at most."""

    def __init__(self, server: Server, cluster: RedisCluster, count: int) -> None:
        self._server = server
        self._cluster = cluster
        self._count = count

    async def rows(self) -> list[Row]:
        single = await self._subscribe(_Target.of_server(self._server), None)
        cluster = self._cluster
        victim = cluster.masters()[0]
        began, lost = await self._subscribe(_Target.of_cluster(cluster), victim), self._lost
        await asyncio.to_thread(cluster.restore)
        count = f"{self._count:,} waiters"
        return [
            Row(f"{count} subscribed", "", "s", single, None, began, None, began / single),
            _single("… a third of them again, a master killed", "", "s", lost[0]),
            _single("… after the others have noticed and replaced it", "", "s", lost[0] - lost[1]),
        ]

    async def _subscribe(self, target: _Target, victim: ClusterNode | None) -> float:
        async with aioresult.connect(target.url) as backend:
            await backend.get_many(new_ids(100))
            began = perf_counter()
            waiters = [asyncio.ensure_future(backend.result(each).get()) for each in new_ids(self._count)]
            await _until(lambda: target.channels() >= self._count)
            took = perf_counter() - began
            if victim is not None:
                await self._lose(victim)
            for each in waiters:
                each.cancel()
            await asyncio.gather(*waiters, return_exceptions=True)
        return took

    async def _lose(self, victim: ClusterNode) -> None:
        cluster = self._cluster
        began = perf_counter()
        await asyncio.to_thread(victim.kill)
        replaced = asyncio.create_task(asyncio.to_thread(_promoted, cluster.replica_of(victim)))
        left = _Target(cluster.url, [node.ask for node in cluster.nodes if node is not victim])
        await _until(lambda: left.channels() >= self._count)
        took = perf_counter() - began
        self._lost = (took, await replaced - began)

    _lost: tuple[float, float]


def _is_past(moment: float) -> bool:
    return perf_counter() > moment


def _promoted(replica: ClusterNode) -> float:
    """When a replica is a master."""
    while replica.ask("ROLE")[0] != "master":
        pass
    return perf_counter()


async def _until(condition: Callable[[], bool]) -> None:
    """Asks in a thread: what is measured must not be held up."""
    async with asyncio.timeout(_TIME_LIMIT):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.02)


def _single(work: str, goal: str, unit: str, value: float) -> Row:
    return Row(work, goal, unit, None, None, value)


def _quantile(values: Sequence[float], percent: int) -> float:
    return quantiles(values, n=100)[percent - 1]


# -- all of it --------------------------------------------------------------------------------------------------------


async def measure(server: Server, quick: bool) -> list[Row]:
    """All figures."""
    logging.getLogger("aioresult").addHandler(logging.NullHandler())  # it says much of what is broken here
    rows: list[Row] = []
    with redis_cluster(replicas=0, node_timeout=15_000) as masters, redis_cluster(node_timeout=15_000) as replicated:
        targets = [_Target.of_server(server), _Target.of_cluster(masters), _Target.of_cluster(replicated)]
        side = _Side(targets, quick)
        rows += await side.costs()
        rows += await side.latencies()
        rows += await side.clients(3_000 if quick else 10_000)
    with redis_cluster(node_timeout=_NODE_TIMEOUT) as cluster:
        faults = _Faults(cluster, quick)
        rows += await faults.migration()
        rows += await faults.kill(full_coverage=False)
        rows += await faults.kill(full_coverage=True)
        rows += await faults.freeze()
        rows += await _Crowd(server, cluster, 10_000 if quick else 100_000).rows()
    return rows


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = [f"{'work':<58}{'goal':>12}{'single':>11}{'3':>11}{'3 + 3':>11}  ratios"]
    for row in rows:
        ratios = [f"{ratio:.2f}" for ratio in (row.ratio, row.replicated_ratio) if ratio is not None]
        values = "".join(f"{_shown(value, row.unit):>11}" for value in (row.single, row.masters, row.replicated))
        lines.append(f"{row.work:<58}{row.goal:>12}{values}  {', '.join(ratios)}".rstrip())
    return "\n".join(lines)


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {unit}"
