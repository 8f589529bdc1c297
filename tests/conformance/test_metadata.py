"""Metadata of the caller's own, stored beside a result."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from aioresult import Backend, EncodeError, TaskRequest, UsageError

from ..harness import Harness

META = {"seconds": 0.25, "labels": ["a", "ü"], "of": {"queue": "fast"}}

STORES: dict[str, Callable[[Backend, Any], Awaitable[bool]]] = {
    "done": lambda backend, meta: backend.mark_as_done("t", [1], meta=meta),
    "failure": lambda backend, meta: backend.mark_as_failure("t", ValueError("no"), meta=meta),
    "retry": lambda backend, meta: backend.mark_as_retry("t", ValueError("no"), meta=meta),
    "revoked": lambda backend, meta: backend.mark_as_revoked("t", "why", meta=meta),
    "progress": lambda backend, meta: backend.store_result("t", {"done": 1}, "PROGRESS", meta=meta),
}


@pytest.mark.parametrize("store", STORES)
async def test_metadata_is_read_with_the_state_that_it_was_stored_with(harness: Harness, store: str) -> None:
    web, worker = await harness.pair()
    assert await STORES[store](worker, META)
    meta = await web.get_task_meta("t")
    assert meta.meta == META
    assert (await web.result("t").fetch()).meta == META


@pytest.mark.parametrize("first", ["progress", "retry", "failure"])
async def test_the_next_state_has_none_of_it(harness: Harness, first: str) -> None:
    web, worker = await harness.pair()
    await STORES[first](worker, META)
    await worker.store_result("t", {"done": 2}, "STARTED")
    assert (await web.get_task_meta("t")).meta is None
    await STORES[first](worker, META)
    await worker.mark_as_done("t", 2)
    assert (await web.get_task_meta("t")).meta is None


async def test_a_waiter_is_told_of_it_and_a_success_keeps_it(harness: Harness) -> None:
    web, worker = await harness.pair()
    waiting = asyncio.create_task(web.wait_for("t", timeout=60))
    await worker.mark_as_done("t", 1, meta=META)
    assert (await waiting).meta == META
    assert not await worker.mark_as_done("t", 2, meta={"late": True})
    assert (await web.get_task_meta("t")).meta == META
    await web.forget("t")
    await worker.mark_as_done("t", 3)
    assert (await web.get_task_meta("t")).meta is None


async def test_it_stands_beside_what_else_is_known_and_an_expiry(harness: Harness) -> None:
    web, worker = await harness.connect(), await harness.connect(extended=True)
    request = TaskRequest(task="add", args=(1, 2), kwargs={}, group="g", group_index=0)
    await worker.mark_as_done("t", 3, request=request, expires=60, meta=META)
    meta = await web.get_task_meta("t")
    assert (meta.meta, meta.name, meta.result) == (META, "add", 3)


async def test_a_batch_mixes_results_with_and_without_it(harness: Harness) -> None:
    web, worker = await harness.pair()
    some = [None if index % 2 else {"index": index} for index in range(100)]
    await asyncio.gather(*(worker.mark_as_done(f"t{index}", index, meta=meta) for index, meta in enumerate(some)))
    assert [meta.meta for meta in await web.get_many([f"t{index}" for index in range(100)])] == some


@pytest.mark.parametrize("bad", [["no mapping"], {1: "no text"}, "text"], ids=repr)
async def test_what_is_no_metadata_is_refused_and_loses_nothing(harness: Harness, bad: Any) -> None:
    web, worker = await harness.pair()
    with pytest.raises(UsageError, match="meta must be a dict whose keys are texts"):
        await worker.mark_as_done("t", 1, meta=bad)
    assert not await web.exists("t")


async def test_metadata_that_cannot_be_stored_is_an_error_of_its_own(harness: Harness) -> None:
    web, worker = await harness.pair()
    with pytest.raises(EncodeError):
        await worker.mark_as_done("t", 1, meta={"an": object()})
    assert not await web.exists("t")
