"""A fault stays with its cause: one id, one argument, one waiter, one chord or one stored value harms no other."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar
from uuid import uuid4

import pytest
import redis.asyncio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import aioresult
from aioresult import (
    AioResultError,
    AsyncResult,
    Backend,
    BackendClosedError,
    BackendConnectionError,
    BackendError,
    BackendGetMetaError,
    BackendRefusedError,
    BackendStoreError,
    ChordError,
    ContentDisallowed,
    DecodeError,
    EncodeError,
    GroupResult,
    TaskMeta,
    TaskRequest,
    UsageError,
)
from aioresult.chord import ChordOp, ChordStep
from aioresult.retry import Backoff
from aioresult.states import FAILURE, PENDING, RETRY, STARTED, SUCCESS
from aioresult.waiter import Outcome

from .harness import Harness, MemoryHarness, intercept, topics_of, until
from .servers import RedisServer, redis_server

#: Sentinels change nothing of this.
BACKENDS = ["memory", "redis", "postgres"]

T = TypeVar("T")
Primitive = Callable[..., Awaitable[Any]]

unhurried = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@asynccontextmanager
async def in_memory(**options: Any) -> AsyncIterator[tuple[MemoryHarness, Backend]]:
    """A store of its own for each generated example."""
    harness = MemoryHarness()
    try:
        yield harness, await harness.connect(**options)
    finally:
        await harness.close()


async def told(call: Awaitable[T]) -> T | BaseException:
    """What ``call`` gives or raises: also what would end the test, but for what the user and pytest-timeout raise."""
    try:
        return await call
    except (KeyboardInterrupt, pytest.fail.Exception):
        raise
    except BaseException as exc:
        return exc


def errors_logged(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "aioresult" and record.levelno >= logging.ERROR]


# -- waiters --------------------------------------------------------------------------------------------------------


class Recorder:
    """A waiter that keeps all that it is told: states and, where there is none, the names of errors."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def receive(self, task_id: str, outcome: Outcome) -> None:
        self.told.append(outcome.status if isinstance(outcome, TaskMeta) else type(outcome).__name__)


class Raiser:
    """A waiter that raises ``error`` at its ``nth`` news."""

    def __init__(self, error: BaseException, nth: int = 1) -> None:
        self.error = error
        self.nth = nth
        self.told = 0

    def receive(self, task_id: str, outcome: Outcome) -> None:
        self.told += 1
        if self.told == self.nth:
            raise self.error


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


_OF_WAITERS: list[Callable[[], BaseException]] = [
    asyncio.QueueFull,
    asyncio.CancelledError,
    asyncio.InvalidStateError,
    lambda: KeyError("x"),
    lambda: ExceptionGroup("two", [ValueError(1), KeyError(2)]),
    lambda: BackendConnectionError("of its own"),
    lambda: BackendClosedError("of its own"),
    StopIteration,
    RecursionError,
    TimeoutError,
    Unprintable,
]


@unhurried
@given(
    plan=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(_OF_WAITERS), st.integers(1, 4)), min_size=1, max_size=8
    ),
    end=st.sampled_from([SUCCESS, FAILURE, "DecodeError", "BackendClosedError"]),
)
async def test_no_exception_whatever_out_of_a_waiter_reaches_anybody_else(
    plan: list[tuple[str, Callable[[], BaseException], int]], end: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    raisers = [Raiser(make(), nth) for _, make, nth in plan]
    recorders = [Recorder() for _ in range(6)]
    async with in_memory() as (harness, backend):
        for task_id, recorder in zip("abc", recorders[:3], strict=True):
            backend.watch(task_id, recorder)
        for (task_id, _, _), raiser in zip(plan, raisers, strict=True):
            backend.watch(task_id, raiser)
        for task_id, recorder in zip("abc", recorders[3:], strict=True):
            backend.watch(task_id, recorder)
        await harness.subscribed(3)
        for count in (1, 2):
            for task_id in "abc":
                await backend.store_result(task_id, count, "PROGRESS")
            await until(lambda count=count: all(len(recorder.told) == count for recorder in recorders))
        for task_id in "abc":
            if end == "DecodeError":
                await harness.put_raw(task_id, b"{")
            elif end == "BackendClosedError":
                await backend.aclose()
            else:
                await backend.store_result(task_id, ValueError("x") if end == FAILURE else 3, end)
        await until(lambda: all(len(recorder.told) == 3 for recorder in recorders))
    assert [recorder.told for recorder in recorders] == [["PROGRESS", "PROGRESS", end]] * 6
    assert [raiser.told for raiser in raisers] == [min(raiser.nth, 3) for raiser in raisers]
    logged = [record.exc_info[1] for record in errors_logged(caplog) if record.exc_info]
    assert Counter(map(id, logged)) == Counter(id(raiser.error) for raiser in raisers if raiser.nth <= 3)
    assert len(errors_logged(caplog)) == len(logged)


class Progress:
    """What a page that shows progress may do: hand all news to a bounded queue that it reads too slowly."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Outcome] = asyncio.Queue(maxsize=3)

    def receive(self, task_id: str, outcome: Outcome) -> None:
        self.queue.put_nowait(outcome)


async def test_a_waiter_whose_queue_is_full_is_dropped_and_nobody_else_notices(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    worker, web = await harness.pair()
    before, slow, after = Recorder(), Progress(), Recorder()
    for waiter in (before, slow, after):
        web.watch("job", waiter)
    other = asyncio.create_task(web.result("other").get())
    await harness.subscribed(2)
    for count in range(1, 7):
        await worker.store_result("job", count, "PROGRESS")
        await until(lambda count=count: len(before.told) == len(after.told) == count)
    await worker.mark_as_done("job", 1)
    await worker.mark_as_done("other", 2)
    assert await other == 2
    assert await web.result("job").get() == 1
    await until(lambda: before.told == after.told == ["PROGRESS"] * 6 + [SUCCESS])
    (record,) = errors_logged(caplog)
    assert "job" in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], asyncio.QueueFull)
    await web.aclose()


async def test_the_subscription_of_a_dropped_waiter_ends_with_it(harness: Harness) -> None:
    worker, web = await harness.pair()
    web.watch("job", Raiser(KeyError("x")))
    await harness.subscribed(1)
    await worker.store_result("job", 1, "PROGRESS")
    await harness.subscribed(0)
    assert len(topics_of(web)) == 0


@pytest.mark.parametrize("error", [KeyError("x"), asyncio.CancelledError()])
async def test_a_waiter_that_raises_in_a_crowd_harms_nobody(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """A crowd is told a slice at a time; what it is told last, by `aclose`, too."""
    async with in_memory() as (harness, backend):
        recorders = [Recorder() for _ in range(1200)]
        raisers = [Raiser(error, nth) for nth in (1, 2) * 3]
        for index, recorder in enumerate(recorders):
            if index % 200 == 100:
                backend.watch("job", raisers[index // 200])
            backend.watch("job", recorder)
        await harness.subscribed(1)
        await backend.store_result("job", 1, "PROGRESS")
        await until(lambda: all(len(recorder.told) == 1 for recorder in recorders))
        await backend.aclose()
        assert {tuple(recorder.told) for recorder in recorders} == {("PROGRESS", "BackendClosedError")}
        assert [raiser.told for raiser in raisers] == [1, 2] * 3
        assert len(errors_logged(caplog)) == 6


# -- what stored bytes run when they are read -----------------------------------------------------------------------


@dataclass(frozen=True)
class CardDeclined(Exception):
    number: str


async def test_an_exception_that_refuses_attributes_is_its_own_readers_alone(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    worker, web = await harness.pair()
    others = [asyncio.create_task(web.result(f"o{index}").get()) for index in range(3)]
    bad = asyncio.create_task(web.result("bad").get())
    await harness.subscribed(4)
    try:
        raise CardDeclined("4242")
    except CardDeclined as exc:
        await worker.mark_as_failure("bad", exc)
    error = await told(bad)
    assert error == CardDeclined("4242")
    assert isinstance(error, CardDeclined)
    assert "in test_an_exception_that_refuses_attributes" in str(error.__cause__)
    for index in range(3):
        await worker.mark_as_done(f"o{index}", index)
    assert await asyncio.gather(*others) == [0, 1, 2]
    metas = await web.get_many(["o0", "bad", "o1"])
    assert [meta.result for meta in metas] == [0, CardDeclined("4242"), 1]
    assert caplog.records == []


class Mute(BaseException):
    """An error that cannot even be named without another one."""

    def __str__(self) -> str:
        raise SystemExit("no text")


_RAISED: dict[str, Callable[[], BaseException]] = {
    "ValueError": lambda: ValueError("x"),
    "SystemExit": lambda: SystemExit(1),
    "CancelledError": asyncio.CancelledError,
    "GeneratorExit": GeneratorExit,
    "StopIteration": StopIteration,
    "StopAsyncIteration": StopAsyncIteration,
    "RecursionError": RecursionError,
    "MemoryError": MemoryError,
    "TimeoutError": TimeoutError,
    "CardDeclined": lambda: CardDeclined("4242"),
    "BackendConnectionError": lambda: BackendConnectionError("of its own"),
    "BackendClosedError": lambda: BackendClosedError("of its own"),
    "UsageError": lambda: UsageError("of its own"),
    "ImproperlyConfigured": lambda: aioresult.ImproperlyConfigured("of its own"),
    "Mute": Mute,
}
_HOOKS = [
    "__new__",
    "__init__",
    "__setattr__",
    "__getattribute__",
    "__str__",
    "__repr__",
    "__reduce__",
    "__reduce_ex__",
    "__setstate__",
    "__eq__",
    "__hash__",
    "with_traceback",
    "add_note",
]


def hostile(hooks: Mapping[str, int], raised: str) -> type[Exception]:
    """An exception class, to be found by its name in this module. Each of ``hooks`` raises after so many calls."""
    calls: Counter[str] = Counter()

    def trap(name: str) -> Callable[..., Any]:
        sound: Callable[..., Any] = getattr(Exception, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            if calls[name] > hooks[name]:
                raise _RAISED[raised]()
            return sound(*args, **kwargs)

        return method

    cls: type[Exception] = type(
        "Hostile", (Exception,), {"__module__": __name__, **{name: trap(name) for name in hooks}}
    )
    globals()["Hostile"] = cls
    return cls


_ANY_HOOKS = st.dictionaries(st.sampled_from(_HOOKS), st.integers(0, 3), min_size=1, max_size=4)
_STORED = {"exc_type": "Hostile", "exc_module": __name__, "exc_message": ["4242"]}


@unhurried
@given(hooks=_ANY_HOOKS, raised=st.sampled_from(sorted(_RAISED)))
@example(hooks={"__setattr__": 0}, raised="ValueError")
@example(hooks={"__init__": 0, "__new__": 0}, raised="SystemExit")
@example(hooks={"__repr__": 0}, raised="ValueError")
@example(hooks={"__repr__": 0}, raised="SystemExit")
@example(hooks={"__repr__": 0}, raised="UsageError")
@example(hooks={"__str__": 1, "with_traceback": 0}, raised="CancelledError")
async def test_no_exception_class_whatever_harms_anybody_but_its_readers(
    hooks: dict[str, int], raised: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    hostile(hooks, raised)
    async with in_memory() as (harness, web):
        waiting = [asyncio.ensure_future(web.wait_for(task_id)) for task_id in ("good", "bad", "fine")]
        await harness.subscribed(3)
        fields = {"status": FAILURE, "result": _STORED, "traceback": "Traceback", "task_id": "bad"}
        await harness.put_raw("bad", json.dumps(fields).encode())
        await asyncio.gather(*(web.mark_as_done(task_id, 1) for task_id in ("good", "fine")))
        found = [await told(each) for each in waiting], await web.get_outcomes(["good", "bad", "fine"])
        for good, bad, fine in found:
            assert isinstance(good, TaskMeta)
            assert isinstance(fine, TaskMeta)
            assert (good.result, fine.result) == (1, 1)
            assert isinstance(bad, DecodeError) or (isinstance(bad, TaskMeta) and isinstance(bad.result, Exception))
        done, pending = await aioresult.wait([web.result(task_id) for task_id in ("good", "bad", "fine")])
        assert (len(done), len(pending)) == (3, 0)
        error = await told(web.result("bad").get())
        assert isinstance(error, Exception)
        assert type(error).__name__ in ("Hostile", "DecodeError")

        for group_id in ("bad", "good"):
            await web.create_chord(group_id, size=1)
        waiters = [asyncio.ensure_future(told(web.chord(group_id).get())) for group_id in ("bad", "good")]
        await web.on_chord_part_return("bad", "t", FAILURE, _STORED, lease=0)
        await web.on_chord_part_return("good", "t", SUCCESS, 1, lease=0)
        assert isinstance(await waiters[0], ChordError | DecodeError)
        assert await waiters[1] == [1]
        assert await told(anext_of(web, "good")) == "good"


async def anext_of(backend: Backend, group_id: str) -> str | None:
    """Dispatch until this chord is dispatched, too."""
    chords = backend.ready_chords()
    try:
        async for ready in chords:
            async with ready:
                if ready.id == group_id:
                    return group_id
    finally:
        await chords.aclose()
    return None


def raise_named(name: str) -> NoReturn:
    raise _RAISED[name]()


class Bomb:
    """Pickled without a word; a reader of the pickle has the exception of that name raised inside `pickle.loads`."""

    def __init__(self, raised: str) -> None:
        self.raised = raised

    def __reduce__(self) -> tuple[Any, ...]:
        return raise_named, (self.raised,)


class ErrorWithBomb(Exception):
    """The same as an exception."""

    def __reduce__(self) -> tuple[Any, ...]:
        return raise_named, self.args


@pytest.mark.parametrize("raised", sorted(_RAISED))
async def test_whatever_a_pickle_raises_is_a_decode_error_for_its_own_id_alone(harness: Harness, raised: str) -> None:
    options: dict[str, Any] = {"serializer": "pickle", "accept": ("pickle",)}
    worker, web = await harness.pair(**options)
    ids = ("good", "bad", "fine")
    waiting = [asyncio.ensure_future(web.wait_for(task_id)) for task_id in ids]
    await harness.subscribed(3)
    await asyncio.gather(*(worker.mark_as_done(each, Bomb(raised) if each == "bad" else 1) for each in ids))
    for good, bad, fine in (
        [await told(each) for each in waiting],
        await web.get_outcomes(ids),
        await asyncio.gather(*map(web.get_task_meta, ids), return_exceptions=True),
    ):
        assert isinstance(bad, DecodeError)
        assert "task bad" in str(bad)
        assert isinstance(good, TaskMeta)
        assert isinstance(fine, TaskMeta)
        assert (good.result, fine.result) == (1, 1)
    done, _ = await aioresult.wait(web.group(ids))
    assert len(done) == 3
    assert await web.exists("bad")

    await web.save_group("good", web.group(ids, "good"))
    await harness.put_raw_group("bad", pickle.dumps(Bomb(raised)))
    bad_group, good_group = await asyncio.gather(*map(web.restore_group, ("bad", "good")), return_exceptions=True)
    assert isinstance(bad_group, DecodeError)
    assert isinstance(good_group, GroupResult)


@pytest.mark.parametrize("raised", sorted(_RAISED))
@pytest.mark.parametrize("where", ["part", "failed part", "body"])
async def test_whatever_the_pickle_of_a_chord_raises_is_a_decode_error_and_ends_no_dispatcher(
    raised: str, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with in_memory(serializer="pickle", accept=("pickle",)) as (_, web):
        await web.create_chord("bad", size=1, body=Bomb(raised) if where == "body" else None)
        value = 1 if where == "body" else Bomb(raised)
        await web.on_chord_part_return("bad", "t", FAILURE if where == "failed part" else SUCCESS, value, lease=0)
        await web.create_chord("good", size=0)
        if where != "body":
            error = await told(web.chord("bad").get())
            assert isinstance(error, DecodeError)
            assert "chord bad" in str(error)
        assert await told(anext_of(web, "good")) == "good"
        await web.create_chord("later", size=0)
        assert await told(anext_of(web, "later")) == "later"


@unhurried
@given(hooks=_ANY_HOOKS, raised=st.sampled_from(sorted(_RAISED)), serializer=st.sampled_from(["json", "pickle"]))
@example(hooks={"__getattribute__": 0}, raised="ValueError", serializer="json")
@example(hooks={"__reduce_ex__": 0}, raised="SystemExit", serializer="pickle")
@example(hooks={"__init__": 0}, raised="SystemExit", serializer="pickle")
@example(hooks={"__new__": 1, "__getattribute__": 2}, raised="BackendClosedError", serializer="pickle")
async def test_nothing_about_an_exception_keeps_it_from_being_stored(
    hooks: dict[str, int], raised: str, serializer: str
) -> None:
    """A worker tells of a failure whatever its class does."""
    exc = Exception.__new__(hostile(hooks, raised), "4242")
    async with in_memory(serializer=serializer, accept=("json", "pickle")) as (_, backend):
        assert await told(backend.mark_as_failure("t", exc)) is True
        await told(backend.on_chord_part_return("g", "t", FAILURE, exc))
        assert (await backend.chord("g").progress()).done == 1
        (outcome,) = await backend.get_outcomes(["t"])
        assert isinstance(outcome, DecodeError) or (isinstance(outcome, TaskMeta) and outcome.status == FAILURE)


# -- values that nobody could read ----------------------------------------------------------------------------------


def tagged(kind: Any, value: Any) -> dict[str, Any]:
    return {"__type__": kind, "__value__": value}


_UNREADABLE = [tagged("point", 1), tagged(None, 1), tagged(["uuid"], 1), tagged("datetime", 5), tagged("uuid", "x")]


@pytest.mark.parametrize("value", _UNREADABLE, ids=str)
async def test_a_value_that_no_reader_could_decode_is_refused_to_its_storer_alone(harness: Harness, value: Any) -> None:
    worker, web = await harness.pair()
    wrong: dict[str, Awaitable[Any]] = {
        "done": worker.mark_as_done("bad", value),
        "nested": worker.mark_as_done("bad", [{"a": (value, 1)}]),
        "progress": worker.store_result("bad", value, "PROGRESS"),
        "started": worker.mark_as_started("bad", **value),
        "retry": worker.store_result("bad", value, RETRY),
        "body": worker.create_chord("bad", value, size=1),
        "part": worker.on_chord_part_return("bad", "t", SUCCESS, value),
        "body of a part": worker.on_chord_part_return("bad", "t", SUCCESS, 1, body=value),
    }
    outcomes = await beside(worker, wrong)
    assert not {name: outcome for name, outcome in outcomes.items() if not isinstance(outcome, EncodeError)}
    assert not await web.exists("bad")
    assert await web.chord("bad").progress() == (0, None)
    await worker.mark_as_failure("failed", ValueError(value))
    error = (await web.get_task_meta("failed")).result
    assert (type(error), error.args) == (ValueError, (repr(value),))


@unhurried
@given(
    value=st.recursive(
        st.sampled_from([1, None, "datetime", "uuid", "bytes", "decimal", "point", "2024-01-01", "1", "__type__"]),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(st.sampled_from(["__type__", "__value__", "hex", "a"]), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    serializer=st.sampled_from(["json", "msgpack", "pickle"]),
    compression=st.sampled_from([None, "gzip"]),
)
@example(value={"__type__": "point", "__value__": 1}, serializer="json", compression=None)
@example(value={"__type__": "point", "__value__": 1}, serializer="msgpack", compression="gzip")
async def test_whatever_is_stored_can_be_read(value: Any, serializer: str, compression: str | None) -> None:
    async with in_memory(serializer=serializer, accept=(serializer,), compression=compression) as (_, backend):
        stored = await told(backend.mark_as_done("t", value))
        if isinstance(stored, EncodeError):
            assert "__type__" in str(stored)
            assert not await backend.exists("t")
        else:
            assert stored is True
            assert (await backend.get_task_meta("t")).status == SUCCESS


# -- arguments ------------------------------------------------------------------------------------------------------

Call = Callable[[Backend, Any], Any]


async def called(call: Call, backend: Backend, value: Any) -> Any:
    """The outcome of ``call``, which may be a plain method."""
    outcome = call(backend, value)
    return await outcome if isinstance(outcome, Awaitable) else outcome


async def beside(backend: Backend, calls: Mapping[str, Awaitable[Any]]) -> dict[str, Any]:
    """The outcome of each call, by its name: all made in one turn of the loop with good calls, which succeed."""
    turn = uuid4().hex
    good = [f"{turn}-{index}" for index in range(4)]
    await backend.mark_as_done(turn, "there")
    kinds: list[Callable[[str], Awaitable[Any]]] = [
        lambda task_id: backend.mark_as_done(task_id, 1),
        lambda task_id: backend.wait_for(task_id),
        lambda _: backend.get_task_meta(turn),
        lambda _: backend.get_many([turn] * 3),
        lambda task_id: backend.forget(f"{task_id}-nothing"),
        lambda task_id: backend.save_group(task_id, backend.group([turn], task_id)),
        lambda task_id: backend.create_chord(task_id, size=1),
        lambda task_id: backend.on_chord_part_return(f"{task_id}-x", "t", SUCCESS, 1),
    ]

    def some(task_id: str) -> list[Awaitable[Any]]:
        return [kind(task_id) for kind in kinds]

    before = asyncio.gather(*some(good[0]), *some(good[1]))
    bad = asyncio.gather(*map(told, calls.values()))
    after = asyncio.gather(*some(good[2]), *some(good[3]))
    outcomes = await bad
    for group in (await before, await after):
        done, waited, read, many, *_ = group
        assert (done, waited.result, read.result, [meta.result for meta in many]) == (True, 1, "there", ["there"] * 3)
    assert [meta.result for meta in await backend.get_many(good)] == [1] * 4
    return dict(zip(calls, outcomes, strict=True))


def _request(**fields: Any) -> TaskRequest:
    return TaskRequest(**{"id": "t", **fields})


_BY_ID: dict[str, Call] = {
    "store_result": lambda b, x: b.store_result(x, 1, "PROGRESS"),
    "mark_as_pending": lambda b, x: b.mark_as_pending(x),
    "mark_as_started": lambda b, x: b.mark_as_started(x),
    "mark_as_done": lambda b, x: b.mark_as_done(x, 1),
    "mark_as_failure": lambda b, x: b.mark_as_failure(x, KeyError(1)),
    "mark_as_retry": lambda b, x: b.mark_as_retry(x, KeyError(1)),
    "mark_as_revoked": lambda b, x: b.mark_as_revoked(x),
    "get_task_meta": lambda b, x: b.get_task_meta(x),
    "get_many": lambda b, x: b.get_many(["a", x]),
    "look_up": lambda b, x: b.get_outcomes([x, "a"]),
    "exists": lambda b, x: b.exists(x),
    "wait_for": lambda b, x: b.wait_for(x),
    "wait_for at once": lambda b, x: b.wait_for(x, 0),
    "watch": lambda b, x: b.watch(x, Recorder()),
    "forget": lambda b, x: b.forget(x),
    "forget_many": lambda b, x: b.forget_many(["a", x]),
    "save_group": lambda b, x: b.save_group(x, b.group(["a"], "g")),
    "restore_group": lambda b, x: b.restore_group(x),
    "delete_group": lambda b, x: b.delete_group(x),
    "create_chord": lambda b, x: b.create_chord(x, size=1),
    "set_chord_size": lambda b, x: b.set_chord_size(x, 1),
    "on_chord_part_return": lambda b, x: b.on_chord_part_return(x, "t", SUCCESS, 1),
    "the task of on_chord_part_return": lambda b, x: b.on_chord_part_return("g", x, SUCCESS, 1),
    "chord": lambda b, x: b.chord(x).get(),
    "result": lambda b, x: b.result(x).get(),
    "group": lambda b, x: b.group(["a", x]).get(),
    "AsyncResult": lambda b, x: AsyncResult[Any](x, b).get(),
    "GroupResult.restore": lambda b, x: GroupResult.restore(x, b),
    "GroupResult.save": lambda b, x: GroupResult(x, [b.result("a")], backend=b).save(),
}
_BY_REQUEST: dict[str, Call] = {
    "group": lambda b, x: b.mark_as_done("t", 1, _request(group=x)),
    "group of a chord": lambda b, x: b.mark_as_done("t", 1, _request(group=x, chord=True)),
    "group of a failure": lambda b, x: b.mark_as_failure("t", KeyError(1), None, _request(group=x)),
    "group of a retry": lambda b, x: b.mark_as_retry("t", KeyError(1), None, _request(group=x)),
    "group of a revoked one": lambda b, x: b.mark_as_revoked("t", "", _request(group=x, chord=True)),
    "group of a state": lambda b, x: b.store_result("t", 1, "PROGRESS", None, _request(group=x)),
    "parent_id": lambda b, x: b.mark_as_done("t", 1, _request(parent_id=x)),
}
_NO_IDS: list[Any] = [5, 1.5, True, b"x", ["a"], {"a"}, object(), "x" * 1025, "\ud800", "a\udfff", "\x00x"]


def tried(calls: Mapping[str, Call], values: Iterable[Any], backend: Backend) -> dict[str, Awaitable[Any]]:
    """Each of ``calls`` with each of ``values``."""
    return {
        f"{name} {number}: {value!r:.30}": called(call, backend, value)
        for number, value in enumerate(values)
        for name, call in calls.items()
    }


def not_refused(outcomes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: outcome for name, outcome in outcomes.items() if not isinstance(outcome, AioResultError)}


async def test_what_is_no_id_is_an_error_to_its_caller_alone(harness: Harness) -> None:
    backend = await harness.connect()
    odd = [*_NO_IDS, "x" * (harness.longest_id + 1), *(["a\x00b"] if harness.name == "postgres" else [])]
    calls = tried(_BY_ID, [None, "", *odd], backend) | tried(_BY_REQUEST, odd, backend)
    assert not not_refused(await beside(backend, calls))
    assert not await backend.exists("t")


_INFINITE = float("inf")
_NO_SECONDS: list[Any] = [float("nan"), _INFINITE, -_INFINITE, -1, "5", True, 1e300, 10**400, b"", [1], object()]
_BY_EXPIRES: dict[str, Call] = {
    "store_result": lambda b, x: b.store_result("t", 1, SUCCESS, expires=x),
    "mark_as_pending": lambda b, x: b.mark_as_pending("t", expires=x),
    "mark_as_done": lambda b, x: b.mark_as_done("t", 1, expires=x),
    "mark_as_failure": lambda b, x: b.mark_as_failure("t", KeyError(1), expires=x),
    "mark_as_retry": lambda b, x: b.mark_as_retry("t", KeyError(1), expires=x),
    "mark_as_revoked": lambda b, x: b.mark_as_revoked("t", expires=x),
    "save_group": lambda b, x: b.save_group("t", b.group(["a"], "t"), expires=x),
    "on_chord_part_return": lambda b, x: b.on_chord_part_return("t", "t", SUCCESS, 1, lease=x),
}
_NO_TIMEOUTS: list[Any] = [float("nan"), "5", True, b"", [1], object(), 10**400]
_BY_TIMEOUT: dict[str, Call] = {
    "wait_for": lambda b, x: b.wait_for("t", x),
    "AsyncResult.get": lambda b, x: b.result("t").get(x),
    "with a parent": lambda b, x: b.result("t", b.result("p")).get(x),
    "ResultSet.get": lambda b, x: b.group(["t", "u"]).get(x),
    "Chord.get": lambda b, x: b.chord("t").get(x),
    "wait": lambda b, x: aioresult.wait([b.result("t")], x),
    "as_completed": lambda b, x: anext(aioresult.as_completed([b.result("t")], x)),
}
_NO_STATES: list[Any] = [1, None, "", True, b"SUCCESS", ["SUCCESS"], "x" * 51, "a\x00b", "\ud800"]
_BY_STATE: dict[str, Call] = {
    "store_result": lambda b, x: b.store_result("t", 1, x),
    "on_chord_part_return": lambda b, x: b.on_chord_part_return("t", "t", x, 1),
}
_BY_TRACEBACK: dict[str, Call] = {
    "store_result": lambda b, x: b.store_result("t", KeyError(1), FAILURE, x),
    "mark_as_failure": lambda b, x: b.mark_as_failure("t", KeyError(1), x),
    "mark_as_retry": lambda b, x: b.mark_as_retry("t", KeyError(1), x),
}
_BY_EXCEPTION: dict[str, Call] = {
    "mark_as_failure": lambda b, x: b.mark_as_failure("t", x),
    "mark_as_retry": lambda b, x: b.mark_as_retry("t", x),
}
_BY_INDEX: dict[str, Call] = {
    "on_chord_part_return": lambda b, x: b.on_chord_part_return("t", "t", SUCCESS, 1, x),
    "mark_as_done": lambda b, x: b.mark_as_done("t", 1, _request(group="t", chord=True, group_index=x)),
    "mark_as_failure": lambda b, x: b.mark_as_failure(
        "t", KeyError(1), None, _request(group="t", chord=True, group_index=x)
    ),
    "mark_as_revoked": lambda b, x: b.mark_as_revoked("t", "", _request(group="t", chord=True, group_index=x)),
    "create_chord": lambda b, x: b.create_chord("t", size=x),
    "set_chord_size": lambda b, x: b.set_chord_size("t", x),
}
_BY_RESULT: dict[str, Call] = {
    "children": lambda b, x: b.mark_as_done("t", 1, _request(children=[x])),
    "save_group": lambda b, x: b.save_group("t", x),
    "gather": lambda b, x: aioresult.gather(b.result("t"), x),
    "wait": lambda b, x: aioresult.wait([x]),
}
_WRONG: dict[str, tuple[dict[str, Call], list[Any]]] = {
    "seconds": (_BY_EXPIRES, _NO_SECONDS),
    "timeouts": (_BY_TIMEOUT, _NO_TIMEOUTS),
    "states": (_BY_STATE, _NO_STATES),
    "tracebacks": (_BY_TRACEBACK, [123, True, b"x", ["x"], object()]),
    "exceptions": (_BY_EXCEPTION, ["x", None, KeyError, 5]),
    "indexes and sizes": (_BY_INDEX, ["x", -1, True, 1.5, 10**15, float("nan"), b"1"]),
    "results": (_BY_RESULT, [5, None, object(), {"a": 1}]),
}


@pytest.mark.parametrize("what", _WRONG)
async def test_an_argument_that_makes_no_sense_is_an_error_to_its_caller_alone(harness: Harness, what: str) -> None:
    backend = await harness.connect()
    assert not not_refused(await beside(backend, tried(*_WRONG[what], backend)))
    assert not await backend.exists("t")
    assert await backend.restore_group("t") is None
    assert await backend.chord("t").progress() == (0, None)


async def test_a_state_that_makes_no_sense_is_refused_whatever_the_serializer() -> None:
    async with in_memory(serializer="pickle", accept=("pickle",)) as (_, backend):
        assert not not_refused(await beside(backend, tried(_BY_STATE, _NO_STATES, backend)))
        assert not await backend.exists("t")


async def test_a_uuid_serves_wherever_an_id_does(harness: Harness) -> None:
    worker, web = await harness.pair()
    task, parent, group_id = uuid4(), uuid4(), uuid4()
    group = web.group([task], group_id)
    assert (group.id, web.result(task, web.result(parent)).id) == (str(group_id), str(task))
    await group.save()
    for restored in (await web.restore_group(group_id), await web.restore_group(str(group_id))):
        assert restored == group
    await web.save_group(group_id, [[group_id, None], [[[task, None], None]]])
    assert await GroupResult.restore(group_id, web) == group

    await web.create_chord(group, body="body")
    assert await worker.mark_as_done(
        task, 1, _request(id=task, group=group_id, parent_id=parent, chord=True, group_index=0)
    )
    assert await web.chord(group_id) == [1]
    ready = await web.chord(group_id).claim()
    assert ready is not None
    assert (ready.id, ready.body, ready.results) == (str(group_id), "body", [1])
    meta = await web.wait_for(task)
    if harness.keeps_family:
        assert (meta.group_id, meta.parent_id) == (str(group_id), str(parent))
    assert await web.group([task], group_id) == [1]

    other = uuid4()
    await web.create_chord(other)
    await worker.on_chord_part_return(other, uuid4(), SUCCESS, 1, lease=0)
    completed = await web.set_chord_size(other, 1)
    assert completed is not None
    assert completed.id == str(other)

    await web.delete_group(group_id)
    assert await web.restore_group(group_id) is None
    assert not not_refused_uuid(
        await beside(worker, {name: called(_BY_ID[name], worker, uuid4()) for name in _AT_ONCE})
    )


#: The calls that do not wait for anything to be stored.
_AT_ONCE = [name for name in _BY_ID if name not in ("wait_for", "wait_for at once", "chord", "result", "group")][:-3]


def not_refused_uuid(outcomes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, Exception)}


# -- batches --------------------------------------------------------------------------------------------------------

#: A primitive that gets many ids at once, and a call that leads to it.
_ASKED: dict[str, tuple[str, Callable[[Backend, str], Awaitable[Any]]]] = {
    "store": ("_store", lambda b, task_id: b.mark_as_done(task_id, 1)),
    "read": ("_fetch", lambda b, task_id: b.get_task_meta(task_id)),
    "forget": ("_delete", lambda b, task_id: b.forget(task_id)),
    "chord": ("_chord_steps", lambda b, task_id: b.create_chord(task_id, size=1)),
    "wait": ("_subscribe", lambda b, task_id: b.wait_for(task_id)),
    "look": ("_fetch", lambda b, task_id: b.wait_for(task_id)),
}
_WAITING = ("wait", "look")


def ids_of(batch: Sequence[Any]) -> set[str]:
    return {item if isinstance(item, str) else getattr(item, "task_id", "") or item.group_id for item in batch}


def failed(ids: Sequence[str], outcomes: Sequence[Any]) -> set[str]:
    return {each for each, outcome in zip(ids, outcomes, strict=True) if isinstance(outcome, BaseException)}


@asynccontextmanager
async def poisoned(
    primitive: str, culprits: set[str], error: Callable[[], Exception], chunk: int, **options: Any
) -> AsyncIterator[tuple[MemoryHarness, Backend]]:
    """A backend of which a primitive refuses as a whole whatever contains one of ``culprits``."""

    async def around(original: Primitive, batch: Sequence[Any], *args: Any) -> Any:
        if ids_of(batch) & culprits:
            raise error()
        return await original(batch, *args)

    harness = MemoryHarness()
    backend = harness.make(**options)
    backend.fetch_chunk = backend.store_chunk = chunk
    intercept(backend, primitive, around)
    try:
        yield harness, await harness.open(backend)
    finally:
        await harness.close()


async def outcomes_of(
    harness: MemoryHarness, backend: Backend, what: str, ids: Sequence[str], culprits: set[str], patient: bool
) -> list[Any]:
    """What is told to each caller. The waiters for a subscription get a result once all others are over."""
    calls = [asyncio.ensure_future(_ASKED[what][1](backend, task_id)) for task_id in ids]
    if what in _WAITING:
        good = [task_id for task_id in ids if task_id not in culprits]
        if patient:  # a wait goes on in an outage, however long
            await until(lambda: all(f"celery-task-meta-{task_id}" in harness.store.listeners for task_id in good))
        else:
            await until(lambda: all(call.done() for call, each in zip(calls, ids, strict=True) if each in culprits))
            await harness.subscribed(len(good))
        async with harness.make() as worker:
            await asyncio.gather(*(worker.mark_as_done(task_id, 1) for task_id in good))
        if patient:
            await asyncio.gather(*(call for call, each in zip(calls, ids, strict=True) if each not in culprits))
            for call, each in zip(calls, ids, strict=True):
                if each in culprits:
                    call.cancel()
    return await asyncio.gather(*calls, return_exceptions=True)


_PLACES = st.sets(st.integers(0, 59), max_size=6)


@pytest.mark.parametrize("what", _ASKED)
@unhurried
@given(
    size=st.integers(1, 60),
    places=_PLACES,
    chunk=st.integers(1, 70),
    error=st.sampled_from([BackendStoreError, BackendError, BackendGetMetaError, ZeroDivisionError, KeyError]),
)
@example(size=20, places={7}, chunk=500, error=ZeroDivisionError)
@example(size=20, places=set(range(20)), chunk=500, error=BackendError)
async def test_a_batch_that_is_refused_as_a_whole_is_an_error_to_the_culprits_alone(
    what: str, size: int, places: set[int], chunk: int, error: type[Exception]
) -> None:
    ids = [f"t{index}" for index in range(size)]
    culprits = {ids[place] for place in places if place < size}
    async with poisoned(_ASKED[what][0], culprits, lambda: error("poisoned"), chunk) as (harness, backend):
        outcomes = await outcomes_of(harness, backend, what, ids, culprits, patient=False)
        assert failed(ids, outcomes) == culprits
        assert all("poisoned" in str(outcome) for outcome in outcomes if isinstance(outcome, Exception))
        if what == "read":
            assert failed(ids, await backend.get_outcomes(ids)) == culprits
        if what == "store":
            assert set(harness.store.values) == {f"celery-task-meta-{task_id}" for task_id in set(ids) - culprits}


def broken() -> BackendConnectionError:
    error = BackendConnectionError("poisoned")
    error.in_flight = True
    return error


@pytest.mark.parametrize("what", _ASKED)
@settings(unhurried, max_examples=2)
@given(size=st.integers(1, 16), places=st.sets(st.integers(0, 15), min_size=1, max_size=2))
@example(size=12, places={0})
@example(size=12, places={11})
async def test_a_batch_on_which_the_connection_dies_each_time_is_an_error_to_the_culprits_alone(
    what: str, size: int, places: set[int]
) -> None:
    ids = [f"t{index}" for index in range(size)]
    culprits = {ids[place] for place in places if place < size}
    async with poisoned(_ASKED[what][0], culprits, broken, 16, retry_for=1) as (harness, backend):
        backend._shards[0].hub._backoff = Backoff(
            0.001, 0.01
        )  # waiters have no deadline: only the number of steps counts
        outcomes = await outcomes_of(harness, backend, what, ids, culprits, patient=True)
        assert failed(ids, outcomes) == culprits


async def test_a_value_that_the_server_does_not_take_fails_for_its_storer_alone() -> None:
    """Redis closes the connection on an argument above ``proto-max-bulk-len``, and says no more."""
    with redis_server("--proto-max-bulk-len", "1mb") as server:
        async with aioresult.connect(server.url, retry_for=1) as backend:
            await backend.mark_as_done("warm", 0)
            outcomes = await asyncio.gather(
                *(backend.mark_as_done(f"t{index}", "x" * 2_000_000 if index == 5 else 1) for index in range(12)),
                *(told(backend.get_task_meta("warm")) for _ in range(3)),
                return_exceptions=True,
            )
            assert isinstance(outcomes[5], BackendError)
            assert [outcome for index, outcome in enumerate(outcomes[:12]) if index != 5] == [True] * 11
            assert [meta.result for meta in outcomes[12:] if isinstance(meta, TaskMeta)] == [0] * 3
            metas = await backend.get_many(f"t{index}" for index in range(12))
            assert [meta.status for meta in metas] == [PENDING if index == 5 else SUCCESS for index in range(12)]


# -- permissions ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def admin(own_redis: RedisServer) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.Redis.from_url(own_redis.url) as client:
        await client.flushall()
        yield client
        await client.acl_deluser("guest")


async def as_guest(admin: redis.asyncio.Redis, server: RedisServer, **rights: Any) -> str:
    """The URL of a user that has these rights."""
    rights = {"keys": ["*"], "reset_channels": True, **rights}
    await admin.acl_setuser("guest", reset=True, enabled=True, passwords=["+secret"], commands=["+@all"], **rights)
    return server.url.replace("redis://", "redis://guest:secret@")


@pytest.mark.parametrize("there_before", [None, STARTED])
@pytest.mark.parametrize(
    "store",
    [
        lambda b, x: b.mark_as_done(x, 1),
        lambda b, x: b.mark_as_failure(x, KeyError(1)),
        lambda b, x: b.store_result(x, 1, "PROGRESS"),
        lambda b, x: b.mark_as_done(x, 1, TaskRequest(id=x, group="g")),
    ],
    ids=["done", "failure", "progress", "member"],
)
async def test_without_the_right_to_publish_nothing_is_stored(
    own_redis: RedisServer,
    admin: redis.asyncio.Redis,
    store: Callable[[Backend, str], Awaitable[bool]],
    there_before: str | None,
) -> None:
    async with (
        aioresult.connect(own_redis.url) as web,
        aioresult.connect(await as_guest(admin, own_redis)) as worker,
    ):
        for task_id in "xyz":
            if there_before is not None:
                await web.store_result(task_id, "before", there_before)
        waiting = [asyncio.create_task(web.wait_for(task_id)) for task_id in "xyz"]
        await until_subscribed(admin, 3)
        before = await everything(admin)
        alone = [await told(store(worker, task_id)) for task_id in "xyz"]
        together = [*await asyncio.gather(*(store(worker, task_id) for task_id in "xyz"), return_exceptions=True)]
        for outcome in (*alone, *together):
            assert isinstance(outcome, BackendRefusedError)
            assert "&celery-task-meta-" in str(outcome)
        assert await everything(admin) == before
        assert not any(waiter.done() for waiter in waiting)
        assert await asyncio.gather(*(web.mark_as_done(task_id, 2) for task_id in "xyz")) == [True] * 3
        assert [meta.result for meta in await asyncio.gather(*waiting)] == [2, 2, 2]


async def until_subscribed(admin: redis.asyncio.Redis, count: int) -> None:
    async def reached() -> bool:
        return len(await admin.pubsub_channels()) == count

    await until(reached)


async def everything(admin: redis.asyncio.Redis) -> dict[Any, Any]:
    """All keys with their values; but the set of chords, where an entry too many does no harm."""
    keys: list[Any] = await admin.keys()
    return {key: await admin.dump(key) for key in sorted(keys) if key != b"aioresult-chords"}


async def test_without_the_right_to_publish_no_chord_changes(
    own_redis: RedisServer, admin: redis.asyncio.Redis
) -> None:
    async with (
        aioresult.connect(own_redis.url) as web,
        aioresult.connect(await as_guest(admin, own_redis)) as worker,
    ):
        await web.create_chord("g", size=1, body="body")
        await web.create_chord("failing", size=2)
        await web.on_chord_part_return("sized", "t", SUCCESS, 1)
        before = await everything(admin)
        steps: list[Callable[[], Awaitable[Any]]] = [
            lambda: worker.on_chord_part_return("g", "t", SUCCESS, 1),
            lambda: worker.on_chord_part_return("failing", "t", FAILURE, KeyError(1)),
            lambda: worker.set_chord_size("sized", 1),
            lambda: worker.create_chord("empty", size=0),
        ]
        for step in steps * 2:
            with pytest.raises(BackendRefusedError, match="&celery-taskset-meta-"):
                await step()
        assert await everything(admin) == before
        ready = await web.on_chord_part_return("g", "t", SUCCESS, 1)
        assert ready is not None
        assert (ready.body, ready.results) == ("body", [1])


async def test_a_channel_that_is_forbidden_fails_the_waiters_for_its_id_alone(
    own_redis: RedisServer, admin: redis.asyncio.Redis
) -> None:
    url = await as_guest(admin, own_redis, channels=["celery-task-meta-ok*"])
    async with aioresult.connect(own_redis.url) as worker, aioresult.connect(url) as web:
        before = asyncio.create_task(web.wait_for("ok-before"))
        await until_subscribed(admin, 1)
        ids = ["ok-0", "secret", "ok-1", "secret too", "ok-2"]
        waiting = [asyncio.create_task(web.wait_for(task_id)) for task_id in ids]
        await until_subscribed(admin, 4)
        for refused in (waiting[1], waiting[3]):
            with pytest.raises(BackendRefusedError, match=r"NOPERM|permission"):
                await refused
        for task_id in ("ok-before", *ids):
            await worker.mark_as_done(task_id, task_id)
        results = [(await waiter).result for waiter in (before, waiting[0], waiting[2], waiting[4])]
        assert results == ["ok-before", "ok-0", "ok-1", "ok-2"]
        assert (await web.wait_for("secret")).result == "secret"  # found by the first look


@pytest.mark.parametrize(
    "call",
    [
        lambda b, x: b.mark_as_done(x, 1),
        lambda b, x: b.get_task_meta(x),
        lambda b, x: b.wait_for(x),
        lambda b, x: b.forget(x),
        lambda b, x: b.restore_group(x),
        lambda b, x: b.on_chord_part_return(x, "t", SUCCESS, 1),
    ],
    ids=["store", "read", "wait", "forget", "group", "chord"],
)
async def test_a_key_that_is_forbidden_is_an_error_for_its_id_alone(
    own_redis: RedisServer, admin: redis.asyncio.Redis, call: Call
) -> None:
    keys = ["celery-task-meta-ok*", "celery-taskset-meta-ok*", "aioresult-chords"]
    url = await as_guest(admin, own_redis, keys=keys, channels=["*"])
    async with aioresult.connect(url) as guest, aioresult.connect(own_redis.url) as worker:
        ids = ["ok-0", "secret", "ok-1"]
        await asyncio.gather(*(worker.mark_as_started(task_id) for task_id in ids))
        calls = [asyncio.ensure_future(called(call, guest, task_id)) for task_id in ids]
        with pytest.raises(BackendRefusedError):
            await calls[1]
        await asyncio.gather(*(worker.mark_as_done(task_id, 1) for task_id in ids))
        await asyncio.gather(calls[0], calls[2])


# -- dispatchers ----------------------------------------------------------------------------------------------------


async def dispatches_despite(
    backend: Backend,
    damaged: Sequence[str],
    announce: Callable[[str], Awaitable[None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A dispatcher gets each good chord, whatever is announced before, and logs each damaged one once.

    Between two rounds the claims run out that could be made, but for which nothing was dispatched.
    """
    chords = backend.ready_chords()
    try:
        for number in range(3):
            for good in (f"good-{number}", f"another-{number}"):
                dispatching = asyncio.ensure_future(anext(chords))
                for group_id in damaged:
                    await announce(group_id)
                await backend.create_chord(good, size=0)
                ready = await dispatching
                assert ready.id == good
                async with ready:
                    pass
            for group_id in damaged:
                await until(lambda group_id=group_id: unclaimed(backend, group_id))
    finally:
        await chords.aclose()
    named = Counter(re.findall(r"chord (\S+) cannot be dispatched", caplog.text))
    assert {group_id: named[group_id] for group_id in damaged} == dict.fromkeys(damaged, 1)


async def unclaimed(backend: Backend, group_id: str) -> bool:
    state = await told(backend.chord_step(ChordStep(ChordOp.READ, group_id)))
    return isinstance(state, BaseException) or state.lease_left is None


def deep(depth: int) -> Any:
    return [["x", None], [deep(depth - 1)] if depth else []]


async def test_damaged_chords_end_no_dispatcher_and_are_logged_once(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    worker, stranger = await harness.connect(), await harness.connect(serializer="pickle", accept=("pickle",))
    backend = await harness.connect(chord_lease=0.2)

    async def make(group_id: str, body: Backend = worker, part: Backend = worker, group: bytes | None = None) -> None:
        await body.create_chord(group_id, "body", size=1)
        if group is not None:
            await harness.put_raw_group(group_id, group)
        await part.on_chord_part_return(group_id, "t", SUCCESS, 1, lease=0)

    await make("body", body=stranger)
    await make("part", part=stranger)
    await make("group", group=b"{")
    await make("kind", group=worker._encode_group("kind", "neither list nor tuple"))
    await make("cycle", group=worker._encode_group("cycle", deep(150)))
    assert isinstance(await told(backend.chord("part").get()), ContentDisallowed)

    async def announce(group_id: str) -> None:
        backend._chord_news(group_id, ready=True)

    await dispatches_despite(backend, ["body", "part", "group", "kind", "cycle"], announce, caplog)


async def test_a_chord_that_was_put_right_is_dispatched(harness: Harness) -> None:
    backend = await harness.connect(chord_lease=0.02)
    await backend.create_chord("mended", size=1)
    await harness.put_raw_group("mended", b"{")
    await backend.on_chord_part_return("mended", "t", SUCCESS, 1, lease=0)
    await backend.create_chord("good", size=0)
    chords = backend.ready_chords()
    assert {(await anext(chords)).id} == {"good"}
    await backend.save_group("mended", backend.group(["t"], "mended"))
    dispatching = asyncio.ensure_future(mended(chords))
    await until(lambda: unclaimed(backend, "mended"))
    backend._chord_news("mended", ready=True)
    assert await dispatching == [1]
    await chords.aclose()


async def mended(chords: AsyncIterator[aioresult.ReadyChord]) -> list[Any]:
    async for ready in chords:
        async with ready:
            if ready.id == "mended":
                return ready.results
    raise AssertionError


#: What becomes of the keys of a chord that is complete.
_DAMAGE: dict[str, Callable[[redis.asyncio.Redis, str], Awaitable[Any]]] = {
    "parts-of-another-kind": lambda r, key: r.set(f"{key}.j", b"x"),
    "size-of-another-kind": lambda r, key: r.lpush(f"{key}.s", "x"),
    "size-that-is-no-number": lambda r, key: r.set(f"{key}.s", "x"),
    "claim-of-another-kind": lambda r, key: r.lpush(f"{key}.c", "x"),
    "body-of-another-kind": lambda r, key: r.set(f"{key}.a", "x"),
    "group-of-another-kind": lambda r, key: r.lpush(key, "x"),
    "part-that-is-no-part": lambda r, key: r.zadd(f"{key}.j", {"[1]": 0}),
    "part-that-is-no-text": lambda r, key: r.zadd(f"{key}.j", {b"\xff\xfe": 0}),
    "body-that-is-no-text": lambda r, key: r.hset(f"{key}.a", "body", b"\xff\xfe"),
    "group-that-is-no-text": lambda r, key: r.set(key, b"\xff\xfe"),
}


async def test_damaged_keys_of_chords_end_no_dispatcher_and_are_logged_once(
    redis_url: str, redis_client: redis.asyncio.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async def announce(group_id: str) -> None:
        await redis_client.publish("aioresult-chords", group_id)

    async with aioresult.connect(redis_url, chord_lease=0.2) as backend:
        for group_id, damage in _DAMAGE.items():
            key = f"celery-taskset-meta-{group_id}"
            await backend.create_chord(group_id, "body", size=1)
            await backend.on_chord_part_return(group_id, "t", SUCCESS, 1, lease=0)
            if "another-kind" in group_id:
                await redis_client.delete(
                    f"{key}.{'jsca'['psco'.index(group_id[0])]}" if group_id[0] in "psco" else key
                )
            await damage(redis_client, key)
        await dispatches_despite(backend, list(_DAMAGE), announce, caplog)


async def test_a_group_saved_under_the_key_of_a_chords_parts_ends_no_dispatcher(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with aioresult.connect(redis_url) as backend:
        await backend.create_chord("job", size=1, body=1)
        await backend.save_group("job.j", backend.group(["a"], "job.j"))
        for again in ("first", "after a restart"):
            await backend.create_chord(again, size=0)
            assert await anext_of(backend, again) == again
        assert isinstance(await told(backend.chord("job").get()), BackendError)
        assert {re.findall(r"chord (\S+)", record.getMessage())[0] for record in errors_logged(caplog)} == {"job"}
