"""Groups: their values, their members, and their way through the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any
from uuid import UUID

import pytest

import aioresult
from aioresult import (
    Backend,
    DecodeError,
    GroupResult,
    ResultSet,
    TaskRevokedError,
    TimeoutError,
    UsageError,
)

from ..harness import Harness, count_calls, shares, topics_of, until


async def done(worker: Backend, **values: Any) -> None:
    """Store each value as the result of the task named; an exception as its failure."""
    async with asyncio.TaskGroup() as tasks:
        for task_id, value in values.items():
            if isinstance(value, Exception):
                tasks.create_task(worker.mark_as_failure(task_id, value))
            else:
                tasks.create_task(worker.mark_as_done(task_id, value))


# -- the values -----------------------------------------------------------------------------------------------------


async def test_the_values_come_in_the_order_of_the_members(harness: Harness) -> None:
    worker, web = await harness.pair()
    group = web.group(["a", "b", "c"])
    waiting = asyncio.gather(group, group.get(), group.join(timeout=60), ResultSet(list(group)).get())
    await harness.subscribed(3)
    for task_id in "cab":
        await worker.mark_as_done(task_id, f"of {task_id}")
    assert list(await waiting) == [["of a", "of b", "of c"]] * 4
    await harness.subscribed(0)


async def test_nested_groups_keep_their_shape(harness: Harness) -> None:
    worker, web = await harness.pair()
    group = web.group(
        [web.group(["a", "b"]), web.result("c"), web.group([web.group([]), ResultSet([web.result("d")])])]
    )
    waiting = asyncio.create_task(group.get())
    await harness.subscribed(4)
    await done(worker, d=4, c=3, b=2, a=1)
    assert await waiting == [[1, 2], 3, [[], [4]]]


async def test_a_group_of_nothing_is_done(harness: Harness) -> None:
    backend = await harness.connect()
    group = backend.group([])
    assert await group == []
    assert await group.get(timeout=0) == []
    assert [result async for result in group.as_completed()] == []
    assert await group.ready()
    assert await group.successful()
    assert not await group.failed()
    assert await group.completed_count() == 0


async def test_the_first_failure_is_raised_without_waiting_for_the_rest(harness: Harness) -> None:
    worker, web = await harness.pair()
    waiting = asyncio.create_task(web.group(["a", "b", "c"]).get())
    await harness.subscribed(3)
    await worker.mark_as_failure("b", KeyError("lost"))
    with pytest.raises(KeyError, match="lost"):
        await waiting
    await harness.subscribed(0)


async def test_without_propagation_exceptions_stand_in_their_places(harness: Harness) -> None:
    worker, web = await harness.pair()
    waiting = asyncio.create_task(web.group([web.group(["a"]), web.result("b"), web.result("c")]).get(propagate=False))
    await harness.subscribed(3)
    await done(worker, a=KeyError("lost"), b=2)
    await worker.mark_as_revoked("c")
    [[lost], two, revoked] = await waiting
    assert isinstance(lost, KeyError)
    assert two == 2
    assert isinstance(revoked, TaskRevokedError)


@pytest.mark.parametrize("propagate", [True, False])
async def test_a_member_that_cannot_be_read_is_raised(harness: Harness, propagate: bool) -> None:
    """Invariant 6."""
    worker, web = await harness.pair()
    waiting = asyncio.create_task(web.group(["a", "bad"]).get(propagate=propagate))
    await harness.subscribed(2)
    await harness.put_raw("bad", b"{no json")
    with pytest.raises(DecodeError, match="task bad"):
        await waiting
    await done(worker, a=1)
    group = web.group(["a", "bad"])
    with pytest.raises(DecodeError, match="task bad"):
        await group.get(timeout=0, propagate=propagate)
    with pytest.raises(DecodeError, match="task bad"):
        await group.completed_count()


async def test_one_timeout_is_for_all_members_together(harness: Harness) -> None:
    """Invariant 8: one deadline, computed once."""
    worker, web = await harness.pair()
    await done(worker, t7=1)
    group = web.group([f"t{n}" for n in range(1000)])
    assert await group[7].ready()
    started = asyncio.get_running_loop().time()
    with pytest.raises(TimeoutError, match=r"task t0, with 998 more, .*timeout=0\.1 seconds"):
        await group.get(timeout=0.1)
    assert asyncio.get_running_loop().time() - started < 30  # a deadline each would be 100 s
    await harness.subscribed(0)


async def test_a_timeout_of_zero_looks_once(harness: Harness) -> None:
    """Invariant 8: what is ready beats a deadline that has passed."""
    worker, web = await harness.connect(), harness.make()
    calls = count_calls(web)
    await harness.open(web)
    group = web.group(["a", "b"])
    await done(worker, a=1)
    with pytest.raises(TimeoutError, match=r"task b was not ready within timeout=0 "):
        await group.get(timeout=0)
    results = group.as_completed(timeout=0)
    assert await anext(results) == web.result("a")
    with pytest.raises(TimeoutError, match=r"task b "):
        await anext(results)
    await done(worker, b=2)
    assert await group.get(timeout=-1) == [1, 2]
    assert calls == {"_fetch": len(shares(web, "ab")) + 2}


# -- as they finish -------------------------------------------------------------------------------------------------


async def test_as_completed_gives_the_order_of_finishing(harness: Harness) -> None:
    worker, web = await harness.connect(), harness.make()
    calls = count_calls(web)
    await harness.open(web)
    group = web.group([web.group(["a", "b"]), *"cde"])
    await done(worker, c=3)
    results = group.as_completed()
    assert await anext(results) == web.result("c")
    await harness.subscribed(4)
    for finished, task_id in enumerate("dab", 2):
        await done(worker, **{task_id: KeyError(task_id)})

        def told(finished: int = finished) -> bool:
            return sum(leaf.meta is not None and leaf.meta.ready for leaf in group.leaves()) == finished

        await until(told)  # or a read that brings two at once might give their order
    calls.clear()
    for task_id in "dab":
        result = await anext(results)
        assert result == web.result(task_id)
        with pytest.raises(KeyError, match=task_id):
            await result
    assert not calls["_fetch"]
    await done(worker, e=5)
    assert [await result async for result in results] == [5]
    await harness.subscribed(0)


async def test_as_completed_gives_each_handle_on_an_id(harness: Harness) -> None:
    worker, web = await harness.pair()
    handles = [web.result("a"), web.result("b"), web.result("a")]
    handles.append(handles[1])
    waiting = asyncio.create_task(ResultSet(handles).get())
    await harness.subscribed(2)
    await done(worker, a=1, b=2)
    assert await waiting == [1, 2, 1, 2]
    fresh = [web.result("a"), web.result("b"), web.result("a")]
    assert sorted([id(result) async for result in ResultSet(fresh).as_completed()]) == sorted(map(id, fresh))


async def test_as_completed_ends_with_its_timeout(harness: Harness) -> None:
    worker, web = await harness.pair()
    await done(worker, a=1)
    known = web.result("a")
    assert await known == 1
    results = web.group([known, "b"]).as_completed(timeout=0.05)
    assert await anext(results) is known
    with pytest.raises(TimeoutError, match=r"task b .*timeout=0\.05 seconds"):
        await anext(results)
    await harness.subscribed(0)


@pytest.mark.parametrize("of_a_group", [True, False])
async def test_leaving_as_completed_early_ends_the_subscriptions(harness: Harness, of_a_group: bool) -> None:
    """Invariant 5."""
    worker, web = await harness.pair()
    await done(worker, a=1)
    group = web.group(["a", "b", "c"])
    async with aclosing(group.as_completed() if of_a_group else aioresult.as_completed(group)) as results:
        async for result in results:
            assert result == web.result("a")
            await harness.subscribed(2)
            break
    assert len(topics_of(web)) == 0
    await harness.subscribed(0)


async def test_as_completed_costs_nothing_before_its_first_step(harness: Harness) -> None:
    web = await harness.connect()
    results: AsyncIterator[Any] = web.group(["a"]).as_completed()
    assert len(topics_of(web)) == 0
    del results


# -- looking --------------------------------------------------------------------------------------------------------


async def test_looking_at_a_group(harness: Harness) -> None:
    worker, web = await harness.pair()

    async def look() -> tuple[int, bool, bool, bool, bool]:
        group = web.group([web.group(["a", "b"]), web.result("c")])
        return (
            await group.completed_count(),
            await group.ready(),
            await group.waiting(),
            await group.successful(),
            await group.failed(),
        )

    assert await look() == (0, False, True, False, False)
    await done(worker, a=1)
    assert await look() == (0, False, True, False, False)
    await done(worker, b=2)
    assert await look() == (1, False, True, False, False)
    await done(worker, c=KeyError("lost"))
    assert await look() == (1, True, False, False, True)
    await done(worker, c=3)
    assert await look() == (2, True, False, True, False)


async def test_a_revoked_member_is_over_and_neither_failed_nor_successful(harness: Harness) -> None:
    worker, web = await harness.pair()
    await worker.mark_as_revoked("a")
    group = web.group(["a"])
    assert (await group.ready(), await group.successful(), await group.failed()) == (True, False, False)


async def test_looking_again_asks_only_for_what_was_not_ready(harness: Harness) -> None:
    worker, web = await harness.connect(), harness.make()
    calls = count_calls(web)
    await harness.open(web)
    group = web.group(["a", "b"])
    await done(worker, a=1, b=2)
    assert await group.completed_count() == 2
    assert await group.successful()
    assert await group.get() == [1, 2]
    assert calls == {"_fetch": len(shares(web, "ab"))}


async def test_forgetting_a_group_forgets_its_members(harness: Harness) -> None:
    worker, web = await harness.pair()
    await done(worker, a=1, b=2, c=3)
    await web.group([web.group(["a"]), web.result("b")]).forget()
    assert [task_id for task_id in "abc" if await web.exists(task_id)] == ["c"]


async def test_a_large_group_of_finished_results_is_joined_in_few_round_trips(harness: Harness) -> None:
    worker, web = await harness.connect(), harness.make()
    calls = count_calls(web)
    await harness.open(web)
    ids = [f"t{n}" for n in range(2000)]
    await asyncio.gather(*(worker.mark_as_done(task_id, n) for n, task_id in enumerate(ids)))
    assert await web.group(ids) == list(range(2000))
    assert await web.group(ids).completed_count() == 2000
    assert await web.group(ids).get(timeout=0) == list(range(2000))
    assert set(calls) == {"_fetch"}
    # In each shard, three times four chunks; and a hundred at first, because it is not known how large they are.
    assert calls["_fetch"] == 13 * len(shares(web, ids))


# -- as a list ------------------------------------------------------------------------------------------------------


async def test_a_group_is_a_list_without_duplicates(harness: Harness) -> None:
    backend = await harness.connect()
    a, b, c = (backend.result(task_id) for task_id in "abc")
    group = backend.group([a])
    group.add(b)
    group.add(backend.result("a"))
    assert list(group) == [a, b]
    group.update([c, b, backend.result("c")])
    assert list(group) == [a, b, c]
    assert (len(group), group[0], group[-1]) == (3, a, c)
    group.remove(backend.result("a"))
    group.remove("b")
    assert list(group) == [c]
    with pytest.raises(KeyError, match="b"):
        group.remove("b")
    group.discard("b")
    group.discard("c")
    assert list(group) == []
    group.update([a, b])
    group.clear()
    assert len(group) == 0


async def test_a_group_is_made_of_handles_and_ids(harness: Harness) -> None:
    backend = await harness.connect()
    handle = backend.result("a")
    group = backend.group([handle, "b"])
    assert group[0] is handle
    assert group[1] == backend.result("b")
    assert UUID(group.id).version == 4
    assert backend.group([]).id != group.id
    assert backend.group([], id="g").id == "g"


# -- through the store ----------------------------------------------------------------------------------------------


async def test_a_group_is_restored_elsewhere(harness: Harness) -> None:
    worker, web = await harness.pair()
    group = GroupResult(
        "g", [web.group(["a", "b"], id="inner"), web.result("c", web.result("parent of c"))], web.result("parent"), web
    )
    await group.save()
    restored = await GroupResult.restore("g", worker)
    assert restored == group
    assert restored is not None
    assert restored.as_tuple() == group.as_tuple()
    assert restored.backend is worker
    await done(worker, a=1, b=2, c=3)
    assert await restored == [[1, 2], 3]
    await restored.delete()
    assert await web.restore_group("g") is None
    assert await web.exists("a")


async def test_a_group_is_saved_anew(harness: Harness) -> None:
    backend = await harness.connect()
    await backend.group(["a"], id="g").save()
    await backend.save_group("g", (("g", None), [(("b", None), None)]), expires=50)
    assert await backend.restore_group("g") == backend.group(["b"], id="g")
    left = await harness.group_seconds_left("g")
    assert left is not None
    assert 30 < left <= 50


async def test_a_group_uses_the_backend_of_its_members(harness: Harness) -> None:
    backend = await harness.connect()
    await GroupResult("g", [backend.result("a")]).save()
    assert await backend.restore_group("g") == backend.group(["a"], id="g")
    with pytest.raises(UsageError, match="no backend"):
        await GroupResult("g").save()


async def test_an_unknown_group_is_none_and_deleting_it_does_nothing(harness: Harness) -> None:
    backend = await harness.connect()
    await backend.mark_as_done("g", 1)
    assert await backend.restore_group("g") is None
    await backend.delete_group("g")
    assert await backend.exists("g")


@pytest.mark.parametrize("data", [b"{no json", b"7", b'{"result": 7}', b'{"result": [["g", null], [7]]}', b"\x80\x04."])
async def test_a_group_that_cannot_be_read_is_an_error(harness: Harness, data: bytes) -> None:
    backend = await harness.connect()
    await harness.put_raw_group("g", data)
    with pytest.raises(DecodeError):
        await backend.restore_group("g")


async def test_a_single_result_is_no_group(harness: Harness) -> None:
    backend = await harness.connect()
    await backend.save_group("g", backend.result("a"))
    with pytest.raises(DecodeError, match="single result"):
        await backend.restore_group("g")
