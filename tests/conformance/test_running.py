"""A task that a worker runs: what is stored when it begins, tells of itself, is stopped, and ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from aioresult import (
    Backend,
    OutputRestarted,
    OutputSuperseded,
    RemoteError,
    Retry,
    Running,
    TaskMeta,
    TaskRequest,
    TaskRevokedError,
    UsageError,
    current_task,
)
from aioresult.exceptions import BackendStoreError, EncodeError
from aioresult.log import START, PageRequest

from ..harness import Harness, intercept, topics_of, until
from .test_streams import put, read, reading, waiting

Primitive = Callable[..., Awaitable[Any]]


async def listening(worker: Backend) -> None:
    """The worker hears what is to be stopped."""
    async with worker.running("first"):
        topic = "\x00worker " + worker.liveness.worker
        await until(lambda: topics_of(worker)[topic].known is not None)


class Body:
    """A task under way, in a task of asyncio's own, until it is told how to end."""

    def __init__(self, worker: Backend, task_id: str = "t", request: Any = None, **terms: Any) -> None:
        self.began, self.end = asyncio.Event(), asyncio.get_running_loop().create_future()
        self.cleanup: Callable[[], Awaitable[None]] | None = None
        self.run = worker.running(task_id, request, **terms)
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> str:
        async with self.run as task:
            self.began.set()
            try:
                task.value = await self.end
            finally:
                if self.cleanup is not None:
                    await self.cleanup()
        return "left"

    async def begun(self) -> Body:
        await self.began.wait()
        return self

    async def outcome(self) -> BaseException | None:
        await asyncio.wait([self.task])
        return asyncio.CancelledError() if self.task.cancelled() else self.task.exception()


async def stored(web: Backend, task_id: str = "t") -> str:
    return (await web.get_task_meta(task_id)).status


async def states(web: Backend, task_id: str = "t", **terms: Any) -> list[TaskMeta]:
    return [meta async for meta in web.updates(task_id, **terms)]


# -- leaving ----------------------------------------------------------------------------------------------------------


async def test_the_body_returns(live: Harness) -> None:
    worker, web = await live.pair()
    async with worker.running("t") as task:
        assert await stored(web) == "STARTED"
        assert set((await web.get_task_meta("t")).result) == {"pid", "hostname"}
        task.value = 5
    assert await web.result("t") == 5
    assert await worker.run("u", lambda x, y: x + y, 1, y=2) == 3
    assert await web.result("u") == 3
    async with worker.running("v", track=False):
        assert await stored(web, "v") == "PENDING"


async def test_the_body_raises(live: Harness) -> None:
    worker, web = await live.pair()
    body = await Body(worker).begun()
    body.end.set_exception(KeyError("x"))
    assert isinstance(await body.outcome(), KeyError)
    meta = await web.get_task_meta("t")
    assert meta.status == "FAILURE"
    assert "in _run" in (meta.traceback or "")
    with pytest.raises(KeyError):
        await web.result("t")


async def test_the_body_asks_for_a_retry(live: Harness) -> None:
    worker, web = await live.pair()
    reader = reading(web, on_restart="continue")
    for number, ending in enumerate([Retry("later"), Retry(exc=OSError("away")), None]):
        body = await Body(worker).begun()
        await put(body.run.output, number)
        await waiting(web)
        if ending is None:
            body.end.set_result(1)
            assert await body.outcome() is None
            continue
        body.end.set_exception(ending)
        assert await body.outcome() is ending
        meta = await web.get_task_meta("t")
        assert meta.status == "RETRY"
        assert type(meta.result).__name__ == type(ending.exc or ending).__name__
        assert not (await web.read_output("t")).ended
    assert await reader == [0, 1, 2]


async def test_a_shutdown_leaves_the_task_to_its_next_attempt(live: Harness) -> None:
    worker, web = await live.pair()
    body = await Body(worker).begun()
    await body.run.output.send("old")
    reader = reading(web)
    updates = asyncio.create_task(states(web))
    await waiting(web)
    body.task.cancel()
    assert isinstance(await body.outcome(), asyncio.CancelledError)
    assert await stored(web) == "STARTED"
    page = await web.read_output("t")
    assert page.chunks == ["old"]
    assert not page.ended
    body = await Body(worker).begun()
    await body.run.output.send("new")
    body.end.set_result(1)
    await body.outcome()
    with pytest.raises(OutputRestarted) as caught:
        await reader
    assert await read(web.stream("t", caught.value.cursor)) == ["new"]
    assert (await updates)[-1].status == "SUCCESS"


async def test_an_end_that_cannot_be_stored_is_a_failure(live: Harness) -> None:
    worker, web = await live.pair()
    body = await Body(worker).begun()
    await body.run.output.send(1)
    body.end.set_result(object())
    assert isinstance(await body.outcome(), EncodeError)
    assert await stored(web) == "FAILURE"
    stream = web.stream("t")
    assert await anext(stream) == 1
    with pytest.raises(RemoteError, match="cannot be stored"):
        await anext(stream)


async def test_what_the_worker_need_not_keep(live: Harness) -> None:
    worker, web = await live.pair()
    request = SimpleNamespace(ignore_result=True)
    updates = asyncio.create_task(states(web))
    async with worker.running("t", request) as task:
        assert await stored(web) == "PENDING"  # as Celery does; nothing would ever follow
        await task.output.send(1)
    assert await stored(web) == "PENDING"
    assert await read(web.stream("t")) == [1]
    updates.cancel()
    await asyncio.wait([updates])


async def test_if_done(live: Harness) -> None:
    worker, web = await live.pair()
    calls: list[int] = []

    def count() -> int:
        calls.append(1)
        return len(calls)

    assert await worker.run("t", count) == 1
    assert await worker.run("t", count, if_done="skip") == 1
    assert await worker.run("t", count) == 2
    assert await web.result("t") == 1  # the first success stays
    await worker.mark_as_failure("u", ValueError())
    assert await worker.run("u", lambda: 7, if_done="skip") == 7
    with pytest.raises(UsageError, match="if_done"):
        await worker.run("t", lambda: 1, if_done="x")  # type: ignore[arg-type]


async def test_outside_of_its_body_a_run_is_of_no_use(live: Harness) -> None:
    worker, web = await live.pair()
    run = worker.running("t")
    with pytest.raises(UsageError, match="not running"):
        run.progress(1)
    with pytest.raises(UsageError, match="not running"):
        run.output  # noqa: B018
    async with run as task:
        output = task.output
        await output.send(1)
    for late in (lambda: run.progress(1), lambda: output.send_nowait(2), run.output.cursor.__len__):
        with suppress(UsageError):
            late()
    with pytest.raises(UsageError, match="closed"):
        await output.send(2)
    with pytest.raises(UsageError, match="once"):
        await run.__aenter__()
    run.stop()
    assert await read(web.stream("t")) == [1]
    assert await stored(web) == "SUCCESS"


async def test_the_task_that_runs_here(live: Harness) -> None:
    worker = await live.connect()
    assert current_task() is None
    async with worker.running("outer") as outer:
        assert current_task() is outer
        async with worker.running("inner") as inner:
            assert current_task() is inner
            assert await asyncio.create_task(_current()) is inner
        assert current_task() is outer
        with suppress(KeyError):
            await worker.run("other", _raise, KeyError())
        assert current_task() is outer
    assert current_task() is None


async def _current() -> Running | None:
    return current_task()


async def _raise(error: Exception) -> None:
    raise error


# -- the output of a run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [1, KeyError(), Retry(), asyncio.CancelledError()], ids=repr)
async def test_the_end_stands_in_the_log_too(live: Harness, ending: Any) -> None:
    """The end is in the log, for readers that read nothing else."""
    worker, web = await live.pair()
    body = await Body(worker).begun()
    await put(body.run.output, 1, 2)
    if isinstance(ending, BaseException):
        body.end.set_exception(ending)
    else:
        body.end.set_result(ending)
    await body.outcome()
    (page,) = await web._pages([PageRequest("t", START, 10)])
    assert not isinstance(page, BaseException)
    last = page.entries[-1]
    expected = {int: (3, "SUCCESS"), KeyError: (3, "FAILURE")}.get(type(ending), (2, ""))
    assert (last.last, last.state) == expected


async def test_a_flush_that_fails_is_tried_again_on_leaving(live: Harness) -> None:
    worker, web = live.make(), await live.connect()
    fails = [True]

    async def fail_once(original: Primitive, *args: Any) -> Any:
        if fails:
            fails.pop()
            raise BackendStoreError("refused by the test")
        return await original(*args)

    intercept(worker, "_append", fail_once)
    await live.open(worker)
    async with worker.running("t") as task:
        await task.output.send(1)
        await until(lambda: task.output._stalled)
    assert await read(web.stream("t")) == [1]


async def test_an_output_that_cannot_be_flushed_is_told(live: Harness) -> None:
    worker, web = live.make(), await live.connect()
    fails = [False]

    async def fail(original: Primitive, *args: Any) -> Any:
        if fails[0]:
            raise BackendStoreError("refused by the test")
        return await original(*args)

    intercept(worker, "_append", fail)
    await live.open(worker)
    body = await Body(worker).begun()
    await put(body.run.output, 1)
    fails[0] = True
    await body.run.output.send(2)
    body.end.set_result(1)
    assert isinstance(await body.outcome(), BackendStoreError)
    assert await stored(web) == "SUCCESS"
    stream = web.stream("t")
    assert await anext(stream) == 1
    with pytest.raises(Exception, match="1 chunks are gone"):
        await anext(stream)


async def test_what_is_sent_while_the_run_is_left(live: Harness) -> None:
    """All that was taken stands in front of the end; the rest is refused."""
    worker, web = await live.pair()
    sent: list[int] = []

    async def produce(run: Running) -> None:
        output = run.output
        with suppress(UsageError):
            while True:
                await output.send(len(sent))
                sent.append(len(sent))
                await asyncio.sleep(0)

    async with worker.running("t") as task:
        await task.output.send(-1)
        producer = asyncio.create_task(produce(task))
        await asyncio.sleep(0)
    await producer
    assert await read(web.stream("t")) == [-1, *sent]


async def test_two_attempts_at_once(live: Harness) -> None:
    """The run that started last decides; of the older one only a success counts."""
    worker, web = await live.pair()
    old = await Body(worker).begun()
    await put(old.run.output, "old")
    new = await Body(worker).begun()
    await put(new.run.output, "new")
    with pytest.raises(OutputSuperseded):
        await put(old.run.output, "older")
    old.end.set_exception(KeyError())
    assert isinstance(await old.outcome(), KeyError)
    assert await stored(web) == "STARTED"
    new.run.progress(1)
    await until(lambda: new.run._storing is None)
    assert await stored(web) == "PROGRESS"
    third = await Body(worker).begun()
    new.run.progress(2)
    new.end.set_result("success of an older one")
    assert await new.outcome() is None
    assert await web.result("t") == "success of an older one"
    third.end.set_exception(KeyError())
    await third.outcome()
    assert await web.result("t") == "success of an older one"


async def test_an_older_attempt_opens_no_output(live: Harness) -> None:
    worker = await live.connect()
    old = await Body(worker).begun()
    new = await Body(worker).begun()
    with pytest.raises(OutputSuperseded):
        await put(old.run.output, "too late")
    for body in (old, new):
        body.end.set_result(1)
        assert await body.outcome() is None


# -- requests ---------------------------------------------------------------------------------------------------------


async def test_a_part_of_a_chord_is_counted_however_it_ends(live: Harness) -> None:
    worker, web = await live.pair()
    endings: dict[str, Any] = {"done": 1, "failed": KeyError("x"), "revoked": None, "refused": None}
    for name, ending in endings.items():
        group = f"g-{name}"
        request = TaskRequest(id=name, group=group, chord={"task": "body"}, group_index=0)
        await worker.create_chord(group, {"task": "body"}, 1)
        if name == "refused":
            await web.revoke(name)
            with pytest.raises(TaskRevokedError):
                await worker.running(name, request).__aenter__()
        else:
            body = await Body(worker, name, request).begun()
            if name == "revoked":
                await listening(worker)
                assert await web.revoke(name)
            elif isinstance(ending, Exception):
                body.end.set_exception(ending)
            else:
                body.end.set_result(ending)
            await body.outcome()
        state = await web.chord(group).progress()
        assert state[0] == 1, name
    assert (
        await worker.run("done", lambda: 1, request=TaskRequest(id="done", group="g-done", chord=True), if_done="skip")
        == 1
    )


async def test_what_comes_after_a_failed_task_in_a_chain_fails_with_it(live: Harness) -> None:
    worker, web = await live.pair()
    body = await Body(
        worker, request=TaskRequest(id="t", chain=[{"task": "next", "options": {"task_id": "after"}}])
    ).begun()
    body.end.set_exception(KeyError("x"))
    await body.outcome()
    assert await stored(web, "after") == "FAILURE"
    body = await Body(
        worker, "u", TaskRequest(id="u", chain=[{"task": "next", "options": {"task_id": "later"}}])
    ).begun()
    body.end.set_exception(Retry())
    await body.outcome()
    assert await stored(web, "later") == "PENDING"


async def test_the_success_of_an_older_attempt_ends_what_the_newer_one_writes(live: Harness) -> None:
    """Its readers are told that what they have read is void, and its writer to stop."""
    older, newer = await live.pair()
    first, second = await Body(older).begun(), await Body(newer).begun()
    await put(second.run.output, 1, 2)
    stream = newer.stream("t")
    assert [await anext(stream), await anext(stream)] == [1, 2]
    first.end.set_result("done")
    assert await first.outcome() is None
    with pytest.raises(OutputRestarted) as restarted:
        await anext(stream)
    assert await read(newer.stream("t", restarted.value.cursor)) == []
    with pytest.raises(OutputSuperseded):
        await put(second.run.output, 3)
    second.end.set_result("late")
    assert await second.outcome() is None
    assert await newer.result("t") == "done"


async def test_a_task_that_has_succeeded_and_runs_again_writes_no_output(live: Harness) -> None:
    """The output stays with the success that it belongs to; what comes after the task has not failed with the rerun."""
    worker, web = await live.pair()
    body = await Body(worker).begun()
    await put(body.run.output, 1)
    body.end.set_result("done")
    assert await body.outcome() is None
    request = TaskRequest(id="t", chain=[{"options": {"task_id": "next"}}])
    with pytest.raises(OutputSuperseded, match="has succeeded before"):
        async with worker.running("t", request) as task:
            await task.output.send(2)
    assert await read(web.stream("t")) == [1]
    assert await web.result("t") == "done"
    assert not await web.exists("next")
    await web.forget("t")
    async with worker.running("t") as task:
        await task.output.send(3)
    assert await read(web.stream("t")) == [3]


@pytest.mark.parametrize("writes", [True, False], ids=["with an output of its own", "without"])
async def test_an_attempt_that_comes_after_a_failure_was_read(live: Harness, writes: bool) -> None:
    """The mark of the first attempt was read, and the result is the second one's."""
    worker, web = await live.pair()
    body = await Body(worker).begun()
    await put(body.run.output, 1)
    body.end.set_exception(KeyError())
    assert isinstance(await body.outcome(), KeyError)
    stream = web.stream("t")
    assert await anext(stream) == 1  # and the mark came on the same page
    async with worker.running("t") as task:
        if writes:
            await task.output.send(2)
        task.value = "done"
    if not writes:
        assert await read(stream) == []
        return
    with pytest.raises(OutputRestarted) as restarted:
        await anext(stream)
    assert await read(web.stream("t", restarted.value.cursor)) == [2]


async def fail_with_metadata() -> None:
    task = current_task()
    assert task is not None
    task.meta = {"tries": 1}
    raise KeyError("u")


async def test_metadata_is_stored_with_the_end(live: Harness) -> None:
    web, worker = await live.connect(), await live.connect()
    async with worker.running("t") as task:
        with pytest.raises(EncodeError):
            task.meta = {"an": object()}
        assert task.meta is None
        given = {"seconds": [0.5]}
        task.meta = given
        given["seconds"].append(1.0)
        task.value = 1
    meta = await web.get_task_meta("t")
    assert (meta.result, meta.meta) == (1, {"seconds": [0.5]})
    with pytest.raises(KeyError):
        await worker.run("u", fail_with_metadata)
    assert (await web.get_task_meta("u")).meta == {"tries": 1}
