"""Workers that die, say good-bye, or only seem dead, and what the waiters of their tasks are told.

A worker dies here by giving no more signs of life, and no good-bye.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from typing import Any

import pytest

from aioresult import Backend, Retry, TaskRevokedError, WorkerLostError
from aioresult.exceptions import BackendClosedError, BackendConnectionError, UsageError
from aioresult.liveness import Liveness

from ..harness import Gate, Harness, count_calls, intercept, topics_of, until
from .test_running import Body, Primitive, states, stored
from .test_streams import put, read, reading, waiting

LEASE = 0.12


async def die(worker: Backend, *bodies: Body) -> None:
    """As by SIGKILL: nothing more comes from there."""
    await worker.liveness.close()
    worker.liveness._works = False
    worker._run_steps = _nothing  # type: ignore[method-assign]
    for body in bodies:
        body.task.cancel()
        body.run._runs.discard(body.run._run)


async def _nothing(steps: Sequence[Any]) -> list[Any]:
    raise UsageError("it is dead")


async def lost(task: asyncio.Task[Any]) -> WorkerLostError:
    with pytest.raises(WorkerLostError, match="has not been heard of") as caught:
        await task
    return caught.value


async def nothing_is_left(live: Harness, web: Backend) -> None:
    liveness = web.liveness
    await until(lambda: not liveness._watched and not liveness._suspects)
    assert not liveness._needed.is_set()
    assert not web._streams._tails


# -- death ------------------------------------------------------------------------------------------------------------


async def test_all_that_asked_are_told_of_a_death(live: Harness) -> None:
    worker, web = await live.pair(lease=LEASE)
    body = await Body(worker).begun()
    await put(body.run.output, 1, 2)
    stream = web.stream("t")
    told = [
        asyncio.create_task(web.result("t").get(on_lost="raise")),
        asyncio.create_task(states(web)),
        asyncio.create_task(read(web.stream("t"))),
    ]
    waits = [
        asyncio.create_task(web.result("t").get()),
        asyncio.create_task(states(web, on_lost="wait")),
        reading(web, on_lost="wait", on_restart="continue"),
    ]
    await waiting(web, 2)
    assert [await anext(stream), await anext(stream)] == [1, 2]
    await die(worker, body)
    for task in told:
        await lost(task)
    with pytest.raises(WorkerLostError):
        await anext(stream)
    assert await stored(web) == "STARTED"  # it is told, not stored
    assert not any(task.done() for task in waits)
    # A waiter that asks now is told, too.
    await lost(asyncio.create_task(web.result("t").get(on_lost="raise")))
    second = await live.connect(lease=LEASE)
    async with second.running("t") as run:
        await run.output.send("anew")
        run.value = 5
    assert await asyncio.gather(*waits[:1], waits[2]) == [5, [1, 2, "anew"]]
    assert (await waits[1])[-1].result == 5
    await nothing_is_left(live, web)


async def test_the_next_attempt_is_watched(live: Harness) -> None:
    first, web = await live.pair(lease=LEASE)
    second = await live.connect(lease=LEASE)
    body = await Body(first).begun()
    waits = asyncio.create_task(web.result("t").get(on_lost="raise"))
    await until(lambda: "t" in web.liveness._watched)
    body.end.set_exception(Retry())
    await body.outcome()
    await die(first)
    again = await Body(second).begun()
    await die(second, again)
    await lost(waits)
    await nothing_is_left(live, web)


async def test_a_task_whose_worker_is_dead_is_revoked_at_once(live: Harness) -> None:
    worker, web = await live.pair(lease=LEASE)
    body = await Body(worker).begun()
    await die(worker, body)
    await until(_no_lease(web, worker))
    assert await web.revoke("t", "why")
    assert await stored(web) == "REVOKED"
    other = await live.connect()
    with pytest.raises(TaskRevokedError, match="why"):
        await other.running("t").__aenter__()


def _no_lease(web: Backend, worker: Backend) -> Any:
    async def gone() -> bool:
        return not any(await web._alive([worker.liveness.worker]))

    return gone


async def test_what_is_over_is_not_lost(live: Harness) -> None:
    worker, web = await live.pair(lease=LEASE)
    await worker.run("t", lambda: 5)
    body = await Body(worker, "u").begun()
    body.end.set_exception(Retry())
    await body.outcome()
    await die(worker)
    await until(_no_lease(web, worker))
    assert await web.result("t").get(on_lost="raise") == 5
    assert (await states(web))[-1].result == 5
    waits = asyncio.create_task(web.result("u").get(on_lost="raise"))
    await until(lambda: "u" in web.liveness._watched)
    await asyncio.sleep(2 * LEASE)
    assert not waits.done()  # no worker runs it
    waits.cancel()
    await asyncio.wait([waits])
    await nothing_is_left(live, web)


# -- life -------------------------------------------------------------------------------------------------------------


async def test_a_worker_that_lives_is_never_lost(live: Harness) -> None:
    worker, web = await live.pair(lease=LEASE)
    body = await Body(worker).begun()
    waits = asyncio.create_task(web.result("t").get(on_lost="raise"))
    await asyncio.sleep(4 * LEASE)
    assert not waits.done()
    body.end.set_result(1)
    assert await waits == 1
    await nothing_is_left(live, web)


async def test_a_good_bye_is_heard_at_once(live: Harness) -> None:
    """By the lease of half a minute it would be told much later."""
    worker, web = live.make(), await live.connect()
    await worker.open()
    body = await Body(worker).begun()
    waits = asyncio.create_task(web.result("t").get(on_lost="raise"))
    await until(lambda: "t" in web.liveness._watched)
    await until(lambda: _confirmed(web))
    await worker.aclose()
    await lost(waits)
    body.task.cancel()
    await body.outcome()
    await nothing_is_left(live, web)


def _confirmed(web: Backend) -> bool:
    topic = topics_of(web).get("\x00workers")
    return topic is not None and topic.known is not None


async def test_a_good_bye_after_a_shutdown_in_order_loses_nobody(live: Harness) -> None:
    worker, web = live.make(lease=LEASE), await live.connect(lease=LEASE)
    await worker.open()
    body = await Body(worker).begun()
    await put(body.run.output, 1)
    told = [asyncio.create_task(web.result("t").get(on_lost="raise")), reading(web, on_restart="continue")]
    await waiting(web)
    body.task.cancel()
    await body.outcome()
    await worker.aclose()
    await asyncio.sleep(2 * LEASE)
    assert not any(task.done() for task in told)
    async with (await live.connect()).running("t") as task:
        await task.output.send(2)
        task.value = 3
    assert await asyncio.gather(*told) == [3, [1, 2]]


@pytest.mark.parametrize("outage", [0.5, 3], ids=["short", "longer than a lease"])
async def test_nobody_is_lost_by_an_outage(live: Harness, outage: float) -> None:
    """Every call fails for that many leases, and the listeners are lost."""
    down: list[bool] = []

    async def fail(original: Primitive, *args: Any) -> Any:
        if down:
            raise BackendConnectionError("away, by the test")
        return await original(*args)

    backends = [live.make(lease=LEASE, retry_for=0.01) for _ in range(2)]
    for backend in backends:
        for primitive in ("_run_steps", "_beat", "_alive", "_subscribe", "_fetch", "_pages"):
            intercept(backend, primitive, fail)
        await live.open(backend)
    worker, web = backends
    body = await Body(worker).begun()
    waits = [asyncio.create_task(web.result("t").get(on_lost="raise")), asyncio.create_task(states(web)), reading(web)]
    await waiting(web)
    await asyncio.sleep(1.5 * LEASE)
    down.append(True)
    for backend in backends:
        backend._listener_lost(ConnectionError("away, by the test"))
    await asyncio.sleep(outage * LEASE)
    down.clear()
    await asyncio.sleep(3 * LEASE)
    assert not any(task.done() for task in waits)
    body.end.set_result(1)
    assert await body.outcome() is None
    assert await waits[0] == 1
    assert await waits[2] == []
    assert (await waits[1])[-1].result == 1


# -- costs, and what is left ------------------------------------------------------------------------------------------


async def test_what_does_not_ask_costs_nothing(live: Harness) -> None:
    worker, web = await live.connect(lease=LEASE), live.make(lease=LEASE)
    calls = count_calls(web)
    beats: list[Any] = []

    async def count(original: Primitive, *args: Any) -> Any:
        beats.append(args)
        return await original(*args)

    for primitive in ("_beat", "_alive", "_run_steps"):
        intercept(web, primitive, count)
    await live.open(web)
    waits = asyncio.create_task(web.result("t").get())
    await until(lambda: calls["_subscribe"] == 1)
    await asyncio.sleep(LEASE)
    await worker.mark_as_done("t", 1)
    assert await waits == 1
    assert not beats


async def test_one_beat_for_any_number_of_tasks(live: Harness) -> None:
    worker = live.make()
    beats: list[Any] = []

    async def count(original: Primitive, *args: Any) -> Any:
        beats.append(args)
        return await original(*args)

    intercept(worker, "_beat", count)
    await live.open(worker)
    bodies = [await Body(worker, f"t{number}").begun() for number in range(50)]
    assert len(beats) <= 2
    for body in bodies:
        body.end.set_result(1)
        await body.outcome()


async def test_those_that_leave_clean_up(live: Harness) -> None:
    worker, web = await live.pair(lease=LEASE)
    body = await Body(worker).begun()
    for turns in range(12):
        waits = [
            asyncio.create_task(web.result("t").get(on_lost="raise")),
            asyncio.create_task(states(web)),
            reading(web),
        ]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in waits:
            task.cancel()
        await asyncio.wait(waits)
        assert all(task.cancelled() for task in waits)
        del task, waits  # their exceptions keep what was read in
        gc.collect()
        await nothing_is_left(live, web)
    await live.subscribed(1)  # the worker's own
    reader = reading(web)
    await die(worker, body)  # those that come after others have left are told
    await lost(reader)
    await nothing_is_left(live, web)


async def test_a_watcher_that_was_told_and_stays_is_nothing_to_those_that_come(live: Harness) -> None:
    worker, web = await live.connect(lease=LEASE), live.make(lease=LEASE)
    broken = [True]

    async def refuse(original: Primitive, ids: Any) -> Any:
        if broken and "\x00workers" in ids:
            raise PermissionError("refused by the test")
        return await original(ids)

    intercept(web, "_subscribe", refuse)
    await live.open(web)
    body = await Body(worker).begun()
    told: list[Exception] = []
    web.liveness.watch("t", told.append)  # and never unwatches
    await until(lambda: bool(told))
    broken.clear()
    waits = asyncio.create_task(web.result("t").get(on_lost="raise"))
    await until(lambda: "\x00workers" in topics_of(web))
    waits.cancel()
    await asyncio.wait([waits])
    web.liveness.unwatch("t", told.append)
    body.end.set_result(1)
    await body.outcome()


async def test_a_suspicion_ends_with_those_that_had_it(live: Harness) -> None:
    """Otherwise an instant without a lease, much later, would seem to have lasted since then."""
    web = await live.connect(lease=LEASE)
    liveness: Liveness = web.liveness
    told: list[Exception] = []
    liveness.watch("other", told.append)
    liveness.watch("t", told.append)
    liveness._suspects.update(t=("run", 0.0), other=("run", 0.0))
    liveness.unwatch("t", told.append)
    assert list(liveness._suspects) == ["other"]
    liveness.unwatch("other", told.append)
    await nothing_is_left(live, web)


async def test_a_suspicion_does_not_begin_when_those_that_asked_have_left(live: Harness) -> None:
    worker, web = await live.connect(), live.make(lease=LEASE)
    gate = Gate(web, "_alive")
    await live.open(web)
    body = await Body(worker).begun()
    await worker._beat(worker.liveness.worker, 0.0)
    told: list[Exception] = []
    web.liveness.watch("t", told.append)
    await gate.reached.wait()
    web.liveness.unwatch("t", told.append)
    gate.open.set()
    web.liveness.watch("u", told.append)
    await until(lambda: not web.liveness._due and not web.liveness._check_due.is_set())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not web.liveness._suspects
    web.liveness.unwatch("u", told.append)
    await nothing_is_left(live, web)
    body.end.set_result(1)
    await body.outcome()


async def test_a_result_in_time_is_no_loss(live: Harness) -> None:
    """The task itself is cancelled by nobody but the waiter, and stays as it was."""
    worker, web = await live.pair(lease=LEASE)
    await worker.run("t", lambda: 1)

    async def get() -> Any:
        me = asyncio.current_task()
        assert me is not None
        value = await web.result("t").get(on_lost="raise")
        return value, me.cancelling()

    assert await asyncio.create_task(get()) == (1, 0)
    body = await Body(worker, "u").begun()
    waits = asyncio.create_task(_caught(web, "u"))
    await until(lambda: "u" in web.liveness._watched)
    await die(worker, body)
    assert await waits == ("WorkerLostError", 0)
    with pytest.raises(TimeoutError):
        await web.result("v").get(timeout=0.01, on_lost="raise")
    with pytest.raises(UsageError, match="on_lost"):
        await web.result("v").get(on_lost="x")  # type: ignore[arg-type]


async def _caught(web: Backend, task_id: str) -> tuple[str, int]:
    me = asyncio.current_task()
    assert me is not None
    try:
        await web.result(task_id).get(on_lost="raise")
    except WorkerLostError as exc:
        return type(exc).__name__, me.cancelling()
    raise AssertionError


async def test_closing_ends_the_waiting_for_liveness(live: Harness) -> None:
    worker, web = await live.connect(), live.make()
    await web.open()
    body = await Body(worker).begun()
    waits = [asyncio.create_task(web.result("t").get(on_lost="raise")), asyncio.create_task(states(web)), reading(web)]
    await waiting(web)
    await web.aclose()
    for task in waits:
        with pytest.raises(BackendClosedError):
            await task
    body.end.set_result(1)
    await body.outcome()
