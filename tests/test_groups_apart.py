"""Groups on a cluster: the group of a result may be in another shard, and holds up no store in this one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

import aioresult
from aioresult import Backend, BackendClosedError, TaskRequest

from .harness import Gate, intercept


@pytest.fixture
async def backend(cluster_url: str) -> AsyncIterator[Backend]:
    """Not open yet, so that a test can stand between it and the cluster."""
    backend = aioresult.connect(cluster_url)
    yield backend
    await backend.aclose()


def member(index: int) -> TaskRequest:
    return TaskRequest(group="g", group_index=index)


async def saved(backend: Backend) -> None:
    await backend.open()
    await backend.save_group("g", backend.group(["a", "b", "c"], id="g"))


async def test_a_store_waits_for_its_group_and_no_other_store_does(backend: Backend) -> None:
    gate = Gate(backend, "_extend_groups")
    await saved(backend)
    storing = asyncio.create_task(backend.mark_as_done("a", 1, member(0)))
    await gate.reached.wait()
    assert await backend.result("a") == 1  # it is stored, and its waiters know
    await asyncio.gather(*(backend.mark_as_done(f"other {number}", number) for number in range(2_000)))
    assert not storing.done()
    gate.open.set()
    assert await storing
    assert (await backend.group_counts("g")).succeeded == 1


async def test_a_caller_that_leaves_leaves_the_group_right(backend: Backend) -> None:
    gate = Gate(backend, "_extend_groups")
    await saved(backend)
    storing = asyncio.create_task(backend.mark_as_done("a", 1, member(0)))
    await gate.reached.wait()
    storing.cancel()
    await asyncio.wait([storing])
    gate.open.set()
    await backend.mark_as_done("b", 2, member(1))  # it is kept after the first
    assert (await backend.group_counts("g")).succeeded == 2


async def test_the_error_of_a_group_does_not_concern_who_stores(backend: Backend) -> None:
    async def refuse(*_: object) -> list[BaseException]:
        raise aioresult.BackendRefusedError("no right to groups")

    intercept(backend, "_extend_groups", refuse)
    await saved(backend)
    assert await backend.mark_as_done("a", 1, member(0))
    async with backend.running("b", member(1)) as task:
        task.value = 2
    assert await backend.result("b") == 2


async def test_closing_ends_such_a_store(backend: Backend, cluster_url: str) -> None:
    gate = Gate(backend, "_store")
    await saved(backend)
    storing = asyncio.create_task(backend.mark_as_done("a", 1, member(0)))
    await gate.reached.wait()
    await backend.aclose()
    with pytest.raises(BackendClosedError):
        await storing
    async with aioresult.connect(cluster_url) as other:
        assert (await other.group_counts("g")).succeeded == 0
