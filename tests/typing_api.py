"""The public API as its users write it, for type checkers alone: nothing here is run.

``mypy`` and ``pyright`` read this file; a type that they see differently from what stands here is an error.
"""

# An error that pyright does not report is an error, as it is with mypy.
# pyright: reportUnnecessaryComparison=true, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any, Unpack, assert_type

from celery import Celery

import aioresult
from aioresult import (
    AsyncResult,
    Backend,
    BackendStats,
    ConnectOptions,
    EagerResult,
    GroupProgress,
    GroupResult,
    Output,
    OutputPage,
    OutputStream,
    PerLoop,
    ResultBase,
    ResultSet,
    Running,
    StoredType,
    TaskMeta,
    TaskRequest,
    Updates,
    as_completed,
    by_name,
    by_url,
    connect,
    current_task,
    gather,
    per_loop,
    result_from_tuple,
    wait,
)
from aioresult.backends.memory import MemoryBackend, MemoryStore
from aioresult.backends.redis import RedisBackend
from aioresult.celery import backend_from_app
from aioresult.meta import SupportsAsTuple


async def connecting() -> None:
    assert_type(
        connect(
            "redis://localhost/0",
            expires=86400.0,
            serializer="json",
            accept=("json",),
            compression=None,
            global_keyprefix="",
            extended=False,
        ),
        Backend,
    )
    connect(
        "postgresql://localhost/db",
        table="results",
        create=True,
        connect_options={"ssl": False},
        cleanup_interval=3600,
        on_chord_ready=None,
    )
    connect("redis+cluster://a,b", address_remap={"10.0.0.1:6379": "a:7000"}, topology_refresh=timedelta(minutes=1))
    connect("redis+cluster://a", address_remap=lambda address: (address[0], address[1] + 1))
    connect("sentinel://a", master_name="m", sentinel_kwargs={"ssl": True}, min_other_sentinels=1, address_remap=None)
    connect("sentinel://a", address_remap="b:1")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    connect("redis://", expire=3)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    connect("redis://", expires="a day")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    connect("redis://", store="memory")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    connect("redis://", connect_options=[3])  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    async with connect("memory://") as backend:
        assert_type(backend, Backend)
    async with MemoryBackend(store=MemoryStore(), expires=None, compression="zstd") as memory:
        assert_type(memory, MemoryBackend)
    redis = await RedisBackend("redis://", accept=["json", "pickle"], heartbeat=1).open()
    assert_type(redis, RedisBackend)
    assert_type(await redis.aclose(), None)
    assert_type(redis.as_uri(), str)
    assert_type(by_name("redis"), type[Backend])
    assert_type(by_url("redis://"), tuple[type[Backend], str])
    assert_type(await per_loop("redis://").current(), Backend)
    assert_type(per_loop(lambda: MemoryBackend()), PerLoop)
    MemoryBackend(expires="a day")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    MemoryBackend(expire=5)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]


def connecting_elsewhere(app: Celery, **options: Unpack[ConnectOptions]) -> None:
    assert_type(connect("memory://", **options), Backend)
    assert_type(backend_from_app(app, **options), Backend)
    backend_from_app(app, expire=3)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]


def types_of_ones_own() -> None:
    fraction = StoredType(Fraction, "fraction", str, Fraction)
    assert_type(fraction, StoredType[Fraction])
    assert_type(connect("memory://", types=[fraction]), Backend)
    assert_type(MemoryBackend(types=(fraction, StoredType(Path, "path", Path.as_posix, Path))), MemoryBackend)
    StoredType(Path, "path", Fraction.limit_denominator, Path)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    StoredType(Path, "path", str, Fraction)  # type: ignore[arg-type]
    assert_type(connect("memory://", json_default=str), Backend)
    MemoryBackend(json_default="str")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    MemoryBackend(types=[Fraction])  # type: ignore[list-item] # pyright: ignore[reportArgumentType]


async def storing(backend: Backend) -> None:
    assert_type(aioresult.Retry("later", exc=OSError(), delay=3).delay, float | None)
    request = TaskRequest(id="a", task="add", args=(1, 2), kwargs={}, group="g", children=[backend.result("b")])
    assert_type(await backend.store_result("a", 1, "PROGRESS", traceback=None, request=request, expires=5), bool)
    assert_type(await backend.mark_as_pending("a"), bool)
    assert_type(await backend.mark_as_started("a", pid=1, hostname="here"), bool)
    assert_type(await backend.mark_as_done("a", {"any": "value"}, request=request), bool)
    assert_type(await backend.mark_as_done("a", 1, meta={"seconds": 0.5}), bool)
    assert_type(await backend.mark_as_failure("a", ValueError(), traceback="text"), bool)
    assert_type(await backend.mark_as_retry("a", ValueError()), bool)
    assert_type(await backend.mark_as_revoked("a", reason="why"), bool)


async def reading(backend: Backend) -> None:
    assert_type(await backend.get_task_meta("a"), TaskMeta)
    assert_type(await backend.get_many(["a", "b"]), list[TaskMeta])
    assert_type(await backend.wait_for("a", timeout=5), TaskMeta)
    assert_type(await backend.exists("a"), bool)
    assert_type(await backend.forget("a"), None)
    assert_type(await backend.cleanup(), int)
    assert_type(await backend.save_group("g", backend.group(["a"])), None)
    assert_type(await backend.restore_group("g"), GroupResult | None)
    assert_type(await backend.delete_group("g"), None)


def a_meta(meta: TaskMeta) -> None:
    assert_type(meta.task_id, str)
    assert_type(meta.status, str)
    assert_type(meta.result, Any)
    assert_type(meta.traceback, str | None)
    assert_type(meta.children, Sequence[Sequence[Any]])
    assert_type(meta.date_done, datetime | None)
    assert_type(meta.ready, bool)
    assert_type(meta.group_id, str | None)
    assert_type(meta.meta, Mapping[str, Any] | None)
    assert_type(meta.retries, int | None)
    meta.status = "SUCCESS"  # type: ignore[misc] # pyright: ignore[reportAttributeAccessIssue]


async def a_result(backend: Backend) -> None:
    assert_type(backend.result("a"), AsyncResult[Any])
    assert_type(backend.result(backend.result("a")), AsyncResult[Any])
    r: AsyncResult[int] = backend.result("a")
    assert_type(AsyncResult[int]("a", backend, parent=r), AsyncResult[int])
    assert_type(backend.result("a", type=Path), AsyncResult[Path])
    assert_type(await backend.result("a", r, type=list[int]), list[int])
    assert_type(backend.result("a", type=int | None), AsyncResult[Any])
    assert_type(await r, int)
    assert_type(await r.get(timeout=1.5, propagate=True, follow_parents=True), int)
    assert_type(await asyncio.wait_for(r, 5), int)
    assert_type(await r.fetch(), TaskMeta)
    assert_type(await r.state(), str)
    assert_type(await r.ready(), bool)
    assert_type(await r.successful(), bool)
    assert_type(await r.failed(), bool)
    assert_type(await r.exists(), bool)
    assert_type(await r.traceback(), str | None)
    assert_type(await r.children(), list[ResultBase])
    assert_type(await r.forget(), None)
    assert_type(r.meta, TaskMeta | None)
    assert_type(r.id, str)
    assert_type(r.parent, ResultBase | None)
    assert_type(r.as_list(), list[str])
    assert_type(result_from_tuple(r.as_tuple(), backend), ResultBase)
    assert_type(await EagerResult("a", 5), int)
    assert_type(await EagerResult[int]("a", ValueError(), "FAILURE"), int)
    assert_type(await r.get_leaf(), Any)
    assert_type(await r.graph(), dict[ResultBase, list[ResultBase]])
    async for node, value in r.collect():
        assert_type(node, ResultBase)
        assert_type(value, Any)
    async for above, below in r.iterdeps(intermediate=True):
        assert_type(above, ResultBase | None)
        assert_type(below, ResultBase)


async def a_forgotten_await(r: AsyncResult[int], g: GroupResult) -> None:
    """docs/migrating.md says which checks find these."""
    if r.state != "SUCCESS":  # type: ignore[comparison-overlap]
        pass
    if r.state() != "SUCCESS":  # type: ignore[comparison-overlap] # pyright: ignore[reportUnnecessaryComparison]
        pass
    if r.ready():  # type: ignore[truthy-bool] # pyright: ignore[reportUnnecessaryComparison]
        pass
    if g.failed():  # type: ignore[truthy-bool] # pyright: ignore[reportUnnecessaryComparison]
        pass
    if r.successful:  # type: ignore[truthy-function] # pyright: ignore[reportUnnecessaryComparison]
        pass
    r.get()  # type: ignore[unused-coroutine] # pyright: ignore[reportUnusedCoroutine]


async def as_with_celery(r: AsyncResult[int]) -> None:
    r.status  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue] # noqa: B018
    r.result  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue] # noqa: B018
    await r.get(interval=0.5)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    await r.revoke(terminate=True)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    await asyncio.wait([r])  # type: ignore[type-var] # pyright: ignore[reportArgumentType]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(r)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
        tasks.create_task(r.get())


async def a_group(backend: Backend, r: AsyncResult[int], g_of_celery: SupportsAsTuple) -> None:
    g = backend.group([r, "b", g_of_celery], id="g")
    assert_type(backend.group(g_of_celery), GroupResult)
    assert_type(g, GroupResult)
    assert_type(await g, list[Any])
    assert_type(await g.get(timeout=5, propagate=False), list[Any])
    assert_type(await g.join(), list[Any])
    async for each in g.as_completed(timeout=5):
        assert_type(each, AsyncResult[Any])
    assert_type(await g.completed_count(), int)
    assert_type(await g.ready(), bool)
    assert_type(await g.successful(), bool)
    assert_type(await g.failed(), bool)
    assert_type(await g.waiting(), bool)
    assert_type(await g.save(), None)
    assert_type(await GroupResult.restore("g", backend), GroupResult | None)
    assert_type(await g.delete(), None)
    assert_type(await g.forget(), None)
    g.add(r)
    g.remove(r)
    g.discard("b")
    g.update([r, g])
    g.clear()
    assert_type(len(g), int)
    assert_type(list(g), list[ResultBase])
    assert_type(g[0], ResultBase)
    assert_type(GroupResult("g", [r, g], parent=r).id, str)
    assert_type(ResultSet([r]).id, str | None)


async def several(r: AsyncResult[int], g: GroupResult) -> None:
    assert_type(await gather(r, g, return_exceptions=True), list[Any])
    done, pending = await wait({r, g}, timeout=5, return_when=aioresult.FIRST_COMPLETED)
    assert_type(done, set[ResultBase])
    assert_type(pending, set[ResultBase])
    async for each in as_completed([r, g], timeout=5):
        assert_type(each, AsyncResult[Any])


def streamed(r: AsyncResult[int]) -> AsyncIterator[AsyncResult[Any]]:
    return as_completed([r])


async def running(backend: Backend, result: AsyncResult[int], group: GroupResult) -> None:
    async with backend.running("a", TaskRequest(id="a"), track=False, output_expires=60) as task:
        assert_type(task, Running)
        assert_type(task.progress(1, 10, "loading", rows=3), None)
        assert_type(task.output, Output)
        assert_type(await task.output.send({"any": "value"}), None)
        task.value = 3
    assert_type(current_task(), Running | None)
    assert_type(await backend.run("a", asyncio.sleep, 1, if_done="skip"), Any)
    async with backend.output("a", keep=aioresult.Keep(chunks=10), on_full="fail") as output:
        assert_type(output, Output)
        assert_type(output.cursor, str)
    assert_type(result.updates(on_lost="wait"), Updates)
    async for meta in result.updates():
        assert_type(meta, TaskMeta)
    async with result.stream(after=aioresult.TAIL, on_lost="wait", on_restart="continue", on_gap="skip") as stream:
        assert_type(stream, OutputStream[Any])
        assert_type(stream.cursor, str)
        async for chunks in stream.batches():
            assert_type(chunks, list[Any])
    assert_type(await result.read_output(limit=10, wait=1.5), OutputPage)
    assert_type(await result.revoke("why"), bool)
    assert_type(await result.get(on_lost="raise", must_exist=True), int)
    async for progress in group.progress(interval=1):
        assert_type(progress, GroupProgress)


async def operations(backend: Backend) -> None:
    assert_type(await backend.ping(), float)
    stats = backend.stats()
    assert_type(stats, BackendStats)
    assert_type((stats.connected, stats.waiters, stats.last_error), tuple[bool, int, str | None])
    assert_type(stats.last_error_at, datetime | None)
    assert_type(await backend.wait_for("a", timedelta(seconds=1), must_exist=True), TaskMeta)
    aioresult.connect("redis://", default_timeout=timedelta(minutes=5), wait_for_server=30)
