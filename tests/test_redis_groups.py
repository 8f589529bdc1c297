"""The progress of groups on Redis: a bit for each member, counted by the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
import redis.asyncio

import aioresult
from aioresult import Backend, GroupProgress, TaskRequest, progress

from .harness import until


@pytest.fixture
async def backend(redis_url: str) -> AsyncIterator[Backend]:
    async with aioresult.connect(redis_url) as backend:
        yield backend


def member(index: int, group: str = "g") -> TaskRequest:
    return TaskRequest(id=f"t{index}", group=group, group_index=index)


async def store(backend: Backend, *indexes: int) -> None:
    await asyncio.gather(*(backend.mark_as_done(f"t{index}", index, member(index)) for index in indexes))


async def saved(backend: Backend, size: int) -> aioresult.GroupResult:
    group = backend.group((f"t{index}" for index in range(size)), "g")
    await group.save()
    return group


async def test_a_large_group_costs_one_subscription_and_two_commands_a_look(
    backend: Backend, redis_client: redis.asyncio.Redis
) -> None:
    group = await saved(backend, 10_000)
    await store(backend, *range(100))
    await redis_client.config_resetstat()

    async def counts() -> int:
        return int((await redis_client.info("commandstats")).get("cmdstat_bitcount", {"calls": 0})["calls"])

    async def looked_twice() -> bool:
        return await counts() == 4

    async with aclosing(group.progress(interval=0)) as steps:
        assert await anext(steps) == GroupProgress(100, 0, 10_000)
        more = asyncio.create_task(anext(steps))
        await until(looked_twice)  # at first, and once it was subscribed
        assert len(await redis_client.pubsub_channels()) == 1
        await redis_client.config_resetstat()
        await store(backend, 100)
        assert await more == GroupProgress(101, 0, 10_000)
        assert await counts() == 2
        assert "cmdstat_subscribe" not in await redis_client.info("commandstats")
        await store(backend, *range(101, 10_000))
        last = [step async for step in steps][-1]
    assert last == GroupProgress(10_000, 0, 10_000)
    keys = [key async for key in redis_client.scan_iter("{celery-taskset-meta-g}.*")]
    assert sum([await redis_client.memory_usage(key) or 0 for key in keys]) <= 2048


async def test_a_member_counts_once_and_its_success_stays(backend: Backend) -> None:
    group = await saved(backend, 3)

    async def now() -> GroupProgress:
        async with aclosing(group.progress()) as steps:
            return await anext(steps)

    await backend.mark_as_failure("t1", ValueError(), request=member(1))
    await backend.mark_as_failure("t1", ValueError(), request=member(1))
    assert await now() == GroupProgress(1, 1, 3)
    await store(backend, 1)
    assert await now() == GroupProgress(1, 0, 3)
    await backend.mark_as_failure("t1", ValueError(), request=member(1))
    await backend.mark_as_retry("t2", ValueError(), request=member(2))
    await backend.mark_as_revoked("t0", request=member(0))
    assert await now() == GroupProgress(2, 1, 3)


@pytest.mark.parametrize("index", [-1, 3, 2**40, True, "0", None])
async def test_an_index_that_is_none_counts_nothing(backend: Backend, index: object) -> None:
    """And allocates nothing: a bit at 2**40 would take the server down."""
    group = await saved(backend, 3)
    request = TaskRequest(id="t0", group="g", group_index=index)  # type: ignore[arg-type]
    assert await backend.mark_as_done("t0", 0, request)
    assert await backend.group_counts("g") == (0, 0)
    async with aclosing(group.progress()) as steps:
        assert await anext(steps) == GroupProgress(1, 0, 3)


async def test_members_that_were_not_counted_are_found(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of Celery's workers: some before the first look, and some while nothing else changes."""
    monkeypatch.setattr(progress, "_FIRST_LOOK", 0.05)
    group = await saved(backend, 4)
    async with aclosing(group.progress(interval=0)) as steps:
        assert await anext(steps) == GroupProgress(0, 0, 4)
        await backend.mark_as_done("t3", 3)
        assert await anext(steps) == GroupProgress(1, 0, 4)
        await store(backend, 0, 1, 2)
        assert [step async for step in steps][-1] == GroupProgress(4, 0, 4)
    other = backend.group(["x", "y"], "h")
    await other.save()
    await backend.mark_as_done("x", 1)
    async with aclosing(other.progress()) as steps:
        assert await anext(steps) == GroupProgress(1, 0, 2)


async def test_counts_that_are_lost_are_no_progress(backend: Backend, redis_client: redis.asyncio.Redis) -> None:
    group = await saved(backend, 4)
    await store(backend, 0, 1)
    async with aclosing(group.progress(interval=0)) as steps:
        assert await anext(steps) == GroupProgress(2, 0, 4)
        await redis_client.delete("{celery-taskset-meta-g}.ok")
        step = asyncio.create_task(anext(steps))
        await store(backend, 2)
        assert await step == GroupProgress(3, 0, 4)


async def test_the_counts_live_and_are_deleted_with_the_group(
    backend: Backend, redis_client: redis.asyncio.Redis
) -> None:
    group = await saved(backend, 2)
    await store(backend, 0)
    await backend.mark_as_failure("t1", ValueError(), request=member(1), expires=10**6)
    keys = ["celery-taskset-meta-g", *(f"{{celery-taskset-meta-g}}{suffix}" for suffix in (".n", ".ok", ".bad"))]
    for key in keys:
        assert 999_000 < await redis_client.ttl(key) <= 10**6, key
    await group.delete()
    assert await redis_client.exists(*keys) == 0
    await backend.save_group("g", group, expires=0)
    await store(backend, 0)
    assert [await redis_client.ttl(key) for key in keys[:3]] == [-1, -1, -1]
    await backend.group([backend.group(["a"], "inner"), "b"], "outer").save()
    assert await backend.group_size("outer") is None


async def test_a_user_with_rights_to_results_and_groups_alone(
    redis_url: str, redis_client: redis.asyncio.Redis
) -> None:
    """Nothing is counted, and all else is as it was before anything was."""
    await redis_client.acl_setuser(
        "plain", enabled=True, passwords=["+secret"], keys=["celery-*"], channels=["*"], commands=["+@all"]
    )
    try:
        async with aioresult.connect(redis_url, connect_options={"username": "plain", "password": "secret"}) as backend:
            group = await saved(backend, 2)
            await backend.mark_as_done("t0", 0, member(0), expires=10**6)
            assert await redis_client.ttl("celery-taskset-meta-g") > 999_000
            async with aclosing(group.progress(interval=0)) as steps:
                assert await anext(steps) == GroupProgress(1, 0, 2)
                await backend.mark_as_failure("t1", ValueError(), request=member(1))
                assert await anext(steps) == GroupProgress(2, 1, 2)
            await group.delete()
            assert await backend.restore_group("g") is None
    finally:
        await redis_client.acl_deluser("plain")
