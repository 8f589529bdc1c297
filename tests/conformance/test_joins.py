"""`gather`, `wait` and `as_completed`: over results of different stores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from aioresult import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    AsyncResult,
    Backend,
    BackendClosedError,
    BackendConnectionError,
    BackendError,
    EagerResult,
    GroupResult,
    ResultBase,
    ResultSet,
    TaskMeta,
    TaskRevokedError,
    TimeoutError,
    UsageError,
    as_completed,
    gather,
    wait,
)
from aioresult.lineage import Lineage
from aioresult.states import FAILURE, STARTED, SUCCESS

from ..harness import Gate, Harness, MemoryHarness, count_calls, intercept, shares, topics_of


class Stores:
    """The store under test and another; tasks whose id begins with ``x`` are on the other."""

    def __init__(self, here: Backend, there: Backend, harness: Harness, other: Harness) -> None:
        self.here, self.there = here, there
        self._harness, self._other = harness, other

    def backend(self, task_id: str) -> Backend:
        return self.there if task_id.startswith("x") else self.here

    def __getitem__(self, task_id: str) -> Any:
        return self.backend(task_id).result(task_id)

    async def done(self, *task_ids: str) -> None:
        for task_id in task_ids:
            await self.backend(task_id).mark_as_done(task_id, f"of {task_id}")

    async def failed(self, task_id: str) -> None:
        await self.backend(task_id).mark_as_failure(task_id, KeyError(task_id))

    async def subscribed(self, here: int, there: int) -> None:
        await self._harness.subscribed(here)
        await self._other.subscribed(there)


@pytest.fixture
async def stores(harness: Harness) -> AsyncIterator[Stores]:
    other = MemoryHarness()
    yield Stores(await harness.connect(), await other.connect(), harness, other)
    await other.close()


# -- gather ---------------------------------------------------------------------------------------------------------


async def test_gather_gives_the_values_in_order(stores: Stores) -> None:
    results = [stores["x1"], stores.here.group([stores["a"], stores["x2"]]), stores["b"], stores["x1"]]
    waiting = asyncio.create_task(gather(*results))
    await stores.subscribed(2, 2)
    await stores.done("b", "x2", "a", "x1")
    assert await waiting == ["of x1", ["of a", "of x2"], "of b", "of x1"]
    await stores.subscribed(0, 0)
    assert await gather() == []


async def test_gather_raises_the_first_failure_and_waits_for_nobody_else(stores: Stores) -> None:
    waiting = asyncio.create_task(gather(stores["a"], stores["x1"], stores["b"]))
    await stores.subscribed(2, 1)
    await stores.failed("x1")
    with pytest.raises(KeyError, match="x1"):
        await waiting
    await stores.subscribed(0, 0)


async def test_gather_returns_exceptions_on_request(stores: Stores) -> None:
    waiting = asyncio.create_task(gather(stores["x1"], stores["a"], stores["b"], return_exceptions=True))
    await stores.subscribed(2, 1)
    await stores.failed("a")
    await stores.done("b", "x1")
    first, lost, last = await waiting
    assert (first, last) == ("of x1", "of b")
    assert isinstance(lost, KeyError)


async def test_a_backend_that_is_closed_ends_a_gather_over_several(stores: Stores) -> None:
    """Invariant 7."""
    waiting = asyncio.create_task(gather(stores["a"], stores["x1"]))
    await stores.subscribed(1, 1)
    await stores.there.aclose()
    with pytest.raises(BackendClosedError):
        await waiting
    await stores.subscribed(0, 0)


# -- wait -----------------------------------------------------------------------------------------------------------


async def test_wait_for_all(stores: Stores) -> None:
    a, b, x = stores["a"], stores["b"], stores["x1"]
    waiting = asyncio.create_task(wait([a, b, x]))
    await stores.subscribed(2, 1)
    await stores.failed("a")
    await stores.done("x1")
    await stores.done("b")
    assert await waiting == ({a, b, x}, set())
    assert await wait([a, b], return_when=ALL_COMPLETED) == ({a, b}, set())
    assert await wait([]) == (set(), set())


@pytest.mark.parametrize("fails", [True, False])
async def test_wait_for_the_first(stores: Stores, fails: bool) -> None:
    a, x = stores["a"], stores["x1"]
    waiting = asyncio.create_task(wait([a, x], return_when=FIRST_COMPLETED))
    await stores.subscribed(1, 1)
    await (stores.failed("x1") if fails else stores.done("x1"))
    assert await waiting == ({x}, {a})
    await stores.subscribed(0, 0)


async def test_wait_for_the_first_exception(stores: Stores) -> None:
    a, b, x = stores["a"], stores["b"], stores["x1"]
    waiting = asyncio.create_task(wait([a, b, x], return_when=FIRST_EXCEPTION))
    await stores.subscribed(2, 1)
    await stores.done("x1")
    await stores.backend("b").mark_as_revoked("b")
    assert await waiting == ({b, x}, {a})
    await stores.done("a")
    assert await wait([a, x], return_when=FIRST_EXCEPTION) == ({a, x}, set())


async def test_what_is_ready_already_is_done_all_of_it(stores: Stores) -> None:
    await stores.done("a", "b", "c")
    results = {stores[task_id] for task_id in "abcd"}
    done, pending = await wait(results, return_when=FIRST_COMPLETED)
    assert {str(result) for result in done} == {"a", "b", "c"}
    assert {str(result) for result in pending} == {"d"}


async def test_the_end_of_a_wait_is_no_error(stores: Stores) -> None:
    a, x = stores["a"], stores["x1"]
    await stores.done("x1")
    assert await x == "of x1"
    for timeout in (0, 0.02):
        assert await wait([a, x], timeout) == ({x}, {a})
    await stores.subscribed(0, 0)


async def test_a_group_is_done_when_all_of_it_is(stores: Stores) -> None:
    a, b = stores["a"], stores["b"]
    group, nothing = stores.here.group([a, b, a]), stores.here.group([])
    await stores.done("a")
    assert await wait([group, a, nothing], timeout=0) == ({a, nothing}, {group})
    unknown = stores["c"]
    assert await wait([unknown, nothing], return_when=FIRST_COMPLETED) == ({nothing}, {unknown})
    await stores.done("b")
    assert await wait([group, a]) == ({group, a}, set())


async def test_a_constant_that_is_none_of_asyncios_is_refused(stores: Stores) -> None:
    with pytest.raises(UsageError, match="return_when"):
        await wait([stores["a"]], return_when="SOMETIME")


# -- as_completed ---------------------------------------------------------------------------------------------------


async def test_as_completed_over_two_stores(stores: Stores) -> None:
    finished = as_completed([stores["a"], stores.there.group([stores["x1"], stores["b"]])])
    for task_id in ("b", "x1", "a"):
        step = asyncio.create_task(anext(finished))
        await stores.done(task_id)
        result: Any = await step
        assert result == stores[task_id]
        assert await result == f"of {task_id}"
    assert [result async for result in finished] == []


async def test_as_completed_within_a_time(stores: Stores) -> None:
    finished = as_completed([stores["a"], stores["x1"]], timeout=0.02)
    with pytest.raises(TimeoutError, match=r"with 1 more, .*timeout=0\.02 seconds"):
        await anext(finished)
    await stores.subscribed(0, 0)


# -- all three ------------------------------------------------------------------------------------------------------


async def test_whatever_is_no_result_is_refused(stores: Stores) -> None:
    handle = stores["a"]
    not_results: Any = [handle, "a"]
    with pytest.raises(UsageError, match="str is not a handle of aioresult; make one"):
        await gather(*not_results)
    with pytest.raises(UsageError, match="str is not a handle of aioresult; make one"):
        await wait(not_results)
    with pytest.raises(UsageError, match="str is not a handle of aioresult; make one"):
        as_completed(not_results)
    with pytest.raises(UsageError, match="several"):
        await wait(handle)
    with pytest.raises(UsageError, match="several"):
        as_completed(handle)


async def test_a_cancelled_join_leaves_nothing(stores: Stores) -> None:
    """Invariant 5."""
    results: list[ResultBase] = [stores["a"], stores["x1"], stores.here.group(["b", "c"])]

    async def iterate() -> None:
        async for _ in as_completed(results):
            raise AssertionError("nothing has finished")

    joins = [asyncio.create_task(join) for join in (gather(*results), wait(results), iterate())]
    await stores.subscribed(3, 1)
    for join in joins:
        join.cancel()
    await asyncio.wait(joins)
    await stores.subscribed(0, 0)
    assert len(topics_of(stores.here)) == len(topics_of(stores.there)) == 0


async def test_a_store_without_members_is_left_alone(harness: Harness) -> None:
    """A join asks each store for its own ids, and of those only for what is not known."""
    first, second = harness.make(), harness.make()
    calls = [count_calls(first), count_calls(second)]
    await harness.open(first)
    await harness.open(second)
    await first.mark_as_done("a", 1)
    known = second.result("a")
    assert await known == 1
    for count in calls:
        count.clear()
    assert await gather(first.result("a"), known, first.result("a")) == [1, 1, 1]
    assert calls == [{"_fetch": 1}, {}]


# -- looking at what is over, before anything is watched --------------------------------------------------------------


async def test_what_is_over_is_found_without_a_subscription(harness: Harness) -> None:
    backend = harness.make()
    calls = count_calls(backend)
    await harness.open(backend)
    await asyncio.gather(*(backend.mark_as_done(f"t{number}", number) for number in range(1200)))
    calls.clear()
    assert await backend.group(f"t{number}" for number in range(1200)) == list(range(1200))
    # A hundred at first: how large they are is not known.
    assert calls == {"_fetch": 4 * len(shares(backend, [f"t{number}" for number in range(1200)]))}


async def test_small_joins_look_together(harness: Harness) -> None:
    backend = harness.make()
    calls = count_calls(backend)
    await harness.open(backend)
    waiting = [asyncio.create_task(backend.group([f"a{number}", f"b{number}"]).get()) for number in range(200)]
    await harness.subscribed(400)
    shards = len(shares(backend, [f"a{number}" for number in range(200)]))
    assert calls["_fetch"] <= (4 if shards == 1 else 8 * shards)  # a join over shards begins at them one by one
    await asyncio.gather(*(backend.mark_as_done(f"{letter}{number}", 1) for letter in "ab" for number in range(200)))
    assert await asyncio.gather(*waiting) == [[1, 1]] * 200


#: More than are left to the hub.
MANY = [f"t{number}" for number in range(150)]


async def test_a_result_stored_between_the_look_and_the_watch_is_not_missed(harness: Harness) -> None:
    backend, worker = harness.make(), await harness.connect()

    async def fetch(original: Any, *args: Any) -> Any:
        found = await original(*args)
        await asyncio.gather(*(worker.mark_as_done(task_id, task_id) for task_id in MANY))  # too late to be seen
        return found

    intercept(backend, "_fetch", fetch)
    await harness.open(backend)
    assert await backend.group(MANY) == MANY


async def test_a_server_that_does_not_answer_holds_no_deadline_up(harness: Harness) -> None:
    backend = harness.make()
    gate = Gate(backend, "_fetch")
    await harness.open(backend)
    with pytest.raises(TimeoutError, match="task t0, with 149 more"):
        await backend.group(MANY).get(timeout=0.01)
    assert gate.reached.is_set()
    gate.open.set()
    await backend.get_many(["t0"])
    assert len(topics_of(backend)) == 0  # nobody goes on to watch what nobody waits for
    await asyncio.gather(*(backend.mark_as_done(task_id, task_id) for task_id in MANY))
    assert await backend.group(MANY).get(timeout=60) == MANY


async def test_a_server_that_does_not_answer_holds_up_no_results_of_another(harness: Harness) -> None:
    here, other = harness.make(), MemoryHarness()
    gate = Gate(here, "_fetch")
    await harness.open(here)
    there = await other.connect()
    await there.mark_as_done("x", 1)
    results = [*(here.result(task_id) for task_id in MANY), there.result("x"), *(there.result(f"x{n}") for n in MANY)]
    steps = as_completed(results)
    assert (await anext(steps)).id == "x"
    await steps.aclose()
    gate.open.set()
    await other.close()


@pytest.mark.parametrize("ids", [["t"], MANY], ids=["few", "many"])
async def test_an_outage_fails_no_join_but_one_that_looks_once(harness: Harness, ids: list[str]) -> None:
    backend = harness.make(retry_for=0.0)
    outages = 3

    async def fetch(original: Any, *args: Any) -> Any:
        nonlocal outages
        outages -= 1
        if outages >= 0:
            raise BackendConnectionError("away")
        return await original(*args)

    intercept(backend, "_fetch", fetch)
    await harness.open(backend)
    await asyncio.gather(*(backend.mark_as_done(task_id, task_id) for task_id in ids))
    assert await backend.group(ids) == ids
    for join in (backend.group(ids).get(timeout=0), wait([backend.group(ids)], timeout=0)):
        outages = 1
        with pytest.raises(BackendConnectionError, match="away"):
            await join


@pytest.mark.parametrize("ids", [["t"], MANY], ids=["few", "many"])
async def test_a_bug_in_a_backend_hangs_no_join(
    harness: Harness, ids: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    backend = harness.make()

    async def fetch(original: Any, *args: Any) -> Any:
        raise KeyError("a bug")

    intercept(backend, "_fetch", fetch)
    await harness.open(backend)
    with pytest.raises(BackendError, match="KeyError: 'a bug'"):
        await backend.group(ids)
    with pytest.raises(BackendError, match="KeyError: 'a bug'"):
        await backend.group(ids).get(timeout=0)


async def test_closing_while_it_looks_ends_a_join(harness: Harness) -> None:
    backend = harness.make()
    gate = Gate(backend, "_fetch")
    await backend.open()
    joining = asyncio.create_task(backend.group(MANY).get())
    await gate.reached.wait()
    closing = asyncio.create_task(backend.aclose())
    with pytest.raises(BackendClosedError):
        await joining
    gate.open.set()
    await closing


async def test_a_read_that_comes_late_does_not_undo_the_end(harness: Harness) -> None:
    """The message may overtake it: they come over different connections."""
    backend = await harness.connect()
    result = backend.result("t")
    await backend.mark_as_done("t", 1)
    assert await result == 1
    result.set_outcome(TaskMeta("t", STARTED, {"pid": 1}))
    assert result.meta is not None
    assert result.meta.status == SUCCESS


# -- parents ----------------------------------------------------------------------------------------------------------


def shapes(backend: Backend) -> dict[str, ResultSet]:
    """Groups that wait for the task ``load``, each in a way of its own."""
    load = backend.result("load")
    nested = GroupResult("nested", [backend.group(["a"]), backend.result("b")], load, backend)
    middle = backend.result("middle", load)
    return {
        "the group's parent": GroupResult("g", map(backend.result, "ab"), load, backend),
        "a member's parents": backend.group([backend.result("a"), backend.result("b", middle)]),
        "a nested group's parent": backend.group([backend.result("c"), nested]),
        "a group as parent": GroupResult("g", [backend.result("a")], backend.group(["c", load]), backend),
        "a member of a parent has a parent": backend.group([backend.result("a", backend.group(["c", middle]))]),
        "a set without an id": ResultSet([backend.result("b", ResultSet([ResultSet([load])]))]),
    }


SHAPES = [
    "the group's parent",
    "a member's parents",
    "a nested group's parent",
    "a group as parent",
    "a member of a parent has a parent",
    "a set without an id",
]


async def first(results: ResultSet) -> Any:
    return await (await anext(results.as_completed()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("revoked", [False, True], ids=["failed", "revoked"])
async def test_every_join_is_told_that_a_parent_failed(harness: Harness, shape: str, revoked: bool) -> None:
    worker, web = await harness.pair()
    results = [shapes(web)[shape] for _ in range(4)]
    # A set has no id, and can be in no other set.
    waited: set[ResultBase] = {results[2]} if isinstance(results[2], GroupResult) else set(results[2])
    if isinstance(results[0], GroupResult):
        await results[0].save()
        restored = await GroupResult.restore(results[0].id, web)
        assert restored is not None
        results.append(restored)
    joins = [first(results[0]), gather(results[1]), wait(waited, return_when=FIRST_EXCEPTION)]
    joins += [result.get() for result in results[3:]]
    waiting = [asyncio.create_task(join) for join in joins]
    lineage = Lineage[AsyncResult[Any]]([results[0]])
    await harness.subscribed(len({*lineage.leaves, *lineage.ancestors}))
    if revoked:
        await worker.mark_as_revoked("load", "no such file")
    else:
        await worker.mark_as_failure("load", ValueError("no such file"))
    waiting += [asyncio.create_task(join) for join in (first(shapes(web)[shape]), gather(shapes(web)[shape]))]
    expected = TaskRevokedError if revoked else ValueError
    for task in waiting:
        if task is waiting[2]:
            done, pending = await task
            assert done | pending == waited
        else:
            with pytest.raises(expected, match="no such file"):
                await task
    with pytest.raises(expected, match="no such file"):
        await shapes(web)[shape].get(timeout=0)
    await harness.subscribed(0)


async def test_a_result_below_a_failure_is_done_and_its_siblings_are_not(harness: Harness) -> None:
    worker, web = await harness.pair()
    load = web.result("load")
    above = GroupResult("g", [web.result("a"), web.result("b")], load)
    below, free = web.result("c", web.result("middle", load)), web.result("free")
    await worker.mark_as_done("b", "b")
    await worker.mark_as_failure("load", ValueError("no such file"))
    assert await wait([above, below, free], return_when=FIRST_EXCEPTION) in (
        ({above}, {below, free}),
        ({below}, {above, free}),
        ({above, below}, {free}),
    )
    assert await wait([above, below, free], timeout=0) == ({above, below}, {free})
    a, b = await gather(*above, return_exceptions=True)
    assert (type(a), b) == (ValueError, "b")
    waiting = asyncio.create_task(gather(above, below, free, return_exceptions=True))
    await harness.subscribed(1)
    await worker.mark_as_done("free", 1)
    (a, b), c, one = await waiting
    assert (type(a), b, type(c), one) == (ValueError, "b", ValueError, 1)
    assert a is not c  # each raises one of its own
    assert await below.state() == "PENDING"
    yielded = {each.id: each async for each in above.as_completed()}
    assert await yielded["b"] == "b"
    with pytest.raises(ValueError, match="no such file"):
        await yielded["a"]  # though the handle alone has no parent


@pytest.mark.parametrize("copies", [False, True], ids=["one handle", "a copy each"])
async def test_a_parent_of_many_is_watched_once(harness: Harness, copies: bool) -> None:
    backend = harness.make()
    calls = count_calls(backend)
    await harness.open(backend)
    load = backend.result("load")
    members = [backend.result(task_id, backend.result("load") if copies else load) for task_id in MANY]
    group = GroupResult("g", members, load, backend)
    waiting = asyncio.create_task(group.get(propagate=False))
    await harness.subscribed(len(MANY) + 1)
    assert len(Lineage[AsyncResult[Any]]([group]).ancestors) == 1
    calls.clear()
    await backend.mark_as_failure("load", KeyError("load"))
    assert {type(value) for value in await waiting} == {KeyError}
    # The look at those below, before they are given up.
    assert calls["_fetch"] <= (2 * len(MANY) // 100 + 2) * len(shares(backend, MANY))
    await harness.subscribed(0)
    assert len(topics_of(backend)) == 0


async def test_parents_of_what_has_succeeded_are_not_read(harness: Harness) -> None:
    backend = harness.make()
    read: list[str] = []

    async def fetch(original: Any, ids: Any, *args: Any) -> Any:
        read.extend(ids)
        return await original(ids, *args)

    intercept(backend, "_fetch", fetch)
    await harness.open(backend)
    await asyncio.gather(*(backend.mark_as_done(task_id, task_id) for task_id in MANY[1:]))
    group = backend.group(backend.result(task_id, backend.result(f"above {task_id}")) for task_id in MANY)
    waiting = asyncio.create_task(group.get())
    await harness.subscribed(2)
    assert {task_id for task_id in read if task_id not in MANY} == {"above t0"}
    await backend.mark_as_done("t0", "t0")
    assert await waiting == MANY
    await harness.subscribed(0)


@pytest.mark.parametrize("when", ["before", "during"])
async def test_of_many_that_failed_with_a_parent_each_has_its_failure(harness: Harness, when: str) -> None:
    """Half of them say so themselves, as Celery's links of a chain do."""
    worker, web = await harness.pair()
    group = web.group(web.result(task_id, web.result("middle", web.result("load"))) for task_id in MANY)
    if when == "during":
        waiting = asyncio.create_task(group.get(propagate=False))
        await harness.subscribed(len(MANY) + 2)
    await worker.mark_as_failure("load", KeyError("load"))
    await asyncio.gather(*(worker.mark_as_failure(task_id, ValueError(task_id)) for task_id in MANY[::2]))
    if when == "before":
        waiting = asyncio.create_task(group.get(propagate=False))
    assert {type(value) for value in await waiting} == {KeyError}
    assert {type(value) for value in await group.get(timeout=0, propagate=False)} == {KeyError}
    await harness.subscribed(0)


async def test_of_parents_that_failed_at_once_it_is_the_topmost(harness: Harness) -> None:
    """The order in which Celery looks."""
    moment = datetime(2026, 1, 1, tzinfo=UTC)

    def failed(task_id: str, date: datetime | None) -> EagerResult[Any]:
        result = EagerResult[Any](task_id, KeyError(task_id), FAILURE)
        result._outcome = TaskMeta(task_id, FAILURE, KeyError(task_id), date_done=date)
        return result

    web = await harness.connect()
    later = moment + timedelta(seconds=1)
    for dates, cause in (
        ({"p": moment, "q": moment, "r": later}, "q"),
        ({"p": later, "q": later, "r": moment}, "r"),
        ({"p": None, "q": None, "r": later}, "r"),
        ({"p": None, "q": None, "r": None}, "q"),
        ({"p": moment.replace(tzinfo=None), "q": None, "r": later}, "p"),
    ):
        parents = {name: failed(name, date) for name, date in dates.items()}
        middle = web.group([web.result("m"), parents["p"], parents["r"]])
        middle.parent = parents["q"]
        with pytest.raises(KeyError, match=cause):
            await web.result("t", middle)
        with pytest.raises(KeyError, match=cause):
            await web.group([web.result("t", middle)])


async def test_ends_of_joins_leave_no_watch_of_a_parent(harness: Harness) -> None:
    web = await harness.connect()
    for shape in shapes(web).values():
        cancelled = asyncio.create_task(shape.get())
        lineage = Lineage[AsyncResult[Any]]([shape])
        await harness.subscribed(len({*lineage.leaves, *lineage.ancestors}))
        cancelled.cancel()
        await asyncio.wait([cancelled])
        await harness.subscribed(0)
        for timeout in (0, 0.001):
            with pytest.raises(TimeoutError, match=r"task [abc]"):  # never of a parent
                await shape.get(timeout)
        await harness.subscribed(0)
        assert len(topics_of(web)) == 0
    closed = await harness.connect()
    waiting = asyncio.create_task(shapes(closed)["the group's parent"].get())
    await harness.subscribed(3)
    await closed.aclose()
    with pytest.raises(BackendClosedError):
        await waiting
    await harness.subscribed(0)


async def test_a_parent_in_another_store_is_followed(stores: Stores) -> None:
    group = GroupResult("g", [stores["a"], stores["b"]], stores["x1"])
    waiting = asyncio.create_task(group.get())
    await stores.subscribed(2, 1)
    await stores.failed("x1")
    with pytest.raises(KeyError, match="x1"):
        await waiting
    await stores.subscribed(0, 0)


async def test_handles_that_are_equal_are_each_told(stores: Stores) -> None:
    one, other = stores["a"], stores["a"]
    await stores.done("a")
    assert await wait([one, other, one]) == ({one}, set())
    assert (one.value(), other.value()) == ("of a", "of a")


async def test_a_long_chain_of_large_groups_is_followed_in_linear_time(harness: Harness) -> None:
    backend = await harness.connect()
    above: ResultBase = backend.result("load")
    for stage in range(20):
        above = GroupResult(f"g{stage}", [backend.result(f"{stage} {n}", above) for n in range(50)], above, backend)
    lineage = Lineage[AsyncResult[Any]]([above])
    assert (len(lineage.leaves), len(lineage.ancestors)) == (50, 951)
    (first_leaf, *_) = lineage.leaves
    assert [each.handle.id for each in lineage.above([first_leaf])][:2] == ["load", "0 0"]
    (load, *_) = lineage.above([first_leaf])
    assert set(lineage.below(load)) == set(lineage.leaves)
    assert list(lineage.below(load)) == []
