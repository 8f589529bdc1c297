"""A life from open to close under hard conditions: forks, shutdown handlers, event loops that end, odd timeouts."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import subprocess
import sys
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextvars import ContextVar, copy_context
from datetime import timedelta
from functools import wraps
from math import inf, nan
from pathlib import Path
from typing import Any, ParamSpec, cast
from uuid import uuid4

import asyncpg
import pytest
import redis

import aioresult
from aioresult import (
    AioResultError,
    Backend,
    BackendClosedError,
    BackendConnectionError,
    ReadyChord,
    TaskMeta,
    UsageError,
    WrongEventLoopError,
)
from aioresult.backends.redis import RedisBackend
from aioresult.chord import ChordOp, ChordStep

from .conformance.test_waiting import Recorder
from .harness import Gate, Harness, connections_of, intercept, servers_of, subscribed, topics_of, until
from .postgres_harness import PostgresHarness

P = ParamSpec("P")
Primitive = Callable[..., Awaitable[Any]]
Call = Callable[[Backend], Awaitable[Any]]

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=["memory", "redis", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    """Of an empty store."""
    return "memory://" if request.param == "memory" else str(request.getfixturevalue(f"{request.param}_url"))


def disconnect_everyone(url: str) -> None:
    """Have the servers close every connection that anybody has to them, except other servers."""
    if url.startswith("redis"):
        for server in servers_of(url):
            with redis.Redis.from_url(server, single_connection_client=True) as client:
                for each in client.client_list():
                    of_a_server = each["flags"] not in "NP" or each["name"].startswith("sentinel")
                    if not of_a_server and int(each["id"]) != client.client_id():
                        client.client_kill_filter(_id=each["id"])
    elif url.startswith("postgres"):
        asyncio.run(_terminate(url))


async def _terminate(url: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
    finally:
        await connection.close()


async def check_works(backend: Backend, worker: Backend | None = None, name: str = "works") -> None:
    """Store, read, wait, join, count a chord and forget, all of which need a task of the backend's own."""
    worker = worker or backend
    ids = [f"{name}-{number}" for number in range(3)]
    waiting = asyncio.create_task(backend.wait_for(ids[0]))
    joining = asyncio.create_task(backend.group(ids).get())
    await subscribed(backend)
    assert all([await worker.mark_as_done(task_id, task_id) for task_id in ids])
    assert (await waiting).result == ids[0]
    assert await joining == ids
    assert [meta.result for meta in await backend.get_many(ids)] == ids
    await backend.save_group(name, backend.group(ids, name))
    assert await backend.restore_group(name) == backend.group(ids, name)
    await backend.create_chord(f"{name}-chord", size=1)
    ready = await backend.on_chord_part_return(f"{name}-chord", "t", "SUCCESS", 1)
    assert ready is not None
    async with ready:
        assert ready.results == [1]
    await backend.forget_many(ids)
    assert not await backend.exists(ids[0])


def bounded(test: Callable[P, Awaitable[None]]) -> Callable[P, Awaitable[None]]:
    """A test of what may hang: it fails, and its fixtures are torn down."""

    @wraps(test)
    async def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async with asyncio.timeout(15):
            await test(*args, **kwargs)

    return run


def is_open(backend: Backend) -> bool:
    """The property, which a type checker takes for one that never changes."""
    return backend.is_open


# -- open or not ----------------------------------------------------------------------------------------------------


async def test_is_open_says_so_in_every_state(harness: Harness) -> None:
    backend = harness.make()
    gates = Gate(backend, "_open"), Gate(backend, "_close")
    assert not is_open(backend)
    for _ in range(2):
        for gate in gates:
            gate.reached.clear()
            gate.open.clear()
        opening = asyncio.create_task(backend.open())
        await gates[0].reached.wait()
        assert not is_open(backend)
        gates[0].open.set()
        await opening
        assert is_open(backend)
        closing = asyncio.create_task(backend.aclose())
        await gates[1].reached.wait()
        assert not is_open(backend)
        gates[1].open.set()
        await closing
        assert not is_open(backend)


async def test_a_backend_that_could_not_be_opened_is_not_open(harness: Harness) -> None:
    backend = harness.make()

    async def fail(original: Primitive) -> None:
        if fails:
            raise BackendConnectionError("away")
        await original()

    fails = True
    intercept(backend, "_open", fail)
    with pytest.raises(BackendConnectionError, match="away"):
        await backend.open()
    assert not is_open(backend)
    fails = False
    async with backend:
        assert is_open(backend)
        await check_works(backend)


async def test_closing_during_open_ends_with_a_closed_backend(harness: Harness) -> None:
    backend = harness.make()
    gate = Gate(backend, "_open")
    opening = asyncio.create_task(backend.open())
    await gate.reached.wait()
    await asyncio.gather(backend.aclose(), backend.aclose())
    assert not is_open(backend)
    with pytest.raises(BackendClosedError, match="was closed"):
        await opening
    with pytest.raises(BackendClosedError):
        await backend.exists("t")
    gate.open.set()
    async with backend:
        await check_works(backend)


async def test_closing_during_open_is_possible_at_any_turn_of_the_loop(harness: Harness) -> None:
    for turns in range(1, 40):
        backend = harness.make()
        opening = asyncio.create_task(backend.open())
        for _ in range(turns):
            await asyncio.sleep(0)
        await backend.aclose()
        assert not is_open(backend)
        (outcome,) = await asyncio.gather(opening, return_exceptions=True)
        assert outcome is backend or isinstance(outcome, BackendClosedError)
        assert not is_open(backend)


async def test_another_event_loop_cannot_close_what_is_being_opened(harness: Harness) -> None:
    backend = harness.make()
    gate = Gate(backend, "_open")
    opening = asyncio.create_task(backend.open())
    await gate.reached.wait()
    with pytest.raises(WrongEventLoopError):
        await asyncio.to_thread(lambda: asyncio.run(backend.aclose()))
    gate.open.set()
    assert await opening is backend
    await backend.aclose()


@pytest.mark.parametrize("url", ["memory://", "redis://localhost", "postgresql://localhost/db"])
def test_without_an_event_loop_of_asyncio_opening_says_what_is_missing(url: str) -> None:
    """As under trio: something else drives the coroutine."""
    backend = aioresult.connect(url)
    for opening in (backend.open(), backend.__aenter__()):
        with pytest.raises(UsageError, match="asyncio"):
            opening.send(None)
    assert not is_open(backend)


# -- timeouts -------------------------------------------------------------------------------------------------------


async def as_completed(backend: Backend, timeout: Any) -> list[Any]:
    return [await each async for each in aioresult.as_completed([backend.result("t")], timeout)]


#: Every call that takes a timeout.
TIMED: dict[str, Callable[[Backend, Any], Awaitable[Any]]] = {
    "wait_for": lambda backend, timeout: backend.wait_for("t", timeout),
    "await result": lambda backend, timeout: backend.result("t").get(timeout),
    "await child": lambda backend, timeout: backend.result("t", backend.result("p")).get(timeout),
    "await group": lambda backend, timeout: backend.group(["t"]).get(timeout),
    "await large group": lambda backend, timeout: backend.group(["t", *many()]).get(timeout),
    "join": lambda backend, timeout: backend.group(["t"]).join(timeout),
    "as_completed": as_completed,
    "await chord": lambda backend, timeout: backend.chord("c").get(timeout),
    "get_leaf": lambda backend, timeout: backend.result("t").get_leaf(timeout),
}


def many() -> list[str]:
    return [f"m{number}" for number in range(150)]


async def store_all(backend: Backend) -> None:
    await asyncio.gather(*(backend.mark_as_done(task_id, 1) for task_id in ["p", "t", *many()]))
    await backend.create_chord("c", size=1)
    await backend.on_chord_part_return("c", "t", "SUCCESS", 1, lease=0)


async def timed_wait(backend: Backend, timeout: Any) -> Any:
    return await aioresult.wait([backend.result("t")], timeout)


@pytest.mark.parametrize("timeout", [nan, "5", b"5", True, [5]], ids=repr)
@pytest.mark.parametrize("call", sorted({*TIMED, "wait"} - {"get_leaf"}))
async def test_what_is_no_timeout_is_refused_by_name(call: str, timeout: Any) -> None:
    async with aioresult.connect("memory://") as backend, asyncio.timeout(15):
        for _ in range(2):
            with pytest.raises(UsageError, match="timeout must be a number of seconds"):
                await {**TIMED, "wait": timed_wait}[call](backend, timeout)
            assert len(topics_of(backend)) == 0
            await store_all(backend)


TINY = [1e-9, 1e-4, timedelta(microseconds=1), 0, timedelta(0), -1, timedelta(days=-1)]


@pytest.mark.parametrize("call", TIMED)
async def test_a_result_that_is_there_beats_any_deadline(harness: Harness, call: str) -> None:
    worker, reader = await harness.pair()
    await store_all(worker)
    for timeout in TINY:
        outcome = await TIMED[call](reader, timeout)
        assert (outcome.result if isinstance(outcome, TaskMeta) else outcome) in (1, [1], [1] * 151)
    await harness.subscribed(0)


@pytest.mark.parametrize("call", sorted({*TIMED} - {"get_leaf"}))
async def test_a_deadline_beats_a_result_that_is_not_there(harness: Harness, call: str) -> None:
    backend = await harness.connect()
    for timeout in TINY:
        with pytest.raises(aioresult.TimeoutError, match="was not ready within timeout="):
            await TIMED[call](backend, timeout)
    await harness.subscribed(0)


async def test_of_many_results_those_that_are_there_beat_a_tiny_timeout(harness: Harness) -> None:
    worker, reader = await harness.pair()
    await store_all(worker)
    handles = [reader.result(task_id) for task_id in ("t", *many(), "missing")]
    done, pending = await aioresult.wait(handles, timeout=1e-9)
    assert done == set(handles[:-1])
    assert pending == {handles[-1]}


@pytest.mark.parametrize("timeout", [timedelta(minutes=1), timedelta(days=1), 60, inf, None])
@pytest.mark.parametrize("call", sorted({*TIMED} - {"get_leaf"}))
async def test_a_long_timeout_waits(call: str, timeout: Any) -> None:
    async with aioresult.connect("memory://") as backend, asyncio.timeout(30):
        waiting = asyncio.ensure_future(TIMED[call](backend, timeout))
        await until(lambda: len(topics_of(backend)) > 0)
        await subscribed(backend)
        assert not waiting.done()
        await store_all(backend)
        await waiting


# -- forks ----------------------------------------------------------------------------------------------------------


def fork(what: str, url: str) -> dict[str, Any]:
    """What `tests.fork_child` reports; the process must have had nothing to say besides."""
    command = [sys.executable, "-W", "error::ResourceWarning", "-m", "tests.fork_child", what, url]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert process.returncode == 0, process.stderr
    report: dict[str, Any] = json.loads(process.stdout)
    assert not any("failed" in child for child in report["children"]), report["children"]
    return report


def check_parent_noticed_nothing(report: dict[str, Any]) -> None:
    assert report["wrong"] == []
    assert report["kept"] is True
    assert report["left"] == []
    assert report["told"] == 1


def check_refused(report: dict[str, Any]) -> None:
    children = [child for child in report["children"] if "raised" in child]
    assert len(children) == 5
    for child in children:
        assert len(child["raised"]) > 30
        for name, raised in child["raised"].items():
            assert raised.startswith("WrongEventLoopError"), name
            assert f"was opened in another process, {child['parent']}" in raised
        assert child["reached"] is False
        assert child["is_open"] is False


def check_closed(report: dict[str, Any]) -> None:
    children = [child for child in report["children"] if "was_open" in child]
    assert children == [{"was_open": False, "is_open": False}] * 5


def check_opened(report: dict[str, Any]) -> None:
    children = [child for child in report["children"] if "told" in child]
    assert children == [{"is_open": True, "stored": True, "told": True, "is_open_after": False}] * 5


def test_a_forked_child_is_refused_every_call_before_anything_is_written(url: str) -> None:
    report = fork("refused", url)
    check_refused(report)
    check_parent_noticed_nothing(report)


def test_a_forked_child_closes_the_backend_for_itself_alone(url: str) -> None:
    report = fork("closed", url)
    check_closed(report)
    check_parent_noticed_nothing(report)


def test_a_forked_child_opens_the_backend_for_itself(url: str) -> None:
    report = fork("opened", url)
    check_opened(report)
    check_parent_noticed_nothing(report)


def test_the_same_in_the_processes_of_a_pool(url: str) -> None:
    report = fork("pool", url)
    check_refused(report)
    check_closed(report)
    check_opened(report)
    check_parent_noticed_nothing(report)


# -- somebody cancels every task of the loop ------------------------------------------------------------------------


def cancel_all(*spared: asyncio.Future[Any]) -> None:
    """As many shutdown handlers do; ``spared`` are the test's own."""
    for task in asyncio.all_tasks():
        if task is not asyncio.current_task() and task not in spared:
            task.cancel()


@bounded
async def test_everything_works_after_all_tasks_of_an_idle_backend_were_cancelled(harness: Harness) -> None:
    worker, reader = await harness.pair()
    for attempt in range(3):
        cancel_all()
        await check_works(reader, worker, f"first-{attempt}")
        cancel_all()
        for _ in range(5):  # until the tasks have ended
            await asyncio.sleep(0)
        await check_works(reader, worker, f"second-{attempt}")


@pytest.mark.parametrize("times", [1, 3])
@bounded
async def test_waiters_are_served_though_all_other_tasks_were_cancelled(harness: Harness, times: int) -> None:
    worker, reader = await harness.pair()
    recorder = Recorder()
    reader.watch("a", recorder)
    waiting: list[asyncio.Task[Any]] = [asyncio.create_task(reader.wait_for(task_id)) for task_id in "ab"]
    waiting.append(asyncio.create_task(reader.group(["a", "b", "c"]).get()))
    await harness.subscribed(3)
    for _ in range(times):
        cancel_all(*waiting)
        await asyncio.sleep(0)
    for task_id in "abc":
        await worker.mark_as_done(task_id, task_id)
    assert [(await each).result for each in waiting[:2]] == ["a", "b"]
    assert await waiting[2] == ["a", "b", "c"]
    assert await recorder.heard() == "SUCCESS"
    await check_works(reader, worker)
    await harness.subscribed(0)


@bounded
async def test_cancelling_the_waiters_with_everything_else_leaves_no_subscription(harness: Harness) -> None:
    worker, reader = await harness.pair()
    waiting = [asyncio.create_task(reader.wait_for(f"t{number}")) for number in range(20)]
    await harness.subscribed(20)
    cancel_all()
    await asyncio.wait(waiting)
    assert all(each.cancelled() for each in waiting)
    await harness.subscribed(0)
    await check_works(reader, worker)


@pytest.mark.parametrize("primitive", ["_fetch", "_subscribe", "_unsubscribe"])
@bounded
async def test_waiters_are_served_though_the_hub_was_cancelled_at_work(harness: Harness, primitive: str) -> None:
    worker, reader = await harness.connect(), harness.make()
    gate = Gate(reader, primitive)
    await harness.open(reader)
    recorder = Recorder()
    if primitive == "_unsubscribe":
        reader.watch("other", recorder)
        await harness.subscribed(1)
        reader.unwatch("other", recorder)
    waiting = asyncio.create_task(reader.wait_for("t"))
    await gate.reached.wait()
    cancel_all(waiting)
    await asyncio.sleep(0)
    gate.open.set()
    await harness.subscribed(1)
    await worker.mark_as_done("t", 1)
    assert (await waiting).result == 1
    await harness.subscribed(0)
    await check_works(reader, worker)


#: Calls, with the primitive that they end in and what they come to.
IN_FLIGHT: dict[str, tuple[str, Call, Any]] = {
    "store_result": ("_store", lambda backend: backend.store_result("new", 1, "PROGRESS"), True),
    "get_task_meta": ("_fetch", lambda backend: backend.get_task_meta("none"), TaskMeta.pending("none")),
    "get_many": ("_fetch", lambda backend: backend.get_many(["none"]), [TaskMeta.pending("none")]),
    "exists": ("_fetch", lambda backend: backend.exists("old"), True),
    "forget": ("_delete", lambda backend: backend.forget("old"), None),
    "save_group": ("_store_group", lambda backend: backend.save_group("g", backend.group(["t"])), None),
    "restore_group": ("_fetch_group", lambda backend: backend.restore_group("none"), None),
    "delete_group": ("_delete_group", lambda backend: backend.delete_group("g"), None),
    "chord.progress": ("_chord_steps", lambda backend: backend.chord("none").progress(), (0, None)),
    "active_chords": ("_active_chords", lambda backend: backend.active_chords(), []),
}


@pytest.mark.parametrize("call", IN_FLIGHT)
@bounded
async def test_a_call_in_flight_is_answered_though_all_other_tasks_were_cancelled(harness: Harness, call: str) -> None:
    primitive, begin, expected = IN_FLIGHT[call]
    backend = harness.make()
    gate = Gate(backend, primitive)
    await harness.open(backend)
    if primitive != "_store":
        await backend.mark_as_done("old", 0)
    calls = [asyncio.ensure_future(begin(backend)) for _ in range(3)]
    await gate.reached.wait()
    cancel_all(*calls)
    await asyncio.sleep(0)
    gate.open.set()
    assert await asyncio.gather(*calls) == [expected] * 3
    await check_works(backend)


@pytest.mark.parametrize("turns", range(0, 24, 3))
@bounded
async def test_calls_are_answered_at_whatever_turn_of_the_loop_the_others_are_cancelled(
    harness: Harness, turns: int
) -> None:
    worker, reader = await harness.pair()
    stores = [asyncio.create_task(worker.mark_as_done(f"t{number}", number)) for number in range(30)]
    waits = [asyncio.create_task(reader.wait_for(f"t{number}")) for number in range(30)]
    reads = [asyncio.create_task(reader.get_task_meta(f"t{number}")) for number in range(30)]
    for _ in range(turns):
        await asyncio.sleep(0)
    cancel_all(*stores, *waits, *reads)
    assert all(await asyncio.gather(*stores))
    assert [meta.result for meta in await asyncio.gather(*waits)] == list(range(30))
    assert {meta.status for meta in await asyncio.gather(*reads)} <= {"PENDING", "SUCCESS"}
    await check_works(reader, worker)


@bounded
async def test_a_join_that_looks_is_served_though_all_other_tasks_were_cancelled(harness: Harness) -> None:
    worker, reader = await harness.connect(), harness.make()
    gate = Gate(reader, "_fetch")
    await harness.open(reader)
    await worker.mark_as_done("t0", 0)
    joins = [asyncio.create_task(reader.group([f"t{number}" for number in range(300)]).get(t)) for t in (None, 60)]
    await gate.reached.wait()
    cancel_all(*joins)
    await asyncio.sleep(0)
    gate.open.set()
    await harness.subscribed(299)
    cancel_all(*joins)
    await asyncio.gather(*(worker.mark_as_done(f"t{number}", number) for number in range(1, 300)))
    assert await asyncio.gather(*joins) == [list(range(300))] * 2
    await harness.subscribed(0)


@bounded
async def test_a_claim_is_renewed_though_all_other_tasks_were_cancelled(harness: Harness) -> None:
    backend = harness.make(chord_lease=0.3)
    renewals = 0

    async def count(original: Primitive, steps: Sequence[ChordStep]) -> Any:
        nonlocal renewals
        renewals += sum(step.op is ChordOp.RENEW for step in steps)
        return await original(steps)

    intercept(backend, "_chord_steps", count)
    await harness.open(backend)
    await backend.create_chord("g", size=1)
    ready = await backend.on_chord_part_return("g", "t", "SUCCESS", 1)
    assert ready is not None
    async with ready:
        for _ in range(3):
            before = renewals
            cancel_all()
            await until(lambda: renewals > before)  # noqa: B023 - called in this very step
    assert await backend.chord("g").claim() is None


@bounded
async def test_a_dispatcher_goes_on_though_all_other_tasks_were_cancelled(harness: Harness) -> None:
    worker, dispatcher = await harness.pair()
    dispatched: asyncio.Queue[str] = asyncio.Queue()

    async def dispatch() -> None:
        async for ready in dispatcher.ready_chords():
            async with ready:
                cancel_all(mine)
            dispatched.put_nowait(ready.id)

    mine = cast("asyncio.Task[Any]", asyncio.current_task())
    dispatching = asyncio.create_task(dispatch())
    for group_id in "abc":
        await subscribed(dispatcher)
        cancel_all(dispatching)
        await worker.create_chord(group_id, size=0)
        assert await dispatched.get() == group_id
    dispatching.cancel()
    await asyncio.wait([dispatching])


@bounded
async def test_an_open_ends_well_though_all_other_tasks_were_cancelled(harness: Harness) -> None:
    """A cancellation that is not the caller's must not look like one to the caller."""
    backend = harness.make()
    gate = Gate(backend, "_open")
    opening = asyncio.create_task(backend.open())
    await gate.reached.wait()
    cancel_all(opening)
    await asyncio.sleep(0)
    gate.open.set()
    await asyncio.wait([opening])
    assert not opening.cancelled()
    assert opening.exception() is None or isinstance(opening.exception(), AioResultError)
    if not backend.is_open:
        await backend.open()
    await check_works(backend)
    await backend.aclose()


@pytest.mark.parametrize("turns", [0, 1, 2, 4])
@bounded
async def test_a_backend_closes_though_all_other_tasks_were_cancelled(harness: Harness, turns: int) -> None:
    backend, closed = harness.make(), 0

    async def close(original: Primitive) -> None:
        nonlocal closed
        await original()
        closed += 1

    intercept(backend, "_close", close)
    await backend.open()
    waiting = asyncio.create_task(backend.wait_for("t"))
    await subscribed(backend)
    closing = asyncio.create_task(backend.aclose())
    for _ in range(turns):
        await asyncio.sleep(0)
    cancel_all(closing, waiting)
    await asyncio.wait([closing, waiting])
    assert not closing.cancelled()
    assert closing.exception() is None
    assert closed == 1
    assert isinstance(waiting.exception(), BackendClosedError)
    await harness.subscribed(0)


@bounded
async def test_a_chord_is_finished_though_all_other_tasks_were_cancelled(harness: Harness) -> None:
    backend = harness.make()
    gate = Gate(backend, "_chord_steps")
    gate.open.set()
    await harness.open(backend)
    await backend.create_chord("g", size=1)
    ready = await backend.on_chord_part_return("g", "t", "SUCCESS", 1)
    assert ready is not None

    async def dispatch(ready: ReadyChord) -> None:
        async with ready:
            gate.open.clear()
            gate.reached.clear()

    dispatching = asyncio.create_task(dispatch(ready))
    await until(lambda: not gate.open.is_set())
    await gate.reached.wait()
    cancel_all(dispatching)
    await asyncio.sleep(0)
    gate.open.set()
    await asyncio.wait([dispatching])
    assert not dispatching.cancelled()
    assert dispatching.exception() is None
    assert await backend.chord("g").claim() is None


# -- another event loop ---------------------------------------------------------------------------------------------


def test_a_backend_that_reconnected_under_load_works_in_another_event_loop(url: str) -> None:
    """Two calls at once find the connection gone, in each of the loops."""
    backend = aioresult.connect(url)

    async def life() -> None:
        async with backend:
            waiting = asyncio.create_task(backend.wait_for("t"))
            await backend.mark_as_done("other", 1)
            await subscribed(backend)
            connections = connections_of(backend) if isinstance(backend, RedisBackend) else []
            await asyncio.to_thread(disconnect_everyone, url)
            await until(lambda: all(connection.closed for connection in connections))
            found, group, stored, _ = await asyncio.gather(
                backend.exists("a"), backend.restore_group("g"), backend.mark_as_started("b"), backend.forget("none")
            )
            assert (found, group, stored) == (False, None, True)
            await backend.mark_as_done("t", 1)
            assert (await waiting).result == 1
            await backend.forget("t")

    for _ in range(3):
        asyncio.run(life())


async def leave_open(backend: Backend, left: str) -> None:
    """As a test that fails before its `aclose`."""
    await backend.open()
    await backend.mark_as_done("before", 1)
    tasks: list[asyncio.Task[Any]] = []
    if left == "a watcher":
        backend.watch("t", Recorder())
        await subscribed(backend, 1)
    elif left == "waiters":
        tasks += [asyncio.create_task(backend.wait_for("t")), asyncio.create_task(backend.group(["t", "u"]).get())]
        await subscribed(backend, 2)
    elif left == "a dispatcher":
        dispatching = asyncio.Event()
        tasks.append(asyncio.create_task(dispatch_for_ever(backend, dispatching)))
        await dispatching.wait()
    assert not any(task.done() for task in tasks)


async def dispatch_for_ever(backend: Backend, dispatching: asyncio.Event) -> None:
    group_id = str(uuid4())
    await backend.create_chord(group_id, size=1)
    ready = await backend.on_chord_part_return(group_id, "t", "SUCCESS", 1)
    assert ready is not None
    async with ready:
        dispatching.set()
        await asyncio.Event().wait()


@pytest.fixture
def sockets_collected() -> Iterator[None]:
    """Nobody could close them: they are to be collected here, where the warnings are expected, and in no later test."""
    yield
    gc.collect()


def leaves_sockets(test: Callable[..., None]) -> Callable[..., None]:
    ignored = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", "ignore:loop is closed:ResourceWarning")
    return cast("Callable[..., None]", pytest.mark.usefixtures("sockets_collected")(ignored(test)))


@leaves_sockets
@pytest.mark.parametrize("left", ["nothing", "waiters", "a watcher", "a dispatcher"])
@pytest.mark.parametrize("close", [True, False], ids=["closed", "opened"])
def test_a_backend_whose_loop_has_ended_can_be_closed_and_opened(
    url: str, left: str, close: bool, caplog: pytest.LogCaptureFixture
) -> None:
    backend = aioresult.connect(url)

    async def use() -> None:
        if close:
            await backend.aclose()
            assert not is_open(backend)
        async with backend:
            assert is_open(backend)
            assert await backend.exists("before")
            await check_works(backend)

    for _ in range(2):
        asyncio.run(leave_open(backend, left))
        assert not is_open(backend)
        asyncio.run(use())
        assert not is_open(backend)
        gc.collect()
    if left != "a watcher":  # no task of its caller's, for `asyncio.run` to cancel: somebody seems to wait still
        assert [text for text in map(logging.LogRecord.getMessage, caplog.records) if "aioresult" in text] == []


@leaves_sockets
def test_a_backend_that_was_closed_after_its_loop_had_ended_says_so(url: str) -> None:
    backend = aioresult.connect(url)

    async def close_and_use() -> None:
        await backend.aclose()
        with pytest.raises(BackendClosedError, match="was closed"):
            await backend.exists("t")

    asyncio.run(leave_open(backend, "nothing"))
    asyncio.run(close_and_use())
    gc.collect()


@leaves_sockets
def test_a_backend_whose_loop_ended_while_it_was_opened_can_be_opened(url: str) -> None:
    backend = aioresult.connect(url)

    async def begin() -> None:
        gate = Gate(backend, "_open")
        opening = asyncio.create_task(backend.open())
        await gate.reached.wait()
        asyncio.get_running_loop().call_soon(gate.open.set)
        assert not opening.done()

    async def use() -> None:
        async with backend:
            await check_works(backend)

    asyncio.run(begin())
    assert not is_open(backend)
    asyncio.run(use())
    gc.collect()


# -- ContextVars ----------------------------------------------------------------------------------------------------


class Request:
    """What a web framework keeps in a ContextVar while it handles a request."""


CURRENT: ContextVar[Request] = ContextVar("CURRENT")


async def in_request(work: Callable[[], Coroutine[Any, Any, object]]) -> weakref.ref[Request]:
    """Run ``work()`` in a task in whose context there is a request; nothing else holds that."""
    request = Request()
    context = copy_context()
    context.run(CURRENT.set, request)
    await asyncio.create_task(work(), context=context)
    return weakref.ref(request)


async def check_released(backend: Backend, request: weakref.ref[Request]) -> None:
    assert is_open(backend)

    def released() -> bool:
        gc.collect()
        return request() is None

    await until(released)  # a callback that is due may still hold it


async def test_the_context_of_the_opener_is_not_kept(harness: Harness) -> None:
    backend = harness.make(recheck=60)
    request = await in_request(lambda: harness.open(backend))
    await check_released(backend, request)
    await check_works(backend)


class Requests:
    """What a request may do; each leaves the backend open and nobody waiting."""

    def __init__(self, harness: Harness, backend: Backend, worker: Backend) -> None:
        self.harness, self.backend, self.worker = harness, backend, worker

    async def store(self) -> None:
        await self.backend.mark_as_done("t", 1)

    async def store_many(self) -> None:
        await asyncio.gather(*(self.backend.mark_as_done(f"t{number}", number) for number in range(200)))

    async def read(self) -> None:
        await asyncio.gather(
            self.backend.exists("t"), self.backend.get_many(["t", "u"]), self.backend.restore_group("g")
        )

    async def wait(self, timeout: float | None = None) -> None:
        waiting = asyncio.ensure_future(self.backend.wait_for("t", timeout))
        await subscribed(self.backend, 1)
        await self.worker.mark_as_done("t", 1)
        await waiting

    async def wait_with_a_timeout(self) -> None:
        await self.wait(timeout=3600)

    async def join_with_a_timeout(self) -> None:
        await self.worker.mark_as_done("t", 1)
        await self.backend.group(["t"]).get(timeout=3600)

    async def join_many(self) -> None:
        ids = [f"t{number}" for number in range(300)]
        joining = asyncio.ensure_future(self.backend.group(ids).get())
        await subscribed(self.backend, 300)
        await asyncio.gather(*(self.worker.mark_as_done(task_id, 1) for task_id in ids))
        await joining

    async def leave(self) -> None:
        waiting = asyncio.ensure_future(self.backend.wait_for("t"))
        await subscribed(self.backend, 1)
        waiting.cancel()
        await asyncio.wait([waiting])

    async def wait_while_the_listener_reconnects(self) -> None:
        waiting = asyncio.ensure_future(self.backend.wait_for("t"))
        await subscribed(self.backend, 1)
        await self._disconnect()
        await subscribed(self.backend, 1)
        await self.worker.mark_as_done("t", 1)
        await waiting

    async def reconnect(self) -> None:
        await self._disconnect()
        await asyncio.gather(self.backend.exists("t"), self.backend.mark_as_done("t", 1))

    async def dispatch(self) -> None:
        await self.backend.create_chord("g", size=1)
        ready = await self.backend.on_chord_part_return("g", "t", "SUCCESS", 1)
        assert ready is not None
        async with ready:
            pass

    async def dispatch_from_the_list(self) -> None:
        chords = self.backend.ready_chords()
        await self.worker.create_chord("g", size=0)
        async with await anext(chords):
            pass
        await chords.aclose()

    async def _disconnect(self) -> None:
        if self.harness.name == "memory":
            self.backend._listener_lost(BackendConnectionError("cut"))
        else:
            await asyncio.to_thread(disconnect_everyone, self.harness.url)


@pytest.fixture
async def requests(harness: Harness) -> Requests:
    worker, backend = await harness.pair()
    return Requests(harness, backend, worker)


@pytest.mark.parametrize("name", [name for name in vars(Requests) if not name.startswith("_")])
async def test_the_context_of_a_request_is_not_kept(requests: Requests, name: str) -> None:
    request = await in_request(getattr(requests, name))
    await check_released(requests.backend, request)


async def test_the_context_in_which_tables_were_created_is_not_kept(postgres_url: str) -> None:
    harness = PostgresHarness(postgres_url)
    backend = await harness.connect(create=True)
    try:
        request = await in_request(backend.create_schema)  # type: ignore[attr-defined]
        await check_released(backend, request)
    finally:
        await harness.close()
