"""Retries and splits as they meet: no hot loop, no call that waits for a stranger's retries, no account that drifts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from aioresult import BackendConnectionError, BackendStoreError, ImproperlyConfigured
from aioresult.backends.memory import MemoryBackend
from aioresult.batch import Batcher
from aioresult.hub import Hub
from aioresult.meta import TaskMeta
from aioresult.retry import Backoff, Persistence
from aioresult.source import Finding
from aioresult.waiter import Outcome, SingleWaiter

from .harness import intercept, until


def broken(in_flight: bool = False) -> BackendConnectionError:
    error = BackendConnectionError("away")
    error.in_flight = in_flight
    return error


@pytest.mark.parametrize("dies", ["twice, then it cannot be reached", "each time"])
async def test_a_connection_that_dies_over_and_over_is_not_tried_in_a_hot_loop(dies: str) -> None:
    attempts, settled = 0, 0

    async def run(items: Sequence[int]) -> Sequence[bool]:
        nonlocal attempts
        attempts += 1
        raise broken(in_flight=dies == "each time" or attempts <= 2)

    def settle(indexes: Sequence[int], outcomes: Sequence[bool | BaseException]) -> None:
        nonlocal settled
        settled += len(indexes)

    await Persistence(1.0, lambda _: None).perform(run, [1, 2, 3], settle, lambda _: True)
    assert settled == 3
    assert attempts < 40  # the pauses between them double


async def test_a_forget_does_not_overtake_stores_that_wait_for_room() -> None:
    async with MemoryBackend(max_pending_bytes=1) as backend:
        calls = [backend.mark_as_done("y", "v" * 100), backend.mark_as_done("x", 1), backend.forget("x")]
        await asyncio.gather(*calls)
        assert not await backend.exists("x")
        calls = [backend.mark_as_done("y", "v" * 100), backend.mark_as_done("x", 1), backend.forget_many(["x", "z"])]
        await asyncio.gather(*calls)
        assert not await backend.exists("x")


async def test_the_next_call_of_a_key_does_not_wait_for_a_strangers_retries() -> None:
    """The batch of its predecessor is split, and what is left of that batch is repeated."""
    gone = asyncio.Event()

    async def run(items: Sequence[str]) -> Sequence[bool]:
        await asyncio.sleep(0)
        if len(items) > 1:
            raise BackendStoreError("refused as a whole")
        if items == ["b1"] and not gone.is_set():
            raise broken()
        return [True]

    batcher: Batcher[str, bool] = Batcher(run, max_items=2, parallel=2, persistence=Persistence(60.0, lambda _: None))
    first, stranger = batcher.submit("a1", "a"), batcher.submit("b1", "b")
    await asyncio.sleep(0)
    second = batcher.submit("a2", "a")
    assert await first
    assert await second
    assert not stranger.done()
    gone.set()
    assert await stranger


async def test_a_batch_that_a_stranger_cancels_keeps_its_account() -> None:
    """A caller has left, what comes after it was settled without it, and the rest is being repeated."""
    repeated = asyncio.Event()
    healed = False

    async def run(items: Sequence[str]) -> Sequence[bool]:
        await asyncio.sleep(0)
        if len(items) == 3:
            leaver.cancel()
            raise BackendStoreError("refused as a whole")
        if "b" in items and not healed:
            repeated.set()
            raise broken()
        return [True] * len(items)

    batcher: Batcher[str, bool] = Batcher(run, max_items=3, persistence=Persistence(60.0, lambda _: None))
    leaver = batcher.submit("a1", "a", size=10)
    successor = batcher.submit("a2", "a", size=10)
    other = batcher.submit("b", "b", size=10)
    assert await successor
    await repeated.wait()
    healed = True
    for task in batcher._tasks:
        task.cancel()
    assert await other
    assert await batcher.submit("a3", "a")
    await until(lambda: not batcher._tasks)
    assert (batcher._held, batcher._working, batcher._tails, batcher._in_flight) == (0, 0, {}, set())


class Refusing:
    """A source that refuses for good, until it is told not to; one id breaks the connection of every read."""

    def __init__(self) -> None:
        self.refuses = True
        self.stored: dict[str, Any] = {}

    async def subscribe(self, task_ids: Sequence[str]) -> None:
        pass

    async def unsubscribe(self, task_ids: Sequence[str]) -> None:
        pass

    async def read(self, task_ids: Sequence[str]) -> Sequence[Finding | None]:
        if self.refuses:
            raise ImproperlyConfigured("for good")
        return [self.stored.get(task_id) for task_id in task_ids]


async def test_a_waiter_that_ends_the_waits_of_others_while_it_is_told_does_not_end_the_hub() -> None:
    source = Refusing()
    hub = Hub(source)
    hub.start()

    class Leaver:
        def receive(self, task_id: str, outcome: Outcome) -> None:
            for each in ("a", "b"):
                hub.unwatch(each, self)

    leaver = Leaver()
    hub.watch("a", leaver)
    hub.watch("b", leaver)
    waiter = SingleWaiter("c", None)
    hub.watch("c", waiter)
    with pytest.raises(ImproperlyConfigured):
        await waiter.future
    source.refuses = False
    again = SingleWaiter("c", None)
    hub.watch("c", again)
    await until(lambda: not hub._to_read_first)
    await hub.close(BackendConnectionError("closed"))
    assert isinstance(again.future.exception(), BackendConnectionError)


async def test_an_id_that_cannot_be_read_keeps_nothing_from_the_others_of_its_read() -> None:
    source = Refusing()
    source.refuses = False
    source.stored = {"bad": (broken(in_flight=True), None), "good": (TaskMeta("good", "SUCCESS", 1), None)}
    hub = Hub(source)
    hub.start()
    bad, good = SingleWaiter("bad", None), SingleWaiter("good", None)
    hub.watch("bad", bad)
    hub.watch("good", good)
    assert (await good.future).result == 1
    assert not bad.future.done()
    await hub.close(BackendConnectionError("closed"))


async def test_a_server_that_has_taken_over_ends_the_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backoff, "pause", lambda self: 3600.0)
    backend = MemoryBackend()
    away = {"_store", "_fetch"}

    async def refuse(original: Any, primitive: str, *args: Any) -> Any:
        if primitive in away:
            away.discard(primitive)
            raise broken()
        return await original(*args)

    for primitive in tuple(away):
        intercept(backend, primitive, lambda original, *args, primitive=primitive: refuse(original, primitive, *args))
    async with backend:
        (shard,) = backend._shards
        waiting = asyncio.create_task(backend.wait_for("t"))
        storing = asyncio.create_task(backend.mark_as_done("t", 1))
        await until(lambda: not away and len(shard.persistence.pauses._sleepers) == 2)
        shard.try_again()
        assert await storing
        assert (await waiting).result == 1
    assert not shard.persistence.pauses._sleepers
