"""What the conformance suite knows of a backend: how to get several connected to one and the same store."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial
from math import inf
from time import monotonic
from typing import Any

import redis.asyncio
import redis.sentinel
from redis.crc import key_slot

import aioresult
from aioresult import Backend
from aioresult.backends.memory import MemoryStore
from aioresult.backends.redis import RedisBackend
from aioresult.backends.redis.cluster import Cluster
from aioresult.backends.redis.connection import RedisConnection
from aioresult.backends.redis.node import Node
from aioresult.backends.redis.topology import Single
from aioresult.hub import Hub
from aioresult.topic import Topic

from .cluster_servers import RedisCluster, SentinelSetup


class Harness:
    """One store, empty at the start of a test. `connect` gives open backends on it, `close` closes them all."""

    name: str
    #: A URL of such a store; braces stand for the credentials and the host.
    example: str = "store://{}"
    #: By which another process opens it. Only a memory store has none.
    url: str
    #: Ids that this store can hold and some other cannot.
    further_ids: tuple[str, ...] = ()
    #: Whether the state of what is stored can only be told by reading all of it.
    judges_by_content = True
    #: How many characters an id may have.
    longest_id = 1024
    #: Whether it keeps a result's ``group_id`` and ``parent_id``; Celery's tables have no columns for them.
    keeps_family = True

    def __init__(self) -> None:
        self._open: list[Backend] = []

    def make(self, **options: Any) -> Backend:
        """A backend that is not open yet; the test closes it."""
        raise NotImplementedError

    async def open(self, backend: Backend) -> Backend:
        """Open what `make` made, and have it closed with the rest."""
        await backend.open()
        self._open.append(backend)
        return backend

    async def connect(self, **options: Any) -> Backend:
        return await self.open(self.make(**options))

    async def pair(self, **options: Any) -> tuple[Backend, Backend]:
        """The worker's side and the waiter's side."""
        return await self.connect(**options), await self.connect(**options)

    async def close(self) -> None:
        for backend in self._open:
            await backend.aclose()

    async def put_raw(self, task_id: str, data: bytes) -> None:
        """Store bytes of the test's making as the result of a task, and publish them."""
        raise NotImplementedError

    async def put_raw_group(self, group_id: str, data: bytes) -> None:
        """Store bytes of the test's making as a group."""
        raise NotImplementedError

    async def subscriptions(self) -> int:
        """How many ids anybody is subscribed to, as the server sees it."""
        raise NotImplementedError

    async def subscribed(self, count: int) -> None:
        """Return once there are so many subscriptions."""

        async def reached() -> bool:
            return await self.subscriptions() == count

        await until(reached)

    async def seconds_left(self, task_id: str) -> float | None:
        """Until the result expires, as the server sees it; ``None`` for never."""
        raise NotImplementedError

    async def group_seconds_left(self, group_id: str) -> float | None:
        raise NotImplementedError

    async def holdings(self) -> dict[str, float | None]:
        """All that the store holds, by names of the harness's making, and how many seconds each will live."""
        raise NotImplementedError


class KeyValueHarness(Harness):
    """For stores that hold Celery's keys."""

    further_ids = ("a\x00b",)

    async def _put(self, key: str, data: bytes, publish: bool) -> None:
        raise NotImplementedError

    async def _left(self, key: str) -> float | None:
        raise NotImplementedError

    async def put_raw(self, task_id: str, data: bytes) -> None:
        await self._put(f"celery-task-meta-{task_id}", data, publish=True)

    async def put_raw_group(self, group_id: str, data: bytes) -> None:
        await self._put(f"celery-taskset-meta-{group_id}", data, publish=False)

    async def seconds_left(self, task_id: str) -> float | None:
        return await self._left(f"celery-task-meta-{task_id}")

    async def group_seconds_left(self, group_id: str) -> float | None:
        return await self._left(f"celery-taskset-meta-{group_id}")


class MemoryHarness(KeyValueHarness):
    name = "memory"
    example = "memory://{}/0"

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore()

    def make(self, **options: Any) -> Backend:
        return aioresult.connect("memory://", store=self.store, **options)

    async def subscriptions(self) -> int:
        return len(self.store.listeners)

    async def _put(self, key: str, data: bytes, publish: bool) -> None:
        self.store.put(key, data, 60)
        for backend in tuple(self.store.listeners.get(key, ())) if publish else ():
            backend._deliver(key, data)

    async def _left(self, key: str) -> float | None:
        assert self.store.get(key) is not None, f"{key} is gone"
        return self.store.seconds_left(key)

    async def holdings(self) -> dict[str, float | None]:
        held = {key: self.store.seconds_left(key) for key in self.store.values}
        for key, chord in self.store.chords.items():
            left = None if chord.expires_at == inf else chord.expires_at - monotonic()
            held.update(dict.fromkeys([f"chord {key}", *(f"part {key} {part}" for part in chord.parts)], left))
        return held


class RedisHarness(KeyValueHarness):
    name = "redis"
    example = "redis://{}/0"

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.client = redis.asyncio.Redis.from_url(url)

    def make(self, **options: Any) -> Backend:
        return aioresult.connect(self.url, **options)

    async def close(self) -> None:
        await super().close()
        await self.client.aclose()

    async def subscriptions(self) -> int:
        return len(await self.client.pubsub_channels())

    async def _put(self, key: str, data: bytes, publish: bool) -> None:
        await self.client.set(key, data, ex=60)
        if publish:
            await self.client.publish(key, data)

    async def _left(self, key: str) -> float | None:
        left = await self.client.pttl(key)
        assert left != -2, f"{key} is gone"
        return None if left == -1 else left / 1000

    async def holdings(self) -> dict[str, float | None]:
        return await _holdings(self.client)


class ClusterHarness(KeyValueHarness):
    name = "cluster"
    example = "redis+cluster://{}/0"

    def __init__(self, cluster: RedisCluster) -> None:
        super().__init__()
        self.url = cluster.url
        # Plain clients: redis-py's own for clusters takes longer to start than many a test to run.
        self._clients: dict[int, Any] = {
            node.port: redis.asyncio.Redis(host=node.address[0], port=node.port, password=node.password)
            for node in cluster.originals
        }
        self._owners: list[tuple[range, Any]] = []

    def make(self, **options: Any) -> Backend:
        return aioresult.connect(self.url, **options)

    async def close(self) -> None:
        await super().close()
        for client in self._clients.values():
            await client.aclose()

    async def _masters(self) -> list[tuple[range, Any]]:
        """Ranges of slots, and the clients of their owners when the test first asked."""
        if not self._owners:
            told = await next(iter(self._clients.values())).execute_command("CLUSTER", "SLOTS")
            self._owners = [(range(first, last + 1), self._clients[at[1]]) for first, last, at, *_ in told]
        return self._owners

    async def _owner(self, key: str) -> Any:
        slot = key_slot(key.encode())
        return next(client for slots, client in await self._masters() if slot in slots)

    async def subscriptions(self) -> int:
        clients = {client for _, client in await self._masters()}
        asked = [client.execute_command("PUBSUB", kind) for client in clients for kind in ("SHARDCHANNELS", "CHANNELS")]
        answers: list[list[bytes]] = await asyncio.gather(*asked)
        return len(set().union(*answers))

    async def _put(self, key: str, data: bytes, publish: bool) -> None:
        owner = await self._owner(key)
        await owner.set(key, data, ex=60)
        if publish:
            await owner.execute_command("SPUBLISH", key, data)

    async def _left(self, key: str) -> float | None:
        left = await (await self._owner(key)).pttl(key)
        assert left != -2, f"{key} is gone"
        return None if left == -1 else left / 1000

    async def holdings(self) -> dict[str, float | None]:
        held: dict[str, float | None] = {}
        for client in {client for _, client in await self._masters()}:
            held |= await _holdings(client)
        return held


class SentinelHarness(RedisHarness):
    """Asks the master of the start, and has the backend ask the sentinels."""

    name = "sentinel"
    example = "redis+sentinel://{}/mymaster/0"

    def __init__(self, setup: SentinelSetup) -> None:
        master = setup.master()
        super().__init__(f"redis://{master.address[0]}:{master.port}/0")
        self.client.connection_pool.connection_kwargs["password"] = master.password
        self.url = setup.service_url
        self._setup = setup

    def make(self, **options: Any) -> Backend:
        return aioresult.connect(self._setup.url, **{"master_name": self._setup.master_name, **options})

    async def subscriptions(self) -> int:
        sentinels_own = b"__sentinel__:hello"
        return sum(channel != sentinels_own for channel in await self.client.pubsub_channels())


async def _holdings(client: redis.asyncio.Redis) -> dict[str, float | None]:
    """All keys, and how many seconds each will live."""
    keys: list[Any] = await client.keys()
    lives = {key.decode(): await client.pttl(key) for key in keys}
    return {key: None if left == -1 else left / 1000 for key, left in lives.items() if left != -2}


# -- what is inside a backend ---------------------------------------------------------------------------------------


def hubs_of(backend: Backend) -> list[Hub]:
    """The hubs of all shards."""
    return [shard.hub for shard in backend._shards]


def hub_of(backend: Backend, topic: str) -> Hub:
    """The hub that serves a topic."""
    return backend._shard_of(topic).hub


def topics_of(backend: Backend) -> dict[str, Topic]:
    """All that is waited for, at whatever shard."""
    return {name: topic for hub in hubs_of(backend) for name, topic in hub._topics.items()}


def shares(backend: Backend, task_ids: Iterable[str]) -> list[list[str]]:
    """The ids, by the shards that serve them. Most backends have one shard."""
    return list(backend._by_shard(task_ids).values())


async def subscribed(backend: Backend, count: int = 0) -> None:
    """Return once so many ids, or more, are waited for, and the subscription of each has been asked for."""
    await until(
        lambda: (
            len(topics_of(backend)) >= count
            and not any(hub._to_read_first or hub._to_subscribe for hub in hubs_of(backend))
            and all(topic.subscribed for topic in topics_of(backend).values())
        )
    )


def node_of(backend: Backend) -> Node:
    """The one server of a Redis backend, with its connections."""
    assert isinstance(backend, RedisBackend)
    assert isinstance(backend._topology, Single)
    return backend._topology.node


def commands_of(backend: Backend) -> RedisConnection:
    """The connection on which that server gets commands. It may be closed."""
    connection = node_of(backend).commands
    assert connection is not None
    return connection


def connections_of(backend: Backend) -> list[RedisConnection]:
    """The connections on which the servers of a Redis backend get commands."""
    assert isinstance(backend, RedisBackend)
    nodes = backend._topology.owners() if isinstance(backend._topology, Cluster) else [node_of(backend)]
    return [node.commands for node in nodes if node.commands is not None]


def servers_of(url: str) -> list[str]:
    """The URL of each server behind ``url`` that has keys: the members of a cluster, or the master behind sentinels."""
    scheme, _, place = url.partition("://")
    servers, _, service = place.partition("/")
    addresses = [address.rpartition(":") for address in servers.split(",")]
    if scheme == "redis+sentinel":
        make: Any = redis.sentinel.Sentinel  # it has no annotations
        sentinel: Any = make([(host, int(port)) for host, _, port in addresses])
        try:
            host, number = sentinel.discover_master(service.partition("/")[0])
        finally:
            for client in sentinel.sentinels:
                client.close()
        return [f"redis://{host}:{number}/0"]
    return [f"redis://{host}:{port}/0" for host, _, port in addresses] if scheme == "redis+cluster" else [url]


async def until(condition: Callable[[], Coroutine[Any, Any, bool]] | Callable[[], bool]) -> None:
    """Return as soon as ``condition`` holds. For what only the server can tell; the hang guard bounds it."""
    while True:
        holds = condition()
        if isinstance(holds, bool) and holds:
            return
        if not isinstance(holds, bool) and await holds:
            return
        await asyncio.sleep(0.002)


# -- standing between a backend and its server: on what `Harness.make` gives, for `open` binds the primitives -------

_PRIMITIVES = (
    "_fetch",
    "_store",
    "_delete",
    "_subscribe",
    "_unsubscribe",
    "_fetch_group",
    "_store_group",
    "_delete_group",
    "_chord_steps",
    "_active_chords",
)


def intercept(backend: Backend, primitive: str, around: Callable[..., Awaitable[Any]]) -> None:
    """Have ``around(original, *args)`` called for one of the backend's primitives."""
    setattr(backend, primitive, partial(around, getattr(backend, primitive)))
    if primitive == "_append":  # nothing is to go past it
        backend._append_at_once = lambda flush, done: False  # type: ignore[method-assign]


def count_calls(backend: Backend) -> Counter[str]:
    """The calls of each primitive from now on."""
    calls: Counter[str] = Counter()

    def counting(primitive: str) -> Callable[..., Awaitable[Any]]:
        async def around(original: Callable[..., Awaitable[Any]], *args: Any) -> Any:
            calls[primitive] += 1
            return await original(*args)

        return around

    for primitive in _PRIMITIVES:
        intercept(backend, primitive, counting(primitive))
    return calls


class Gate:
    """Stops every call of a primitive on its way to the server until it is `open`."""

    def __init__(self, backend: Backend, primitive: str) -> None:
        #: Set by the first call.
        self.reached = asyncio.Event()
        self.open = asyncio.Event()
        intercept(backend, primitive, self._around)

    async def _around(self, original: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        self.reached.set()
        await self.open.wait()
        return await original(*args)
