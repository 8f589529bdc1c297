"""What only the memory backend has: a store to share, and to look into. All else is in the conformance suite."""

from __future__ import annotations

import aioresult
from aioresult.backends.memory import MemoryBackend, MemoryStore

from .harness import until


async def test_backends_share_what_they_are_given_to_share() -> None:
    store = MemoryStore()
    async with MemoryBackend(store=store) as one, MemoryBackend(store=store) as two, MemoryBackend() as stranger:
        await one.mark_as_done("t", 1)
        assert await two.result("t") == 1
        assert not await stranger.exists("t")


async def test_results_outlive_the_close() -> None:
    backend = aioresult.connect("memory://")
    async with backend:
        await backend.mark_as_done("t", 1)
    async with backend:
        assert await backend.result("t") == 1


async def test_storing_makes_room_for_itself_and_cleanup_tells_how_much() -> None:
    store = MemoryStore()
    async with MemoryBackend(store=store) as backend:
        for n in range(100):
            await backend.mark_as_done(f"t{n}", n, expires=0.001)
        await until(lambda: not any(store.get(key) for key in tuple(store.values)))
        await backend.mark_as_done("kept", 1)
        assert len(store.values) == 1
        await backend.mark_as_done("gone", 1, expires=0.001)
        await backend.mark_as_done("kept", 2)
        await until(lambda: store.get("celery-task-meta-gone") is None)
        assert await backend.cleanup() == 1
        assert await backend.cleanup() == 0


async def test_what_was_stored_anew_is_not_purged_for_its_former_expiry() -> None:
    store = MemoryStore()
    store.put("stays", b"1", 0.001)
    store.put("stays", b"2", 0)
    store.put("goes", b"1", 0.001)
    await until(lambda: store.get("goes") is None)
    assert store.purge() == 1
    assert store.values == {"stays": b"2"}
