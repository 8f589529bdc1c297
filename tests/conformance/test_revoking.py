"""Stopping tasks: by push, in any order with what the task itself and others do; and what the task tells meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

from aioresult import Backend, Retry, TaskMeta, TaskRequest, TaskRevokedError
from aioresult.exceptions import BackendClosedError, BackendConnectionError, BackendStoreError, EncodeError, UsageError

from ..harness import Gate, Harness, count_calls, intercept, until
from .test_running import Body, Primitive, listening, stored
from .test_streams import put, read, reading, waiting

# -- revoke -----------------------------------------------------------------------------------------------------------


async def test_a_pending_task_is_revoked_at_once_and_never_begins(live: Harness) -> None:
    worker, web = await live.pair()
    readers = [reading(web), asyncio.create_task(_value(web))]
    await waiting(web)
    assert await web.result("t").revoke("not needed")
    for reader in readers:
        with pytest.raises(TaskRevokedError, match="not needed"):
            await reader
    assert await stored(web) == "REVOKED"
    for _ in range(2):
        with pytest.raises(TaskRevokedError, match="not needed"):
            async with worker.running("t"):
                raise AssertionError
    assert not worker._running._runs
    assert await web.revoke("t")  # once more


async def _value(web: Backend, task_id: str = "t") -> Any:
    return await web.result(task_id)


async def test_what_is_over_is_not_revoked(live: Harness) -> None:
    worker, web = await live.pair()
    async with worker.running("t") as task:
        task.value = 1
    assert not await web.revoke("t")
    body = await Body(worker, "u").begun()
    body.end.set_exception(KeyError())
    await body.outcome()
    assert not await web.revoke("u")
    assert [await stored(web), await stored(web, "u")] == ["SUCCESS", "FAILURE"]


async def test_a_running_task_is_cancelled(live: Harness) -> None:
    worker, web = await live.pair()
    body = await Body(worker).begun()
    reader = reading(web)
    await put(body.run.output, 1)

    async def clean_up() -> None:
        await asyncio.sleep(0)
        await put(body.run.output, "last words")

    body.cleanup = clean_up
    assert await web.revoke("t", "why")
    error = await body.outcome()
    assert isinstance(error, TaskRevokedError)
    assert str(error) == "why"
    assert body.run.revoked
    with pytest.raises(TaskRevokedError, match="why"):
        await reader
    assert (await web.read_output("t")).chunks == [1, "last words"]
    assert await stored(web) == "REVOKED"


async def test_the_loop_of_a_worker_goes_on_after_a_revoke(live: Harness) -> None:
    worker, web = await live.pair()
    began = asyncio.Event()

    async def work() -> list[Any]:
        outcomes: list[Any] = []
        for task_id in ("a", "b"):
            try:
                async with worker.running(task_id) as task:
                    began.set()
                    if task_id == "a":
                        await asyncio.Event().wait()
                    await asyncio.sleep(0)
                    task.value = 1
            except TaskRevokedError as exc:
                outcomes.append(str(exc))
        me = asyncio.current_task()
        assert me is not None
        return [*outcomes, me.cancelling()]

    task = asyncio.create_task(work())
    await began.wait()
    await web.revoke("a", "stop")
    assert await task == ["stop", 0]
    assert [await stored(web, "a"), await stored(web, "b")] == ["REVOKED", "SUCCESS"]


async def test_a_body_that_swallows_the_cancellation_has_succeeded(live: Harness) -> None:
    worker, web = await live.pair()

    async def stubborn() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
        return "done all the same"

    running = asyncio.create_task(worker.run("t", stubborn))
    await until(lambda: any(run._inside for run in worker._running._runs.values()))
    assert await web.revoke("t")
    assert await running == await web.result("t") == "done all the same"
    assert not await web.revoke("t")


@pytest.mark.parametrize("error", [KeyError("in the cleanup"), Retry("again")])
async def test_a_cleanup_that_raises(live: Harness, error: Exception) -> None:
    worker, web = await live.pair()
    body = await Body(worker).begun()

    async def clean_up() -> None:
        raise error

    body.cleanup = clean_up
    await web.revoke("t")
    outcome = await body.outcome()
    if isinstance(error, Retry):  # there is no next attempt
        assert isinstance(outcome, TaskRevokedError)
        assert await stored(web) == "REVOKED"
    else:
        assert outcome is error
        assert await stored(web) == "FAILURE"


@pytest.mark.parametrize("first", ["revoke", "other"])
@pytest.mark.parametrize("other", ["cancel", "timeout", "anyio", "anyio inside"])
async def test_both_cancellations(live: Harness, first: str, other: str) -> None:
    """Stored is REVOKED; who cancelled beside it has what it wanted, too."""
    worker, web = await live.pair()
    await listening(worker)
    began, deadline = asyncio.Event(), asyncio.Event()
    scopes: list[Any] = []

    async def body() -> None:
        async with worker.running("t") as run:
            began.set()
            try:
                if other == "anyio inside":
                    with anyio.CancelScope() as scope:
                        scopes.append(scope)
                        await asyncio.Event().wait()
                await asyncio.Event().wait()
            finally:
                deadline.set()
                if first == "revoke" and other != "anyio inside":
                    await asyncio.Event().wait()
                with anyio.CancelScope(shield=True):
                    await until(lambda: run.revoked and bool(stopped))

    async def around() -> str:
        me = asyncio.current_task()
        assert me is not None
        try:
            if other == "timeout":
                async with asyncio.timeout(3600) as timeout:
                    scopes.append(timeout)
                    await body()
            elif other == "anyio":
                with anyio.CancelScope() as scope:
                    scopes.append(scope)
                    await body()
            else:
                await body()
        except (TaskRevokedError, TimeoutError) as exc:
            return f"{type(exc).__name__} {me.cancelling()}"
        return f"went on {me.cancelling()}"

    stopped: list[bool] = []
    task = asyncio.create_task(around())
    await began.wait()

    def stop() -> None:
        stopped.append(True)
        if other == "cancel":
            task.cancel()
        elif other == "timeout":
            scopes[0].reschedule(0)
        else:
            scopes[0].cancel()

    if first == "other":
        stop()
        await deadline.wait() if other != "anyio inside" else await asyncio.sleep(0)
    assert await web.revoke("t")
    if first == "revoke":
        await deadline.wait()
        stop()
    await asyncio.wait([task])
    assert await stored(web) == "REVOKED"
    if other == "cancel":
        assert task.cancelled()
    elif other == "timeout":
        assert task.result() == "TimeoutError 0"
    elif other == "anyio":
        assert not task.cancelled()
        assert task.result() == "went on 0"
    else:
        assert task.result() == "TaskRevokedError 0"


@pytest.mark.parametrize("leaving", ["shutdown", "KeyboardInterrupt"])
async def test_a_shutdown_passes_through_also_when_the_task_was_revoked(live: Harness, leaving: str) -> None:
    """The wish is in the store and has not come to the worker."""
    worker, web = live.make(), await live.connect()
    worker._revoke_news = lambda worker, run: None  # type: ignore[method-assign]
    await live.open(worker)
    await listening(worker)
    run = worker.running("t")
    await run.__aenter__()
    assert await web.revoke("t", "why")
    exc = asyncio.CancelledError() if leaving == "shutdown" else KeyboardInterrupt()
    await run.__aexit__(type(exc), exc, None)  # which raises nothing else
    assert await stored(web) == "REVOKED"


async def test_a_cancellation_passes_through_also_when_nothing_can_be_stored(live: Harness) -> None:
    worker = live.make()
    broken: list[bool] = []

    async def fail(original: Primitive, *args: Any) -> Any:
        if broken:
            raise BackendStoreError("refused by the test")
        return await original(*args)

    intercept(worker, "_run_steps", fail)
    await live.open(worker)
    body = await Body(worker).begun()
    broken.append(True)
    body.task.cancel()
    assert isinstance(await body.outcome(), asyncio.CancelledError)


async def test_revoked_between_two_attempts(live: Harness) -> None:
    worker, web = await live.pair()
    body = await Body(worker).begun()
    await put(body.run.output, 1)
    body.end.set_exception(Retry())
    await body.outcome()
    reader = reading(web)
    await waiting(web)
    assert await web.revoke("t")
    with pytest.raises(TaskRevokedError):
        await reader
    assert isinstance(await Body(worker).outcome(), TaskRevokedError)


async def test_only_the_newest_of_two_runs_is_cancelled(live: Harness) -> None:
    worker, web = await live.pair()
    await listening(worker)
    old, new = await Body(worker).begun(), await Body(worker).begun()
    await web.revoke("t")
    assert isinstance(await new.outcome(), TaskRevokedError)
    assert not old.task.done()
    old.end.set_result("counts")
    await old.outcome()
    assert await web.result("t") == "counts"


async def test_a_revoke_that_a_lost_listener_missed(live: Harness) -> None:
    worker, web = live.make(), await live.connect()
    worker._revoke_news = lambda worker, run: None  # type: ignore[method-assign]
    await live.open(worker)
    await listening(worker)
    bodies = [await Body(worker, f"t{number}").begun() for number in range(3)]
    assert await web.revoke("t1")
    worker._listener_lost(ConnectionError("cut by the test"))
    assert isinstance(await bodies[1].outcome(), TaskRevokedError)
    assert [body.task.done() for body in bodies] == [False, True, False]
    for body in bodies:
        body.task.cancel()
        await body.outcome()


async def test_a_result_that_cannot_be_read_keeps_no_worker_busy(live: Harness) -> None:
    """Neither can the wish, then; that is no reason to ask without end."""
    worker, web = live.make(), await live.connect()
    calls = count_calls(worker)
    await live.open(worker)
    await listening(worker)
    body = await Body(worker).begun()
    await live.put_raw("t", b"\xff no result")
    before = calls["_subscribe"]
    worker._listener_lost(ConnectionError("cut by the test"))
    await until(lambda: calls["_subscribe"] > before)
    await asyncio.sleep(0.02)
    assert calls["_subscribe"] - before < 3
    body.task.cancel()
    await body.outcome()
    assert await web.exists("t")


@pytest.mark.parametrize("what", ["a refused subscription", "a task that a stranger cancels", "an outage"])
async def test_a_worker_that_could_not_listen_does_so_later(
    live: Harness, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aioresult.running.LISTEN_AGAIN", 0.01)
    worker, web = live.make(retry_for=0.01), await live.connect()
    broken: list[bool] = []

    async def around(original: Primitive, *args: Any) -> Any:
        if broken and broken.pop():
            if what == "an outage":
                broken.append(True)
                raise BackendConnectionError("away, by the test")
            if what == "a refused subscription":
                raise PermissionError("refused by the test")
            for task in worker._running._reading:
                task.cancel()
        return await original(*args)

    intercept(worker, "_subscribe" if what == "a refused subscription" else "_run_steps", around)
    worker._revoke_news = lambda worker, run: None  # type: ignore[method-assign]
    await live.open(worker)
    await listening(worker)
    body = await Body(worker).begun()
    assert await web.revoke("t")
    broken.append(True)
    worker._listener_lost(ConnectionError("cut by the test"))
    if what == "an outage":
        await until(lambda: worker._running._timer is not None)
    else:
        await until(lambda: not broken)
    broken.clear()
    assert isinstance(await body.outcome(), TaskRevokedError)


@pytest.mark.parametrize("turns", range(12))
async def test_revoked_while_it_begins(live: Harness, turns: int) -> None:
    worker, web = await live.pair()
    body = Body(worker)
    for _ in range(turns):
        await asyncio.sleep(0)
    assert await web.revoke("t")
    assert isinstance(await body.outcome(), TaskRevokedError)
    assert await stored(web) == "REVOKED"
    assert await web.revoke("t")


async def test_entering_is_cancelled_at_any_turn(live: Harness) -> None:
    worker, web = await live.pair()
    for turns in range(15):
        body = Body(worker, f"t{turns}")
        for _ in range(turns):
            await asyncio.sleep(0)
        body.task.cancel()
        assert isinstance(await body.outcome(), asyncio.CancelledError)
        assert not worker._running._runs
        # No worker runs it now, and a revoke says so.
        await web.revoke(f"t{turns}")
        assert await stored(web, f"t{turns}") == "REVOKED"


async def test_leaving_is_cancelled_at_any_turn(live: Harness) -> None:
    worker, web = await live.pair()
    for turns in range(15):
        body = await Body(worker, f"t{turns}").begun()
        await body.run.output.send(1)
        body.end.set_result(turns)
        for _ in range(turns):
            await asyncio.sleep(0)
        cancelled = body.task.cancel()
        outcome = await body.outcome()
        assert isinstance(outcome, asyncio.CancelledError) if cancelled else outcome is None
        if await stored(web, f"t{turns}") == "SUCCESS":
            assert await read(web.stream(f"t{turns}")) == [1]
        else:
            assert turns < 3  # in the body
        assert not worker._running._runs


@pytest.mark.parametrize("primitive", ["_run_steps", "_chord_steps"])
async def test_refusing_is_seen_through_although_it_is_cancelled(live: Harness, primitive: str) -> None:
    """A run that was stopped before its body began is ended, and its part counted."""
    worker, web = live.make(), await live.connect()
    gate = Gate(worker, primitive)
    gate.open.set()
    await live.open(worker)
    await listening(worker)
    await worker.create_chord("g", {}, 1)
    gate.open.clear()
    gate.reached.clear()
    body = Body(worker, request=TaskRequest(id="t", group="g", chord={"task": "body"}, group_index=0))
    if primitive == "_run_steps":
        body.run._stopped = True  # as heard in the very turn in which the run began
    else:
        await web.revoke("t")
    await gate.reached.wait()
    if primitive == "_run_steps":
        gate.reached.clear()
        gate.open.set()
        await until(lambda: gate.reached.is_set())
        gate.open.clear()
        await asyncio.sleep(0)
    body.task.cancel()
    await asyncio.sleep(0)
    gate.open.set()
    await body.outcome()
    if primitive == "_run_steps":
        await until(lambda: not worker._running._runs)
    assert await stored(web) == "REVOKED"
    assert (await web.chord("g").progress())[0] == 1


# -- what a task tells of itself --------------------------------------------------------------------------------------


async def test_states_in_order_and_each_once(live: Harness) -> None:
    worker, web = await live.pair()
    seen: list[tuple[str, Any]] = []
    news = asyncio.Event()

    async def follow() -> None:
        async for meta in web.updates("t"):
            seen.append((meta.status, meta.result if meta.status in ("PROGRESS", "SUCCESS", "HALF") else None))
            news.set()

    async def seen_so_far(state: str) -> None:
        await until(lambda: seen[-1:] != [] and seen[-1][0] == state)
        web._listener_lost(ConnectionError("cut by the test"))  # what is read again is no news
        await asyncio.sleep(0.005)

    follower = asyncio.create_task(follow())
    await seen_so_far("PENDING")
    body = await Body(worker).begun()
    await seen_so_far("STARTED")
    body.run.progress(1, 2, "half", more=True)
    await seen_so_far("PROGRESS")
    body.end.set_exception(Retry())
    await body.outcome()
    await seen_so_far("RETRY")
    await worker.store_result("t", {"x": 1}, "HALF")  # as Celery's update_state
    await seen_so_far("HALF")
    await worker.run("t", lambda: 5)
    await follower
    told = {"current": 1, "total": 2, "message": "half", "more": True}
    assert [entry for entry in seen if entry != ("STARTED", None)] == [
        ("PENDING", None),
        ("PROGRESS", told),
        ("RETRY", None),
        ("HALF", {"x": 1}),
        ("SUCCESS", 5),
    ]
    assert [meta.status async for meta in web.updates("t")] == ["SUCCESS"]
    with pytest.raises(UsageError, match="on_lost"):
        web.updates("t", "x")


async def test_a_slow_reader_gets_the_newest_state(live: Harness) -> None:
    worker, web = await live.pair()
    updates = web.updates("t", on_lost="wait")
    assert (await anext(updates)).status == "PENDING"
    step = asyncio.ensure_future(anext(updates))
    await live.subscribed(1)
    await worker.store_result("t", 0, "PROGRESS")
    assert (await step).result == 0
    for number in range(1, 20):
        await worker.store_result("t", number, "PROGRESS")
    await until(lambda: isinstance(updates._newest.news, TaskMeta) and updates._newest.news.result == 19)
    assert (await anext(updates)).result == 19
    await worker.mark_as_failure("t", KeyError("x"))
    last = await anext(updates)
    assert (last.status, type(last.result)) == ("FAILURE", KeyError)
    assert [meta async for meta in updates] == []
    await live.subscribed(0)


async def test_progress_is_conflated(live: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last of a burst are stored, whatever lies between; what is late is dropped."""
    monkeypatch.setattr("aioresult.running.PROGRESS_INTERVAL", 0.02)
    worker, web = live.make(), await live.connect()
    stores: list[Any] = []

    async def count(original: Primitive, steps: Any) -> Any:
        stores.extend(step.state for step in steps if step.state == "PROGRESS")
        return await original(steps)

    intercept(worker, "_run_steps", count)
    await live.open(worker)
    async with worker.running("t") as task:
        for number in range(10_000):
            task.progress(number)
        await until(lambda: len(stores) == 2)
        await until(lambda: task._storing is None)
        assert (await web.get_task_meta("t")).result == {"current": 9_999}
        with pytest.raises(EncodeError):
            async with worker.running("u") as other:
                other.progress(1, more=object())
        for number in range(10):
            task.progress(number)
    await asyncio.sleep(0.04)
    assert len(stores) <= 4
    assert await stored(web) == "SUCCESS"


async def test_progress_that_cannot_be_stored_is_logged(live: Harness, caplog: pytest.LogCaptureFixture) -> None:
    worker = live.make()

    async def refuse(original: Primitive, steps: Any) -> Any:
        if any(step.state == "PROGRESS" for step in steps):
            raise BackendStoreError("refused by the test")
        return await original(steps)

    intercept(worker, "_run_steps", refuse)
    await live.open(worker)
    async with worker.running("t") as task:
        task.progress(1)
        await until(lambda: task._storing is None)
    assert "refused by the test" in caplog.text


async def test_closing_the_backend_under_a_run(live: Harness) -> None:
    worker, web = live.make(), await live.connect()
    await worker.open()
    body = await Body(worker).begun()
    body.run.progress(1)
    await body.run.output.send(1)
    await worker.aclose()
    body.end.set_result(1)
    assert isinstance(await body.outcome(), BackendClosedError)
    assert await stored(web) in ("STARTED", "PROGRESS")


async def test_nothing_is_left_of_a_run(live: Harness) -> None:
    worker, web = await live.pair()
    for ending in (KeyError(), Retry(), asyncio.CancelledError(), 1):
        body = await Body(worker).begun()
        body.run.progress(1)
        await body.run.output.send(1)
        if isinstance(ending, BaseException):
            body.end.set_exception(ending)
        else:
            body.end.set_result(ending)
        await body.outcome()
        assert body.run._output is not None
        for timer in (body.run._progress_timer, body.run._renewal, body.run._output._renewal):
            assert timer is None or timer.cancelled()
    assert not worker._running._runs
    await live.subscribed(1)  # the worker's own topic
    await worker.aclose()
    await live.subscribed(0)
    assert await web.exists("t")
