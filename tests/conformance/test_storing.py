"""What the worker's side stores, and what the other side then reads."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from fractions import Fraction
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from aioresult import (
    AsyncResult,
    Backend,
    ContentDisallowed,
    DecodeError,
    EncodeError,
    ImproperlyConfigured,
    ResultTooLargeError,
    StoredType,
    TaskMeta,
    TaskRequest,
    TaskRevokedError,
    UsageError,
    gather,
    result_from_tuple,
)
from aioresult.states import FAILURE, PENDING, READY_STATES, RETRY, REVOKED, STARTED, SUCCESS

from ..harness import Harness, count_calls, until

Mark = Callable[[Backend, str], Awaitable[bool]]

MARKS: dict[str, Mark] = {
    PENDING: lambda backend, task_id: backend.mark_as_pending(task_id),
    STARTED: lambda backend, task_id: backend.mark_as_started(task_id, pid=7, hostname="w1"),
    "PROGRESS": lambda backend, task_id: backend.store_result(task_id, {"done": 3, "of": 4}, "PROGRESS"),
    RETRY: lambda backend, task_id: backend.mark_as_retry(task_id, ConnectionError("away")),
    REVOKED: lambda backend, task_id: backend.mark_as_revoked(task_id, "expired"),
    FAILURE: lambda backend, task_id: backend.mark_as_failure(task_id, KeyError("a")),
    SUCCESS: lambda backend, task_id: backend.mark_as_done(task_id, [1, "two", None]),
}
RESULTS: dict[str, Any] = {
    PENDING: None,
    STARTED: {"pid": 7, "hostname": "w1"},
    "PROGRESS": {"done": 3, "of": 4},
    RETRY: ConnectionError("away"),
    REVOKED: TaskRevokedError("expired"),
    FAILURE: KeyError("a"),
    SUCCESS: [1, "two", None],
}
#: States that say more than that the task exists.
BEYOND_PENDING = [state for state in MARKS if state != PENDING]

#: Every form in which a success may be stored.
FORMATS: list[dict[str, Any]] = [
    {},
    {"compression": "gzip"},
    {"serializer": "pickle", "accept": ("pickle", "json")},
    {"serializer": "msgpack", "accept": ("msgpack", "json"), "compression": "bzip2"},
]


def same(value: Any, expected: Any) -> bool:
    """Whether they are equal; exceptions are if type and arguments are."""
    if isinstance(expected, BaseException):
        return isinstance(value, type(expected)) and value.args == expected.args
    return bool(value == expected)


# -- the states -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", MARKS)
async def test_a_mark_is_read_by_others(harness: Harness, state: str) -> None:
    worker, reader = await harness.pair()
    assert await MARKS[state](worker, "t") is True
    meta = await reader.get_task_meta("t")
    assert (meta.task_id, meta.status) == ("t", state)
    assert same(meta.result, RESULTS[state])
    assert (meta.date_done is not None) == (state in READY_STATES)


async def test_a_traceback_is_the_one_given_or_that_of_the_exception(harness: Harness) -> None:
    worker, reader = await harness.pair()
    try:
        raise ValueError("here")
    except ValueError as exc:
        raised = exc
    await worker.mark_as_failure("given", raised, "as the worker wrote it")
    await worker.mark_as_failure("own", raised)
    await worker.mark_as_retry("never raised", ValueError("here"))
    given, own, none = await reader.get_many(["given", "own", "never raised"])
    assert given.traceback == "as the worker wrote it"
    assert own.traceback is not None
    assert 'raise ValueError("here")' in own.traceback
    assert none.traceback is None


async def test_unknown_is_not_pending(harness: Harness) -> None:
    """Invariant 11: absence is visible."""
    worker, reader = await harness.pair()
    assert await reader.get_task_meta("t") == TaskMeta("t", PENDING)
    assert not await reader.exists("t")
    await worker.mark_as_pending("t")
    assert await reader.get_task_meta("t") == TaskMeta("t", PENDING)
    assert await reader.exists("t")


async def test_an_id_is_registered_once(harness: Harness) -> None:
    backends = await harness.pair()
    registered = await asyncio.gather(*(backends[n % 2].mark_as_pending("t") for n in range(10)))
    assert sorted(registered) == [False] * 9 + [True]


@pytest.mark.parametrize("state", BEYOND_PENDING)
async def test_pending_never_overwrites(harness: Harness, state: str) -> None:
    worker, submitter = await harness.pair()
    await MARKS[state](worker, "t")
    before = await submitter.get_task_meta("t")
    assert await submitter.mark_as_pending("t", expires=1) is False
    after = await submitter.get_task_meta("t")
    assert (after.status, after.date_done) == (before.status, before.date_done)
    left = await harness.seconds_left("t")
    assert left is not None
    assert left > 1


@pytest.mark.parametrize("later", [STARTED, RETRY, REVOKED, FAILURE, SUCCESS])
@pytest.mark.parametrize("earlier", [FAILURE, REVOKED, RETRY, STARTED, PENDING])
async def test_whatever_is_no_success_is_overwritten(harness: Harness, earlier: str, later: str) -> None:
    """Invariant 3: FAILURE and REVOKED keep Celery's rules, for a task may be run again."""
    worker, other = await harness.pair()
    await MARKS[earlier](worker, "t")
    assert await MARKS[later](other, "t") is True
    meta = await worker.get_task_meta("t")
    assert meta.status == later
    assert same(meta.result, RESULTS[later])


@pytest.mark.parametrize("second", FORMATS[:2])
@pytest.mark.parametrize("first", FORMATS)
async def test_success_stays(harness: Harness, first: dict[str, Any], second: dict[str, Any]) -> None:
    """Invariant 3, whoever comes later and in whatever form either of them stores."""
    accept = ("json", "pickle", "msgpack")
    worker = await harness.connect(**{**first, "accept": accept})
    other = await harness.connect(**{**second, "accept": accept})
    assert await worker.mark_as_done("t", "first") is True
    for mark in MARKS.values():
        assert await mark(other, "t") is False
    assert (await other.get_task_meta("t")).result == "first"


@pytest.mark.parametrize("options", FORMATS)
async def test_one_of_many_concurrent_successes_is_kept(harness: Harness, options: dict[str, Any]) -> None:
    """Invariants 2 and 3: those who read, those who wait and those who stored all agree."""
    backends = [await harness.connect(**options) for _ in range(4)]
    waiting = [asyncio.create_task(backend.wait_for("t")) for backend in backends]
    await harness.subscribed(1)
    kept = await asyncio.gather(*(backends[n % 4].mark_as_done("t", n) for n in range(40)))
    (winner,) = (n for n, stored in enumerate(kept) if stored)
    assert {meta.result for meta in await asyncio.gather(*waiting)} == {winner}
    assert {(await backend.get_task_meta("t")).result for backend in backends} == {winner}


@pytest.mark.parametrize("options", FORMATS)
async def test_one_id_several_times_in_a_batch_is_as_one_after_the_other(
    harness: Harness, options: dict[str, Any]
) -> None:
    worker = harness.make(**options)
    calls = count_calls(worker)
    await harness.open(worker)
    kept = await asyncio.gather(
        worker.mark_as_started("t"),
        worker.mark_as_pending("t"),
        worker.mark_as_failure("t", KeyError("a")),
        worker.mark_as_done("t", 1),
        worker.mark_as_done("t", 2),
        worker.mark_as_retry("t", KeyError("a")),
    )
    assert calls["_store"] == 1
    assert list(kept) == [True, False, True, True, False, False]
    assert (await worker.get_task_meta("t")).result == 1


# -- for how long ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("default", "own", "expected"),
    [
        ({}, None, 86_400),
        ({"expires": 50}, None, 50),
        ({"expires": 50.5}, 100, 100),
        ({"expires": 50}, 0, None),
        ({"expires": 0}, None, None),
        ({"expires": None}, None, None),
        ({"expires": None}, 100.5, 100.5),
    ],
)
async def test_a_result_expires_on_the_server(
    harness: Harness, default: dict[str, Any], own: float | None, expected: float | None
) -> None:
    worker = await harness.connect(**default)
    error = ValueError("x")
    await asyncio.gather(
        worker.store_result("stored", 1, "PROGRESS", expires=own),
        worker.mark_as_pending("pending", expires=own),
        worker.mark_as_done("done", 1, expires=own),
        worker.mark_as_failure("failure", error, expires=own),
        worker.mark_as_retry("retry", error, expires=own),
        worker.mark_as_revoked("revoked", expires=own),
    )
    await worker.save_group("group", worker.group(["done"]), expires=own)
    left = [
        await harness.seconds_left(task_id) for task_id in ("stored", "pending", "done", "failure", "retry", "revoked")
    ]
    left.append(await harness.group_seconds_left("group"))
    for seconds in left:
        if expected is None:
            assert seconds is None
        else:
            assert seconds is not None
            assert expected - 20 < seconds <= expected


async def test_a_later_state_brings_its_own_expiry(harness: Harness) -> None:
    worker = await harness.connect(expires=0)
    for expires in (1000, 50, 100):
        await worker.store_result("t", 1, "PROGRESS", expires=expires)
        left = await harness.seconds_left("t")
        assert left is not None
        assert expires - 20 < left <= expires
    await worker.mark_as_started("t")
    assert await harness.seconds_left("t") is None


@pytest.mark.parametrize("expires", [-1, float("nan"), float("inf"), True, "60"])
async def test_an_expiry_that_makes_no_sense_is_refused(harness: Harness, expires: Any) -> None:
    worker = await harness.connect()
    with pytest.raises(ImproperlyConfigured, match="expires must be a number of seconds"):
        await worker.mark_as_done("t", 1, expires=expires)
    with pytest.raises(ImproperlyConfigured, match="expires must be a number of seconds"):
        harness.make(expires=expires)
    assert not await worker.exists("t")


async def test_what_has_expired_is_gone(harness: Harness) -> None:
    worker, reader = await harness.pair()
    await worker.mark_as_done("t", 1, expires=0.01)
    await worker.save_group("g", worker.group(["t"]), expires=0.01)

    async def gone() -> bool:
        return not await reader.exists("t") and await reader.restore_group("g") is None

    await until(gone)
    assert await reader.get_task_meta("t") == TaskMeta("t", PENDING)
    assert await worker.mark_as_pending("t") is True  # an expired success is in nobody's way


async def test_cleanup_leaves_what_has_not_expired(harness: Harness) -> None:
    worker, reader = await harness.pair()
    await worker.mark_as_done("kept", 1)
    await worker.mark_as_done("gone", 1, expires=0.01)

    async def gone() -> bool:
        return not await reader.exists("gone")

    await until(gone)
    assert await reader.cleanup() in (0, 1)
    assert (await reader.get_task_meta("kept")).result == 1


@pytest.mark.parametrize(("member", "expected"), [(1000, 1000), (0, None), (5, 100), (None, 86400)])
async def test_a_group_lives_at_least_as_long_as_its_members(
    harness: Harness, member: float | None, expected: float | None
) -> None:
    worker, submitter = await harness.pair()
    await submitter.save_group("g", submitter.group(["t"], id="g"), expires=100)
    await worker.mark_as_done("t", 1, TaskRequest(id="t", group="g"), expires=member)
    left = await harness.group_seconds_left("g")
    if expected is None:
        assert left is None
    else:
        assert left is not None
        assert expected - 20 < left <= expected


async def test_a_group_that_nobody_saved_does_not_come_from_its_members(harness: Harness) -> None:
    worker, reader = await harness.pair()
    await worker.mark_as_done("t", 1, TaskRequest(id="t", group="g"))
    assert await reader.restore_group("g") is None


# -- the fields beside ----------------------------------------------------------------------------------------------

REQUEST = TaskRequest(
    id="t",
    task="shop.charge",
    args=[1, "two"],
    kwargs={"currency": "EUR"},
    hostname="celery@w1",
    retries=2,
    group="g",
    parent_id="p",
    queue="payments",
)
CELERYS = SimpleNamespace(
    id="t",
    task="shop.charge",
    args=[1, "two"],
    kwargs={"currency": "EUR"},
    hostname="celery@w1",
    retries=2,
    group="g",
    parent_id="p",
    delivery_info={"routing_key": "payments", "priority": 0},
    children=[],
    ignore_result=False,
    stamped_headers=["tenant", "result"],
    stamps={"tenant": ["acme"], "unlisted": 1, "result": "in the way"},
)


@pytest.mark.parametrize("request_", [REQUEST, CELERYS])
@pytest.mark.parametrize("state", [SUCCESS, FAILURE, RETRY, REVOKED])
async def test_extended_results_tell_of_the_task(harness: Harness, request_: Any, state: str) -> None:
    worker = await harness.connect(extended=True)
    reader = await harness.connect()
    error = ValueError("x")
    store = {
        SUCCESS: lambda: worker.mark_as_done("t", 1, request_),
        FAILURE: lambda: worker.mark_as_failure("t", error, request=request_),
        RETRY: lambda: worker.mark_as_retry("t", error, request=request_),
        REVOKED: lambda: worker.mark_as_revoked("t", request=request_),
    }
    await store[state]()
    meta = await reader.get_task_meta("t")
    assert (meta.name, meta.args, meta.kwargs) == ("shop.charge", [1, "two"], {"currency": "EUR"})
    assert (meta.worker, meta.retries, meta.queue) == ("celery@w1", 2, "payments")
    assert (meta.group_id, meta.parent_id) == (("g", "p") if harness.keeps_family else (None, None))


async def test_stamps_are_stored_as_far_as_they_are_listed(harness: Harness) -> None:
    worker = await harness.connect(extended=True)
    await worker.mark_as_done("t", 1, CELERYS)
    meta = await worker.get_task_meta("t")
    extra = meta.extra
    assert extra is not None
    assert meta.result == 1
    assert extra["stamped_headers"] == ["tenant", "result"]
    assert extra["tenant"] == ["acme"]
    assert "unlisted" not in extra


async def test_results_that_are_not_extended_know_only_their_family(harness: Harness) -> None:
    worker = await harness.connect()
    await worker.mark_as_done("t", 1, REQUEST)
    meta = await worker.get_task_meta("t")
    assert (meta.group_id, meta.parent_id) == (("g", "p") if harness.keeps_family else (None, None))
    assert (meta.name, meta.args, meta.kwargs, meta.worker, meta.retries, meta.queue) == (None,) * 6


async def test_arguments_that_cannot_be_stored_do_not_cost_the_result(harness: Harness) -> None:
    worker = await harness.connect(extended=True)
    request = TaskRequest(id="t", args=[{1, 2}], kwargs={"x": object}, task="odd")
    assert await worker.mark_as_done("t", 1, request)
    meta = await worker.get_task_meta("t")
    assert (meta.result, meta.name, meta.args) == (1, "odd", "[{1, 2}]")
    assert "object" in meta.kwargs


async def test_children_are_stored_from_handles_and_from_tuples(harness: Harness) -> None:
    worker, reader = await harness.pair()
    group = worker.group(["a", "b"], id="g")
    request = TaskRequest(id="t", children=[worker.result("c"), group, (("d", None), None)])
    await worker.mark_as_done("t", 1, request)
    children = await reader.result("t").children()
    assert children == [reader.result("c"), reader.group(["a", "b"], id="g"), reader.result("d")]


async def test_nothing_is_stored_for_a_task_whose_result_is_ignored(harness: Harness) -> None:
    worker = await harness.connect()
    assert await worker.mark_as_done("t", 1, SimpleNamespace(ignore_result=True)) is False
    assert not await worker.exists("t")


# -- types of the user's own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
async def test_types_are_written_and_read_wherever_a_value_is_stored(harness: Harness, serializer: str) -> None:
    half = Fraction(1, 2)
    types = [StoredType(Fraction, "fraction", str, Fraction)]
    worker, reader = await harness.pair(serializer=serializer, accept=(serializer,), types=types, extended=True)
    waiting = asyncio.create_task(reader.wait_for("t"))
    await harness.subscribed(1)
    request = TaskRequest(id="t", task="cut", args=[half], kwargs={"by": half}, children=[(("c", None), None)])
    await worker.mark_as_done("t", {"each": [half]}, request)
    await worker.mark_as_failure("failed", ValueError(half))
    meta, failed = await reader.get_many(["t", "failed"])
    assert (await waiting) == meta
    assert (meta.result, meta.args, meta.kwargs, len(meta.children)) == ({"each": [half]}, [half], {"by": half}, 1)
    assert failed.result.args == (half,)


async def test_a_type_that_cannot_be_decoded_is_the_error_of_that_result_alone(harness: Harness) -> None:
    worker = await harness.connect(types=[StoredType(Fraction, "fraction", str, Fraction)])
    reader = await harness.connect(types=[StoredType(Fraction, "fraction", str, lambda text: Fraction(int(text)))])
    await worker.mark_as_done("bad", Fraction(1, 2))
    await worker.mark_as_done("good", Fraction(2))
    bad, good = await reader.get_outcomes(["bad", "good"])
    assert isinstance(bad, DecodeError)
    assert isinstance(good, TaskMeta)
    assert good.result == 2
    with pytest.raises(DecodeError, match=r"bad.*1/2"):
        await reader.wait_for("bad")


# -- what cannot be stored ------------------------------------------------------------------------------------------


async def test_a_value_that_cannot_be_stored_is_the_storers_error_and_changes_nothing(harness: Harness) -> None:
    worker, reader = await harness.pair()
    await worker.mark_as_started("task-7", pid=1)
    with pytest.raises(EncodeError, match=r"task-7.*complex"):
        await worker.mark_as_done("task-7", 1j)
    meta = await reader.get_task_meta("task-7")
    assert (meta.status, meta.result) == (STARTED, {"pid": 1})


async def test_a_value_that_is_too_large_is_the_storers_error_and_changes_nothing(harness: Harness) -> None:
    worker = await harness.connect(max_result_size=1000)
    await worker.mark_as_started("task-7", pid=1)
    with pytest.raises(ResultTooLargeError, match=r"task-7.*max_result_size"):
        await worker.mark_as_done("task-7", "x" * 1000)
    assert (await worker.get_task_meta("task-7")).status == STARTED


async def test_a_value_too_large_for_the_reader_is_the_readers_error(harness: Harness) -> None:
    worker = await harness.connect(compression="gzip")
    reader = await harness.connect(max_result_size=1000)
    await worker.mark_as_done("t", "x" * 1000)
    with pytest.raises(ResultTooLargeError, match="max_result_size"):
        await reader.get_task_meta("t")


# -- ids ------------------------------------------------------------------------------------------------------------

ODD_IDS: Sequence[str] = [
    " ",
    "a b",
    "a\nb",
    "a\r\nb",
    "\t",
    "*",
    "a?[b]*",
    "{a}b",
    "%s%(a)s",
    "'; drop table x; --",
    '"quoted"',
    "back\\slash",
    "$1",
    "ünïcödé",
    "日本",
    "\N{PILE OF POO}",
    "e\N{COMBINING ACUTE ACCENT}",
    "é",
    "\x7f\x01",
    "A",
    "a",
    "a ",
    "celery-task-meta-a",
    "celery-taskset-meta-a",
    "-celery-task-meta-",
    "None",
    "0",
]


async def test_odd_ids_are_kept_apart_from_all_others(harness: Harness) -> None:
    worker, reader = await harness.pair()
    ids = [*ODD_IDS, *harness.further_ids, "x" * harness.longest_id, "x" * (harness.longest_id - 1)]
    waiting = [asyncio.create_task(reader.wait_for(task_id)) for task_id in ids]
    await harness.subscribed(len(ids))
    for task_id in ids:
        await reader.save_group(task_id, reader.group([task_id], id=task_id))
        await worker.mark_as_done(task_id, f"of {task_id}")
    for task_id, woken, read in zip(ids, await asyncio.gather(*waiting), await reader.get_many(ids), strict=True):
        assert woken == read
        assert (read.task_id, read.result) == (task_id, f"of {task_id}")
        group = await worker.restore_group(task_id)
        assert group is not None
        assert (group.id, group[0], len(group)) == (task_id, reader.result(task_id), 1)
    gone = ids[::2]
    await asyncio.gather(*(worker.forget(task_id) for task_id in gone))
    assert [task_id for task_id in ids if not await reader.exists(task_id)] == gone


async def test_a_uuid_serves_as_an_id(harness: Harness) -> None:
    worker, reader = await harness.pair()
    task_id: Any = uuid4()
    handles = [reader.result(task_id), AsyncResult[Any](task_id, reader)]
    waiting = asyncio.gather(handles[0], handles[1], gather(*handles), reader.group([task_id]))
    await harness.subscribed(1)
    await worker.mark_as_done(task_id, 1)
    assert list(await waiting) == [1, 1, [1, 1], [1]]
    assert (await reader.get_task_meta(str(task_id))).result == 1
    await harness.subscribed(0)


@pytest.mark.parametrize("task_id", ["", "x" * 1025, None, 7, b"bytes", ["a"], "lone \ud800 surrogate"])
async def test_an_id_that_is_none_is_refused(harness: Harness, task_id: Any) -> None:
    backend = harness.make()
    calls = count_calls(backend)
    await harness.open(backend)
    attempts: list[Callable[[], Awaitable[Any]]] = [
        lambda: backend.mark_as_done(task_id, 1),
        lambda: backend.mark_as_pending(task_id),
        lambda: backend.get_task_meta(task_id),
        lambda: backend.get_many(["fine", task_id]),
        lambda: backend.wait_for(task_id),
        lambda: backend.wait_for(task_id, timeout=0),
        lambda: backend.exists(task_id),
        lambda: backend.forget(task_id),
        lambda: backend.save_group(task_id, backend.group(["a"])),
        lambda: backend.restore_group(task_id),
        lambda: backend.delete_group(task_id),
    ]
    for attempt in attempts:
        with pytest.raises(UsageError, match=r"\bid\b"):
            await attempt()
    assert not calls


# -- reading and forgetting -----------------------------------------------------------------------------------------


async def test_many_are_read_in_order_with_duplicates_and_strangers(harness: Harness) -> None:
    worker, reader = await harness.pair()
    await worker.mark_as_done("a", 1)
    await worker.mark_as_done("b", 2)
    metas = await reader.get_many(["b", "nobody", "a", "b"])
    assert [(meta.task_id, meta.result) for meta in metas] == [("b", 2), ("nobody", None), ("a", 1), ("b", 2)]
    assert await reader.get_many([]) == []


async def test_what_cannot_be_read_exists_and_spoils_no_other(harness: Harness) -> None:
    """Invariant 6, for those who read."""
    worker, reader = await harness.pair()
    await worker.mark_as_done("good", 1)
    await harness.put_raw("bad", b"{no json")
    good, bad = await asyncio.gather(reader.get_task_meta("good"), reader.get_task_meta("bad"), return_exceptions=True)
    assert isinstance(good, TaskMeta)
    assert good.result == 1
    assert isinstance(bad, DecodeError)
    assert await reader.exists("bad")
    first, second = await reader.get_outcomes(["bad", "good"])
    assert isinstance(first, DecodeError)
    assert isinstance(second, TaskMeta)
    with pytest.raises(DecodeError, match="task bad"):
        await reader.get_many(["good", "bad"])


async def test_what_is_forgotten_is_unknown_and_may_be_stored_anew(harness: Harness) -> None:
    worker, reader = await harness.pair()
    await worker.mark_as_done("a", 1)
    await worker.mark_as_done("b", 2)
    await reader.forget("a")
    await reader.forget("nobody")
    assert not await worker.exists("a")
    assert (await worker.get_task_meta("b")).result == 2
    assert await worker.mark_as_started("a") is True


async def test_a_result_handle_is_stored_as_its_tuple(harness: Harness) -> None:
    """As Celery stores a task that returns the result of another, within other values too."""
    backend = await harness.connect()
    group = backend.group(["a", backend.result("b", parent=backend.result("c"))], "g")
    await backend.mark_as_done("t", {"see": group})
    value = await backend.result("t")
    assert result_from_tuple(value["see"], backend) == group


async def test_what_may_be_a_success_that_this_writer_cannot_read_is_not_overwritten(harness: Harness) -> None:
    """Invariant 3, where 10 forbids to look."""
    trusting = await harness.connect(serializer="pickle", accept=("pickle", "json"))
    careful = await harness.connect()
    await trusting.mark_as_done("t", {1, 2})
    if harness.judges_by_content:
        with pytest.raises(ContentDisallowed, match="accept"):
            await careful.mark_as_failure("t", ValueError("late"))
    else:
        assert not await careful.mark_as_failure("t", ValueError("late"))
    assert await trusting.result("t") == {1, 2}


async def test_a_plain_result_keeps_nothing_of_the_fuller_one_it_replaces(harness: Harness) -> None:
    backend = await harness.connect(expires=3600.0, extended=True)
    request = TaskRequest(id="t", task="tasks.add", args=[1], children=[(("child", None), None)])
    await backend.store_result("t", KeyError("again"), RETRY, "Traceback …", request, expires=60)
    fuller = await backend.get_task_meta("t")
    assert (fuller.traceback, fuller.name, len(fuller.children)) == ("Traceback …", "tasks.add", 1)
    # Together with one that is not plain: both are in one batch.
    await asyncio.gather(backend.mark_as_done("t", 1), backend.mark_as_done("u", 2, request, expires=60))
    plain, other = await backend.get_many(["t", "u"])
    assert (plain.result, plain.traceback, plain.name, list(plain.children)) == (1, None, None, [])
    assert (other.result, other.name) == (2, "tasks.add")
    left = await harness.seconds_left("t")
    assert left is not None
    assert left > 60


async def test_a_batch_of_plain_results_replaces_what_had_an_expiry_of_its_own(harness: Harness) -> None:
    backend = await harness.connect(expires=3600.0)
    ids = [f"t{number}" for number in range(5)]
    await asyncio.gather(*(backend.store_result(task_id, {}, STARTED, "note", expires=60) for task_id in ids))
    await asyncio.gather(*(backend.mark_as_done(task_id, task_id) for task_id in ids))
    for meta in await backend.get_many(ids):
        assert (meta.result, meta.traceback) == (meta.task_id, None)
        left = await harness.seconds_left(meta.task_id)
        assert left is not None
        assert left > 60
