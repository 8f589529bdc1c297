"""What is specific to Redis in running tasks: its keys, its scripts, what others store there, what it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import hiredis
import pytest
import redis.asyncio
from redis.crc import key_slot

import aioresult
from aioresult import (
    BackendConnectionError,
    BackendError,
    BackendGetMetaError,
    BackendRefusedError,
    BackendStoreError,
    ContentDisallowed,
    DecodeError,
    TaskMeta,
)
from aioresult.backends.keyvalue import sibling
from aioresult.backends.redis import RedisBackend
from aioresult.backends.redis.connection import code_of, translate
from aioresult.backends.redis.runs import NOT_TOLD
from aioresult.exceptions import OutputSuperseded
from aioresult.log import OUTPUT_TOPIC, START, Entry, Flush, OutputNews, Page, PageRequest, Place
from aioresult.record import Record
from aioresult.run import RunOp, RunState, RunStep, Verdict
from aioresult.states import FAILURE, REVOKED, STARTED, SUCCESS

from .conformance.test_running_store import NO_GAP
from .harness import commands_of, until
from .servers import RedisServer, redis_server

Client = redis.asyncio.Redis
Call = Callable[[RedisBackend], Awaitable[Any]]

KEY = "celery-task-meta-t"
OUT, RUN = f"{{{KEY}}}.out", f"{{{KEY}}}.run"


@pytest.fixture
async def backend(redis_url: str) -> AsyncIterator[RedisBackend]:
    async with RedisBackend(redis_url) as backend:
        yield backend


def record(backend: RedisBackend, state: str, result: Any = None, task_id: str = "t", **terms: Any) -> Record:
    return Record(task_id, backend._encode(TaskMeta(task_id, state, result)), 600.0, **terms)


def start(backend: RedisBackend, run: str = "r1", task_id: str = "t", **terms: Any) -> RunStep:
    given = {"record": record(backend, STARTED, task_id=task_id), "lives": 600.0, **terms}
    return RunStep(RunOp.START, task_id, run, "w", **given)


def finish(backend: RedisBackend, state: str = SUCCESS, task_id: str = "t", **terms: Any) -> RunStep:
    given = {"record": record(backend, state, task_id=task_id), **terms}
    return RunStep(RunOp.FINISH, task_id, "r1", state=state, **given)


def revoke(backend: RedisBackend, task_id: str = "t", **terms: Any) -> RunStep:
    given = {"record": record(backend, REVOKED, KeyError("r"), task_id), "lives": 600.0, **terms}
    return RunStep(RunOp.REVOKE, task_id, reason="why", **given)


READ = RunStep(RunOp.READ, "t")


def opening(task_id: str = "t", **terms: Any) -> Flush:
    return Flush(task_id, "p", 0, 1, b"[1]", **{"expires": 600.0, **terms})


async def step(backend: RedisBackend, step: RunStep) -> RunState:
    (state,) = await backend._run_steps([step])
    if isinstance(state, BaseException):
        raise state
    return state


async def flush(backend: RedisBackend, flush: Flush) -> int:
    (outcome,) = await backend._append([flush])
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


async def page(backend: RedisBackend, after: Place | None = START, task_id: str = "t") -> Page:
    (found,) = await backend._pages([PageRequest(task_id, after, 100)])
    if isinstance(found, BaseException):
        raise found
    return found


async def dump(client: Client) -> dict[Any, Any]:
    return {key: await client.dump(key) for key in await client.keys()}


# -- round trips ------------------------------------------------------------------------------------------------------


async def test_flushes_looks_and_steps_of_many_tasks_share_a_round_trip(
    backend: RedisBackend, trips: list[int]
) -> None:
    ids = [f"t{n}" for n in range(20)]
    await backend._run_steps([start(backend, task_id=task_id) for task_id in ids])
    epochs = await backend._append([opening(task_id) for task_id in ids])
    flushes = [Flush(task_id, "p", int(str(epoch)), 2, b"[2]") for task_id, epoch in zip(ids, epochs, strict=True)]
    await backend._append(flushes)
    await backend._pages([PageRequest(task_id, START, 10) for task_id in ids])
    assert len(trips) == 4
    await backend._append(flushes)  # refused by the streams; what has become of them is one look more for all
    await backend._pages([PageRequest(task_id, Place(1, 10**9), 10) for task_id in ids])
    assert len(trips) == 7


@pytest.mark.parametrize("theirs", ["json", "gzip"])
@pytest.mark.parametrize("ours", ["json", "gzip"])
async def test_whether_the_task_is_over_is_read_before_its_log(
    redis_url: str, trips: list[int], ours: str, theirs: str
) -> None:
    """Whatever comes between two commands of a look: a task that is over has all its output."""
    options: dict[str, Any] = {"gzip": {"compression": "gzip"}, "json": {}}
    async with RedisBackend(redis_url, **options[ours]) as web, RedisBackend(redis_url, **options[theirs]) as worker:
        await step(worker, start(worker))
        epoch = await flush(worker, opening())
        trips.clear()
        await page(web)
        assert len(trips) == 1 + (ours == "json" and theirs == "gzip")
        execute, finals = web._execute, set()
        for when in range(5):
            done = 0

            async def one_by_one(commands: Sequence[Any], when: int = when) -> list[Any]:
                nonlocal done
                replies = []
                for command in commands:
                    if done == when:
                        await flush(worker, Flush("t", "p", epoch, 2, b"[2]"))
                        await worker._store([record(worker, SUCCESS)])
                    done += 1
                    replies += await execute([command])
                return replies

            web._execute = one_by_one  # type: ignore[method-assign]
            found = await page(web)
            finals.add(found.final)
            assert len(found.entries) == 2 or not found.final, when
            await worker.forget("t")
            await worker._store([record(worker, STARTED)])
            await flush(worker, Flush("t", "p", epoch, 1, b"[1]"))
        assert finals == {False, True}


async def test_an_entry_that_comes_after_a_look_that_found_nothing_is_not_passed_over(backend: RedisBackend) -> None:
    epoch = await flush(backend, opening())
    execute, calls = backend._execute, 0

    async def meanwhile(commands: Sequence[Any]) -> list[Any]:
        nonlocal calls
        calls += 1
        if calls == 2:
            await execute([("XADD", OUT, f"{epoch}-2", "d", "[2]")])
        return await execute(commands)

    backend._execute = meanwhile  # type: ignore[method-assign]
    assert await page(backend, Place(epoch, 1)) == Page(False, (), True, Place(epoch, 2))


async def test_scripts_flushed_from_the_server_are_loaded_again(backend: RedisBackend, redis_client: Client) -> None:
    epoch = await flush(backend, opening("u"))
    await redis_client.script_flush()
    outcomes = await backend._append([Flush("u", "p", epoch, 2, b"[2]"), opening()])
    assert outcomes[0] == epoch
    assert isinstance(outcomes[1], int)
    await redis_client.script_flush()
    assert (await step(backend, start(backend))).verdict is Verdict.STARTED
    await redis_client.script_flush()
    await backend._beat("w", 600.0, NO_GAP)
    assert await backend._alive(["w"]) == [True]
    await redis_client.script_flush()
    await backend.forget("t")
    assert [entry.last for entry in (await page(backend, task_id="u")).entries] == [1, 2]
    assert await redis_client.keys(f"*{KEY}*") == []


async def test_the_older_protocol_says_the_same(redis_url: str) -> None:
    async with RedisBackend(f"{redis_url}?protocol=2") as backend:
        assert await step(backend, READ) == RunState(Verdict.NOTED)
        await step(backend, start(backend))
        epoch = await flush(backend, opening())
        assert await flush(backend, Flush("t", "p", epoch, 2, b"[2]")) == epoch
        assert await step(backend, revoke(backend)) == RunState(Verdict.ASKED, "r1", "w", "why")
        assert (await page(backend)).entries == (Entry(epoch, 1, b"[1]"), Entry(epoch, 2, b"[2]"))
        await backend._beat("w", 600.0)
        assert await backend._alive(["w", "v"]) == [True, False]


# -- keys -------------------------------------------------------------------------------------------------------------


IDS = ["t", "{t}", "a{b}c", "{", "a{b", "{{a}}", "ü{é}", "{a}b}c{"]


@pytest.mark.parametrize("prefix", ["", "{p}", "p{"])
async def test_what_belongs_to_a_task_is_in_one_slot(redis_url: str, redis_client: Client, prefix: str) -> None:
    ids = IDS if prefix != "p{" else ["t", "{", "a{b"]  # where a tag is of both, the id may only end it
    async with RedisBackend(redis_url, global_keyprefix=prefix) as backend:
        for task_id in ids:
            await step(backend, start(backend, task_id=task_id))
            epoch = await flush(backend, opening(task_id))
            keys: list[Any] = await redis_client.keys()
            assert len(keys) == 3
            assert len({key_slot(key) for key in keys}) == 1, keys
            assert (await page(backend, task_id=task_id)).entries == (Entry(epoch, 1, b"[1]"),)
            await backend.forget(task_id)
            assert await redis_client.keys() == []


async def test_how_long_each_key_lives(backend: RedisBackend, redis_client: Client) -> None:
    await step(backend, start(backend, lives=50.0))
    epoch = await flush(backend, opening(expires=40.0))
    lives = [await redis_client.ttl(key) for key in (KEY, RUN, OUT)]
    assert [round(left, -1) for left in lives] == [600, 50, 40]
    await flush(backend, Flush("t", "p", epoch, 2, b"[2]"))
    assert 30 < await redis_client.ttl(OUT) <= 40
    await flush(backend, Flush("t", "p", epoch, 3, b"[3]", expires=0.0))
    assert await redis_client.ttl(OUT) == -1
    await step(backend, RunStep(RunOp.RENEW, "t", "r1", lives=0.0))
    assert await redis_client.ttl(RUN) == -1
    await step(backend, finish(backend, output=Place(epoch, 3), lives=70.0))
    lives = [await redis_client.ttl(key) for key in (KEY, RUN, OUT)]
    assert [round(left, -1) for left in lives] == [600, 70, 600]


async def test_a_forgotten_task_takes_nothing_of_a_later_run_with_it(backend: RedisBackend) -> None:
    """A removal that is repeated after its reply was lost meets what came after its first attempt."""
    await step(backend, start(backend, record=None))
    await flush(backend, opening())
    versions: Any = await backend._versions(["t"])
    await backend._delete(["t"], versions)
    assert await backend._versions(["t"]) == [None]
    await step(backend, start(backend, "r2", record=None))
    await flush(backend, opening())
    await backend._delete(["t"], versions)
    assert (await step(backend, READ)).run == "r2"
    assert (await page(backend)).entries
    await flush(backend, Flush("t", "p", (await page(backend)).entries[0].epoch, 2, b"[2]"))
    await backend.forget("t")
    assert await backend._versions(["t"]) == [None]


@pytest.mark.parametrize(
    "later", [RunStep(RunOp.RELEASE, "t", "r1"), RunStep(RunOp.START, "t", "r2")], ids=["release", "start"]
)
async def test_a_group_lives_as_long_as_what_was_wished_for(
    backend: RedisBackend, redis_client: Client, later: RunStep
) -> None:
    await redis_client.set("celery-taskset-meta-g", "{}", ex=10)
    await step(backend, start(backend, record=record(backend, STARTED)))
    wish = record(backend, REVOKED, KeyError("r"), group_id="g")
    await redis_client.expire("celery-taskset-meta-g", 10)
    await step(backend, revoke(backend, record=wish))
    await redis_client.expire("celery-taskset-meta-g", 10)
    assert (await step(backend, later)).verdict is Verdict.REVOKED
    assert await redis_client.ttl("celery-taskset-meta-g") > 500


# -- what others store ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", [{"compression": "gzip"}, {"serializer": "msgpack"}, {"serializer": "pickle"}])
async def test_a_state_that_only_the_codec_can_read_is_judged(redis_url: str, theirs: dict[str, Any]) -> None:
    accept = ("json", "msgpack", "pickle")
    async with RedisBackend(redis_url, accept=accept) as plain, RedisBackend(redis_url, accept=accept, **theirs) as odd:
        for backend in (plain, odd):
            for n, (state, verdict) in enumerate(
                [(SUCCESS, Verdict.DONE), (FAILURE, Verdict.STARTED), (REVOKED, Verdict.REVOKED)]
            ):
                task_id = f"{backend is plain}{n}"
                await odd._store([record(odd, state, KeyError(1) if n else 1, task_id)])
                assert (await page(backend, task_id=task_id)).final
                begun = await step(backend, start(backend, task_id=task_id, skip_done=True))
                assert begun.verdict is verdict
            await odd._store([record(odd, STARTED, 1, "u")])
            await flush(backend, opening("u"))
            for _ in range(2):
                found = await page(backend, task_id="u")
                assert (found.final, len(found.entries)) == (False, 1)
                assert (await step(backend, start(backend, task_id="u"))).verdict is Verdict.STARTED
            ending = finish(backend, task_id="u")
            for _ in range(2):
                assert (await step(backend, ending)).verdict is Verdict.STORED
            assert (await page(backend, None, "u")).final
            await backend.forget("u")


async def test_what_was_judged_is_judged_again_if_it_has_been_replaced_meanwhile(redis_url: str) -> None:
    async with RedisBackend(redis_url) as backend, RedisBackend(redis_url, compression="gzip") as odd:
        await odd._store([record(odd, STARTED)])
        execute, calls = backend._execute, 0

        async def meanwhile(commands: Sequence[Any]) -> list[Any]:
            nonlocal calls
            calls += 1
            if calls == 2:
                await odd._store([record(odd, SUCCESS, 1)])
            return await execute(commands)

        backend._execute = meanwhile  # type: ignore[method-assign]
        assert (await step(backend, start(backend, skip_done=True))).verdict is Verdict.DONE
        assert calls == 3


async def test_steps_of_a_task_keep_their_order_where_the_first_takes_longer(redis_url: str) -> None:
    async with RedisBackend(redis_url) as backend, RedisBackend(redis_url, compression="gzip") as odd:
        await odd._store([record(odd, STARTED)])
        steps = [start(backend), finish(backend), start(backend, "r2", skip_done=True), start(backend, task_id="u")]
        states = await backend._run_steps(steps)
        verdicts = [state.verdict for state in states if isinstance(state, RunState)]
        assert verdicts == [Verdict.STARTED, Verdict.STORED, Verdict.DONE, Verdict.STARTED]


async def test_a_result_that_cannot_be_read_ends_its_readers_and_refuses_its_run(redis_url: str) -> None:
    async with (
        RedisBackend(redis_url) as backend,
        RedisBackend(redis_url, serializer="pickle", accept=("pickle",)) as odd,
    ):
        await odd._store([record(odd, STARTED)])
        assert (await page(backend)).final  # which sends them to the result, and its error
        steps = [start(backend), start(backend, task_id="u")]
        refused, begun = await backend._run_steps(steps)
        assert isinstance(refused, ContentDisallowed)
        assert isinstance(begun, RunState)
        assert (await step(backend, READ)).run == ""


FOREIGN: dict[str, dict[bytes, bytes]] = {
    "other fields": {b"x": b"y"},
    "an empty end": {b"e": b""},
    "no text": {b"e": b"\xff"},
}


@pytest.mark.parametrize("fields", FOREIGN.values(), ids=FOREIGN.keys())
async def test_a_strangers_entry_is_an_error_of_those_who_read_it(
    backend: RedisBackend, redis_client: Client, fields: dict[Any, Any]
) -> None:
    epoch = await flush(backend, opening())
    await redis_client.xadd(OUT, fields, id=f"{epoch}-2")
    await flush(backend, opening("u"))
    asks = [PageRequest("t", START, 10), PageRequest("u", START, 10), PageRequest("t", None, 1)]
    first, other, last = await backend._pages(asks)
    assert isinstance(first, DecodeError)
    assert isinstance(last, DecodeError)
    assert isinstance(other, Page)
    assert await flush(backend, Flush("t", "p", epoch, 3, b"[3]")) == epoch
    assert (await page(backend, Place(epoch, 2))).entries == (Entry(epoch, 3, b"[3]"),)


async def test_a_log_that_a_stranger_has_emptied(backend: RedisBackend, redis_client: Client) -> None:
    """Its stream still refuses what is not greater than the last id that it has had."""
    epoch = await flush(backend, opening())
    await flush(backend, Flush("t", "p", epoch, 2, b"[2]"))
    await redis_client.xtrim(OUT, maxlen=0, approximate=False)
    assert await page(backend, Place(epoch, 2)) == Page(False, (), False, START)
    with pytest.raises(BackendStoreError, match="output of task t"):
        await flush(backend, Flush("t", "p", epoch, 2, b"[2]"))
    assert await flush(backend, Flush("t", "p", epoch, 3, b"[3]")) == epoch


async def test_a_clock_that_was_set_back_gives_a_later_epoch_all_the_same(
    backend: RedisBackend, redis_client: Client
) -> None:
    later = 2**43
    await redis_client.xadd(OUT, {"d": "[0]", "o": "q"}, id=f"{later}-7")
    assert await flush(backend, opening()) == later + 1
    assert (await page(backend)).entries == (Entry(later + 1, 1, b"[1]"),)
    with pytest.raises(OutputSuperseded):
        await flush(backend, Flush("t", "q", later, 8, b"[8]"))
    await step(backend, start(backend))
    await redis_client.persist(OUT)
    await step(backend, finish(backend, output=Place(later, 7)))  # of the older one
    assert len((await page(backend)).entries) == 1
    assert await redis_client.ttl(OUT) == -1


async def test_an_id_without_a_later_one_is_an_error_of_that_flush(backend: RedisBackend, redis_client: Client) -> None:
    await redis_client.xadd(OUT, {"d": "[0]"}, id=f"{2**64 - 1}-{2**64 - 1}")
    refused, epoch = await backend._append([opening(), opening("u")])
    assert isinstance(refused, BackendStoreError)
    assert isinstance(epoch, int)
    with pytest.raises(OutputSuperseded):
        await flush(backend, Flush("t", "p", 5, 1, b"[1]"))


OTHER_KINDS: dict[str, tuple[str, Call, type[BackendError]]] = {
    "open": (OUT, lambda b: flush(b, opening()), BackendStoreError),
    "open, of a run": (RUN, lambda b: flush(b, opening(run="r1")), BackendStoreError),
    "flush": (OUT, lambda b: flush(b, Flush("t", "p", 5, 1, b"[1]")), BackendStoreError),
    "renew": (OUT, lambda b: flush(b, Flush("t", "p", 5, 1)), BackendStoreError),
    "page": (OUT, page, BackendGetMetaError),
    "page, of the end": (OUT, lambda b: page(b, None), BackendGetMetaError),
    "page, of the result": (KEY, page, BackendGetMetaError),
    "step": (KEY, lambda b: step(b, start(b)), BackendStoreError),
    "step, of the note": (RUN, lambda b: step(b, READ), BackendStoreError),
    "beat": ("aioresult-workers", lambda b: b._beat("w", 1.0), BackendStoreError),
    "reap": ("aioresult-workers", lambda b: b._beat("", 1.0, NO_GAP), BackendStoreError),
    "alive": ("aioresult-workers", lambda b: b._alive(["w"]), BackendGetMetaError),
}


@pytest.mark.parametrize(("key", "call", "kind"), OTHER_KINDS.values(), ids=OTHER_KINDS.keys())
async def test_a_key_of_another_kind_is_an_error_that_says_so(
    backend: RedisBackend, redis_client: Client, key: str, call: Call, kind: type[BackendError]
) -> None:
    await redis_client.rpush(key, "a")
    before = await dump(redis_client)
    with pytest.raises(kind, match="WRONGTYPE"):
        await call(backend)
    assert await dump(redis_client) == before
    await backend.forget("t")  # of whatever kind
    assert await redis_client.keys("*celery*") == []


async def test_a_log_of_another_kind_keeps_no_run_from_its_end(backend: RedisBackend, redis_client: Client) -> None:
    await redis_client.rpush(OUT, "a")
    await step(backend, start(backend))
    assert (await step(backend, finish(backend, output=Place(5, 1)))).verdict is Verdict.STORED
    assert await redis_client.ttl(OUT) == -1


# -- what the server refuses ------------------------------------------------------------------------------------------


CHANGES: dict[str, Call] = {
    "open": lambda b: flush(b, opening("u")),
    "flush": lambda b: flush(b, Flush("t", "p", 2**42, 5, b"[5]", expires=5.0)),
    "start": lambda b: step(b, start(b, task_id="u")),
    "store": lambda b: step(b, RunStep(RunOp.STORE, "t", "r1", record=record(b, "PROGRESS", 1))),
    "finish": lambda b: step(b, finish(b, output=Place(2**42, 1))),
    "end": lambda b: step(b, finish(b, FAILURE, record=None, output=Place(2**42, 1))),
    "revoke": lambda b: step(b, revoke(b)),
    "revoke at once": lambda b: step(b, revoke(b, "u")),
}


async def running(backend: RedisBackend, client: Client) -> None:
    """Task t runs, and has output."""
    await step(backend, start(backend))
    await client.xadd(OUT, {"d": "[1]"}, id=f"{2**42}-1")


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
async def test_a_full_server_refuses_a_change_and_says_nothing_of_it(
    backend: RedisBackend, redis_client: Client, change: Call
) -> None:
    await running(backend, redis_client)
    before = await dump(redis_client)
    async with redis_client.pubsub() as listener:
        await listener.psubscribe("*")
        await listener.get_message(timeout=None)
        await redis_client.config_set("maxmemory", "1")
        try:
            with pytest.raises(BackendStoreError, match="OOM"):
                await change(backend)
            assert (await step(backend, READ)).run == "r1"
            assert (await page(backend)).entries
        finally:
            await redis_client.config_set("maxmemory", "0")
        assert await dump(redis_client) == before
        await change(backend)
        assert await dump(redis_client) != before
        await redis_client.publish("mark", "")
        said: list[Any] = []
        while not said or said[-1] != b"mark":
            said.append((await listener.get_message(timeout=None))["channel"])
    assert 1 < len(said) <= 3  # of the second attempt alone
    assert len(set(said)) == len(said)


async def test_a_full_server_refuses_nothing_that_is_done_already(backend: RedisBackend, redis_client: Client) -> None:
    await running(backend, redis_client)
    ending = finish(backend, output=Place(2**42, 1))
    epoch = await flush(backend, opening("u"))
    assert (await step(backend, ending)).verdict is Verdict.STORED
    await redis_client.config_set("maxmemory", "1")
    try:
        assert (await step(backend, ending)).verdict is Verdict.STORED
        assert (await step(backend, start(backend, "r2", skip_done=True))).verdict is Verdict.DONE
        assert await flush(backend, opening("u")) == epoch
    finally:
        await redis_client.config_set("maxmemory", "0")


@pytest.fixture
async def mute(own_redis: RedisServer, redis_client: Client) -> AsyncIterator[RedisBackend]:
    """Of a user that may do everything but publish."""
    await redis_client.acl_setuser(
        "mute", enabled=True, passwords=["+pw"], keys=["*"], commands=["+@all"], reset=True, reset_channels=True
    )
    async with RedisBackend(f"redis://mute:pw@127.0.0.1:{own_redis.port}/0") as backend:
        yield backend
    await redis_client.acl_deluser("mute")


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
async def test_without_the_right_to_publish_nothing_changes(
    backend: RedisBackend, mute: RedisBackend, redis_client: Client, change: Call
) -> None:
    await running(backend, redis_client)
    before = await dump(redis_client)
    with pytest.raises(BackendRefusedError, match=r"ACL SETUSER .*'&\{celery-task-meta-\*' '&aioresult-worker\*'"):
        await change(mute)
    assert await dump(redis_client) == before
    rights = ["celery-task-meta-*", "{celery-task-meta-*", "aioresult-worker*"]
    await redis_client.acl_setuser("mute", enabled=True, keys=["*"], commands=["+@all"], channels=rights)
    await change(mute)
    assert await dump(redis_client) != before


async def test_without_the_right_to_publish_no_worker_is_removed(
    backend: RedisBackend, mute: RedisBackend, redis_client: Client
) -> None:
    await backend._beat("w", 600.0)
    with pytest.raises(BackendRefusedError, match=r"&aioresult-worker\*"):
        await mute._beat("w", 0.0)
    assert await backend._alive(["w"]) == [True]
    await mute._beat("v", 600.0, NO_GAP)  # nothing is to be told
    assert await backend._alive(["v"]) == [True]


async def test_a_user_with_rights_to_results_alone_may_forget(
    backend: RedisBackend, mute: RedisBackend, redis_client: Client
) -> None:
    await redis_client.acl_setuser(
        "mute", enabled=True, passwords=["+pw"], keys=["celery-*"], commands=["+@all"], reset=True, reset_keys=True
    )
    await backend.mark_as_done("t", 1)
    await mute.forget("t")
    await mute.forget("t")
    assert not await backend.exists("t")


@pytest.mark.parametrize(("reason", "kind"), [("READONLY a replica", BackendConnectionError), ("OOM", None)])
async def test_why_a_transaction_was_discarded(
    backend: RedisBackend, reason: str, kind: type[BackendError] | None
) -> None:
    """The server can refuse EXEC itself, for what has happened since the commands were queued."""
    error = hiredis.ReplyError(f"EXECABORT Transaction discarded because of: {reason}")
    connection = commands_of(backend)
    if kind is None:
        assert str(backend._why_aborted([], [], error)) == reason
        assert not connection.closed
    else:
        with pytest.raises(kind):
            backend._why_aborted([], [], error)
        assert connection.closed  # the name may lead to another master by now


@pytest.mark.parametrize(
    "text", ["@user_script: 12: -{}", "ERR Error running script (call to f_0a): @user_script:3: @user_script: 3: -{}"]
)
def test_what_arises_in_a_script_of_redis_6_is_known_for_what_it_is(text: str) -> None:
    error = translate(hiredis.ReplyError(text.format("READONLY You can't write against a read only replica.")), "there")
    assert isinstance(error, BackendConnectionError)
    error = translate(
        hiredis.ReplyError(text.format("OOM command not allowed when used memory > 'maxmemory'.")), "there"
    )
    assert type(error) is BackendRefusedError


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("ERR ACL failure in script: User a has no permissions to run the 'set' command", "NOPERM"),
        ("ERR Error running script: @user_script:3: The user executing the script can't run this command", "NOPERM"),
        (f"{NOT_TOLD} ERR ACL failure in script: User a has no permissions to run the 'publish' command", NOT_TOLD),
    ],
    ids=["redis 7", "redis 6", "publish"],
)
def test_a_right_that_a_script_lacks_is_a_missing_right(text: str, code: str) -> None:
    assert code_of(hiredis.ReplyError(text)) == code


async def test_a_flush_to_a_replica_waits_for_a_master() -> None:
    with redis_server() as server:
        async with aioresult.connect(server.url) as backend, Client.from_url(server.url) as client:
            assert isinstance(backend, RedisBackend)
            epoch = await flush(backend, opening())
            await client.replicaof("127.0.0.1", 1)  # a master that never answers
            first = commands_of(backend)
            assert first is not None
            appending = asyncio.ensure_future(backend._shards[0].appends.submit(Flush("t", "p", epoch, 2, b"[2]"), "t"))
            await until(lambda: first.closed)
            await client.replicaof("NO", "ONE")
            assert await appending == epoch
            assert [entry.last for entry in (await page(backend)).entries] == [1, 2]


def test_the_key_beside_another() -> None:
    assert sibling("a-t", ".out") == "{a-t}.out"
    assert sibling("a-{t}", ".out") == "a-{t}.out"


async def test_a_flush_without_company_is_sent_at_once_and_again_after_any_trouble(
    backend: RedisBackend, redis_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[Sequence[Flush]] = []
    append = backend._append

    async def noted(flushes: Sequence[Flush]) -> list[int | BaseException]:
        batches.append(flushes)
        return await append(flushes)

    monkeypatch.setattr(backend, "_append", noted)
    output = backend.output("t")
    for number in range(3):
        await output.send(number)
        await output.flush()
    assert len(batches) == 1  # the one that opened it
    await redis_client.client_kill_filter(_type="normal", skipme=True)
    await output.send(3)
    await output.flush()
    assert len(batches) > 1
    assert [entry.data for entry in (await page(backend)).entries] == [b"[0]", b"[1]", b"[2]", b"[3]"]
    async with backend.output("t") as rival:
        await rival.send("other")
    await output.send(4)
    with pytest.raises(OutputSuperseded):
        await output.flush()


class Heard:
    """A waiter that notes everything."""

    def __init__(self) -> None:
        self.news: list[tuple[str, Any]] = []

    def receive(self, topic: str, outcome: Any) -> None:
        self.news.append((topic, outcome.result))


async def test_the_output_of_a_task_on_the_channel_of_the_result_of_another(
    backend: RedisBackend, redis_url: str
) -> None:
    """As it is where an id has a tag of its own: both waiters are told what is theirs."""
    heard, output = Heard(), OUTPUT_TOPIC + "{x}"
    backend.watch("{x}.out", heard, read_first=False)
    backend.watch_topic(output, heard, read_first=False)
    await until(lambda: (output, None) in heard.news)
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        for message in (b"7-3 [1, 2]", backend._encode(TaskMeta("{x}.out", SUCCESS, 42))):
            await client.publish("celery-task-meta-{x}.out", message)
    await until(lambda: ("{x}.out", 42) in heard.news)
    assert heard.news[1:] == [(output, OutputNews(7, 3, b"[1, 2]")), ("{x}.out", 42)]
