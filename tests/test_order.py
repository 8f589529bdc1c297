"""The order of calls with one id, whatever has to be repeated in between, and what may replace what."""

from __future__ import annotations

import asyncio
import random
import sys
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import asyncpg
import pytest
import redis.asyncio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import aioresult
import aioresult.retry
from aioresult import Backend, BackendConnectionError, DecodeError
from aioresult.record import Record
from aioresult.states import EXCEPTION_STATES, FAILURE, PENDING, READY_STATES, RETRY, REVOKED, STARTED, SUCCESS

from .harness import Harness, RedisHarness, intercept, until
from .postgres_harness import PostgresHarness
from .servers import PostgresServer, RedisServer, TcpProxy, redis_server

#: Sentinels change nothing of this.
BACKENDS = ["memory", "redis", "postgres", "cluster"]

PROGRESS = "PROGRESS"
FORGET = "forget"
Primitive = Callable[..., Awaitable[Any]]

servers = pytest.mark.parametrize("store_name", ["redis", "postgres"], indirect=True)


# -- the model ------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A store of a state, or a forget; the number tells it from all others."""

    what: str
    task_id: str
    number: int


#: A state and the number of the call that stored it; ``None`` for nothing.
State = tuple[str, int] | None


def after(state: State, call: Call) -> State:
    """What is stored after the call, if ``state`` was before."""
    if call.what == FORGET:
        return None
    if state is not None and (state[0] == SUCCESS or (state[0] in READY_STATES and call.what == PROGRESS)):
        return state
    return call.what, call.number


def after_all(calls: Iterable[Call]) -> dict[str, State]:
    states: dict[str, State] = {}
    for call in calls:
        states[call.task_id] = after(states.get(call.task_id), call)
    return states


async def perform(backend: Backend, call: Call) -> None:
    if call.what == FORGET:
        await backend.forget(call.task_id)
    else:
        value = ValueError(call.number) if call.what in EXCEPTION_STATES else call.number
        await backend.store_result(call.task_id, value, call.what)


async def stored(backend: Backend, task_id: str) -> State:
    meta = await backend.get_task_meta(task_id)
    return None if meta.status == PENDING else (meta.status, int(str(meta.result)))


async def all_stored(backend: Backend, task_ids: Iterable[str]) -> dict[str, State]:
    return {task_id: await stored(backend, task_id) for task_id in task_ids}


async def turns(count: int) -> None:
    """Let the event loop go round so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


# -- generated trouble, in memory -----------------------------------------------------------------------------------


class Trouble(NamedTuple):
    """What happens to one call of a primitive that fails, or is only slow."""

    #: The turns of the event loop that it takes on its way, and on the way back.
    way: int
    way_back: int
    #: How much of it is carried out.
    share: float
    fails: bool
    in_flight: bool


class Step(NamedTuple):
    what: str
    task_id: str
    #: Turns of the event loop after it was called.
    turns: int
    #: After how many further turns its caller is cancelled, if it is.
    leaves: int | None


SHARES = st.sampled_from([0.0, 0.5, 1.0])
TROUBLE = st.builds(Trouble, st.integers(0, 4), st.integers(0, 4), SHARES, st.booleans(), st.booleans())
STATES = [STARTED, PROGRESS, FAILURE, RETRY, REVOKED, SUCCESS]
STAYS = st.builds(Step, st.sampled_from([*STATES, FORGET]), st.sampled_from("abc"), st.integers(0, 2), st.none())
LEAVES = st.builds(
    Step, st.sampled_from([*STATES, FORGET]), st.sampled_from("abc"), st.integers(0, 2), st.none() | st.integers(0, 6)
)


def lost(trouble: Trouble) -> BackendConnectionError:
    error = BackendConnectionError("lost")
    error.in_flight = trouble.in_flight
    return error


def make_trouble(backend: Backend, troubles: Sequence[Trouble]) -> None:
    """Have each call of `_store` and `_delete` meet the next trouble; after the last, all goes well."""
    left = iter(troubles)

    async def around(original: Primitive, *columns: Sequence[Any]) -> Any:
        trouble = next(left, Trouble(0, 0, 1.0, False, False))
        await turns(trouble.way)
        size = len(columns[0])
        carried = round(size * trouble.share) if trouble.fails else size
        outcome = await original(*(column[:carried] for column in columns)) if carried else None
        await turns(trouble.way_back)
        if trouble.fails:
            raise lost(trouble)
        return outcome

    intercept(backend, "_store", around)
    intercept(backend, "_delete", around)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again in the next turn of the event loop."""
    monkeypatch.setattr(aioresult.retry.Backoff, "pause", lambda self: 0.0)


async def play(steps: Sequence[Step], troubles: Sequence[Trouble], chunk: int) -> None:
    backend = aioresult.connect("memory://")
    backend.store_chunk, backend.store_parallel = chunk, 3
    make_trouble(backend, troubles)
    #: A call whose caller left took effect in its place, or not at all.
    possible: dict[str, set[State]] = {task_id: {None} for task_id in "abc"}
    calls: list[asyncio.Task[None]] = []
    async with backend:
        for number, step in enumerate(steps):
            call = Call(step.what, step.task_id, number)
            task = asyncio.create_task(perform(backend, call))
            before = possible[call.task_id]
            possible[call.task_id] = {after(state, call) for state in before}
            await turns(step.turns)
            if step.leaves is not None:
                await turns(step.leaves)
                task.cancel()
                possible[call.task_id] |= before
            calls.append(task)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert all(outcome is None or isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        await until(lambda: not backend._shards[0].writes._in_flight and not backend._shards[0].writes._tails)
        for task_id, states in possible.items():
            assert await stored(backend, task_id) in states


generated = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@generated
@given(steps=st.lists(STAYS, max_size=25), troubles=st.lists(TROUBLE, max_size=12), chunk=st.integers(1, 6))
@example(
    [Step(STARTED, "a", 2, None), Step(FAILURE, "a", 2, None)],
    [Trouble(4, 4, 0.0, True, False), *[Trouble(0, 0, 1.0, False, False)] * 2],
    1,
)
async def test_whatever_fails_in_between_the_outcome_is_that_of_one_call_after_the_other(
    no_pauses: None, steps: list[Step], troubles: list[Trouble], chunk: int
) -> None:
    await play(steps, troubles, chunk)


@generated
@given(steps=st.lists(LEAVES, max_size=25), troubles=st.lists(TROUBLE, max_size=12), chunk=st.integers(1, 6))
async def test_a_call_whose_caller_leaves_takes_effect_in_its_place_or_not_at_all(
    no_pauses: None, steps: list[Step], troubles: list[Trouble], chunk: int
) -> None:
    await play(steps, troubles, chunk)


@pytest.mark.parametrize("what", [STARTED, FORGET])
async def test_a_call_whose_caller_has_left_is_not_sent_again(harness: Harness, no_pauses: None, what: str) -> None:
    backend = harness.make()
    sent: list[str] = []
    failed = asyncio.Event()

    async def fail_once(original: Primitive, *columns: Sequence[Any]) -> Any:
        sent.extend(each.task_id if isinstance(each, Record) else str(each) for each in columns[0])
        if not failed.is_set():
            failed.set()
            raise BackendConnectionError("away")
        return await original(*columns)

    await harness.open(backend)
    await backend.store_result("t", 0, PROGRESS)
    intercept(backend, "_store", fail_once)
    intercept(backend, "_delete", fail_once)
    backend._store_at_once = lambda record, done: False  # type: ignore[method-assign]
    leaver = asyncio.create_task(perform(backend, Call(what, "t", 1)))
    await failed.wait()
    leaver.cancel()
    assert await backend.mark_as_failure("t", ValueError(2))
    assert sent == ["t", "t"]  # the one that failed, and the one after it
    assert await stored(backend, "t") == (FAILURE, 2)


# -- on real servers ------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [{}, {"compression": "gzip"}]


class Story:
    """Calls by chance, submitted without waiting for any."""

    def __init__(self, backend: Backend, seed: int, ids: int = 20) -> None:
        self._backend = backend
        self._chance = random.Random(seed)
        self._ids = [f"t{number}" for number in range(ids)]
        self.calls: list[Call] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def go_on(self, count: int = 100) -> None:
        for _ in range(count):
            call = Call(self._chance.choice([*STATES, FORGET]), self._chance.choice(self._ids), len(self.calls))
            self.calls.append(call)
            self._tasks.append(asyncio.create_task(perform(self._backend, call)))
        await turns(self._chance.randrange(4))

    async def end(self) -> None:
        await asyncio.gather(*self._tasks)
        assert await all_stored(self._backend, self._ids) == after_all(
            [*(Call(FORGET, task_id, -1) for task_id in self._ids), *self.calls]
        )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", range(3))
async def test_a_script_that_redis_forgets_puts_no_call_before_another(
    redis_url: str, redis_client: redis.asyncio.Redis, seed: int, options: dict[str, Any]
) -> None:
    backend = aioresult.connect(redis_url, **options)
    backend.store_chunk = 5
    async with backend:
        story = Story(backend, seed)
        for _ in range(20):
            await story.go_on()
            await redis_client.script_flush()
        await story.end()


@servers
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", range(2))
async def test_connections_that_are_killed_put_no_call_before_another(
    harness: Harness, seed: int, options: dict[str, Any]
) -> None:
    assert isinstance(harness, (RedisHarness, PostgresHarness))
    deaths = 0

    async def count_deaths(original: Primitive, *args: Any) -> Any:
        nonlocal deaths
        try:
            return await original(*args)
        except BackendConnectionError:
            deaths += 1
            raise

    backend = harness.make(**options)
    backend.store_chunk = 10
    for primitive in ("_store", "_delete"):
        intercept(backend, primitive, count_deaths)
    await harness.open(backend)
    story = Story(backend, seed)
    while deaths < 3:
        await story.go_on(200)
        await kill_connections(harness.url)
    await story.end()


async def kill_connections(url: str) -> None:
    """All but one's own, as an administrator would."""
    if url.startswith("redis"):
        async with redis.asyncio.Redis.from_url(url) as client:
            await client.client_kill_filter(_type="normal", skipme=True)
    else:
        connection = await asyncpg.connect(url)
        try:
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
        finally:
            await connection.close()


@pytest.fixture(params=["redis", "postgres"])
def own_server(request: pytest.FixtureRequest) -> RedisServer | PostgresServer:
    request.getfixturevalue(f"{request.param}_url")  # which empties it
    server: RedisServer | PostgresServer = request.getfixturevalue(f"own_{request.param}")
    return server


class Line(NamedTuple):
    """A server, seen directly and through a proxy that may misbehave."""

    proxy: TcpProxy
    url: str
    url_of_proxy: str


@pytest.fixture
async def line(own_server: RedisServer | PostgresServer) -> AsyncIterator[Line]:
    async with TcpProxy(own_server.port) as proxy:
        yield Line(proxy, own_server.url, own_server.url.replace(str(own_server.port), str(proxy.port)))


async def test_two_stores_during_an_outage_keep_their_order(line: Line) -> None:
    async with aioresult.connect(line.url_of_proxy) as backend:
        await backend.mark_as_started("t")
        line.proxy.refuse()
        line.proxy.cut()
        before = line.proxy.accepted
        early = asyncio.create_task(backend.store_result("t", 1, PROGRESS))
        await until(lambda: line.proxy.accepted > before)
        late = asyncio.create_task(backend.mark_as_failure("t", ValueError(2)))
        await until(lambda: line.proxy.accepted > before + 2)
        line.proxy.refuse(False)
        assert all(await asyncio.gather(early, late))
        assert await stored(backend, "t") == (FAILURE, 2)


@pytest.fixture
def mortal() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


async def test_a_store_that_was_given_up_during_an_outage_is_not_stored_after_it(
    mortal: RedisServer, no_pauses: None
) -> None:
    async with aioresult.connect(mortal.url) as backend:
        await asyncio.to_thread(mortal.stop)
        given_up = asyncio.create_task(backend.mark_as_started("t"))
        await until(lambda: backend._shards[0].persistence.down_since is not None)
        given_up.cancel()
        await asyncio.to_thread(mortal.start)
        assert await backend.mark_as_failure("t", ValueError(1))
        await until(lambda: not backend._shards[0].writes._tasks)
        assert await stored(backend, "t") == (FAILURE, 1)


# -- forgetting, repeated -------------------------------------------------------------------------------------------


@servers
@pytest.mark.parametrize("carried_out", [True, False])
async def test_a_repeated_forget_leaves_what_another_process_stored_after_its_first_attempt(
    harness: Harness, no_pauses: None, carried_out: bool
) -> None:
    mine, other = harness.make(), await harness.connect()
    attempts = 0

    async def lose_the_first_reply(original: Primitive, *args: Any) -> None:
        nonlocal attempts
        attempts += 1
        if attempts > 1:
            await original(*args)
            return
        if carried_out:
            await original(*args)
        assert await other.mark_as_done("t", "new") is True
        raise lost(Trouble(0, 0, 1.0, True, True))

    intercept(mine, "_delete", lose_the_first_reply)
    await harness.open(mine)
    await other.store_result("t", "old", PROGRESS)
    await other.mark_as_done("bystander", 1)
    await asyncio.gather(mine.forget("t"), mine.forget("bystander"))
    assert attempts > 1
    assert (await other.get_task_meta("t")).result == "new"
    assert not await other.exists("bystander")


async def test_a_forget_whose_reply_is_lost_on_the_way_deletes_nothing_that_came_later(line: Line) -> None:
    async with (
        aioresult.connect(line.url_of_proxy, heartbeat=60) as mine,
        aioresult.connect(line.url) as other,
    ):
        for task_id in ("warm up", "so that no statement is left to prepare"):
            await mine.forget(task_id)
            await mine.mark_as_done(task_id, 1)
            await mine.forget(task_id)
        await other.mark_as_done("t", "old")
        requests = 0

        def swallow_the_second_reply(data: bytes, to_server: bool) -> bytes:
            nonlocal requests
            requests += to_server
            return data if to_server or requests < 2 else b""  # the first asks what there is to forget

        line.proxy.filter = swallow_the_second_reply
        forgetting = asyncio.create_task(mine.forget("t"))

        async def gone() -> bool:
            return not await other.exists("t")

        await until(gone)
        assert await other.mark_as_done("t", "new") is True
        assert not forgetting.done()
        line.proxy.filter = None
        line.proxy.cut()
        await forgetting
        assert (await other.get_task_meta("t")).result == "new"


async def test_a_forget_that_found_nothing_deletes_nothing(harness: Harness) -> None:
    mine, other = await harness.pair()
    await mine.forget("t")
    assert await other.mark_as_done("t", 1)
    assert (await mine.get_task_meta("t")).result == 1


# -- what may replace what ------------------------------------------------------------------------------------------


def compressed(content_type: bytes, body: bytes) -> bytes:
    return b"\x00celery-compressed\x00" + content_type + b"\x00" + body


#: Successes that this process cannot read.
UNREADABLE = {
    "of yaml": b"children: []\nresult: 42\nstatus: SUCCESS\ntask_id: x\n",
    "of brotli": compressed(b"application/x-brotli", b"\x0b\x02\x80abc\x03"),
    "of zstd": compressed(b"application/zstd", b"\x28\xb5\x2f\xfd\x20\x00\x01\x00\x00"),
    "of gzip that is cut short": compressed(b"application/x-gzip", zlib.compress(b'{"status": "SUCCESS"}')[:-4]),
    "of pickle": b"\x80\x04}\x94\x8c\x06status\x94\x8c\x07SUCCESS\x94s.",
    "of msgpack": b"\x81\xa6status\xa7SUCCESS",
}
OF_UNKNOWN_TYPE = b'{"status": "SUCCESS", "result": {"__type__": "money", "__value__": "4 EUR"}, "task_id": "x"}'


async def try_to_replace(backend: Backend, what: str) -> bool:
    value = ValueError("second run") if what in EXCEPTION_STATES else "second run"
    return await backend.store_result("x", value, what)


@pytest.mark.parametrize("store_name", ["memory", "redis"], indirect=True)
@pytest.mark.parametrize("what", [STARTED, PROGRESS, RETRY, FAILURE, REVOKED, SUCCESS])
@pytest.mark.parametrize("kind", UNREADABLE)
async def test_a_success_that_this_process_cannot_read_is_not_overwritten(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, kind: str, what: str
) -> None:
    monkeypatch.setitem(sys.modules, "backports.zstd" if sys.version_info < (3, 14) else "compression.zstd", None)
    backend = await harness.connect()
    await harness.put_raw("x", UNREADABLE[kind])
    (before,) = await backend._fetch(["x"])
    if harness.judges_by_content:
        with pytest.raises(DecodeError, match="may be a success"):
            await try_to_replace(backend, what)
    else:
        assert await try_to_replace(backend, what) is False
    assert await backend._fetch(["x"]) == [before]
    await backend.forget("x")
    assert await try_to_replace(backend, what) is True


@pytest.mark.parametrize("store_name", ["memory", "redis"], indirect=True)
@pytest.mark.parametrize("what", [STARTED, PROGRESS, FAILURE, SUCCESS])
@pytest.mark.parametrize(
    "data",
    [
        OF_UNKNOWN_TYPE,
        OF_UNKNOWN_TYPE.replace(b'": ', b'":'),
        compressed(b"application/x-gzip", zlib.compress(OF_UNKNOWN_TYPE)),
    ],
    ids=["plain", "without spaces", "compressed"],
)
async def test_a_success_of_a_type_that_is_unknown_here_is_a_success(harness: Harness, what: str, data: bytes) -> None:
    backend = await harness.connect()
    await harness.put_raw("x", data)
    (before,) = await backend._fetch(["x"])
    assert await try_to_replace(backend, what) is False
    assert await backend._fetch(["x"]) == [before]


async def test_a_refused_store_over_an_unreadable_success_harms_no_other_of_its_batch(harness: Harness) -> None:
    backend = await harness.connect()
    await harness.put_raw("x", UNREADABLE["of yaml"])
    calls = [backend.mark_as_done(task_id, 1) for task_id in ("a", "x", "b")]
    before, outcome, behind = await asyncio.gather(*calls, return_exceptions=True)
    assert before is True
    assert isinstance(outcome, DecodeError) if harness.judges_by_content else outcome is False
    assert behind is True


FORMATS: list[dict[str, Any]] = [{}, {"compression": "gzip"}, {"serializer": "pickle", "accept": ["pickle"]}]


@pytest.mark.parametrize("options", FORMATS, ids=str)
@pytest.mark.parametrize("end", [FAILURE, REVOKED, SUCCESS])
async def test_a_late_progress_does_not_bring_a_task_back_to_life(
    harness: Harness, options: dict[str, Any], end: str
) -> None:
    backend = await harness.connect(**options)
    await perform(backend, Call(end, "t", 1))
    assert await backend.store_result("t", 2, PROGRESS) is False
    assert await stored(backend, "t") == (end, 1)


@pytest.mark.parametrize("options", FORMATS, ids=str)
@pytest.mark.parametrize("end", [FAILURE, REVOKED])
@pytest.mark.parametrize("begin", [STARTED, RETRY])
async def test_a_new_run_begins_anew(harness: Harness, options: dict[str, Any], end: str, begin: str) -> None:
    backend = await harness.connect(**options)
    for call in (Call(end, "t", 1), Call(begin, "t", 2)):
        await perform(backend, call)
        assert await stored(backend, "t") == (call.what, call.number)
    assert await backend.store_result("t", 3, PROGRESS) is True
    assert await backend.mark_as_done("t", 4) is True
    assert await stored(backend, "t") == (SUCCESS, 4)


@pytest.mark.parametrize("options", FORMATS, ids=str)
@pytest.mark.parametrize("end", [FAILURE, REVOKED])
@pytest.mark.parametrize("begin", [STARTED, RETRY])
async def test_a_new_run_and_its_first_progress_may_share_a_batch(
    harness: Harness, options: dict[str, Any], end: str, begin: str
) -> None:
    backend = await harness.connect(**options)
    await perform(backend, Call(end, "t", 1))
    await asyncio.gather(perform(backend, Call(begin, "t", 2)), perform(backend, Call(PROGRESS, "t", 3)))
    assert await stored(backend, "t") == (PROGRESS, 3)
    await asyncio.gather(perform(backend, Call(end, "t", 4)), perform(backend, Call(PROGRESS, "t", 5)))
    assert await stored(backend, "t") == (end, 4)


async def test_a_late_progress_wakes_nobody(harness: Harness) -> None:
    """Its message would be news of a task that is over."""
    worker, web = await harness.pair()
    told: list[str] = []

    class Watcher:
        def receive(self, task_id: str, outcome: Any) -> None:
            told.append(outcome.status)

    web.watch("t", Watcher())
    await harness.subscribed(1)
    await worker.mark_as_failure("t", ValueError(1))
    await until(lambda: bool(told))
    later = Watcher()
    web.watch("t", later, read_first=False)
    await worker.store_result("t", 2, PROGRESS)
    await until(lambda: len(told) == 2)
    assert told == [FAILURE, FAILURE]
