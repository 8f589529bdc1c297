"""What the conformance suite knows of a backend: how to get several connected to one and the same store."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from math import inf
from time import monotonic
from typing import Any

import redis.asyncio

import aioresult
from aioresult import Backend
from aioresult.backends.memory import MemoryStore
from aioresult.backends.redis import RedisBackend
from aioresult.backends.redis.connection import RedisConnection
from aioresult.backends.redis.node import Node
from aioresult.backends.redis.topology import Single


class Harness:
    """One store, empty at the start of a test. `connect` gives open backends on it, `close` closes them all."""

    name: str
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
        keys: list[Any] = await self.client.keys()
        lives = {key.decode(): await self.client.pttl(key) for key in keys}
        return {key: None if left == -1 else left / 1000 for key, left in lives.items() if left != -2}


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
