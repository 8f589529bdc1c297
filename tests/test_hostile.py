"""Whoever can write to the store, or speak for the server: what that does to those who only read."""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
import redis.asyncio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import aioresult
from aioresult import AioResultError, Backend, BackendError, BackendGetMetaError, BackendStoreError, TaskMeta
from aioresult.states import EXCEPTION_STATES, SUCCESS

from .conformance.test_waiting import Recorder
from .fuzz import targets
from .harness import Harness, until
from .postgres_harness import PostgresHarness
from .servers import PostgresServer, RedisServer, TcpProxy

unhurried = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


# -- whatever is stored ---------------------------------------------------------------------------------------------

_ANY_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)
_ANY_RESULT = st.fixed_dictionaries(
    {"status": st.sampled_from([SUCCESS, "STARTED", *sorted(EXCEPTION_STATES)]) | _ANY_JSON},
    optional=dict.fromkeys(("result", "traceback", "children", "date_done", "group_id", "args"), _ANY_JSON),
).map(lambda fields: json.dumps(fields).encode())
_ANY_BYTES = st.one_of(
    _ANY_RESULT,
    st.binary(max_size=200),
    st.binary(max_size=50).map(lambda data: b"\x00celery-compressed\x00application/x-gzip\x00" + data),
    st.sampled_from(targets.SEEDS["codec"]),
)


@pytest.fixture
async def pair(harness: Harness) -> tuple[Backend, Backend]:
    return await harness.pair()


@unhurried
@given(data=_ANY_BYTES)
@example(b'{"status": "FAILURE", "result": {"exc_module": "os", "exc_type": "system", "exc_message": "true"}}')
@example(b'{"status": "FAILURE", "result": {"exc_module": "builtins", "exc_type": "SystemExit", "exc_message": [1]}}')
@example(b'{"status": "SUCCESS", "result": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
@example(b'{"status": "SUCCESS", "result": ' + b"9" * 10_000 + b"}")
@example(b'{"status": "SUCCESS", "children": [[["t", null], [[["t", null], null]]]]}')
async def test_no_stored_bytes_whatever_harm_anybody_but_those_who_wait_for_them(
    harness: Harness, pair: tuple[Backend, Backend], data: bytes
) -> None:
    """They get a meta or an error of ours; the listener and everybody else go on."""
    worker, web = pair
    await asyncio.gather(worker.forget("bad"), worker.forget("good"))
    bad = asyncio.ensure_future(web.wait_for("bad"))
    good = asyncio.ensure_future(web.wait_for("good"))
    await harness.subscribed(2)
    await harness.put_raw("bad", data)
    await harness.put_raw("bad", b"{")  # in case the first was of a task that still runs
    (outcome,) = await asyncio.gather(bad, return_exceptions=True)
    assert isinstance(outcome, (TaskMeta, AioResultError))
    assert "bad" in (outcome.task_id if isinstance(outcome, TaskMeta) else str(outcome))
    assert not good.done()
    await worker.mark_as_done("good", 1)
    assert (await good).result == 1


@unhurried
@given(
    status=st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=50),
    result=st.none() | _ANY_BYTES,
    children=st.none() | _ANY_BYTES,
    stamps=st.none() | _ANY_BYTES,
)
async def test_no_row_whatever_harms_anybody_but_those_who_wait_for_it(
    postgres_pair: tuple[PostgresHarness, Backend, asyncpg.Connection[Any]],
    status: str,
    result: bytes | None,
    children: bytes | None,
    stamps: bytes | None,
) -> None:
    harness, web, admin = postgres_pair
    bad, recorder = Recorder(), Recorder()
    web.watch("bad", bad)
    web.watch("good", recorder)
    await harness.subscribed(2)
    await admin.execute(
        "INSERT INTO celery_taskmeta (id, task_id, status, result, children, stamps) "
        "VALUES (nextval('task_id_sequence'), 'bad', $1, $2, $3, $4)",
        status,
        result,
        children,
        stamps,
    )
    outcome = await bad._told.get()
    assert isinstance(outcome, (TaskMeta, AioResultError))
    web.unwatch("bad", bad)
    await web.store_result("good", 1, "PROGRESS")
    assert await recorder.heard() == "PROGRESS"
    web.unwatch("good", recorder)
    await admin.execute("DELETE FROM celery_taskmeta")


@pytest.fixture
async def postgres_pair(
    postgres_url: str,
) -> AsyncIterator[tuple[PostgresHarness, Backend, asyncpg.Connection[Any]]]:
    harness = PostgresHarness(postgres_url)
    web = await harness.connect()
    admin = await asyncpg.connect(postgres_url)
    yield harness, web, admin
    await admin.close()
    await harness.close()


# -- whatever a server says -----------------------------------------------------------------------------------------


@unhurried
@given(
    data=st.lists(
        st.sampled_from([*targets.SEEDS["redis"], b"*3\r\n", b"$1\r\n", b"\r\n", b">2\r\n", b":1\r\n", b"*-1\r\n"])
        | st.binary(max_size=10),
        max_size=8,
    ).map(b"".join),
    listening=st.booleans(),
)
async def test_no_bytes_whatever_get_past_a_redis_connection(data: bytes, listening: bool) -> None:
    await targets.redis_replies(data, listening)


@pytest.mark.parametrize("data", targets.SEEDS["redis"])
@pytest.mark.parametrize("listening", [True, False])
async def test_odd_replies(data: bytes, listening: bool) -> None:
    await targets.redis_replies(data, listening)


@unhurried
@given(text=st.text(max_size=50) | st.sampled_from(targets.SEEDS["postgres"]).map(bytes.decode))
def test_no_payload_whatever_upsets_a_listener(text: str) -> None:
    targets.notification(text)


@pytest.mark.parametrize(
    "payload", ["", " ", "x y", "-1 a", "9" * 5000 + " a", "chord", "ready ", "ready \x01", "\u0661 a"]
)
async def test_a_notification_of_anybodys_making_disturbs_nobody(
    postgres_pair: tuple[PostgresHarness, Backend, asyncpg.Connection[Any]],
    payload: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    harness, web, admin = postgres_pair
    waiting = asyncio.ensure_future(web.wait_for("t"))
    await harness.subscribed(1)
    await admin.execute("SELECT pg_notify($1, $2)", web._channel("t"), payload)  # type: ignore[attr-defined]
    await web.mark_as_done("t", 1)
    assert (await waiting).result == 1
    assert caplog.records == []


@pytest.mark.parametrize("payload", [b"", b"\x00", b"\xff\xfe", b"x" * 2000, b"a\x00b"])
async def test_a_chord_announced_by_anybody_stops_no_dispatcher(
    redis_url: str, redis_client: redis.asyncio.Redis, payload: bytes
) -> None:
    """Neither on the channel of completed chords nor in the set of those that may be."""
    async with aioresult.connect(redis_url) as backend:
        await redis_client.zadd("aioresult-chords", {payload: 10**12})
        chords = backend.ready_chords()
        dispatching = asyncio.ensure_future(anext(chords))
        await until(
            lambda: backend._shards[0].hub.has_waiters("\x00chords") and not backend._shards[0].hub._to_subscribe
        )
        await redis_client.publish("aioresult-chords", payload)
        await backend.create_chord("sound", size=0)
        assert (await dispatching).id == "sound"
        await chords.aclose()


@pytest.mark.parametrize("data", [b"", b"\xff", b"{}", b"[1]", b"[1, 2, 3, 4]", b'[1, "t", "SUCCESS"]', b"[" * 10_000])
@pytest.mark.parametrize("where", ["part", "body"])
async def test_a_chord_that_somebody_damaged_is_an_error_by_name_and_stops_no_dispatcher(
    redis_url: str, redis_client: redis.asyncio.Redis, data: bytes, where: str
) -> None:
    async with aioresult.connect(redis_url) as backend:
        await backend.create_chord("bad", body="body", size=1)
        if where == "body":
            data = b"{" + data
            assert await redis_client.hset("celery-taskset-meta-bad.a", "body", data) == 0  # in place of what was there
            await backend.on_chord_part_return("bad", "t", SUCCESS, 1, lease=0)
        else:
            await redis_client.zadd("celery-taskset-meta-bad.j", {data: 0})
            with pytest.raises(AioResultError, match="chord bad"):
                await backend.chord("bad").get(timeout=20)
        chords = backend.ready_chords()
        dispatching = asyncio.ensure_future(anext(chords))
        await backend.create_chord("sound", size=0)
        assert (await dispatching).id == "sound"
        await chords.aclose()
        await redis_client.delete("celery-taskset-meta-bad.c")  # the claim of the dispatcher, which is still held
        with pytest.raises(AioResultError, match="chord bad"):
            await backend.chord("bad").claim()


# -- keys and ids ---------------------------------------------------------------------------------------------------


async def test_a_key_of_another_kind_is_an_error_for_its_own_id_alone(
    redis_url: str, redis_client: redis.asyncio.Redis
) -> None:
    async with aioresult.connect(redis_url) as backend:
        await redis_client.lpush("celery-task-meta-bad", "x")
        waiting = [asyncio.ensure_future(backend.wait_for(task_id)) for task_id in ("a", "bad", "b")]
        reading = [asyncio.ensure_future(backend.get_task_meta(task_id)) for task_id in ("a", "bad", "b")]
        storing = [asyncio.ensure_future(backend.mark_as_done(task_id, 1)) for task_id in ("a", "bad", "b")]
        assert all(await asyncio.gather(storing[0], storing[2]))
        assert [(await each).result for each in (waiting[0], waiting[2])] == [1, 1]
        assert [(await each).task_id for each in (reading[0], reading[2])] == ["a", "b"]
        for harmed, error in (
            (waiting[1], BackendGetMetaError),
            (reading[1], BackendGetMetaError),
            (storing[1], BackendStoreError),
        ):
            with pytest.raises(error, match=r"celery-task-meta-bad.*WRONGTYPE"):
                await harmed


async def test_a_group_whose_id_is_the_key_of_a_chord_gets_an_error_by_name(
    redis_url: str, redis_client: redis.asyncio.Redis
) -> None:
    """Celery's keys collide there (docs/guarantees.md); what matters is that nobody takes one for the other."""
    async with aioresult.connect(redis_url) as backend:
        await backend.create_chord("g", size=2)
        await backend.on_chord_part_return("g", "t", SUCCESS, 1, index=0)
        with pytest.raises(BackendGetMetaError, match=r"g\.j.*WRONGTYPE"):
            await backend.restore_group("g.j")
        await backend.save_group("g.j", backend.group(["a"], "g.j"))
        with pytest.raises(BackendStoreError, match=r"chord g.*WRONGTYPE"):
            await backend.on_chord_part_return("g", "u", SUCCESS, 2, index=1)


@pytest.mark.parametrize(
    "state", ["'; DROP TABLE celery_taskmeta; --", "12 34", " ", "a\nb", "$1", "%s", "日本", "ready x"]
)
async def test_a_state_of_any_form_is_kept_and_heard_of(harness: Harness, state: str) -> None:
    worker, web = await harness.pair()
    recorder = Recorder()
    web.watch("t", recorder)
    await harness.subscribed(1)
    await worker.store_result("t", 1, state)
    assert await recorder.heard() == state
    assert (await web.get_task_meta("t")).status == state


# -- what is shown --------------------------------------------------------------------------------------------------

SECRET = "s3cr3t%2Fw%40rd"


def shown(error: BaseException) -> str:
    """All that a log of it would hold."""
    return f"{error!r} {error} {''.join(traceback.format_exception(error))}"


@pytest.fixture(params=["redis", "postgres"])
def server(request: pytest.FixtureRequest) -> RedisServer | PostgresServer:
    request.getfixturevalue(f"{request.param}_url")
    found: RedisServer | PostgresServer = request.getfixturevalue(f"own_{request.param}")
    return found


async def test_a_password_is_shown_nowhere_whatever_goes_wrong(
    server: RedisServer | PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    user = "postgres"
    if isinstance(server, RedisServer):
        user = "shopkeeper"
        async with redis.asyncio.Redis.from_url(server.url) as client:
            await client.acl_setuser(
                user, enabled=True, passwords=["+s3cr3t/w@rd"], keys=["*"], commands=["+@all"], channels=["*"]
            )
    scheme, _, rest = server.url.partition("://")
    where = rest.rpartition("/")[2]
    seen: list[str] = []

    def make(port: int, password: str = SECRET, database: str = where, who: str = user) -> Backend:
        return aioresult.connect(
            f"{scheme}://{who}:{password}@127.0.0.1:{port}/{database}", heartbeat=0.2, retry_for=0.1
        )

    async with TcpProxy(server.port) as proxy:
        for failing in (
            make(1),
            make(server.port, "wrong" + SECRET, who="nobody"),
            make(server.port, database="999999"),
        ):
            seen.append(repr(failing))
            with pytest.raises(BackendError) as caught:
                await failing.open()
            seen.append(shown(caught.value))
        backend = await make(proxy.port).open()
        waiting = asyncio.ensure_future(backend.wait_for("t"))
        await until(lambda: "t" in backend._shards[0].hub._topics and backend._shards[0].hub._topics["t"].subscribed)
        proxy.refuse()
        proxy.cut()
        for call in (backend.mark_as_done("t", 1), backend.get_task_meta("t"), backend.restore_group("t")):
            with pytest.raises(BackendError) as caught:
                await call
            seen.append(shown(caught.value))
        await until(lambda: "trying again" in caplog.text)
        seen += [repr(backend), repr(backend.result("t")), str(backend.group(["t"])), backend.as_uri()]
        await backend.aclose()
        with pytest.raises(BackendError) as caught:
            await waiting
        seen.append(shown(caught.value))
    if isinstance(server, RedisServer):
        async with redis.asyncio.Redis.from_url(server.url) as client:
            await client.acl_deluser(user)
    seen.append(caplog.text)
    seen += [repr(record.__dict__) for record in caplog.records]
    for text in seen:
        assert "s3cr3t" not in text
        assert "w@rd" not in text
