"""How far a group is: counted from the results of its members, whichever process stores them."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from aioresult import GroupProgress, ImproperlyConfigured, TaskRevokedError

from ..harness import Harness


async def test_progress_begins_with_the_present_and_ends_with_everything(harness: Harness) -> None:
    worker, reader = await harness.pair()
    group = reader.group(["a", "b", "c", "d"])
    await worker.mark_as_done("a", 1)
    await worker.mark_as_failure("b", ValueError("no"))
    seen: list[GroupProgress] = []
    async for progress in group.progress(interval=0):
        seen.append(progress)
        if progress.done == 2:
            await worker.mark_as_revoked("c")
        elif progress.done == 3:
            await worker.mark_as_done("d", 4)
    assert seen == [GroupProgress(2, 1, 4), GroupProgress(3, 2, 4), GroupProgress(4, 2, 4)]


async def test_progress_of_what_is_over_is_told_once(harness: Harness) -> None:
    worker, reader = await harness.pair()
    await asyncio.gather(*(worker.mark_as_done(str(index), index) for index in range(120)))
    group = reader.group(map(str, range(120)))
    assert [progress async for progress in group.progress()] == [GroupProgress(120, 0, 120)]
    assert [progress async for progress in reader.group([]).progress()] == [GroupProgress(0, 0, 0)]


async def test_progress_counts_the_members_of_nested_groups(harness: Harness) -> None:
    worker, reader = await harness.pair()
    group = reader.group([reader.result("a"), reader.group(["b", "c"])])
    async with aclosing(group.progress(interval=0)) as steps:
        assert await anext(steps) == GroupProgress(0, 0, 3)
        await worker.mark_as_done("c", 3)
        assert await anext(steps) == GroupProgress(1, 0, 3)
    await harness.subscribed(0)


async def test_a_member_that_waits_for_a_parent_that_failed_has_failed(harness: Harness) -> None:
    worker, reader = await harness.pair()
    group = reader.group([reader.result("child", parent=reader.result("parent")), reader.result("other")])
    async with aclosing(group.progress(interval=0)) as steps:
        assert await anext(steps) == GroupProgress(0, 0, 2)
        await worker.mark_as_revoked("parent", "not wanted")
        assert await anext(steps) == GroupProgress(1, 1, 2)
        await worker.mark_as_done("other", 1)
        assert await anext(steps) == GroupProgress(2, 1, 2)
    with pytest.raises(TaskRevokedError):
        await group


async def test_progress_is_told_at_most_once_an_interval(harness: Harness) -> None:
    """What comes within an interval is told together: three members, one step."""
    worker, reader = await harness.pair()
    group = reader.group(["a", "b", "c"])
    async with aclosing(group.progress(interval=0.2)) as steps:
        assert await anext(steps) == GroupProgress(0, 0, 3)
        await worker.mark_as_done("a", 1)
        assert await anext(steps) == GroupProgress(1, 0, 3)
        await asyncio.gather(worker.mark_as_done("b", 2), worker.mark_as_done("c", 3))
        assert await anext(steps) == GroupProgress(3, 0, 3)


async def test_an_interval_that_makes_no_sense(harness: Harness) -> None:
    group = (await harness.connect()).group(["a"])
    with pytest.raises(ImproperlyConfigured, match="interval"):
        await anext(group.progress(interval=-1))
