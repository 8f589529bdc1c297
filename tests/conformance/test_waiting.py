"""Waiting for one id: nothing is missed, nobody disturbs anybody, and nothing is left behind."""

from __future__ import annotations

import asyncio
import builtins
import gc
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import uuid4

import pytest

from aioresult import (
    Backend,
    BackendConnectionError,
    BackendError,
    BackendRefusedError,
    ContentDisallowed,
    DecodeError,
    TaskMeta,
    TimeoutError,
)
from aioresult.states import FAILURE, READY_STATES, RETRY, STARTED, SUCCESS
from aioresult.waiter import Outcome

from ..harness import Harness, count_calls, intercept, topics_of, until

Primitive = Callable[..., Awaitable[Any]]


class Recorder:
    """A waiter that keeps all that it is told; `heard` gives the next of it."""

    def __init__(self) -> None:
        self._told: asyncio.Queue[Outcome] = asyncio.Queue()

    def receive(self, task_id: str, outcome: Outcome) -> None:
        self._told.put_nowait(outcome)

    @property
    def silent(self) -> bool:
        return self._told.empty()

    async def heard(self) -> str:
        outcome = await self._told.get()
        assert isinstance(outcome, TaskMeta)
        return outcome.status


def wait(backend: Backend, task_id: str = "t", timeout: float | None = None) -> asyncio.Task[TaskMeta]:
    return asyncio.create_task(backend.wait_for(task_id, timeout))


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)


async def nothing_is_left(harness: Harness, backend: Backend) -> None:
    """Invariant 5: whatever became of the waiters, their subscriptions end."""
    await harness.subscribed(0)
    assert len(topics_of(backend)) == 0


# -- the wake-up ----------------------------------------------------------------------------------------------------


async def test_a_result_stored_before_is_found_without_a_subscription(harness: Harness) -> None:
    worker = await harness.connect()
    waiter = harness.make()
    calls = count_calls(waiter)
    await harness.open(waiter)
    await worker.mark_as_done("t", 1)
    assert (await waiter.wait_for("t")).result == 1
    assert calls == {"_fetch": 1}


@pytest.mark.parametrize("state", sorted(READY_STATES))
async def test_a_result_stored_during_the_wait_wakes(harness: Harness, state: str) -> None:
    """Invariant 2: nobody sees a notification without its row."""
    worker, waiter = await harness.pair()
    waiting = wait(waiter)
    await harness.subscribed(1)
    await worker.store_result("t", "value", state)
    told, read = await waiting, await waiter.get_task_meta("t")
    assert told.status == state
    assert (told.status, told.date_done, str(told.result)) == (read.status, read.date_done, "value")
    await nothing_is_left(harness, waiter)


async def test_a_backend_wakes_its_own_waiters(harness: Harness) -> None:
    backend = await harness.connect()
    waiting = wait(backend)
    await harness.subscribed(1)
    await backend.mark_as_done("t", 1)
    assert (await waiting).result == 1


MOMENTS = ["before the look", "before the subscription", "during it", "when it is confirmed", "after the read"]


@pytest.mark.parametrize("moment", MOMENTS)
async def test_no_moment_is_too_early_to_store(harness: Harness, moment: str) -> None:
    """Invariant 1: the subscription is confirmed, then what is stored is read."""
    worker, waiter = await harness.connect(), harness.make()
    happened: list[str] = []  # up to the store

    async def store(now: str) -> None:
        if moment not in happened:
            happened.append(now)
            if now == moment:
                await worker.mark_as_done("t", 1)

    async def fetch(original: Primitive, ids: Sequence[str]) -> Any:
        if not happened:
            await store("before the look")
        found = await original(ids)
        if "when it is confirmed" in happened:
            await store("after the read")
        return found

    async def subscribe(original: Primitive, ids: Sequence[str]) -> None:
        await store("before the subscription")
        await asyncio.gather(original(ids), store("during it"))
        await store("when it is confirmed")

    intercept(waiter, "_fetch", fetch)
    intercept(waiter, "_subscribe", subscribe)
    await harness.open(waiter)
    assert (await waiter.wait_for("t")).result == 1
    assert happened == MOMENTS[: len(happened)]
    assert happened[-1] == moment
    await nothing_is_left(harness, waiter)


async def test_no_wake_up_is_lost_in_a_crowd(harness: Harness) -> None:
    """Invariant 1 again, with every order that chance brings about."""
    worker, waiter = await harness.pair()
    ids = [f"t{n}" for n in range(300)]
    waiting = []
    async with asyncio.TaskGroup() as tasks:
        for n, task_id in enumerate(ids):
            waiting.append(tasks.create_task(waiter.wait_for(task_id)))
            tasks.create_task(worker.mark_as_done(task_id, n))
    assert [(await meta).result for meta in waiting] == list(range(300))
    await nothing_is_left(harness, waiter)


async def test_states_on_the_way_wake_nobody_but_those_who_watch(harness: Harness) -> None:
    worker, waiter = await harness.pair()
    waiting, recorder = wait(waiter), Recorder()
    waiter.watch("t", recorder)
    await harness.subscribed(1)
    await worker.mark_as_pending("t")
    await worker.mark_as_started("t")
    await worker.store_result("t", 50, "PROGRESS")
    await worker.mark_as_retry("t", ValueError("again"))
    while await recorder.heard() != RETRY:
        pass
    assert not waiting.done()
    await worker.mark_as_done("t", 1)
    assert (await waiting).result == 1
    while (state := await recorder.heard()) == RETRY:  # a state may be told twice, by a message and by a read
        pass
    assert state == SUCCESS


@pytest.mark.parametrize("task_id", ["t", uuid4()])
async def test_who_no_longer_watches_is_told_nothing(harness: Harness, task_id: Any) -> None:
    """Invariant 5."""
    worker, waiter = await harness.pair()
    first, second = Recorder(), Recorder()
    waiter.watch(task_id, first)
    waiter.watch(task_id, second)
    await harness.subscribed(1)
    waiter.unwatch(task_id, first)
    await worker.mark_as_started(task_id)
    while await second.heard() != STARTED:
        pass
    waiter.unwatch(task_id, second)
    await nothing_is_left(harness, waiter)
    assert first.silent


async def test_forgetting_wakes_nobody(harness: Harness) -> None:
    worker, waiter = await harness.pair()
    waiting, recorder = wait(waiter), Recorder()
    waiter.watch("t", recorder)
    await harness.subscribed(1)
    await worker.mark_as_started("t")
    await worker.forget("t")
    await worker.store_result("t", 50, "PROGRESS")
    while await recorder.heard() != "PROGRESS":
        pass
    assert not waiting.done()
    await worker.mark_as_done("t", 1)
    assert (await waiting).result == 1


# -- many on one id -------------------------------------------------------------------------------------------------


async def test_many_waiters_share_a_subscription_and_are_all_woken(harness: Harness) -> None:
    worker = await harness.connect()
    waiter = harness.make()
    calls = count_calls(waiter)
    await harness.open(waiter)
    waiting = [wait(waiter) for _ in range(100)]
    await harness.subscribed(1)
    waiting += [wait(waiter) for _ in range(100)]
    await asyncio.sleep(0)  # they have begun
    await worker.mark_as_done("t", 1)
    assert [(await each).result for each in waiting] == [1] * 200
    await nothing_is_left(harness, waiter)
    assert (calls["_subscribe"], calls["_unsubscribe"]) == (1, 1)


async def test_who_leaves_takes_nobody_along_until_the_last(harness: Harness) -> None:
    """Invariant 5: waiters are counted."""
    worker, waiter = await harness.pair()
    cancelled, stays = wait(waiter), wait(waiter)
    timed_out = wait(waiter, timeout=0.01)
    await harness.subscribed(1)
    await cancel(cancelled)
    with pytest.raises(TimeoutError):
        await timed_out
    assert not stays.done()
    await worker.mark_as_started("t")
    assert await harness.subscriptions() == 1
    await cancel(stays)
    await nothing_is_left(harness, waiter)


async def test_an_id_may_be_waited_for_again_at_once(harness: Harness) -> None:
    """Whether the last one left or was woken; in the same turn of the loop in which the subscription is given up."""
    worker, waiter = await harness.pair()
    first = wait(waiter)
    await harness.subscribed(1)
    await cancel(first)
    second = wait(waiter)
    await harness.subscribed(1)
    await worker.mark_as_failure("t", KeyError("a"))
    assert (await second).status == FAILURE
    assert (await waiter.wait_for("t")).status == FAILURE
    await worker.forget("t")
    third = wait(waiter)
    await harness.subscribed(1)
    await worker.mark_as_done("t", 1)
    assert (await third).result == 1
    await nothing_is_left(harness, waiter)


# -- deadlines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, -1.5])
async def test_a_timeout_of_zero_is_a_single_look(harness: Harness, timeout: float) -> None:
    """Invariant 8."""
    worker = await harness.connect()
    waiter = harness.make()
    calls = count_calls(waiter)
    await harness.open(waiter)
    with pytest.raises(TimeoutError):
        await waiter.wait_for("t", timeout)
    await worker.mark_as_done("t", 1)
    assert (await waiter.wait_for("t", timeout)).result == 1
    assert calls == {"_fetch": 2}


async def test_the_error_names_the_task_and_the_timeout(harness: Harness) -> None:
    waiter = await harness.connect()
    with pytest.raises(TimeoutError, match=r"task-7 .*timeout=0\.02 seconds") as caught:
        await waiter.wait_for("task-7", 0.02)
    assert isinstance(caught.value, builtins.TimeoutError)
    await nothing_is_left(harness, waiter)


async def test_a_result_in_time_leaves_no_timer(harness: Harness) -> None:
    worker, waiter = await harness.pair()
    waiting = wait(waiter, timeout=3600)
    await harness.subscribed(1)
    await worker.mark_as_done("t", 1)
    assert (await waiting).result == 1
    loop: Any = asyncio.get_running_loop()
    assert not [handle for handle in loop._scheduled if handle.when() > loop.time() + 1800 and not handle.cancelled()]


# -- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"{no json", DecodeError),
        (b'{"status": "SUCCESS", "result": {"__type__": "nonsense", "__value__": 1}}', DecodeError),
        (b"\x80\x04K\x01.", ContentDisallowed),
        (b"\x00celery-compressed\x00application/x-gzip\x00no gzip", DecodeError),
    ],
)
async def test_a_message_that_cannot_be_read_harms_only_its_own_waiters(
    harness: Harness, data: bytes, error: type[Exception]
) -> None:
    """Invariants 6 and 10."""
    worker, waiter = await harness.pair()
    bad = [wait(waiter, "bad"), wait(waiter, "bad")]
    good = wait(waiter, "good")
    await harness.subscribed(2)
    await harness.put_raw("bad", data)
    for each in bad:
        with pytest.raises(error, match="task bad"):
            await each
    assert not good.done()
    await worker.mark_as_done("good", 1)
    assert (await good).result == 1
    await nothing_is_left(harness, waiter)


async def test_what_is_stored_and_cannot_be_read_is_found_at_the_first_look(harness: Harness) -> None:
    waiter = await harness.connect()
    await harness.put_raw("bad", b"{no json")
    for timeout in (None, 0):
        with pytest.raises(DecodeError, match="task bad"):
            await waiter.wait_for("bad", timeout)


async def test_a_connection_that_comes_back_misses_nothing(harness: Harness) -> None:
    """Invariants 1 and 7: what was stored while it was away is found by the read that follows the subscription."""
    worker, waiter = await harness.connect(), harness.make()
    failures = iter([BackendConnectionError("away"), BackendConnectionError("still away")])

    async def subscribe(original: Primitive, ids: Sequence[str]) -> None:
        for failure in failures:
            await worker.mark_as_done("t", 1)
            raise failure
        await original(ids)

    intercept(waiter, "_subscribe", subscribe)
    await harness.open(waiter)
    assert (await waiter.wait_for("t")).result == 1
    assert next(failures, None) is None


@pytest.mark.parametrize(
    ("failure", "error"), [(BackendRefusedError("no"), BackendRefusedError), (RuntimeError("a bug"), BackendError)]
)
async def test_a_failure_that_no_retry_mends_is_told_at_once_and_the_next_wait_starts_afresh(
    harness: Harness, failure: Exception, error: type[Exception]
) -> None:
    """Invariant 7: the listener cannot die silently."""
    worker, waiter = await harness.connect(), harness.make()
    failing = True

    async def subscribe(original: Primitive, ids: Sequence[str]) -> None:
        if failing:
            raise failure
        await original(ids)

    intercept(waiter, "_subscribe", subscribe)
    await harness.open(waiter)
    waiting = [wait(waiter, "a"), wait(waiter, "b")]
    for each in waiting:
        with pytest.raises(error, match=str(failure)):
            await each
    failing = False
    again = wait(waiter, "a")
    await harness.subscribed(1)
    await worker.mark_as_done("a", 1)
    assert (await again).result == 1
    await nothing_is_left(harness, waiter)


async def test_a_read_that_fails_leaves_the_subscriptions_of_others_counted(harness: Harness) -> None:
    """Invariant 5: commands may be cut off while the listener is well."""
    waiter = harness.make(retry_for=0)
    failing, failed = False, asyncio.Event()

    async def fetch(original: Primitive, ids: Sequence[str]) -> Any:
        if failing:
            failed.set()
            raise BackendConnectionError("away")
        return await original(ids)

    intercept(waiter, "_fetch", fetch)
    await harness.open(waiter)
    first = wait(waiter, "a")
    await harness.subscribed(1)
    failing = True
    second = wait(waiter, "b")
    await failed.wait()
    await cancel(first)
    failing = False
    await cancel(second)
    await nothing_is_left(harness, waiter)


# -- many ids -------------------------------------------------------------------------------------------------------


async def test_a_thousand_wait_on_a_thousand_ids(harness: Harness) -> None:
    worker, waiter = await harness.pair()
    ids = [f"t{n}" for n in range(1000)]
    waiting = [wait(waiter, task_id) for task_id in ids]
    await harness.subscribed(1000)
    await asyncio.gather(*(worker.mark_as_done(task_id, n) for n, task_id in enumerate(ids)))
    assert [meta.result for meta in await asyncio.gather(*waiting)] == list(range(1000))
    await nothing_is_left(harness, waiter)


async def test_a_thousand_cancelled_leave_nothing(harness: Harness) -> None:
    """Invariant 5."""
    waiter = await harness.connect()
    first = wait(waiter)
    await harness.subscribed(1)
    await cancel(first)
    await nothing_is_left(harness, waiter)
    before = asyncio.all_tasks()  # with whatever the first wait of all starts
    waiting = [wait(waiter, f"t{n}") for n in range(1000)]
    await harness.subscribed(1000)
    await until(lambda: asyncio.all_tasks() - before == set(waiting))
    await cancel(*waiting)
    await nothing_is_left(harness, waiter)
    await until(lambda: asyncio.all_tasks() <= before)


async def test_who_is_cancelled_before_anything_was_sent_costs_nothing(harness: Harness) -> None:
    waiter = harness.make()
    calls = count_calls(waiter)
    await harness.open(waiter)
    waiting = [wait(waiter, f"t{n}") for n in range(10)]
    for each in waiting:
        each.cancel()
    await asyncio.wait(waiting)
    await nothing_is_left(harness, waiter)
    assert not calls


async def test_handles_cost_no_io_and_leave_nothing(harness: Harness) -> None:
    """Invariants 5 and 11: neither creating nor dropping a handle, nor looking at what it knows."""
    backend = harness.make()
    calls = count_calls(backend)
    await harness.open(backend)
    tasks = asyncio.all_tasks()
    handles = [backend.result(f"t{n}") for n in range(10_000)]
    group = backend.group(handles)
    assert {(handle.meta, handle.parent, len(handle.as_list())) for handle in handles} == {(None, None, 1)}
    assert len(group.as_tuple()[1]) == 10_000
    del handles, group
    gc.collect()
    await until(lambda: asyncio.all_tasks() == tasks)
    assert len(topics_of(backend)) == 0
    assert not calls
