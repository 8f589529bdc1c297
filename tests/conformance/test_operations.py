"""What operators and newcomers meet: waits that never end, limits on waits, pings, figures, a server that is late."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from math import inf
from typing import Any

import pytest

import aioresult
from aioresult import (
    AsyncResult,
    Backend,
    BackendClosedError,
    BackendConnectionError,
    BackendRefusedError,
    BackendStats,
    DecodeError,
    ImproperlyConfigured,
    TaskNotFoundError,
    TimeoutError,
)
from aioresult.backends.contract import BackendContract

from ..harness import Gate, Harness, count_calls, hub_of, hubs_of, intercept, shares, topics_of, until
from .test_waiting import cancel, wait

Call = Callable[[Backend, Any], Awaitable[Any]]


async def idle(backend: Backend, count: int) -> None:
    """Return once ``count`` ids are waited for, and no hub has anything to do and no call in flight."""
    hubs = hubs_of(backend)
    await until(
        lambda: len(topics_of(backend)) == count and all(hub._work._waiters and not hub._work.is_set() for hub in hubs)
    )


def look_soon(backend: Backend) -> None:
    for hub in hubs_of(backend):
        hub.unheard.after = 0.02


def look_anew(backend: Backend) -> None:
    """As `look_soon`, for hubs whose timers run already."""
    look_soon(backend)
    for hub in hubs_of(backend):
        hub.unheard.close()
        hub.unheard.set_timer()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# -- a wait that may never end --------------------------------------------------------------------------------------


async def test_a_wait_for_what_nobody_submitted_is_warned_of_once(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    backend = await harness.connect()
    look_soon(backend)
    waiting = [wait(backend, "typo"), wait(backend, "typo")]
    await until(lambda: bool(warnings(caplog)))
    (warning,) = warnings(caplog)
    for hint in ("task typo.", backend.as_uri(), "submitted", "worker", "ignore_result", "eager", "global_keyprefix"):
        assert hint in warning
    other = wait(backend, "other")
    await until(lambda: len(warnings(caplog)) == 2)
    assert "task other." in warnings(caplog)[1]
    await cancel(*waiting, other)


def said_of(warning: str) -> str:
    return warning[warning.index("tasks ") : warning.index(" more.") + len(" more.")]


async def test_many_waits_are_warned_of_in_one_line(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    """Each shard has a line of its own."""
    backend = await harness.connect()
    ids = [f"t{number}" for number in range(1200)]
    waiting = [wait(backend, task_id) for task_id in ids]
    await idle(backend, 1200)
    look_anew(backend)
    found = shares(backend, ids)
    await until(lambda: len(warnings(caplog)) >= len(found))
    expected = [f"tasks {', '.join(some[:5])} and {len(some) - 5:,} more." for some in found]
    assert sorted(map(said_of, warnings(caplog))) == sorted(expected)
    await cancel(*waiting)


async def test_a_task_that_is_only_registered_is_warned_of(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    web, worker = await harness.pair()
    look_soon(web)
    await worker.mark_as_pending("pending")
    waiting = wait(web, "pending")
    await until(lambda: bool(warnings(caplog)))
    assert "no worker has stored anything" in warnings(caplog)[0]
    await cancel(waiting)


async def test_only_ids_of_which_no_worker_has_stored_anything_are_warned_of(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    """The braces keep all ids in one shard, so that one hub looks at all of them."""
    web, worker = await harness.pair()
    look_soon(web)
    await worker.mark_as_started("{x}started")
    waiting = [wait(web, task_id) for task_id in ("{x}started", "{x}later", "{x}forgotten")]
    await idle(web, 3)
    await worker.store_result("{x}later", {"done": 1}, "PROGRESS")
    await worker.mark_as_started("{x}forgotten")
    await until(lambda: all(topic.known for topic in topics_of(web).values()))
    await worker.forget("{x}forgotten")
    waiting.append(wait(web, "{x}nothing"))
    await until(lambda: bool(warnings(caplog)))
    (warning,) = warnings(caplog)
    assert "task {x}nothing." in warning
    await cancel(*waiting)


async def test_looking_for_such_waits_asks_the_server_nothing(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    backend = harness.make()
    calls = count_calls(backend)
    await harness.open(backend)
    waiting = wait(backend)
    await idle(backend, 1)
    before = calls.copy()
    look_anew(backend)
    await until(lambda: bool(warnings(caplog)))
    assert calls == before
    await cancel(waiting)
    await idle(backend, 0)
    await until(lambda: all(hub.unheard.timer is None for hub in hubs_of(backend)))  # without a wait, nothing ticks


async def test_nothing_is_said_of_an_id_that_was_not_read(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    backend = harness.make()
    gate = Gate(backend, "_fetch")
    await harness.open(backend)
    look_soon(backend)
    waiting = wait(backend)
    await gate.reached.wait()
    await until(lambda: hub_of(backend, "t").unheard.due)
    assert topics_of(backend)["t"].looks == 0
    gate.open.set()
    await until(lambda: bool(warnings(caplog)))
    await cancel(waiting)


# -- a limit on every wait ------------------------------------------------------------------------------------------

WAITS: dict[str, Call] = {
    "wait_for": lambda b, timeout: b.wait_for("t", timeout),
    "get": lambda b, timeout: b.result("t").get(timeout),
    "get with a parent": lambda b, timeout: AsyncResult[Any]("t", b, b.result("p")).get(timeout),
    "group": lambda b, timeout: b.group(["t", "u"]).get(timeout),
    "group as_completed": lambda b, timeout: anext(b.group(["t", "u"]).as_completed(timeout)),
    "as_completed": lambda b, timeout: anext(aioresult.as_completed([b.result("t")], timeout)),
}


async def test_a_wait_without_a_timeout_has_the_default(harness: Harness) -> None:
    backend = await harness.connect(default_timeout=timedelta(seconds=0.01))
    for name, call in WAITS.items():
        for timeout, said in ((None, "default_timeout=0.01"), (0.02, "timeout=0.02")):
            with pytest.raises(TimeoutError) as raised:
                await call(backend, timeout)
            assert f"not ready within {said} seconds" in str(raised.value), name


async def test_joins_across_backends_have_the_default_of_the_first(harness: Harness) -> None:
    limited, patient = await harness.connect(default_timeout=0.01), await harness.connect()
    first, second = limited.result("a"), patient.result("b")
    with pytest.raises(TimeoutError, match="default_timeout"):
        await aioresult.gather(first, second)
    assert await aioresult.wait([first, second]) == (set(), {first, second})
    with pytest.raises(TimeoutError, match="default_timeout"):
        await first
    waiting = asyncio.ensure_future(aioresult.gather(second, first))
    await until(lambda: len(topics_of(limited)) == len(topics_of(patient)) == 1)
    await patient.mark_as_done("a", 1)
    await patient.mark_as_done("b", 2)
    assert await waiting == [2, 1]


async def test_an_infinite_timeout_has_no_limit(harness: Harness) -> None:
    backend = await harness.connect(default_timeout=0.01)
    waiting = {name: asyncio.ensure_future(call(backend, inf)) for name, call in WAITS.items()}
    await until(lambda: len(topics_of(backend)) == 3)  # the task, the other member and the parent
    with pytest.raises(TimeoutError):  # begun later, with the default
        await backend.wait_for("other")
    assert [name for name, wait in waiting.items() if wait.done()] == []
    for task in waiting.values():
        task.cancel()
    await asyncio.wait(waiting.values())


async def test_what_is_no_wait_for_a_result_has_no_default(harness: Harness) -> None:
    backend = await harness.connect(default_timeout=0.01)
    updates = backend.result("t").updates(on_lost="wait")
    assert (await anext(updates)).status == "PENDING"
    change = asyncio.ensure_future(anext(updates))
    with pytest.raises(TimeoutError):
        await backend.wait_for("t")
    await backend.mark_as_done("t", 1)
    assert (await change).result == 1
    progress = backend.group(["a"]).progress()
    await anext(progress)
    change_of_group = asyncio.ensure_future(anext(progress))
    with pytest.raises(TimeoutError):
        await backend.wait_for("a")
    await backend.mark_as_done("a", 1)
    assert (await change_of_group).done == 1


@pytest.mark.parametrize("bad", [0, -1, "3", True, inf])
async def test_a_default_that_is_no_limit_is_refused(bad: Any) -> None:
    with pytest.raises(ImproperlyConfigured, match="default_timeout"):
        aioresult.connect("memory://", default_timeout=bad)


# -- only what exists -----------------------------------------------------------------------------------------------

EXISTING: dict[str, Call] = {
    "wait_for": lambda b, timeout: b.wait_for("t", timeout, must_exist=True),
    "get": lambda b, timeout: b.result("t").get(timeout, must_exist=True),
    "get with a parent": lambda b, timeout: AsyncResult[Any]("t", b, b.result("p")).get(timeout, must_exist=True),
}


async def test_a_task_that_must_exist(harness: Harness) -> None:
    web, worker = await harness.pair()
    for name, call in EXISTING.items():
        for timeout in (None, 0, 5, inf):
            with pytest.raises(TaskNotFoundError, match="mark_as_pending") as raised:
                await call(web, timeout)
            assert isinstance(raised.value, LookupError), name
    assert len(topics_of(web)) == 0
    await worker.mark_as_pending("t")
    for call in EXISTING.values():
        with pytest.raises(TimeoutError, match=r"not ready within timeout=0\.01 seconds"):
            await call(web, 0.01)
    waiting = [asyncio.ensure_future(call(web, None)) for call in EXISTING.values()]
    await until(lambda: web.stats().waiters >= len(EXISTING))
    await worker.mark_as_done("t", 1)
    meta, *values = await asyncio.gather(*waiting)
    assert [meta.result, *values] == [1] * len(EXISTING)


async def test_what_cannot_be_read_exists(harness: Harness) -> None:
    backend = await harness.connect()
    await harness.put_raw("t", b"\xff nonsense")
    with pytest.raises(DecodeError):
        await backend.result("t").get(must_exist=True)


async def test_a_known_result_needs_not_exist_any_more(harness: Harness) -> None:
    backend = await harness.connect()
    await backend.mark_as_done("t", 1)
    result = backend.result("t")
    assert await result == 1
    await backend.forget("t")
    assert await result.get(must_exist=True) == 1
    assert await aioresult.EagerResult("e", 2).get(must_exist=True) == 2


# -- is it there? ---------------------------------------------------------------------------------------------------


async def test_a_ping_measures_a_round_trip(harness: Harness) -> None:
    backend = harness.make()
    with pytest.raises(aioresult.BackendNotOpenError):
        await backend.ping()
    await harness.open(backend)
    assert 0 <= await backend.ping() < 10
    pings = 0

    async def count(original: Callable[[], Awaitable[None]]) -> None:
        nonlocal pings
        pings += 1
        await original()

    intercept(backend, "_ping", count)
    assert len(await asyncio.gather(*(backend.ping() for _ in range(100)))) == 100
    assert 0 < pings <= 2
    await backend.aclose()
    with pytest.raises(BackendClosedError):
        await backend.ping()


async def test_a_ping_is_not_repeated_and_waits_for_no_other_call(harness: Harness) -> None:
    backend = harness.make()

    async def away(original: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        raise BackendConnectionError("away")

    for primitive in ("_ping", "_fetch_group"):
        intercept(backend, primitive, away)
    await harness.open(backend)
    calls = [asyncio.create_task(backend.restore_group("g")) for _ in range(20)]
    await asyncio.sleep(0)
    with pytest.raises(BackendConnectionError, match="away"):
        await backend.ping()
    assert not any(call.done() for call in calls)
    assert backend.stats().last_error == "away"
    await cancel(*calls)


async def test_without_a_ping_of_its_own_a_backend_fetches_what_does_not_exist(harness: Harness) -> None:
    backend = await harness.connect()
    calls = count_calls(backend)
    await BackendContract._ping(backend)  # as of a backend that does not override it
    assert calls == {"_fetch": 1}


# -- what is going on -----------------------------------------------------------------------------------------------


async def test_the_figures_of_a_backend(harness: Harness) -> None:
    backend = harness.make()
    closed = backend.stats()
    assert closed == BackendStats(False, False, 0, 0, 0, 0, 0, 0, None, None)
    gate = Gate(backend, "_store")
    backend._store_at_once = lambda record, done: False  # type: ignore[method-assign]
    await harness.open(backend)
    assert backend.stats() == BackendStats(True, True, 0, 0, 0, 0, 0, 0, None, None)
    waiting = [wait(backend, task_id) for task_id in ("a", "a", "a", "b")]
    await idle(backend, 2)
    stats = backend.stats()
    assert (stats.waiters, stats.waited_ids, stats.subscriptions) == (4, 2, 2)
    storing = [asyncio.create_task(backend.mark_as_done(task_id, "x" * 1000)) for task_id in ("a", "b", "b", "c")]
    await gate.reached.wait()
    storing.append(asyncio.create_task(backend.mark_as_done("b", "x" * 1000)))  # it is sent behind the others
    await until(lambda: backend.stats().queued_stores == 5)
    stats = backend.stats()
    assert stats.connected
    assert stats.queued_bytes > 5000
    gate.open.set()
    await asyncio.gather(*waiting, *storing)
    await idle(backend, 0)
    assert backend.stats() == BackendStats(True, True, 0, 0, 0, 0, 0, 0, None, None)
    await backend.aclose()
    assert backend.stats() == closed


async def test_the_figures_tell_of_an_outage(harness: Harness) -> None:
    backend = harness.make()
    down = True

    async def away(original: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        if down:
            raise BackendConnectionError("the server is away")
        return await original(*args)

    intercept(backend, "_store", away)
    backend._store_at_once = lambda record, done: False  # type: ignore[method-assign]
    await harness.open(backend)
    began = datetime.now(UTC)
    storing = asyncio.create_task(backend.mark_as_done("t", 1))
    await until(lambda: not backend.stats().connected)
    stats = backend.stats()
    assert (stats.last_error, stats.reconnects) == ("the server is away", 0)
    assert stats.last_error_at is not None
    assert began <= stats.last_error_at <= datetime.now(UTC)
    down = False
    await storing
    stats = backend.stats()
    assert (stats.connected, stats.reconnects, stats.last_error) == (True, 1, "the server is away")


# -- a server that starts later -------------------------------------------------------------------------------------


def late(backend: Backend, attempts: int, error: Exception) -> list[int]:
    """Have so many attempts to open ``backend`` fail. The list grows with each attempt."""
    made: list[int] = []

    async def fail(original: Callable[[], Awaitable[None]]) -> None:
        made.append(1)
        if len(made) <= attempts:
            raise error
        await original()

    intercept(backend, "_open", fail)
    return made


async def test_opening_waits_for_a_server_that_starts(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aioresult")
    backend = harness.make(wait_for_server=30)
    made = late(backend, 3, BackendConnectionError("nobody there"))
    await harness.open(backend)
    assert await backend.mark_as_done("t", 1)
    assert len(made) == 4
    assert warnings(caplog) == ["nobody there; open() tries again for up to wait_for_server=30 seconds"]
    assert caplog.messages[-1].startswith(f"{backend.as_uri()} was reached after ")


async def test_opening_waits_no_longer_than_it_was_told(harness: Harness) -> None:
    backend = harness.make(wait_for_server=timedelta(seconds=0.05))
    made = late(backend, 1000, BackendConnectionError("nobody there"))
    with pytest.raises(BackendConnectionError, match=r"nobody there .*wait_for_server=0\.05 seconds"):
        await backend.open()
    assert len(made) > 1
    at_once = harness.make()
    made = late(at_once, 1000, BackendConnectionError("nobody there"))
    with pytest.raises(BackendConnectionError, match=r"^nobody there$"):
        await at_once.open()
    assert len(made) == 1


async def test_a_server_that_refuses_is_not_waited_for(harness: Harness) -> None:
    backend = harness.make(wait_for_server=30)
    made = late(backend, 1000, BackendRefusedError("wrong password"))
    with pytest.raises(BackendRefusedError, match="wrong password"):
        await backend.open()
    assert len(made) == 1


async def test_closing_ends_the_wait_for_a_server(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    backend = harness.make(wait_for_server=3000)
    late(backend, 1_000_000, BackendConnectionError("nobody there"))
    opening = asyncio.create_task(backend.open())
    await until(lambda: bool(warnings(caplog)))
    await backend.aclose()
    with pytest.raises(BackendClosedError):
        await opening
