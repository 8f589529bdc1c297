"""What is told is so: stored or not, whose error, which store's value, whose exception."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
import redis.asyncio

import aioresult
from aioresult import (
    AsyncResult,
    Backend,
    BackendClosedError,
    BackendConnectionError,
    BackendError,
    BackendRefusedError,
    ChordError,
    DecodeError,
    GroupResult,
    RemoteError,
    ResultSet,
    TaskError,
    TaskRequest,
)
from aioresult.backends.memory import MemoryStore
from aioresult.exceptions import RemoteTraceback

from .harness import Gate, Harness, intercept, subscribed, topics_of, until
from .servers import RedisServer

#: Sentinels change nothing of this.
BACKENDS = ["memory", "redis", "postgres"]

Primitive = Callable[..., Awaitable[Any]]
Call = Callable[[Backend], Awaitable[Any]]

PART = TaskRequest(id="t", group="g", group_index=0, chord=True)


# -- without the right to publish -----------------------------------------------------------------------------------


@pytest.fixture
async def admin(own_redis: RedisServer) -> AsyncIterator[redis.asyncio.Redis]:
    """Of an empty server with a user ``mute``, who may do everything but publish."""
    async with redis.asyncio.Redis.from_url(own_redis.url) as client:
        await client.flushall()
        await allow(client)
        yield client
        await client.acl_deluser("mute")


async def allow(admin: redis.asyncio.Redis, *channels: str) -> None:
    """Let ``mute`` publish on these channels, and no others."""
    await admin.acl_setuser(
        "mute", enabled=True, passwords=["+pw"], keys=["*"], commands=["+@all"], channels=list(channels), reset=True
    )


def mute_url(server: RedisServer) -> str:
    return f"redis://mute:pw@127.0.0.1:{server.port}/0"


async def dump(admin: redis.asyncio.Redis, pattern: str = "celery-*") -> dict[Any, Any]:
    return {key: await admin.dump(key) for key in await admin.keys(pattern)}


STORES: dict[str, Call] = {
    "success": lambda backend: backend.mark_as_done("t", 1),
    "failure": lambda backend: backend.mark_as_failure("t", ValueError("x")),
    "revoked": lambda backend: backend.mark_as_revoked("t"),
    "started": lambda backend: backend.mark_as_started("t"),
    "progress": lambda backend: backend.store_result("t", 1, "PROGRESS"),
    "in a group": lambda backend: backend.mark_as_done("t", 1, request=TaskRequest(id="t", group="g")),
    "part of a chord": lambda backend: backend.mark_as_done("t", 1, request=PART),
}


@pytest.mark.parametrize(
    ("store", "before"),
    [("pending", "nothing"), *((store, before) for store in STORES for before in ("nothing", "STARTED", "compressed"))],
)
async def test_without_the_right_to_publish_nothing_is_stored(
    admin: redis.asyncio.Redis, own_redis: RedisServer, store: str, before: str
) -> None:
    calls = STORES | {"pending": lambda backend: backend.mark_as_pending("t")}
    options: dict[str, Any] = {"compression": "gzip"} if before == "compressed" else {}
    async with (
        aioresult.connect(own_redis.url, **options) as sound,
        aioresult.connect(mute_url(own_redis)) as mute,
    ):
        if before != "nothing":
            await sound.mark_as_started("t", pid=1)
        await sound.create_chord("g", size=1)
        stored = await dump(admin)
        for _ in range(3):  # the first of a backend goes another way than the others
            with pytest.raises(BackendRefusedError, match=r"ACL SETUSER .*&celery-task-meta-\*"):
                await calls[store](mute)
            assert await dump(admin) == stored
        assert await sound.exists("t") == (before != "nothing")
        await allow(admin, "*")
        await calls[store](mute)
        assert await dump(admin) != stored


async def test_of_a_batch_what_may_be_published_is_stored(admin: redis.asyncio.Redis, own_redis: RedisServer) -> None:
    await allow(admin, "celery-task-meta-a*")
    async with aioresult.connect(own_redis.url) as reader, aioresult.connect(mute_url(own_redis)) as mute:
        waiting = [asyncio.create_task(reader.wait_for(task_id)) for task_id in ("a1", "b1", "a2", "b2")]
        await subscribed(reader, 4)
        calls = [mute.mark_as_done(task_id, task_id) for task_id in ("a1", "b1", "a2", "b2")]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert outcomes[::2] == [True, True]
        assert [type(outcome) for outcome in outcomes[1::2]] == [BackendRefusedError] * 2
        assert outcomes[1] is not outcomes[3]
        assert [(await each).result for each in waiting[::2]] == ["a1", "a2"]
        assert not any(each.done() for each in waiting[1::2])
        await allow(admin, "*")
        assert await asyncio.gather(*(mute.mark_as_done(task_id, task_id) for task_id in ("b1", "b2"))) == [True, True]
        assert [(await each).result for each in waiting[1::2]] == ["b1", "b2"]


async def test_the_missing_right_is_named_with_the_prefix(admin: redis.asyncio.Redis, own_redis: RedisServer) -> None:
    async with aioresult.connect(mute_url(own_redis), global_keyprefix="shop:") as mute:
        with pytest.raises(BackendRefusedError, match=r"'&shop:celery-task-meta-\*'"):
            await mute.mark_as_done("t", 1)
        assert await admin.keys() == []


async def finish(backend: Backend) -> None:
    ready = await backend.chord("whole").claim()
    assert ready is not None
    async with ready:
        pass


async def release(backend: Backend) -> None:
    ready = await backend.chord("whole").claim()
    assert ready is not None
    async with ready:
        raise ZeroDivisionError


CHORD_STEPS: dict[str, Call] = {
    "the last part": lambda backend: backend.on_chord_part_return("g", "t1", "SUCCESS", 1, 1),
    "the last part, for others to dispatch": lambda backend: backend.on_chord_part_return(
        "g", "t1", "SUCCESS", 1, 1, lease=0
    ),
    "the first failure": lambda backend: backend.on_chord_part_return("open", "t", "FAILURE", ValueError("x"), 0),
    "a size of parts that have come": lambda backend: backend.set_chord_size("open", 1),
    "an empty chord": lambda backend: backend.create_chord("empty", size=0),
}


@pytest.mark.parametrize("step", CHORD_STEPS)
async def test_without_the_right_to_publish_no_key_of_a_chord_changes(
    admin: redis.asyncio.Redis, own_redis: RedisServer, step: str
) -> None:
    async with aioresult.connect(own_redis.url) as sound, aioresult.connect(mute_url(own_redis)) as mute:
        await sound.create_chord("g", size=2)
        await sound.on_chord_part_return("g", "t0", "SUCCESS", 0, 0)
        await sound.create_chord("open")
        await sound.on_chord_part_return("open", "o", "SUCCESS", 0, 1)
        before = await dump(admin)
        for _ in range(2):
            with pytest.raises(BackendRefusedError, match=r"ACL SETUSER .*&celery-taskset-meta-\*"):
                await CHORD_STEPS[step](mute)
            assert await dump(admin) == before
        await CHORD_STEPS[step](sound)
        assert await dump(admin) != before


@pytest.mark.parametrize("leave", [finish, release])
async def test_without_the_right_to_publish_a_claim_stands(
    admin: redis.asyncio.Redis, own_redis: RedisServer, leave: Call
) -> None:
    async with aioresult.connect(own_redis.url) as sound, aioresult.connect(mute_url(own_redis)) as mute:
        await sound.create_chord("whole", size=1)
        await sound.on_chord_part_return("whole", "t", "SUCCESS", 1, 0, lease=0)
        with pytest.raises((BackendRefusedError, ZeroDivisionError)):
            await leave(mute)
        assert await sound.chord("whole").claim() is None
        assert await sound.chord("whole").get() == [1]
        await admin.delete("celery-taskset-meta-whole.c")  # as when the lease has run out
        ready = await sound.chord("whole").claim()
        assert ready is not None
        async with ready:
            assert ready.results == [1]


async def test_a_part_whose_result_may_not_be_published_is_not_counted(
    admin: redis.asyncio.Redis, own_redis: RedisServer
) -> None:
    await allow(admin, "celery-taskset-meta-*", "aioresult-chords")
    async with aioresult.connect(own_redis.url) as sound, aioresult.connect(mute_url(own_redis)) as mute:
        await sound.create_chord("g", size=1)
        with pytest.raises(BackendRefusedError):
            await mute.mark_as_done("t", 1, request=PART)
        assert await sound.chord("g").progress() == (0, 1)


# -- which store ----------------------------------------------------------------------------------------------------


def same_store() -> list[tuple[Backend, Backend]]:
    store = MemoryStore()
    urls = ["redis://localhost/0", "postgresql://localhost/db"]
    return [
        (aioresult.connect("memory://", store=store), aioresult.connect("memory://", store=store)),
        *((aioresult.connect(url), aioresult.connect(url)) for url in urls),
    ]


def other_store() -> list[tuple[Backend, Backend]]:
    store = MemoryStore()
    redis_url, postgres_url = "redis://localhost/0", "postgresql://localhost/db"
    pairs: list[tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = [
        (("memory://", {}), ("memory://", {})),
        (("memory://", {"store": store}), ("memory://", {})),
        (("memory://", {"store": store}), ("memory://", {"store": store, "global_keyprefix": "a"})),
        ((redis_url, {}), ("memory://", {})),
        ((redis_url, {}), ("redis://localhost/1", {})),
        ((redis_url, {}), (redis_url, {"global_keyprefix": "a"})),
        ((redis_url, {}), (postgres_url, {})),
        ((postgres_url, {}), ("postgresql://localhost/other", {})),
        ((postgres_url, {}), (postgres_url, {"table": "other"})),
        ((postgres_url, {}), (postgres_url, {"schema": "other"})),
    ]
    return [(aioresult.connect(a, **one), aioresult.connect(b, **two)) for (a, one), (b, two) in pairs]


@pytest.mark.parametrize("number", range(3))
def test_handles_of_one_id_in_one_store_are_equal(number: int) -> None:
    one, other = same_store()[number]
    assert one.result("x") == one.result("x") == other.result("x")
    assert len({one.result("x"), other.result("x")}) == 1
    assert one.result("x") != other.result("y")
    assert one.group(["x"], "g") == other.group(["x"], "g")
    assert one.group([], "g") == other.group([], "g")
    assert ResultSet([one.result("x")]) == ResultSet([other.result("x")])


@pytest.mark.parametrize("number", range(10))
def test_handles_of_one_id_in_two_stores_are_not_equal(number: int) -> None:
    one, other = other_store()[number]
    assert one.result("x") != other.result("x")
    assert one.result("x") != AsyncResult("x", None)
    assert len({one.result("x"), other.result("x")}) == 2
    assert one.result("x") == "x" == other.result("x")
    assert hash(one.result("x")) == hash("x")
    assert one.group(["x"], "g") != other.group(["x"], "g")
    assert ResultSet([one.result("x")]) != ResultSet([other.result("x")])


@pytest.mark.parametrize("number", range(10))
def test_groups_without_members_are_equal_only_in_one_store(number: int) -> None:
    one, other = other_store()[number]
    assert one.group([], "g") != other.group([], "g")


@pytest.fixture
async def two() -> AsyncIterator[tuple[Backend, Backend]]:
    """Two stores with different values under one id."""
    async with aioresult.connect("memory://") as one, aioresult.connect("memory://") as other:
        yield one, other


async def store_both(two: tuple[Backend, Backend]) -> None:
    await two[0].mark_as_done("x", "of one")
    await two[1].mark_as_done("x", "of other")


@pytest.mark.parametrize("before", [True, False], ids=["stored before", "stored during the wait"])
@pytest.mark.parametrize(
    "join",
    [
        lambda handles: asyncio.gather(*handles),
        lambda handles: aioresult.gather(*handles),
        lambda handles: ResultSet(handles).get(),
        lambda handles: GroupResult("g", handles).get(),
        lambda handles: added(handles).get(),
        lambda handles: updated(handles).get(),
    ],
    ids=["asyncio.gather", "aioresult.gather", "ResultSet", "GroupResult", "add", "update"],
)
async def test_a_join_over_two_stores_keeps_both(
    two: tuple[Backend, Backend], join: Callable[[list[AsyncResult[Any]]], Awaitable[list[Any]]], before: bool
) -> None:
    if before:
        await store_both(two)
    waiting = asyncio.ensure_future(join([backend.result("x") for backend in two]))
    if not before:
        await until(lambda: all(len(topics_of(backend)) == 1 for backend in two))
        await store_both(two)
    assert await waiting == ["of one", "of other"]


def added(handles: list[AsyncResult[Any]]) -> ResultSet:
    results = ResultSet()
    for handle in handles * 2:
        results.add(handle)
    assert len(results) == 2
    return results


def updated(handles: list[AsyncResult[Any]]) -> ResultSet:
    results = ResultSet()
    results.update(handles * 2)
    assert len(results) == 2
    return results


async def test_wait_over_two_stores_keeps_both(two: tuple[Backend, Backend]) -> None:
    handles = [backend.result("x") for backend in two]
    await two[0].mark_as_done("x", "of one")
    done, pending = await aioresult.wait(handles, timeout=0)
    assert [next(iter(done)) is handles[0], next(iter(pending)) is handles[1]] == [True, True]
    await two[1].mark_as_done("x", "of other")
    done, pending = await aioresult.wait(handles)
    assert pending == set()
    assert sorted([await handle.get() for handle in done]) == ["of one", "of other"]
    assert [await handle async for handle in aioresult.as_completed(handles)] == ["of one", "of other"]


async def test_a_set_is_not_changed_by_a_handle_of_another_store(two: tuple[Backend, Backend]) -> None:
    results = ResultSet([two[0].result("x")])
    results.discard(two[1].result("x"))
    assert len(results) == 1
    with pytest.raises(KeyError):
        results.remove(two[1].result("x"))


@pytest.mark.parametrize("make", [ResultSet, lambda members: ResultSet([ResultSet(members)])])
async def test_a_result_set_in_asyncio_gather_says_what_to_write(
    two: tuple[Backend, Backend], make: Callable[[list[AsyncResult[Any]]], ResultSet]
) -> None:
    await store_both(two)
    results = make([backend.result("x") for backend in two])
    with pytest.raises(TypeError, match=r"aioresult\.gather.*get\(\).*asyncio\.gather"):
        await asyncio.gather(results)
    assert await aioresult.gather(results) == list(await asyncio.gather(results.get()))


# -- members that come and go ---------------------------------------------------------------------------------------


def add(results: ResultSet, backend: Backend) -> None:
    results.add(backend.result("late"))


def remove(results: ResultSet, backend: Backend) -> None:
    results.remove("b")


def clear(results: ResultSet, backend: Backend) -> None:
    results.clear()


def replace(results: ResultSet, backend: Backend) -> None:
    results.results[:] = [backend.result("late")]


@pytest.mark.parametrize("change", [add, remove, clear, replace])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
async def test_a_set_that_changes_during_a_wait_gives_the_values_of_its_members_before(
    harness: Harness, change: Callable[[ResultSet, Backend], None], nested: bool
) -> None:
    worker, reader = await harness.pair()
    inner = ResultSet([reader.result("a"), reader.result("b")])
    results = ResultSet([inner, reader.result("c")]) if nested else inner
    waiting = asyncio.create_task(results.get())
    stepping = asyncio.create_task(collected(results))
    await harness.subscribed(3 if nested else 2)
    change(inner, reader)
    for task_id in ("a", "b", "c"):
        await worker.mark_as_done(task_id, task_id)
    assert await waiting == ([["a", "b"], "c"] if nested else ["a", "b"])
    assert await stepping == {"a", "b", "c"} - (set() if nested else {"c"})
    await harness.subscribed(0)


async def collected(results: ResultSet) -> set[Any]:
    return {await each async for each in results.as_completed()}


# -- parents --------------------------------------------------------------------------------------------------------


async def spoil(harness: Harness, task_id: str, how: str) -> None:
    """Have something stored that `spoilt_reader` cannot read."""
    match how:
        case "undecodable":
            await harness.put_raw(task_id, b"{")
        case "another serializer":
            await (await harness.connect(serializer="pickle", accept=["pickle"])).mark_as_done(task_id, 1)
        case "too large":
            await (await harness.connect()).mark_as_done(task_id, "x" * 2000)


async def spoilt_reader(harness: Harness) -> Backend:
    return await harness.connect(max_result_size=1000)


SPOILT = ["undecodable", "another serializer", "too large"]


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("when", ["before", "during the wait"])
async def test_a_parent_that_cannot_be_read_has_not_failed(harness: Harness, how: str, when: str) -> None:
    worker, reader = await harness.connect(), await spoilt_reader(harness)
    child = reader.result("child", reader.result("parent", reader.group(["member", "other"])))
    waiting: asyncio.Task[Any] | None = None
    if when != "before":
        waiting = asyncio.create_task(child.get(timeout=60))
        await harness.subscribed(4)
    await spoil(harness, "parent", how)
    await spoil(harness, "member", how)
    if waiting is None:
        waiting = asyncio.create_task(child.get(timeout=60))
        await harness.subscribed(2)
    await worker.mark_as_done("child", "value")
    assert await waiting == "value"
    with pytest.raises(aioresult.SerializationError):
        await reader.result("parent").get()
    await harness.subscribed(0)


async def test_a_parent_that_failed_is_told_though_another_cannot_be_read(harness: Harness) -> None:
    worker, reader = await harness.pair()
    child = reader.result("child", reader.result("parent", reader.result("grandparent")))
    await harness.put_raw("parent", b"{")
    waiting = asyncio.create_task(child.get(timeout=60))
    await harness.subscribed(2)
    await worker.mark_as_failure("grandparent", ValueError("x"))
    with pytest.raises(ValueError, match="x"):
        await waiting


# -- whose error ----------------------------------------------------------------------------------------------------


class OwnTimeout(aioresult.TimeoutError):
    """A class of the worker's, imported by the reader, too."""


READERS_OWN = [
    aioresult.TimeoutError("task other was not ready"),
    BackendClosedError("the backend was closed"),
    BackendConnectionError("away"),
    DecodeError("what is stored"),
    aioresult.UsageError("wrong"),
    aioresult.ResultTooLargeError("large"),
    OwnTimeout("mine"),
]


@pytest.mark.parametrize("error", READERS_OWN, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("serializer", ["json", "pickle"])
async def test_a_tasks_error_is_not_mistaken_for_the_readers(
    harness: Harness, error: Exception, serializer: str
) -> None:
    worker, reader = await harness.pair(serializer=serializer, accept=["json", "pickle"])
    await worker.mark_as_failure("t", error, "Traceback of the worker")
    await worker.create_chord("g", size=1)
    await worker.on_chord_part_return("g", "t", "FAILURE", error, 0, lease=0)
    metas = [await reader.wait_for("t", 60), await reader.get_task_meta("t"), *await reader.get_many(["t"])]
    told = [meta.result for meta in metas]
    for call in (
        reader.result("t").get(timeout=60),
        reader.result("t").get(timeout=1e-9),
        reader.group(["t"]).get(timeout=60),
        reader.result("child", reader.result("t")).get(timeout=60),
    ):
        with pytest.raises(RemoteError) as caught:
            await call
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        told.append(caught.value)
    with pytest.raises(ChordError) as failed:
        await reader.chord("g").get(timeout=60)
    told.append(failed.value.__cause__)
    for each in told:
        assert isinstance(each, TaskError)
        assert not isinstance(each, type(error) | TimeoutError | BackendError | aioresult.SerializationError)
        assert (type(each).__name__, type(each).__module__) == (type(error).__name__, type(error).__module__)
        assert str(each) == str(error)
    done, pending = await aioresult.wait([reader.result("t")], timeout=60)
    assert (len(done), pending) == (1, set())


@pytest.mark.parametrize("serializer", ["json", "pickle"])
@pytest.mark.parametrize("error", [aioresult.TaskRevokedError("x"), ChordError("x"), RemoteError("x"), TimeoutError()])
async def test_what_became_of_a_task_is_told_by_its_own_class(
    harness: Harness, error: Exception, serializer: str
) -> None:
    worker, reader = await harness.pair(serializer=serializer, accept=["json", "pickle"])
    await worker.mark_as_failure("t", error)
    with pytest.raises(type(error)) as caught:
        await reader.result("t").get(timeout=60)
    assert not isinstance(caught.value, aioresult.TimeoutError)


# -- exists ---------------------------------------------------------------------------------------------------------


async def check_exists(backend: Backend, task_id: str) -> None:
    """By each way, and beside others in the same batch."""
    await backend.mark_as_done("sound", 1)
    ids = [task_id, "none", "sound", task_id]
    assert await asyncio.gather(*(backend.exists(each) for each in ids)) == [True, False, True, True]
    assert await backend.result(task_id).exists()


@pytest.mark.parametrize("how", SPOILT)
async def test_whatever_is_stored_exists(harness: Harness, how: str) -> None:
    reader = await spoilt_reader(harness)
    await spoil(harness, "bad", how)
    await check_exists(reader, "bad")


@pytest.mark.parametrize("data", [b"\x00", b"null", b"[]", b"\x00celery-compressed\x00application/x-brotli\x00x"])
async def test_bytes_of_any_kind_exist(harness: Harness, data: bytes) -> None:
    backend = await harness.connect()
    await harness.put_raw("bad", data)
    await check_exists(backend, "bad")


async def test_a_key_of_another_kind_exists(redis_url: str, redis_client: redis.asyncio.Redis) -> None:
    await redis_client.lpush("celery-task-meta-bad", "x")
    async with aioresult.connect(redis_url) as backend:
        await check_exists(backend, "bad")


async def test_a_pending_result_exists_and_an_expired_one_does_not(harness: Harness) -> None:
    worker, reader = await harness.pair()
    await worker.mark_as_pending("t")
    assert await reader.exists("t")
    await worker.mark_as_done("brief", 1, expires=0.05)
    await worker.mark_as_done("long", 1, expires=60)

    async def expired() -> bool:
        return not await reader.exists("brief")

    await until(expired)
    assert not await worker.result("brief").exists()
    assert await reader.exists("long")
    await worker.forget("long")
    assert not await reader.exists("long")


@pytest.mark.parametrize(("group", "member"), [(0, 0.05), (60, 0.05), (60, 0)])
async def test_a_member_never_shortens_the_life_of_its_group(harness: Harness, group: float, member: float) -> None:
    backend = await harness.connect()
    await backend.save_group("g", backend.group(["a"], "g"), expires=group)
    await backend.mark_as_done("a", 1, request=TaskRequest(id="a", group="g"), expires=member)
    left = await harness.group_seconds_left("g")
    if group and member:
        assert left is not None
        assert left > 30
    else:
        assert left is None
    if member:

        async def expired() -> bool:
            return not await backend.exists("a")

        await until(expired)
    await backend.mark_as_done("b", 1)
    await backend.cleanup()
    assert await backend.restore_group("g") == backend.group(["a"], "g")


# -- whose exception ------------------------------------------------------------------------------------------------


async def caught(awaitable: Awaitable[Any]) -> BaseException:
    try:
        await awaitable
    except Exception as exc:
        return exc
    raise AssertionError("nothing was raised")


async def returned(awaitable: Awaitable[Any]) -> BaseException:
    """The exception that ``propagate=False`` gives, or a meta has."""
    value = await awaitable
    found = value[0] if isinstance(value, list) else value
    error = found if isinstance(found, BaseException) else found.result
    assert isinstance(error, BaseException)
    return error


async def stepped(backend: Backend) -> BaseException:
    async for each in aioresult.as_completed([backend.result("t")]):
        return await caught(each)
    raise AssertionError("nothing came")


#: Each comes to an exception of the task ``t``, or of the chord ``g``.
WAYS: dict[str, Call] = {
    "await result": lambda backend: caught(backend.result("t")),
    "get": lambda backend: caught(backend.result("t").get(timeout=60)),
    "propagate=False": lambda backend: returned(backend.result("t").get(propagate=False)),
    "group": lambda backend: caught(backend.group(["t"])),
    "nested group": lambda backend: caught(backend.group([backend.group(["t"]), "t"])),
    "group, propagate=False": lambda backend: returned(backend.group(["t", "t"]).get(propagate=False)),
    "large group": lambda backend: caught(backend.group(["t", *(f"never-{number}" for number in range(150))])),
    "gather": lambda backend: caught(aioresult.gather(backend.result("t"))),
    "gather, return_exceptions": lambda backend: returned(
        aioresult.gather(backend.result("t"), return_exceptions=True)
    ),
    "child": lambda backend: caught(backend.result("never", backend.result("t"))),
    "as_completed": stepped,
    "wait_for": lambda backend: returned(backend.wait_for("t")),
    "chord": lambda backend: caught(backend.chord("g")),
}
READS: dict[str, Call] = {
    "get_task_meta": lambda backend: returned(backend.get_task_meta("t")),
    "get_many": lambda backend: returned(backend.get_many(["t", "t"])),
    "fetch": lambda backend: returned(backend.result("t").fetch()),
    "group.value": lambda backend: returned(valued(backend.group(["t"]))),
}


async def valued(group: GroupResult) -> Any:
    await group.ready()
    return group.value()


async def fail(worker: Backend) -> None:
    """With a worker's traceback."""
    try:
        raise ValueError("x", ["argument"])
    except ValueError as exc:
        await worker.create_chord("g", size=2)
        await worker.on_chord_part_return("g", "t", "FAILURE", exc, 0)
        await worker.mark_as_failure("t", exc)


def check_apart(errors: Sequence[BaseException]) -> None:
    """What happens to one of them must not show in another."""

    def parts(error: BaseException) -> list[object]:
        return [
            part
            for part in (error, error.__traceback__, error.__cause__, error.__context__, *error.args)
            if part is not None and not isinstance(part, str)
        ]

    shared = [id(part) for error in errors for part in parts(error)]
    assert len(shared) == len(set(shared)), errors
    for number, error in enumerate(errors):
        error.add_note(str(number))
    assert [error.__notes__ for error in errors] == [[str(number)] for number in range(len(errors))]
    causes = [error.__cause__ for error in errors]
    for error in errors[1:]:
        with pytest.raises(type(error)):
            raise error from KeyError("one's own")
    assert errors[0].__cause__ is causes[0]
    assert errors[0].__context__ is None or errors[0].__context__ is causes[0]


@pytest.mark.parametrize("store_name", ["memory"], indirect=True)
@pytest.mark.parametrize("serializer", ["json", "pickle"])
@pytest.mark.parametrize("way", [*WAYS, *READS])
async def test_each_reader_of_a_failed_task_has_an_exception_of_its_own(
    harness: Harness, way: str, serializer: str
) -> None:
    worker, reader = await harness.pair(serializer=serializer, accept=["json", "pickle"])
    await fail(worker)
    call = {**WAYS, **READS}[way]
    errors = await asyncio.gather(*(call(reader) for _ in range(3)))
    errors.append(await call(reader))
    assert all(error.__cause__ is not None for error in errors)
    check_apart(errors)
    await harness.subscribed(0)


@pytest.mark.parametrize("store_name", ["memory"], indirect=True)
@pytest.mark.parametrize("way", WAYS)
async def test_each_waiter_that_one_message_tells_has_an_exception_of_its_own(harness: Harness, way: str) -> None:
    worker, reader = await harness.pair()
    waiting = [asyncio.ensure_future(WAYS[each](reader)) for each in (way, way, way, "await result")]
    await subscribed(reader, 1)
    await fail(worker)
    check_apart(await asyncio.gather(*waiting))
    await harness.subscribed(0)


async def test_one_handle_raises_another_exception_each_time(harness: Harness) -> None:
    worker, reader = await harness.pair()
    handle, group = reader.result("t"), reader.group(["t", "u"])
    waiting = [asyncio.create_task(caught(handle.get())) for _ in range(2)]
    waiting += [asyncio.create_task(caught(group.get())) for _ in range(2)]
    await harness.subscribed(2)
    await fail(worker)
    errors = await asyncio.gather(*waiting)
    for _ in range(2):
        errors += [await caught(handle), await returned(handle.get(propagate=False)), await caught(group)]
        errors += [handle.value(), group.value()[0]]
    check_apart(errors)


async def test_an_eager_result_keeps_no_traceback_of_the_one_before() -> None:
    result = aioresult.EagerResult[Any]("t", ValueError("x"), "FAILURE")
    depths = []
    for _ in range(3):
        error, depth = await caught(result), 0
        trace = error.__traceback__
        while trace is not None:
            trace, depth = trace.tb_next, depth + 1
        depths.append(depth)
        del error
    assert len(set(depths)) == 1


class Local:
    """What a request has in a local variable while it waits."""


async def wait_with_a_local(awaitable: Callable[[], Awaitable[Any]]) -> weakref.ref[Local]:
    local = Local()
    try:
        await awaitable()
    except aioresult.AioResultError as exc:
        exc.add_note("seen")
    except ValueError as exc:
        exc.add_note("seen")
    return weakref.ref(local)


KEPT = ["result", "group", "nested group", "gathered", "propagate=False"]


@pytest.mark.parametrize("store_name", ["memory"], indirect=True)
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("when", ["before", "during the wait"])
@pytest.mark.parametrize("outcome", ["failure", "undecodable"])
async def test_a_handle_that_is_kept_keeps_no_frames_alive(
    harness: Harness, kept: str, when: str, outcome: str
) -> None:
    """Nor does the backend that told the failure."""
    worker, reader = await harness.pair()
    handle = reader.result("t")
    group = reader.group([reader.group([handle]) if kept == "nested group" else handle, "t"])

    async def reraise() -> None:
        error = await handle.get(propagate=False)
        assert isinstance(error, Exception)
        raise error

    ways: dict[str, Callable[[], Awaitable[Any]]] = {
        "result": handle.get,
        "gathered": lambda: aioresult.gather(handle),
        "propagate=False": reraise,
    }
    wait = ways.get(kept, group.get)
    store = fail(worker) if outcome == "failure" else harness.put_raw("t", b"{")
    if when == "before":
        await store
        local = await wait_with_a_local(wait)
    else:
        waiting = asyncio.create_task(wait_with_a_local(wait))
        await harness.subscribed(1)
        await store
        local = await waiting
        del waiting
    await asyncio.sleep(0)
    gc.collect()
    assert local() is None
    assert (handle.id, len(group)) == ("t", 2)
    assert reader.is_open


async def test_waiters_of_a_result_that_cannot_be_read_have_errors_of_their_own(harness: Harness) -> None:
    reader = await harness.connect()
    calls: list[Awaitable[BaseException]] = [caught(reader.wait_for("t")) for _ in range(2)]
    calls += [caught(reader.result("t").get()), caught(reader.group(["t"]).get()), caught(reader.group(["t"]).get())]
    waiting = [asyncio.ensure_future(call) for call in calls]
    await harness.subscribed(1)
    await harness.put_raw("t", b"{")
    errors = await asyncio.gather(*waiting)
    reads = [reader.get_task_meta("t"), reader.get_many(["t"]), reader.get_task_meta("t")]
    errors += await asyncio.gather(*map(caught, reads))
    check_distinct(errors, DecodeError)


# -- one error for many callers -------------------------------------------------------------------------------------


def check_distinct(errors: Sequence[BaseException], kind: type[BaseException]) -> None:
    assert {type(error) for error in errors} == {kind}
    assert len({id(error) for error in errors}) == len(errors)
    for number, error in enumerate(errors):
        error.add_note(str(number))
    assert [error.__notes__ for error in errors] == [[str(number)] for number in range(len(errors))]


async def test_those_that_wait_when_a_backend_closes_have_errors_of_their_own(harness: Harness) -> None:
    backend = await harness.make().open()
    waiting = [asyncio.create_task(caught(backend.wait_for(task_id))) for task_id in ("a", "a", "b")]
    waiting += [asyncio.create_task(caught(backend.group(["a", "c"]).get())) for _ in range(2)]
    waiting += [asyncio.create_task(caught(backend.chord("g").get())) for _ in range(2)]
    await subscribed(backend, 4)
    await backend.aclose()
    errors = await asyncio.gather(*waiting)
    errors += [await caught(backend.exists("t")), await caught(backend.mark_as_done("t", 1))]
    check_distinct(errors, BackendClosedError)


@pytest.mark.parametrize("store_name", ["memory"], indirect=True)
@pytest.mark.parametrize("in_flight", [True, False], ids=["in flight", "queued"])
async def test_calls_that_end_with_the_backend_have_errors_of_their_own(harness: Harness, in_flight: bool) -> None:
    backend = harness.make()
    backend.store_parallel = 1
    gates = [Gate(backend, name) for name in ("_store", "_fetch", "_store_group", "_chord_steps")]
    await backend.open()

    def calls() -> list[asyncio.Task[BaseException]]:
        begun = [
            backend.mark_as_done("t", 1),
            backend.mark_as_done("u", 1),
            backend.get_task_meta("t"),
            backend.get_task_meta("u"),
            backend.save_group("g", backend.group(["t"])),
            backend.save_group("h", backend.group(["t"])),
            backend.chord("c").progress(),
            backend.chord("d").progress(),
        ]
        return [asyncio.create_task(caught(call)) for call in begun]

    waiting = calls()
    for gate in gates:
        await gate.reached.wait()
    if not in_flight:
        waiting += calls()
        await asyncio.sleep(0)
    await backend.aclose()
    check_distinct(await asyncio.gather(*waiting), BackendClosedError)


#: The primitive that fails, and a call, one of several, that needs it.
BATCHED: dict[str, tuple[str, Callable[[Backend, int], Awaitable[Any]]]] = {
    "stores": ("_store", lambda backend, number: backend.mark_as_done(f"t{number}", 1)),
    "stores of one id": ("_store", lambda backend, number: backend.store_result("t", number, "PROGRESS")),
    "reads": ("_fetch", lambda backend, number: backend.get_task_meta(f"t{number}")),
    "reads of one id": ("_fetch", lambda backend, number: backend.get_task_meta("t")),
    "reads of many": ("_fetch", lambda backend, number: backend.get_many(["t", "u"])),
    "removals": ("_delete", lambda backend, number: backend.forget(f"t{number}")),
    "waits": ("_subscribe", lambda backend, number: backend.wait_for(f"t{number}")),
    "waits for one id": ("_subscribe", lambda backend, number: backend.wait_for("t")),
    "groups": ("_fetch_group", lambda backend, number: backend.restore_group("g")),
    "chords": ("_chord_steps", lambda backend, number: backend.chord("g").progress()),
}


@pytest.mark.parametrize("store_name", ["memory"], indirect=True)
@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("kind", [BackendRefusedError, BackendConnectionError, BackendError])
async def test_callers_of_a_batch_that_fails_have_errors_of_their_own(
    harness: Harness, name: str, kind: type[BackendError]
) -> None:
    primitive, call = BATCHED[name]
    if primitive == "_subscribe" and kind is BackendConnectionError:  # which a wait survives
        kind = BackendRefusedError
    backend = harness.make(retry_for=0)

    async def refuse(original: Primitive, *args: Any) -> Any:
        raise kind("no")

    await harness.open(backend)
    await asyncio.gather(*(backend.mark_as_started(task_id) for task_id in ("t", "t0", "t1", "t2", "t3")))
    await backend.aclose()
    intercept(backend, primitive, refuse)
    await harness.open(backend)
    calls = [call(backend, number) for number in range(3)]
    errors = await asyncio.gather(*map(caught, calls))
    errors.append(await caught(call(backend, 3)))
    check_distinct(errors, kind)


async def test_calls_that_an_outage_ends_have_errors_of_their_own(harness: Harness) -> None:
    """Also those of other kinds, which had not had their turn. The braces keep all ids in one shard."""
    backend = harness.make(retry_for=0)
    backend.store_parallel = 1
    gates = [Gate(backend, name) for name in ("_store", "_chord_steps")]

    async def break_off(original: Primitive, *args: Any) -> Any:
        raise BackendConnectionError("away")

    intercept(backend, "_fetch", break_off)
    await harness.open(backend)
    under_way: list[asyncio.Task[Any]] = [asyncio.create_task(backend.mark_as_done("{x}first", 1))]
    under_way += [asyncio.create_task(caught(backend.chord(f"{{x}}g{number}").progress())) for number in range(2)]
    for gate in gates:
        await gate.reached.wait()
    queued = [asyncio.create_task(caught(backend.mark_as_done(f"{{x}}t{number}", 1))) for number in range(3)]
    await asyncio.sleep(0)
    reads = [asyncio.create_task(caught(backend.get_task_meta(f"{{x}}t{number}"))) for number in range(3)]
    errors = await asyncio.gather(*queued, *reads)
    for gate in gates:
        gate.open.set()
    await asyncio.wait(under_way)
    check_distinct(errors, BackendConnectionError)
