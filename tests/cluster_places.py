"""Redis Cluster and Sentinel for the soak: what an operator does to them, and what breaks.

Redis replicates in the background. A master that is killed, or replaced while it still works, may lose what it has
acknowledged last, as docs/cluster.md says. Here nothing that was acknowledged may be lost, so the soak replaces masters
only in ways that lose nothing:

- The operator asks the master for it (CLUSTER FAILOVER, FAILOVER): it stops writing until its replica is in step.
- A master ends on SIGTERM: it waits for its replicas first. Then a replica takes its place, without the master's help.

Replicas and sentinels are killed. Masters freeze for less time than it takes the others to replace them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import psutil
import redis

import aioresult
from aioresult import Backend

from .cluster_servers import ClusterNode, Node, RedisCluster, SentinelSetup, slot_of
from .sites import Place, Trouble

N = TypeVar("N", bound=Node)

#: The most seconds for which a server is frozen, or stopped and started again.
_FREEZE = 1.0
#: Milliseconds after which the others replace a master that does not answer: so many that a busy machine does not have
#: them do it. They replace it at once if the soak asks for it.
_PATIENCE = 5000
#: What holds keys without an expiry.
_ENDLESS = "aioresult-workers"


class _Servers(Place, Generic[N]):
    """What the two have in common."""

    def __init__(self, setup: RedisCluster | SentinelSetup) -> None:
        self._setup = setup
        #: The masters, as far as the soak knows.
        self._expected: set[N] = set()

    def start(self) -> None:
        self._setup.start()
        self._expected = set(self._masters())

    def remove(self) -> None:
        self._setup.remove()

    def _masters(self) -> Sequence[N]:
        raise NotImplementedError

    def _servers(self) -> Sequence[Node]:
        """All to which a backend may be connected."""
        raise NotImplementedError

    @asynccontextmanager
    async def _in_order(self) -> AsyncIterator[Sequence[N]]:
        """Gives the masters. All servers work at the beginning, and again at the end."""
        await asyncio.to_thread(self._setup.wait_ok)
        masters = await asyncio.to_thread(self._masters)
        # A machine that is too busy could do that. What it loses is no fault of the library.
        assert set(masters) == self._expected, f"masters were replaced unasked: {self._expected} by {masters}"
        yield masters
        await asyncio.to_thread(self._setup.wait_ok)
        self._expected = set(await asyncio.to_thread(self._masters))

    def troubles(self, chance: random.Random) -> Sequence[Trouble]:
        async def kill() -> None:
            kinds = chance.choice([("normal", "pubsub"), ("normal",), ("pubsub",)])
            nodes = [node for node in self._servers() if node.up]
            for node in chance.sample(nodes, chance.randint(1, len(nodes))):
                with contextlib.suppress(OSError, redis.RedisError):  # it has just been stopped
                    await asyncio.to_thread(_kill_clients, node, kinds)

        async def freeze() -> None:
            # Unlike `Node.freeze` this does not take it out of the set-up: a migration goes on, slowly.
            process = psutil.Process(chance.choice([node for node in self._servers() if node.up]).pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
                await asyncio.sleep(chance.uniform(0.1, _FREEZE))
                process.resume()

        return [kill, freeze]

    async def connections(self) -> int:
        def count() -> int:
            return sum(len(_clients(node)) for node in self._servers())

        return await asyncio.to_thread(count)

    async def without_expiry(self) -> int:
        def count() -> int:
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(node.client()) for node in self._masters()]
                return sum(
                    client.ttl(key) == -1
                    for client in clients
                    for key in client.scan_iter(count=1000)
                    if _ENDLESS not in key.decode()
                )

        return await asyncio.to_thread(count)


class ClusterPlace(_Servers[ClusterNode]):
    """Three masters and three replicas."""

    name = "cluster"
    _setup: RedisCluster

    def __init__(self) -> None:
        super().__init__(RedisCluster("--appendonly", "yes", node_timeout=_PATIENCE))

    def ports(self) -> Sequence[int]:
        return [node.port for node in self._setup.originals]

    def through(self, proxies: Mapping[int, int]) -> tuple[str, dict[str, Any]]:
        hosts = ",".join(f"127.0.0.1:{port}" for port in proxies.values())
        # Nodes that join later have no proxy.
        remap = {f"127.0.0.1:{port}": f"127.0.0.1:{proxy}" for port, proxy in proxies.items()}
        return f"redis+cluster://{hosts}", {"address_remap": remap}

    def backend(self) -> Backend:
        return aioresult.connect(self._setup.url, heartbeat=0.5)

    def _masters(self) -> Sequence[ClusterNode]:
        return self._setup.masters()

    def _servers(self) -> Sequence[Node]:
        return self._setup.up()

    def rearrangements(self, chance: random.Random, ids: Callable[[], Sequence[str]]) -> Sequence[Trouble]:
        setup = self._setup

        async def restart() -> None:
            async with self._in_order():
                node = chance.choice(setup.nodes)
                await asyncio.to_thread(node.stop)
                await asyncio.sleep(chance.uniform(0.1, _FREEZE))
                await asyncio.to_thread(node.start)

        async def kill_replica() -> None:
            async with self._in_order():
                replica = chance.choice(await asyncio.to_thread(setup.replicas))
                await asyncio.to_thread(replica.kill)
                await asyncio.sleep(chance.uniform(0.1, 1))
                await asyncio.to_thread(replica.start)

        async def failover() -> None:
            async with self._in_order() as masters:
                await self._promote(setup.replica_of(chance.choice(masters)))

        async def lose_master() -> None:
            async with self._in_order() as masters:
                master = chance.choice(masters)
                replica = setup.replica_of(master)
                await asyncio.to_thread(master.stop)
                await asyncio.sleep(chance.uniform(0.1, 1))
                await self._promote(replica, "FORCE")
                await asyncio.to_thread(setup.wait_replaced, master)
                await asyncio.to_thread(master.start)

        async def reshard() -> None:
            async with self._in_order() as masters:
                to = chance.choice(masters)
                own = set(await asyncio.to_thread(setup.slots_of, to))
                slots = sorted({slot_of(task_id) for task_id in ids()} - own)
                if chance.random() < 0.5:
                    await asyncio.to_thread(setup.migrate_all, chance.sample(slots, min(len(slots), 30)), to)
                else:
                    await self._held(chance.sample(slots, min(len(slots), 5)), to, chance)

        async def come_and_go() -> None:
            async with self._in_order() as masters:
                node = await asyncio.to_thread(setup.add_node)
                slots = {slot_of(task_id) for task_id in chance.sample(ids(), 20)}
                await asyncio.to_thread(setup.migrate_all, slots, node)
                await asyncio.sleep(chance.uniform(0, 0.5))
                await asyncio.to_thread(setup.migrate_all, slots, chance.choice(masters))
                await asyncio.to_thread(setup.remove_node, node)
                await asyncio.sleep(chance.uniform(0, 0.5))  # it still answers, and knows of no cluster
                await asyncio.to_thread(node.remove)
                setup.removed.remove(node)

        return [restart, kill_replica, failover, lose_master, *[reshard] * 4, come_and_go]

    async def _promote(self, replica: ClusterNode, *how: str) -> None:
        """An attempt fails if the other masters vote too late."""
        while (await asyncio.to_thread(replica.ask, "ROLE"))[0] != "master":
            with contextlib.suppress(redis.ResponseError):
                await asyncio.to_thread(replica.ask, "CLUSTER", "FAILOVER", *how)
            await asyncio.sleep(0.1)

    async def _held(self, slots: Sequence[int], to: ClusterNode, chance: random.Random) -> None:
        """First the source has some keys and the target has others, then the target has all. Not all slots move."""
        setup = self._setup
        for slot in slots:
            await asyncio.to_thread(setup.begin_migration, slot, to)
        await asyncio.sleep(chance.uniform(0, 0.2))
        for slot in slots:
            await asyncio.to_thread(setup.move_keys, slot, to)
        await asyncio.sleep(chance.uniform(0, 1))
        for slot in slots:
            end = chance.choice([setup.end_migration] * 3 + [setup.cancel_migration])
            await asyncio.to_thread(end, slot, to)


class SentinelPlace(_Servers[Node]):
    """A master, a replica and three sentinels."""

    name = "sentinel"
    _setup: SentinelSetup

    def __init__(self) -> None:
        super().__init__(SentinelSetup("--appendonly", "yes", down_after=_PATIENCE))

    def ports(self) -> Sequence[int]:
        return [node.port for node in self._servers()]

    def through(self, proxies: Mapping[int, int]) -> tuple[str, dict[str, Any]]:
        hosts = ",".join(f"127.0.0.1:{proxies[node.port]}" for node in self._setup.sentinels)
        remap = {f"127.0.0.1:{node.port}": f"127.0.0.1:{proxies[node.port]}" for node in self._setup.nodes}
        return f"redis+sentinel://{hosts}/{self._setup.master_name}/0", {"address_remap": remap}

    def backend(self) -> Backend:
        return aioresult.connect(self._setup.service_url, heartbeat=0.5)

    def _masters(self) -> Sequence[Node]:
        return [self._setup.master()]

    def _servers(self) -> Sequence[Node]:
        return [*self._setup.nodes, *self._setup.sentinels]

    def rearrangements(self, chance: random.Random, ids: Callable[[], Sequence[str]]) -> Sequence[Trouble]:
        setup = self._setup

        async def restart() -> None:
            async with self._in_order() as (master,):
                await asyncio.to_thread(master.stop)
                await asyncio.sleep(chance.uniform(0.1, _FREEZE))
                await asyncio.to_thread(master.start)

        async def kill_replica() -> None:
            async with self._in_order() as (master,):
                replica = chance.choice(setup.replicas())
                await asyncio.to_thread(replica.kill)
                await asyncio.sleep(chance.uniform(0.1, 1))
                await asyncio.to_thread(_start_as_replica, replica, master)

        async def kill_sentinel() -> None:
            async with self._in_order():
                sentinel = chance.choice(setup.sentinels)
                await asyncio.to_thread(sentinel.kill)
                await asyncio.sleep(chance.uniform(0.1, 1))
                await asyncio.to_thread(sentinel.start)

        async def failover() -> None:
            async with self._in_order() as (master,):
                replica = chance.choice(setup.replicas())
                # SENTINEL FAILOVER alone has two masters for a moment, and loses what the old one is sent.
                await asyncio.to_thread(master.ask, "FAILOVER", "TO", *replica.address)
                while (await asyncio.to_thread(replica.ask, "ROLE"))[0] != "master":  # noqa: ASYNC110 - a server
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(setup.failover)

        async def lose_master() -> None:
            async with self._in_order() as (master,):
                await asyncio.to_thread(master.stop)
                await asyncio.sleep(chance.uniform(0.1, 1))
                new = await asyncio.to_thread(setup.failover)
                await asyncio.to_thread(_start_as_replica, master, new)

        return [restart, kill_replica, kill_sentinel, failover, lose_master]


def _start_as_replica(node: Node, master: Node) -> None:
    node.start("--replicaof", *map(str, master.address))


def _clients(node: Node, *words: str) -> list[dict[str, str]]:
    """The connections that a node has with clients that are neither ours nor of the set-up itself."""
    lines: list[str] = node.ask("CLIENT", "LIST", *words).splitlines()
    clients = [dict(word.partition("=")[::2] for word in line.split()) for line in lines]
    return [
        client
        for client in clients
        if not client["name"].startswith("sentinel-")
        and not set(client["flags"]) & set("USM")
        and client["cmd"] not in ("migrate", "restore", "restore-asking")
    ]


def _kill_clients(node: Node, kinds: Iterable[str]) -> None:
    with node.asking() as ask:
        for kind in kinds:
            for client in _clients(node, "TYPE", kind):
                with contextlib.suppress(redis.ResponseError):  # it has gone
                    ask("CLIENT", "KILL", "ID", client["id"])
