"""Opening, closing and everything between that can be interrupted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

import aioresult
from aioresult import (
    Backend,
    BackendClosedError,
    BackendNotOpenError,
    GroupResult,
    UsageError,
    WrongEventLoopError,
)
from aioresult.waiter import Outcome

from ..harness import Gate, Harness, count_calls, intercept

Primitive = Callable[..., Awaitable[Any]]

#: Every coroutine that reaches for the store.
CALLS: dict[str, Callable[[Backend], Awaitable[Any]]] = {
    "store_result": lambda backend: backend.store_result("t", 1, "PROGRESS"),
    "mark_as_pending": lambda backend: backend.mark_as_pending("t"),
    "mark_as_started": lambda backend: backend.mark_as_started("t"),
    "mark_as_done": lambda backend: backend.mark_as_done("t", 1),
    "mark_as_failure": lambda backend: backend.mark_as_failure("t", KeyError("a")),
    "mark_as_retry": lambda backend: backend.mark_as_retry("t", KeyError("a")),
    "mark_as_revoked": lambda backend: backend.mark_as_revoked("t"),
    "get_task_meta": lambda backend: backend.get_task_meta("t"),
    "get_many": lambda backend: backend.get_many(["t"]),
    "look_up": lambda backend: backend.get_outcomes(["t"]),
    "wait_for": lambda backend: backend.wait_for("t"),
    "wait_for a moment": lambda backend: backend.wait_for("t", timeout=0),
    "exists": lambda backend: backend.exists("t"),
    "forget": lambda backend: backend.forget("t"),
    "cleanup": lambda backend: backend.cleanup(),
    "save_group": lambda backend: backend.save_group("g", backend.group(["t"])),
    "restore_group": lambda backend: backend.restore_group("g"),
    "delete_group": lambda backend: backend.delete_group("g"),
    "await result": lambda backend: backend.result("t").get(),
    "await group": lambda backend: backend.group(["t"]).get(),
    "group.ready": lambda backend: backend.group(["t"]).ready(),
    "GroupResult.restore": lambda backend: GroupResult.restore("g", backend),
    "wait": lambda backend: aioresult.wait([backend.result("t")]),
    "as_completed": lambda backend: anext(aioresult.as_completed([backend.result("t")])),
}


class Ignorer:
    def receive(self, task_id: str, outcome: Outcome) -> None:
        pass


# -- open and closed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
async def test_a_backend_is_used_while_it_is_open(harness: Harness, call: str) -> None:
    backend = harness.make()
    with pytest.raises(BackendNotOpenError, match="async with"):
        await CALLS[call](backend)
    await backend.open()
    await backend.aclose()
    with pytest.raises(BackendClosedError, match="was closed"):
        await CALLS[call](backend)


async def test_async_with_opens_and_closes(harness: Harness) -> None:
    backend = harness.make()

    async def use_and_fail() -> None:
        async with backend:
            assert await backend.mark_as_done("t", 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await use_and_fail()
    with pytest.raises(BackendClosedError):
        await backend.exists("t")
    async with harness.make() as backend:
        assert await backend.exists("t")


async def test_opening_twice_is_refused_and_changes_nothing(harness: Harness) -> None:
    backend = await harness.connect()
    waiting = asyncio.create_task(backend.wait_for("t"))
    with pytest.raises(UsageError, match="open already"):
        await backend.open()
    await backend.mark_as_done("t", 1)
    assert (await waiting).result == 1


async def test_of_two_who_open_at_once_one_is_refused(harness: Harness) -> None:
    backend = harness.make()
    gate = Gate(backend, "_open")
    first = asyncio.create_task(backend.open())
    await gate.reached.wait()
    with pytest.raises(UsageError, match="being opened or closed"):
        await backend.open()
    gate.open.set()
    assert await first is backend
    await backend.aclose()


async def test_closing_twice_or_before_opening_does_nothing(harness: Harness) -> None:
    backend = harness.make()
    await backend.aclose()
    await backend.open()
    await asyncio.gather(backend.aclose(), backend.aclose())
    await backend.aclose()


async def test_a_backend_is_opened_again(harness: Harness) -> None:
    worker, backend = await harness.connect(), harness.make()
    for attempt in range(3):
        await harness.open(backend)
        waiting = asyncio.create_task(backend.wait_for(f"t{attempt}"))
        await harness.subscribed(1)
        await worker.mark_as_done(f"t{attempt}", attempt)
        assert (await waiting).result == attempt
        assert await backend.exists("t0")
        await backend.aclose()


async def test_a_backend_is_opened_again_only_when_it_has_closed(harness: Harness) -> None:
    backend = harness.make()
    gate = Gate(backend, "_close")
    await backend.open()
    closing = asyncio.create_task(backend.aclose())
    await gate.reached.wait()
    with pytest.raises(UsageError, match="being opened or closed"):
        await backend.open()
    gate.open.set()
    await closing
    async with backend:
        assert await backend.mark_as_done("t", 1)


async def test_an_open_that_is_cancelled_leaves_nothing(harness: Harness) -> None:
    backend = harness.make()
    connected, closed = asyncio.Event(), asyncio.Event()

    async def open_and_hang(original: Primitive) -> None:
        await original()
        if not connected.is_set():
            connected.set()
            await asyncio.Event().wait()

    async def close(original: Primitive) -> None:
        closed.set()
        await original()

    intercept(backend, "_open", open_and_hang)
    intercept(backend, "_close", close)
    opening = asyncio.create_task(backend.open())
    await connected.wait()
    opening.cancel()
    await asyncio.wait([opening])
    assert opening.cancelled()
    assert closed.is_set()
    async with backend:
        assert await backend.mark_as_done("t", 1)


async def test_an_open_is_cancelled_at_any_turn_of_the_loop(harness: Harness) -> None:
    for turns in range(40):
        backend = harness.make()
        opening = asyncio.create_task(backend.open())
        for _ in range(turns):
            await asyncio.sleep(0)
        in_time = opening.cancel()
        await asyncio.wait([opening])
        assert opening.cancelled() == in_time
        await backend.aclose()


# -- event loops ----------------------------------------------------------------------------------------------------


async def test_a_backend_belongs_to_the_event_loop_that_opened_it(harness: Harness) -> None:
    """Invariant 12."""
    backend = harness.make()
    calls = count_calls(backend)
    await harness.open(backend)

    async def use_everything() -> None:
        for call in (*CALLS.values(), Backend.aclose):
            with pytest.raises(WrongEventLoopError, match="the event loop of another thread"):
                await call(backend)

    await asyncio.to_thread(lambda: asyncio.run(use_everything()))
    assert not calls
    assert await backend.mark_as_done("t", 1)


async def test_a_closed_backend_may_move_to_another_event_loop(harness: Harness) -> None:
    backend = harness.make()

    async def use() -> Any:
        async with backend:
            waiting = asyncio.create_task(backend.wait_for("t"))
            await backend.mark_as_done("t", 1)
            return (await waiting).result

    assert await use() == 1
    assert await asyncio.to_thread(lambda: asyncio.run(use())) == 1
    assert await use() == 1


# -- closing while something is under way ---------------------------------------------------------------------------


async def test_closing_fails_everyone_who_waits(harness: Harness) -> None:
    """Invariant 7: with an error that says so."""
    backend = await harness.connect()
    waiting: list[asyncio.Future[Any]] = [asyncio.create_task(backend.wait_for(f"t{n}")) for n in range(500)]
    waiting.append(asyncio.create_task(backend.group(["t0", "other"]).get()))
    waiting.append(asyncio.create_task(aioresult.gather(backend.result("t0"), return_exceptions=True)))
    await harness.subscribed(501)
    await backend.aclose()
    done, late = await asyncio.wait(waiting, timeout=0)
    assert not late
    assert {type(each.exception()) for each in done} == {BackendClosedError}
    await harness.subscribed(0)


async def test_closing_lets_what_is_on_its_way_finish(harness: Harness) -> None:
    worker, reader = harness.make(), await harness.connect()
    gates = Gate(worker, "_store"), Gate(worker, "_store_group")
    await worker.open()
    storing = asyncio.create_task(worker.mark_as_done("t", 1))
    saving = asyncio.create_task(worker.save_group("g", worker.group(["t"])))
    for gate in gates:
        await gate.reached.wait()
    closing = asyncio.create_task(worker.aclose())
    for _ in range(20):  # as far as it comes
        await asyncio.sleep(0)
    for gate in gates:
        gate.open.set()
    assert await storing is True
    await saving
    await closing
    assert await reader.exists("t")
    assert await reader.restore_group("g") is not None


async def test_closing_does_not_wait_for_what_never_finishes(harness: Harness) -> None:
    """Invariant 7: whoever called gets a named error."""
    await (await harness.connect()).mark_as_done("u", 1)
    backend = harness.make()
    gates = [Gate(backend, name) for name in ("_store", "_fetch", "_delete", "_fetch_group")]
    await backend.open()
    calls = [
        backend.mark_as_done("t", 1),
        backend.get_task_meta("t"),
        backend.get_many(["t"]),
        backend.forget("u"),
        backend.restore_group("g"),
        backend.wait_for("t"),
    ]
    tasks = [asyncio.create_task(call) for call in calls]
    for gate in gates:
        await gate.reached.wait()
    await backend.aclose()
    done, late = await asyncio.wait(tasks, timeout=0)
    assert not late
    assert {type(task.exception()) for task in done} == {BackendClosedError}


async def test_closing_is_possible_at_any_turn_of_the_loop(harness: Harness) -> None:
    for turns in range(30):
        backend = await harness.make().open()
        backend.watch("t", Ignorer())
        for _ in range(turns):
            await asyncio.sleep(0)
        await backend.aclose()
    await harness.subscribed(0)


async def test_a_driver_that_swallows_a_cancellation_does_not_keep_a_backend_open(harness: Harness) -> None:
    """As `asyncio.wait_for` does up to Python 3.11, when the result comes in the same turn of the loop."""
    backend = harness.make()
    subscribing = asyncio.Event()

    async def subscribe(original: Primitive, ids: Sequence[str]) -> None:
        await original(ids)
        subscribing.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return

    intercept(backend, "_subscribe", subscribe)
    await backend.open()
    waiting = asyncio.create_task(backend.wait_for("t"))
    await subscribing.wait()
    await backend.aclose()
    with pytest.raises(BackendClosedError):
        await waiting


async def test_a_cancelled_close_closes_all_the_same(harness: Harness) -> None:
    backend = harness.make()
    gate = Gate(backend, "_close")
    await harness.open(backend)
    waiting = asyncio.create_task(backend.wait_for("t"))
    await harness.subscribed(1)
    closing = asyncio.create_task(backend.aclose())
    await gate.reached.wait()
    closing.cancel()
    await asyncio.sleep(0)
    assert not closing.done()
    gate.open.set()
    await asyncio.wait([closing])
    assert closing.cancelled()
    with pytest.raises(BackendClosedError):
        await waiting
    await harness.subscribed(0)


# -- callers that are cancelled -------------------------------------------------------------------------------------


async def test_a_store_cancelled_on_its_way_is_whole_and_disturbs_nobody(harness: Harness) -> None:
    """Invariants 2 and 4: no caller's cancellation reaches the socket; what was sent is stored and told in full."""
    worker, web = harness.make(), await harness.connect()
    gate = Gate(worker, "_store")
    await harness.open(worker)
    waiting = [asyncio.create_task(web.wait_for(task_id)) for task_id in ("cancelled", "other")]
    await harness.subscribed(2)
    cancelled = asyncio.create_task(worker.mark_as_done("cancelled", 1))
    other = asyncio.create_task(worker.mark_as_done("other", 2))
    await gate.reached.wait()
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert cancelled.cancelled()
    gate.open.set()
    assert await other is True
    told = await asyncio.gather(*waiting)
    assert [meta.result for meta in told] == [1, 2]
    assert await web.get_many(["cancelled", "other"]) == told


async def test_a_store_cancelled_before_it_was_sent_is_never_sent(harness: Harness) -> None:
    worker = harness.make()
    worker.store_parallel = 1
    gate = Gate(worker, "_store")
    await harness.open(worker)
    first = asyncio.create_task(worker.mark_as_done("first", 1))
    await gate.reached.wait()
    queued = [asyncio.create_task(worker.mark_as_done(task_id, 2)) for task_id in ("cancelled", "second")]
    await asyncio.sleep(0)
    queued[0].cancel()
    gate.open.set()
    assert [await first, await queued[1]] == [True, True]
    assert [await worker.exists(task_id) for task_id in ("first", "cancelled", "second")] == [True, False, True]


@pytest.mark.parametrize(
    ("primitive", "call"),
    [
        ("_fetch", "get_task_meta"),
        ("_fetch", "get_many"),
        ("_fetch", "exists"),
        ("_delete", "forget"),
        ("_fetch_group", "restore_group"),
        ("_store_group", "save_group"),
        ("_delete_group", "delete_group"),
    ],
)
async def test_no_cancellation_reaches_a_primitive(harness: Harness, primitive: str, call: str) -> None:
    """Invariant 4."""
    await (await harness.connect()).store_result("t", 0, "PROGRESS")
    backend = harness.make()
    reached, released, finished = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def around(original: Primitive, *args: Any) -> Any:
        reached.set()
        await released.wait()
        value = await original(*args)
        finished.set()
        return value

    intercept(backend, primitive, around)
    await harness.open(backend)
    task = asyncio.ensure_future(CALLS[call](backend))
    await reached.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    released.set()
    await finished.wait()
    assert await backend.mark_as_done("t", 1)


# -- what is shown --------------------------------------------------------------------------------------------------


async def test_no_password_is_shown(harness: Harness) -> None:
    backend = type(harness.make())(harness.example.format("user:s3cret@localhost"))
    with pytest.raises(BackendNotOpenError) as caught:
        await backend.exists("t")
    for text in (repr(backend), str(backend), backend.as_uri(), str(caught.value)):
        assert "s3cret" not in text
        assert "user:**@localhost" in text


async def test_a_backend_shows_whether_it_is_open(harness: Harness) -> None:
    backend = harness.make()
    assert repr(backend).endswith("closed>")
    async with backend:
        assert repr(backend).endswith("open>")
    assert repr(backend).endswith("closed>")
