"""Handles on single results: what awaiting them gives, what they know, and the trees they form."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from aioresult import (
    FIRST_COMPLETED,
    AsyncResult,
    Backend,
    BackendConnectionError,
    BackendNotOpenError,
    CyclicResultError,
    DecodeError,
    EagerResult,
    GroupResult,
    IncompleteStream,
    RemoteError,
    ResultBase,
    ResultSet,
    TaskMeta,
    TaskRequest,
    TaskRevokedError,
    TimeoutError,
    UsageError,
    as_completed,
    gather,
    result_from_tuple,
    wait,
)
from aioresult.exceptions import RemoteTraceback
from aioresult.states import FAILURE, PENDING, RETRY, REVOKED, STARTED, SUCCESS

from ..harness import Harness, count_calls, intercept

# -- awaiting -------------------------------------------------------------------------------------------------------


async def test_awaiting_gives_the_value(harness: Harness) -> None:
    worker, web = await harness.pair()
    waiting = asyncio.gather(web.result("t"), web.result("t").get(timeout=60), AsyncResult[Any]("t", web))
    await harness.subscribed(1)
    await worker.mark_as_done("t", {"answer": 42})
    assert list(await waiting) == [{"answer": 42}] * 3


async def test_awaiting_a_failure_raises_its_own_type_with_the_workers_traceback(harness: Harness) -> None:
    worker, web = await harness.pair()
    await worker.mark_as_failure("t", ZeroDivisionError("by zero"), "  File worker.py, line 7")
    for _ in range(2):  # the handle knows, and says it again
        with pytest.raises(ZeroDivisionError, match="by zero") as caught:
            await web.result("t")
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert "worker.py, line 7" in str(caught.value.__cause__)


async def test_a_failure_of_a_class_that_is_not_here_has_one_made_for_it(harness: Harness) -> None:
    """Invariant 10: no module is imported because data names it."""
    worker, web = await harness.pair()
    odd = type("CardDeclined", (Exception,), {"__module__": "shop.payments"})
    await worker.mark_as_failure("t", odd("4242"))
    with pytest.raises(RemoteError, match="4242") as caught:
        await web.result("t")
    assert (type(caught.value).__module__, type(caught.value).__name__) == ("shop.payments", "CardDeclined")


async def test_a_group_of_exceptions_comes_back_as_one_with_its_notes(harness: Harness) -> None:
    worker, web = await harness.pair()
    group = ExceptionGroup("two", [KeyError("a"), FileNotFoundError(2, "no", "f.txt")])
    group.exceptions[0].add_note("of the worker")
    await worker.mark_as_failure("t", group)
    for _ in range(2):
        with pytest.raises(ExceptionGroup, match="two") as caught:
            await web.result("t")
        one, other = caught.value.exceptions
        assert isinstance(one, KeyError)
        assert one.__notes__ == ["of the worker"]
        assert isinstance(other, FileNotFoundError)
        assert other.filename == "f.txt"
        one.add_note("of a caller")


async def test_without_propagation_the_exception_is_the_value(harness: Harness) -> None:
    worker, web = await harness.pair()
    await worker.mark_as_failure("t", KeyError("a"))
    handle = web.result("t")
    for _ in range(2):
        value: Any = await handle.get(propagate=False)
        assert isinstance(value, KeyError)


async def test_a_retry_is_waited_out(harness: Harness) -> None:
    worker, web = await harness.pair()
    await worker.mark_as_retry("t", ConnectionError("away"))
    handle = web.result("t")
    waiting = asyncio.create_task(handle.get())
    await harness.subscribed(1)
    assert await handle.state() == RETRY
    await worker.mark_as_done("t", 1)
    assert await waiting == 1


async def test_awaiting_a_revoked_task_raises(harness: Harness) -> None:
    worker, web = await harness.pair()
    await worker.mark_as_revoked("t", "too late")
    with pytest.raises(TaskRevokedError, match="too late"):
        await web.result("t")


async def test_a_deadline_that_has_passed_does_not_matter_to_a_result_that_is_there(harness: Harness) -> None:
    """Invariant 8."""
    worker, web = await harness.pair()
    handle = web.result("t")
    with pytest.raises(TimeoutError, match="task t"):
        await handle.get(timeout=0)
    await worker.mark_as_done("t", 1)
    assert await handle.get(timeout=0) == 1
    await worker.forget("t")
    assert await handle.get(timeout=-1) == 1


async def test_an_ignored_result_is_none_at_once(harness: Harness) -> None:
    backend = harness.make()
    calls = count_calls(backend)
    await harness.open(backend)
    ignored = AsyncResult[Any]("t", backend, ignored=True)
    assert await ignored is None
    assert await gather(ignored, ResultSet([ignored])) == [None, [None]]
    assert [result async for result in ResultSet([ignored]).as_completed()] == [ignored]
    assert not calls


@pytest.mark.parametrize("parent", [None, EagerResult("p", 1)])
async def test_a_handle_without_a_backend_says_so(harness: Harness, parent: ResultBase | None) -> None:
    handle = AsyncResult[Any]("t", None, parent)
    with pytest.raises(UsageError, match="no backend"):
        await handle
    with pytest.raises(UsageError, match="no backend"):
        await gather(handle)
    assert [result async for result in as_completed([handle])] == [handle]


# -- looking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "ready", "successful", "failed"),
    [
        (PENDING, False, False, False),
        (STARTED, False, False, False),
        (RETRY, False, False, False),
        ("PROGRESS", False, False, False),
        (SUCCESS, True, True, False),
        (FAILURE, True, False, True),
        (REVOKED, True, False, False),
    ],
)
async def test_looking(harness: Harness, status: str, ready: bool, successful: bool, failed: bool) -> None:
    worker, web = await harness.pair()
    await worker.store_result("t", None, status, traceback="text")
    looks: list[Callable[[AsyncResult[Any]], Any]] = [
        lambda handle: handle.state(),
        lambda handle: handle.ready(),
        lambda handle: handle.successful(),
        lambda handle: handle.failed(),
        lambda handle: handle.exists(),
        lambda handle: handle.traceback(),
        lambda handle: handle.children(),
    ]
    expected = [status, ready, successful, failed, True, "text", []]
    assert [await look(web.result("t")) for look in looks] == expected
    handle = web.result("t")
    assert handle.meta is None
    meta = await handle.fetch()
    assert (meta.status, meta.ready) == (status, ready)
    assert handle.meta is meta


async def test_looking_at_the_unknown(harness: Harness) -> None:
    handle = (await harness.connect()).result("t")
    assert await handle.state() == PENDING
    assert not await handle.exists()
    assert await handle.traceback() is None


async def test_a_handle_that_is_ready_asks_nobody_again(harness: Harness) -> None:
    worker, web = await harness.connect(), harness.make()
    calls = count_calls(web)
    await harness.open(web)
    handle = web.result("t")
    assert await handle.state() == PENDING
    await worker.mark_as_done("t", 1, TaskRequest(id="t", children=[(("c", None), None)]))
    assert await handle.ready()
    calls.clear()
    assert await handle == 1
    assert await handle.state() == SUCCESS
    assert await handle.successful()
    assert not await handle.failed()
    assert await handle.children() == [web.result("c")]
    assert await gather(handle, web.group([handle])) == [1, [1]]
    assert await web.group([handle]).completed_count() == 1
    assert not calls
    await worker.forget("t")
    assert not await handle.exists()  # asks, of course


async def test_forgetting_takes_the_parents_along(harness: Harness) -> None:
    worker, web = await harness.pair()
    ids = ["t", "p1", "p2", "member", "other"]
    await asyncio.gather(*(worker.mark_as_done(task_id, 1) for task_id in ids))
    handle = web.result("t", web.result("p1", GroupResult("g", [web.result("member")], web.result("p2"))))
    assert await handle == 1
    await handle.forget()
    assert [task_id for task_id in ids if await worker.exists(task_id)] == ["other"]
    assert handle.meta is None


# -- parents --------------------------------------------------------------------------------------------------------


def chain(backend: Backend, *ids: str) -> AsyncResult[Any]:
    """A handle on the last id, whose parents are those before."""
    handle = backend.result(ids[0])
    for task_id in ids[1:]:
        handle = backend.result(task_id, handle)
    return handle


async def test_a_parent_that_fails_ends_the_wait(harness: Harness) -> None:
    worker, web = await harness.pair()
    waiting = asyncio.create_task(chain(web, "a", "b", "c").get())
    await harness.subscribed(3)
    await worker.mark_as_done("b", 1)
    await worker.mark_as_failure("a", KeyError("lost"))
    with pytest.raises(KeyError, match="lost"):
        await waiting
    await harness.subscribed(0)


async def test_a_group_among_the_parents_ends_the_wait_too(harness: Harness) -> None:
    worker, web = await harness.pair()
    header = web.group(["h1", "h2"])
    waiting = asyncio.create_task(web.result("body", header).get())
    await harness.subscribed(3)
    await worker.mark_as_revoked("h2", "cancelled")
    with pytest.raises(TaskRevokedError, match="cancelled"):
        await waiting


async def test_a_parent_that_fails_may_be_passed_over(harness: Harness) -> None:
    worker, web = await harness.pair()
    await worker.mark_as_failure("a", KeyError("lost"))
    handle = chain(web, "a", "b")
    for propagate in (True, False):
        with pytest.raises(TimeoutError):
            await handle.get(timeout=0, propagate=propagate, follow_parents=False)
    with pytest.raises(KeyError, match="lost"):
        await handle
    waiting = asyncio.create_task(handle.get(follow_parents=False))
    await harness.subscribed(1)
    await worker.mark_as_done("b", 1)
    assert await waiting == 1
    assert await handle == 1


async def test_without_propagation_the_exception_of_a_parent_is_the_value(harness: Harness) -> None:
    worker, web = await harness.pair()
    handle = chain(web, "a", "b")
    waiting = asyncio.create_task(handle.get(propagate=False))
    await harness.subscribed(2)
    await worker.mark_as_failure("a", KeyError("lost"))
    value: Any = await waiting
    assert isinstance(value, KeyError)
    assert isinstance(handle.value(), KeyError)
    assert (await handle.state(), handle.meta) == (PENDING, TaskMeta.pending("b"))  # what is stored of it is nothing
    await harness.subscribed(0)


@pytest.mark.parametrize("how", ["get", "gather", "as_completed", "state"])
async def test_a_result_that_comes_after_all_takes_precedence(harness: Harness, how: str) -> None:
    """The chain was run again."""
    worker, web = await harness.pair()
    await worker.mark_as_failure("a", KeyError("lost"))
    handle = chain(web, "a", "b")
    for _ in range(2):
        with pytest.raises(KeyError, match="lost"):
            await handle
    await worker.mark_as_done("b", 1)
    match how:
        case "get":
            assert await handle == 1
        case "gather":
            assert await gather(handle) == [1]
        case "as_completed":
            assert [await each async for each in as_completed([handle])] == [1]
        case "state":
            assert await handle.state() == SUCCESS
    assert (handle.value(), await handle.get(timeout=0)) == (1, 1)
    assert await chain(web, "a", "b").get() == 1


class Mine(Exception):
    pass


async def fail_chord(worker: Backend) -> None:
    """What a chord leaves behind of which two parts failed, the last one first."""
    await worker.mark_as_done("h1", 1)
    await worker.mark_as_failure("h3", Mine("h3"))
    await worker.mark_as_failure("h2", KeyError("h2"))
    await worker.mark_as_failure("body", RuntimeError("a part failed"))


def body_of(backend: Backend) -> AsyncResult[Any]:
    return backend.result("body", GroupResult("header", map(backend.result, ["h1", "h2", "h3"])))


@pytest.mark.parametrize("timeout", [None, 60, 0.5, 0])
async def test_what_a_failed_result_raises_does_not_depend_on_when_one_looks(
    harness: Harness, timeout: float | None
) -> None:
    worker, web = await harness.pair()
    early = body_of(web)
    waiting = asyncio.create_task(early.get())
    await harness.subscribed(4)
    await fail_chord(worker)
    fetched = body_of(web)
    assert await fetched.state() == FAILURE  # it knows of itself, and not yet of the parts
    with pytest.raises(Mine, match="h3"):
        await waiting
    group = web.group([body_of(web)])
    late = body_of(web)
    for get in (late.get, fetched.get, early.get, group.get, late.get, group.get):
        with pytest.raises(Mine, match="h3"):
            await get(timeout)
    with pytest.raises(RuntimeError):
        await late.get(follow_parents=False)
    with pytest.raises(RuntimeError):
        await web.result("body")  # which has no parent to look at
    await harness.subscribed(0)


async def test_a_failure_whose_parents_were_looked_at_is_remembered(harness: Harness) -> None:
    backend = harness.make()
    calls = count_calls(backend)
    await harness.open(backend)
    await backend.mark_as_failure("b", KeyError("b"))
    known = backend.result("b")
    assert await known.state() == FAILURE
    known.parent = backend.result("a")
    with pytest.raises(KeyError, match="b"):
        await known
    assert calls["_fetch"] == 2  # of the state, and of the parent
    await backend.mark_as_failure("a", Mine("a"))  # too late for these handles
    calls.clear()
    with pytest.raises(KeyError, match="b"):
        await known
    assert not calls


async def test_a_failure_is_told_though_its_parents_cannot_be_read(harness: Harness) -> None:
    web = harness.make(retry_for=0.0)
    away = False

    async def fetch(original: Any, *args: Any) -> Any:
        if away:
            raise BackendConnectionError("away")
        return await original(*args)

    intercept(web, "_fetch", fetch)
    await harness.open(web)
    await web.mark_as_failure("b", KeyError("b"))
    handle = chain(web, "a", "b")
    assert await handle.failed()
    await web.mark_as_failure("a", Mine("a"))
    away = True
    for _ in range(2):
        with pytest.raises(KeyError, match="b"):
            await handle
        away = False  # what was told once stays


async def test_an_ignored_parent_never_fails_but_those_above_it_do(harness: Harness) -> None:
    worker, web = await harness.pair()
    ignored = AsyncResult[Any]("b", web, web.result("a"), ignored=True)
    await worker.mark_as_failure("b", KeyError("b"))
    assert await ignored.failed()
    waiting = asyncio.create_task(web.result("c", ignored).get())
    await harness.subscribed(2)
    await worker.mark_as_failure("a", Mine("a"))
    with pytest.raises(Mine):
        await waiting


@pytest.mark.parametrize("wrong", [float("nan"), "-1", True])
async def test_a_wrong_timeout_is_refused_whatever_is_known(harness: Harness, wrong: Any) -> None:
    backend = await harness.connect()
    await backend.mark_as_done("t", 1)
    known = backend.result("t")
    assert await known == 1
    ignored = AsyncResult[Any]("i", backend, ignored=True)
    for result in (known, ignored, EagerResult[int]("e", 1), ResultSet([known]), ResultSet()):
        with pytest.raises(UsageError, match="timeout must be"):
            await result.get(timeout=wrong)
    for results in ([known], [], [ResultSet()]):
        with pytest.raises(UsageError, match="timeout must be"):
            await wait([GroupResult("g", results)], wrong, FIRST_COMPLETED)
        with pytest.raises(UsageError, match="timeout must be"):
            as_completed(results, wrong)


async def test_a_child_that_is_done_has_no_need_of_its_parents(harness: Harness) -> None:
    worker, web = await harness.pair()
    await worker.mark_as_done("b", 1)
    assert await chain(web, "unknown", "b").get() == 1
    assert await chain(web, "unknown", "b").get(timeout=0) == 1
    await harness.subscribed(0)


async def test_a_timeout_holds_with_parents_too(harness: Harness) -> None:
    web = await harness.connect()
    for timeout in (0, 0.01):
        with pytest.raises(TimeoutError, match=rf"timeout={timeout} "):
            await chain(web, "a", "b").get(timeout)
    await harness.subscribed(0)


# -- trees of tasks that started tasks ------------------------------------------------------------------------------


async def plant(worker: Backend, tree: dict[str, list[str]]) -> None:
    """Store each task as done, its id as its value, with those children. One in braces is a group of its letters."""
    for task_id, children in tree.items():
        handles = [
            worker.group(list(child[1:-1]), id=child) if child.startswith("{") else worker.result(child)
            for child in children
        ]
        await worker.mark_as_done(task_id, task_id, TaskRequest(id=task_id, children=handles))


def ids(graph: dict[ResultBase, list[ResultBase]]) -> dict[str, list[str]]:
    return {str(node): [str(child) for child in children] for node, children in graph.items()}


TREE = {"a": ["b", "{de}"], "b": ["c"], "c": [], "d": [], "e": ["f"], "f": []}


async def test_collect_goes_down_the_tree_layer_by_layer(harness: Harness) -> None:
    worker, web = await harness.pair()
    await plant(worker, TREE)
    collected = [(str(result), value) async for result, value in web.result("a").collect()]
    assert collected == [
        ("a", "a"),
        ("b", "b"),
        ("{de}", ["d", "e"]),
        ("c", "c"),
        ("d", "d"),
        ("e", "e"),
        ("f", "f"),
    ]
    assert await web.result("a").get_leaf() == "f"


async def test_collect_waits_for_what_is_not_ready(harness: Harness) -> None:
    worker, web = await harness.pair()
    collecting = web.result("a").collect()
    step = asyncio.create_task(anext(collecting))
    await harness.subscribed(1)
    await plant(worker, {"a": ["b"]})
    assert await step == (web.result("a"), "a")
    step = asyncio.create_task(anext(collecting))
    await harness.subscribed(1)
    await worker.mark_as_failure("b", KeyError("lost"))
    with pytest.raises(KeyError, match="lost"):
        await step
    collected = [value async for _, value in web.result("a").collect(propagate=False)]
    assert [type(value) for value in collected] == [str, KeyError]
    with pytest.raises(TimeoutError):
        await web.result("unknown").get_leaf(timeout=0)


async def test_iterdeps_tells_whose_child_it_is(harness: Harness) -> None:
    worker, web = await harness.pair()
    await plant(worker, TREE)
    edges = [(str(parent), str(node)) async for parent, node in web.result("a").iterdeps()]
    assert edges == [("None", "a"), ("a", "b"), ("a", "{de}"), ("b", "c"), ("{de}", "d"), ("{de}", "e"), ("e", "f")]


async def test_a_tree_that_has_not_finished_is_walked_only_on_request(harness: Harness) -> None:
    worker, web = await harness.pair()
    await plant(worker, {"a": ["b", "c"], "c": []})
    with pytest.raises(IncompleteStream, match="intermediate=True"):
        await web.result("a").graph()
    graph = await web.result("a").graph(intermediate=True)
    assert ids(graph) == {"a": ["b", "c"], "b": [], "c": []}


async def test_a_task_that_two_tasks_started_is_walked_once_and_stands_in_the_graph_twice(harness: Harness) -> None:
    worker, web = await harness.pair()
    await plant(worker, {"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []})
    assert ids(await web.result("a").graph()) == {"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}
    assert [str(node) async for _, node in web.result("a").iterdeps()] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    "tree", [{"a": ["a"]}, {"a": ["b"], "b": ["a"]}, {"a": ["{bc}"], "b": [], "c": ["d"], "d": ["{bc}"]}]
)
async def test_a_task_among_its_own_descendants_is_an_error(harness: Harness, tree: dict[str, list[str]]) -> None:
    worker, web = await harness.pair()
    await plant(worker, tree)
    with pytest.raises(CyclicResultError, match="own descendants"):
        await web.result("a").graph()
    with pytest.raises(CyclicResultError, match="own descendants"):
        await web.result("a").get_leaf()


async def test_children_that_are_no_result_tuples_are_an_error(harness: Harness) -> None:
    worker, web = await harness.pair()
    await worker.mark_as_done("t", 1, TaskRequest(id="t", children=[["a", "b", "c"]]))
    assert await web.result("t") == 1
    with pytest.raises(DecodeError, match="result tuple"):
        await web.result("t").children()


# -- as data --------------------------------------------------------------------------------------------------------


def test_tuples_are_celerys() -> None:
    grandparent = AsyncResult[Any]("g", None)
    parent = GroupResult("p", [AsyncResult[Any]("m", None)], grandparent)
    handle = AsyncResult[Any]("t", None, parent)
    assert grandparent.as_tuple() == (("g", None), None)
    assert handle.as_tuple() == (("t", (("p", (("g", None), None)), [(("m", None), None)])), None)
    assert handle.as_list() == ["t", "p", "g"]
    nested = GroupResult("o", [parent, handle])
    assert nested.as_tuple() == (("o", None), [parent.as_tuple(), handle.as_tuple()])


def shape(result: ResultBase) -> Any:
    members = [shape(member) for member in result] if isinstance(result, ResultSet) else None
    return type(result), result.id, None if result.parent is None else shape(result.parent), members


async def test_tuples_lead_back_to_handles(harness: Harness) -> None:
    backend = await harness.connect()
    inner = backend.group([backend.result("a"), chain(backend, "x", "y", "b")], id="inner")
    outer = GroupResult("outer", [inner, backend.group([], id="empty")], chain(backend, "p", "q"))
    result = AsyncResult[Any]("t", backend, outer)
    back = result_from_tuple(result.as_tuple(), backend)
    assert shape(back) == shape(result)
    await backend.mark_as_done("t", 1)
    assert await back == 1


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([["a", None], None], (AsyncResult, "a", None, None)),
        (["a", None], (AsyncResult, "a", None, None)),
        ((("a", []), None), (AsyncResult, "a", None, None)),
        ([["a", [["p", None], None]], None], (AsyncResult, "a", (AsyncResult, "p", None, None), None)),
        ([["a", ["p", None]], None], (AsyncResult, "a", (AsyncResult, "p", None, None), None)),
        ([["g", None], []], (GroupResult, "g", None, [])),
        (["g", [["a", None]]], (GroupResult, "g", None, [(AsyncResult, "a", None, None)])),
    ],
)
def test_every_form_of_celerys_is_read(data: Any, expected: Any) -> None:
    assert shape(result_from_tuple(data, None)) == expected


@pytest.mark.parametrize(
    "data",
    [
        None,
        "a",
        7,
        [],
        {},
        ["a"],
        ["a", "b"],
        [None, None],
        ["", None],
        [["", None], None],
        [7, None],
        [["a"], None],
        [["a", None, None], None],
        [["a", 7], None],
        [["a", "parent"], None],
        [["a", None], {}],
        [["a", None], "members"],
        [["a", None], [None]],
        [["a", None], [["b", None], 7]],
        {"id": "a"},
    ],
)
def test_what_is_no_tuple_of_a_result_is_an_error(data: Any) -> None:
    with pytest.raises(DecodeError, match="result tuple"):
        result_from_tuple(data, None)


def parents_without_end() -> Any:
    data: Any = None
    for n in range(1_000_000):
        data = [[str(n), data], None]
    return data


def groups_in_groups() -> Any:
    data: Any = ["a", None]
    for n in range(100_000):
        data = [[str(n), None], [data]]
    return data


def its_own_parent() -> Any:
    data: Any = [["a", None], None]
    data[0][1] = data
    return data


def its_own_member() -> Any:
    data: Any = [["a", None], []]
    data[1].append(data)
    return data


def its_own_member_twice() -> Any:
    data: Any = [["a", None], []]
    data[1] += [data, data]
    return data


def a_bush() -> Any:
    data: Any = ["a", None]
    for n in range(30):
        data = [[str(n), None], [data] * 4]
    return data


@pytest.mark.parametrize(
    "make", [parents_without_end, groups_in_groups, its_own_parent, its_own_member, its_own_member_twice, a_bush]
)
def test_data_without_end_is_an_error(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 10: neither the stack nor the memory is at the mercy of what is stored."""
    monkeypatch.setattr("aioresult.result._MAX_NODES", 20_000)  # a million takes seconds
    with pytest.raises(CyclicResultError):
        result_from_tuple(make(), None)


def test_the_longest_chain_that_is_read_can_be_handled() -> None:
    def longest() -> ResultBase:
        data: Any = None
        for n in range(10_000):
            data = [[str(n), data], []]
        return result_from_tuple(data, None)

    result = longest()
    assert result == longest()
    assert AsyncResult[Any]("t", None, result).as_list() == ["t", *map(str, reversed(range(10_000)))]
    again: Any = result.as_tuple()
    for n in reversed(range(10_000)):
        (task_id, again), members = again
        assert (task_id, members) == (str(n), [])


async def test_handles_in_a_circle_are_an_error(harness: Harness) -> None:
    backend = await harness.connect()
    own_parent = backend.result("a")
    own_parent.parent = backend.result("b", own_parent)
    own_member = backend.group([])
    own_member.add(backend.group([own_member]))
    member = backend.result("a")
    member.parent = backend.group([member])
    for result in (own_parent, own_member, member):
        with pytest.raises(CyclicResultError):
            result.as_tuple()
    with pytest.raises(CyclicResultError):
        own_parent.as_list()
    for circle in (own_parent, own_member):
        with pytest.raises(CyclicResultError):
            await circle.get()
        with pytest.raises(CyclicResultError):
            await circle.forget()
    with pytest.raises(CyclicResultError):
        await own_member.ready()


# -- eager results --------------------------------------------------------------------------------------------------


async def test_an_eager_result_knows_everything() -> None:
    eager = EagerResult("t", 42)
    assert await eager == 42
    assert await eager.get(timeout=0) == 42
    assert (await eager.state(), await eager.ready(), await eager.successful(), await eager.failed()) == (
        SUCCESS,
        True,
        True,
        False,
    )
    assert await eager.exists()
    await eager.forget()
    assert (await eager.fetch()).result == 42
    assert await eager.children() == []
    assert eager.as_tuple() == (("t", None), None)


async def test_an_eager_failure_is_raised() -> None:
    eager = EagerResult[Any]("t", KeyError("lost"), FAILURE, "text")
    with pytest.raises(KeyError, match="lost"):
        await eager
    assert isinstance(await eager.get(propagate=False), KeyError)
    assert (await eager.failed(), await eager.traceback()) == (True, "text")
    with pytest.raises(RemoteError, match="no exception"):
        await EagerResult[Any]("t", "no exception", FAILURE)


async def test_eager_results_stand_among_others(harness: Harness) -> None:
    worker, web = await harness.pair()
    results = [EagerResult("e", 1), web.result("t"), EagerResult("r", "not over", "RETRY")]
    group = GroupResult("g", results, backend=web)
    waiting = asyncio.create_task(group.get())
    await harness.subscribed(1)
    assert not await group.ready()
    await worker.mark_as_done("t", 2)
    assert await waiting == [1, 2, "not over"]
    assert {str(result) async for result in group.as_completed()} == {"e", "t", "r"}


# -- as Python objects ----------------------------------------------------------------------------------------------


def test_handles_on_the_same_id_are_equal() -> None:
    handle: Any = AsyncResult[Any]("t", None)
    assert handle == AsyncResult[Any]("t", None, parent=handle)
    assert handle == EagerResult("t", 1)
    assert handle == "t"
    assert handle != AsyncResult[Any]("u", None)
    assert handle != "u"
    assert handle != GroupResult("t")
    assert handle is not None
    assert len({handle, AsyncResult[Any]("t", None), "t"}) == 1
    assert (str(handle), repr(handle)) == ("t", "<AsyncResult: t>")


def test_groups_are_equal_in_id_members_and_parents() -> None:
    def group(id: str = "g", members: str = "ab", parent: str = "p") -> Any:
        return GroupResult(id, [AsyncResult[Any](m, None) for m in members], AsyncResult[Any](parent, None))

    assert group() == group()
    assert hash(group()) == hash(group())
    assert group() == "g"
    assert (str(group()), repr(group())) == ("g", "<GroupResult: g [a, b]>")
    assert repr(group(members="abcdef")) == "<GroupResult: g [a, b, c, d, e, …]>"
    for other in (group("h"), group(members="ba"), group(members="a"), group(parent="q"), "h"):
        assert group() != other


def test_sets_are_equal_in_their_members_and_cannot_be_hashed() -> None:
    assert ResultSet([AsyncResult[Any]("a", None)]) == ResultSet([AsyncResult[Any]("a", None)])
    assert ResultSet([AsyncResult[Any]("a", None)]) != ResultSet([AsyncResult[Any]("b", None)])
    assert repr(ResultSet([AsyncResult[Any]("a", None)])) == "<ResultSet [a]>"
    with pytest.raises(TypeError, match="no id to hash"):
        hash(ResultSet())


async def test_a_handle_of_a_backend_that_is_not_open_says_so(harness: Harness) -> None:
    handle = harness.make().result("t")
    with pytest.raises(BackendNotOpenError):
        await handle
    with pytest.raises(BackendNotOpenError):
        await gather(handle)
