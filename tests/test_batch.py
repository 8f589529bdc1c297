"""The batcher: who shares a round trip with whom, and what reaches whom when something fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import pytest

from aioresult import BackendClosedError, BackendConnectionError, BackendError
from aioresult.batch import Batcher

from .harness import until


class RoundTrips:
    """What the batcher runs: notes each batch, and answers it once the gate is open."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.under_way = self.most_under_way = 0
        self.gate = asyncio.Event()

    async def run(self, items: Sequence[int]) -> Sequence[int | BaseException]:
        self.batches.append(list(items))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await self.gate.wait()
            return [self.answer(item) for item in items]
        finally:
            self.under_way -= 1

    def answer(self, item: int) -> int | BaseException:
        return item * 10


async def submitted(batcher: Batcher[int, int], items: Sequence[int]) -> list[asyncio.Future[int]]:
    """Callers, one per item, each of which has got as far as waiting."""
    tasks = [asyncio.ensure_future(batcher.submit(item)) for item in items]
    await asyncio.sleep(0)
    return tasks


async def in_flight(trips: RoundTrips, batcher: Batcher[int, int], items: Sequence[int]) -> list[asyncio.Future[int]]:
    """The same, whose batch has been sent."""
    before = len(trips.batches)
    tasks = await submitted(batcher, items)
    await until(lambda: len(trips.batches) > before)
    return tasks


async def test_concurrent_calls_share_a_round_trip() -> None:
    trips = RoundTrips()
    trips.gate.set()
    batcher = Batcher(trips.run, max_items=1000)
    assert await asyncio.gather(*map(batcher.submit, range(100))) == [n * 10 for n in range(100)]
    assert trips.batches == [list(range(100))]


async def test_a_lone_call_is_sent_at_once() -> None:
    trips = RoundTrips()
    trips.gate.set()
    batcher = Batcher(trips.run, max_items=1000)
    assert [await batcher.submit(n) for n in range(3)] == [0, 10, 20]
    assert trips.batches == [[0], [1], [2]]


async def test_what_comes_while_one_is_in_flight_goes_out_together_in_the_next() -> None:
    trips = RoundTrips()
    batcher = Batcher(trips.run, max_items=1000)
    tasks = await in_flight(trips, batcher, [0])
    for n in range(1, 5):
        tasks += await submitted(batcher, [n])
    assert trips.batches == [[0]]
    trips.gate.set()
    assert await asyncio.gather(*tasks) == [0, 10, 20, 30, 40]
    assert trips.batches == [[0], [1, 2, 3, 4]]


@pytest.mark.parametrize("parallel", [1, 2, 3])
async def test_neither_a_batch_nor_their_number_exceeds_its_bound(parallel: int) -> None:
    trips = RoundTrips()
    batcher = Batcher(trips.run, max_items=10, parallel=parallel)
    tasks = await submitted(batcher, range(45))
    await until(lambda: trips.under_way == parallel)
    trips.gate.set()
    assert await asyncio.gather(*tasks) == [n * 10 for n in range(45)]
    assert [len(batch) for batch in trips.batches] == [10, 10, 10, 10, 5]
    assert [n for batch in trips.batches for n in batch] == list(range(45))
    assert trips.most_under_way == parallel


async def test_a_second_batch_may_go_while_the_first_is_in_flight() -> None:
    trips = RoundTrips()
    batcher = Batcher(trips.run, max_items=10, parallel=2)
    tasks = await in_flight(trips, batcher, [0])
    tasks += await in_flight(trips, batcher, [1])
    assert trips.batches == [[0], [1]]
    trips.gate.set()
    assert await asyncio.gather(*tasks) == [0, 10]


class OddFails(RoundTrips):
    def answer(self, item: int) -> int | BaseException:
        return BackendError(f"{item} is odd") if item % 2 else item * 10


async def test_an_error_in_a_place_is_raised_to_that_caller_alone() -> None:
    trips = OddFails()
    trips.gate.set()
    tasks = await submitted(Batcher(trips.run, max_items=10), range(4))
    for task in tasks[1::2]:
        with pytest.raises(BackendError, match="is odd"):
            await task
    assert [await task for task in tasks[::2]] == [0, 20]
    assert trips.batches == [[0, 1, 2, 3]]


class AllFail(RoundTrips):
    def answer(self, item: int) -> int | BaseException:
        raise BackendConnectionError("lost")


async def test_an_error_of_the_whole_is_raised_to_every_caller_and_the_next_batch_goes_out() -> None:
    trips = AllFail()
    batcher = Batcher(trips.run, max_items=10)
    tasks = await in_flight(trips, batcher, [0, 1, 2])
    tasks += await submitted(batcher, [3])
    trips.gate.set()
    for task in tasks:
        with pytest.raises(BackendConnectionError, match="lost"):
            await task
    assert trips.batches == [[0, 1, 2], [3]]


@pytest.mark.parametrize("outcomes", [[], [1], [1, 2, 3, 4]])
async def test_a_run_that_miscounts_is_an_error_to_all_of_its_callers(outcomes: list[int]) -> None:
    async def run(items: Sequence[int]) -> Sequence[int]:
        return outcomes

    for task in await submitted(Batcher(run, max_items=10), range(3)):
        with pytest.raises(BackendError, match=f"{len(outcomes)} outcomes came back for 3 items"):
            await task


async def test_a_caller_that_is_cancelled_in_the_queue_is_not_sent() -> None:
    trips = RoundTrips()
    batcher = Batcher(trips.run, max_items=2)
    first = await in_flight(trips, batcher, [0])
    queued = await submitted(batcher, [1, 2, 3, 4])
    for task in queued[:3]:
        task.cancel()
    trips.gate.set()
    outcomes = await asyncio.gather(*first, *queued, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes[1:4]] == [asyncio.CancelledError] * 3
    assert (outcomes[0], outcomes[4]) == (0, 40)
    assert trips.batches == [[0], [4]]


async def test_a_queue_of_cancelled_callers_alone_sends_nothing() -> None:
    trips = RoundTrips()
    batcher = Batcher(trips.run, max_items=2)
    first = await in_flight(trips, batcher, [0])
    queued = await submitted(batcher, [1, 2, 3])
    for task in queued:
        task.cancel()
    trips.gate.set()
    await asyncio.gather(*first, *queued, return_exceptions=True)
    assert await batcher.submit(4) == 40
    assert trips.batches == [[0], [4]]


async def test_a_caller_that_is_cancelled_in_flight_disturbs_nobody() -> None:
    trips = RoundTrips()
    batcher = Batcher(trips.run, max_items=10)
    tasks = await in_flight(trips, batcher, [0, 1, 2])
    tasks[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    assert trips.under_way == 1
    trips.gate.set()
    assert (await tasks[0], await tasks[2]) == (0, 20)


class WithAShortcut(RoundTrips):
    """Notes what comes at once, and keeps how to answer it."""

    def __init__(self) -> None:
        super().__init__()
        self.open = True
        self.at_once: list[int] = []
        self.done: list[Callable[[int | None], None]] = []

    def send(self, item: int, done: Callable[[int | None], None]) -> bool:
        if self.open:
            self.at_once.append(item)
            self.done.append(done)
        return self.open

    async def batcher(self, **options: Any) -> Batcher[int, int]:
        """One whose last item came alone."""
        batcher = Batcher(self.run, max_items=10, at_once=self.send, **options)
        self.gate.set()
        await batcher.submit(0)
        self.gate.clear()
        self.batches.clear()
        return batcher


async def test_who_comes_alone_again_is_sent_before_submit_returns() -> None:
    trips = WithAShortcut()
    batcher = await trips.batcher()
    for item in (1, 2):
        future = batcher.submit(item)
        assert trips.at_once[-1] == item
        trips.done[-1](item * 10)
        assert await future == item * 10
    assert trips.batches == []


async def test_who_has_company_shares_a_batch_and_so_do_those_after_it() -> None:
    trips = WithAShortcut()
    batcher = await trips.batcher()
    trips.gate.set()
    first = batcher.submit(1)
    others = [batcher.submit(item) for item in (2, 3)]
    await asyncio.sleep(0)
    assert trips.batches == []  # they wait for the first, like for any round trip
    trips.done[0](10)
    assert await asyncio.gather(first, *others) == [10, 20, 30]
    assert await batcher.submit(4) == 40  # after company, company is expected
    assert (trips.at_once, trips.batches) == ([1], [[2, 3], [4]])
    assert not batcher.submit(5).done()
    assert trips.at_once == [1, 5]


async def test_nothing_is_sent_at_once_past_a_batch_that_is_under_way() -> None:
    trips = WithAShortcut()
    batcher = await trips.batcher()
    trips.open = False
    under_way = await in_flight(trips, batcher, [1])
    trips.open = True
    under_way.append(batcher.submit(2))
    assert trips.at_once == []
    trips.gate.set()
    assert await asyncio.gather(*under_way) == [10, 20]


async def test_trouble_on_the_short_way_sends_the_item_on_the_long_one_and_first() -> None:
    trips = WithAShortcut()
    batcher = await trips.batcher()
    trips.gate.set()
    futures = [batcher.submit(item) for item in (1, 2)]
    await asyncio.sleep(0)
    futures.append(batcher.submit(3))
    trips.done[0](None)
    assert await asyncio.gather(*futures) == [10, 20, 30]
    assert trips.batches == [[1, 2, 3]]


async def test_trouble_of_a_caller_that_was_cancelled_does_not_keep_those_behind_it() -> None:
    trips = WithAShortcut()
    batcher = await trips.batcher()
    trips.gate.set()
    batcher.submit(1).cancel()
    second = batcher.submit(2)
    trips.done[0](None)
    assert await second == 20
    assert trips.batches == [[2]]


async def test_trouble_with_what_nobody_waits_for_any_more_sends_nothing() -> None:
    trips = WithAShortcut()
    batcher = await trips.batcher()
    batcher.submit(1).cancel()
    trips.done[0](None)
    batcher.submit(2).cancel()
    trips.done[1](20)
    assert (trips.at_once, trips.batches, len(batcher._due)) == ([1, 2], [], 0)


@pytest.mark.parametrize("outcome", [None, 10])
async def test_closing_lets_what_was_sent_at_once_finish(outcome: int | None) -> None:
    trips = WithAShortcut()
    batcher = await trips.batcher()
    future = batcher.submit(1)
    closing = asyncio.create_task(batcher.close(BackendClosedError("closed")))
    await asyncio.sleep(0)
    assert not closing.done()
    trips.done[0](outcome)
    await closing
    if outcome is None:
        with pytest.raises(BackendClosedError):
            await future
    else:
        assert await future == outcome
    assert trips.batches == []


async def test_closing_does_not_wait_for_ever_for_what_was_sent_at_once() -> None:
    trips = WithAShortcut()
    batcher = await trips.batcher()
    future = batcher.submit(1)
    await batcher.close(BackendClosedError("closed"))
    with pytest.raises(BackendClosedError):
        await future
    trips.done[0](10)  # comes too late, and harms nothing


async def test_closing_fails_the_queue_lets_the_rest_finish_and_refuses_more() -> None:
    trips = RoundTrips()
    batcher = Batcher(trips.run, max_items=10)
    sent = await in_flight(trips, batcher, [0, 1])
    queued = await submitted(batcher, [2, 3])
    error = BackendClosedError("closed")
    closing = asyncio.create_task(batcher.close(error))
    assert list(map(repr, await asyncio.gather(*queued, return_exceptions=True))) == [repr(error)] * 2
    with pytest.raises(BackendClosedError, match="closed"):
        await batcher.submit(4)
    assert not closing.done()
    trips.gate.set()
    await closing
    assert await asyncio.gather(*sent) == [0, 10]
    assert trips.batches == [[0, 1]]


async def test_closing_does_not_wait_for_ever() -> None:
    trips = RoundTrips()
    batcher = Batcher(trips.run, max_items=10)
    sent = await in_flight(trips, batcher, [0, 1])
    error = BackendClosedError("closed")
    await batcher.close(error)
    assert trips.under_way == 0
    assert list(map(repr, await asyncio.gather(*sent, return_exceptions=True))) == [repr(error)] * 2


async def test_closing_an_idle_one_is_at_once() -> None:
    batcher = Batcher(RoundTrips().run, max_items=10)
    await batcher.close(BackendClosedError("closed"))
    with pytest.raises(BackendClosedError):
        await batcher.submit(1)


async def test_the_end_of_the_loop_leaves_nobody_waiting() -> None:
    """`asyncio.run` cancels every task there is; whoever cleans up then may still store."""
    trips = RoundTrips()
    batcher = Batcher(trips.run, max_items=1)
    before = asyncio.all_tasks()
    (caller,) = await in_flight(trips, batcher, [0])
    (worker,) = asyncio.all_tasks() - before - {caller}
    queued = await submitted(batcher, [1, 2])
    trips.gate.set()
    worker.cancel()
    assert await batcher.submit(3) == 30
    assert await asyncio.gather(caller, *queued) == [0, 10, 20]
    assert trips.batches == [[0], [0], [1], [2], [3]]


async def test_the_end_of_the_loop_may_come_before_a_batch_has_begun() -> None:
    trips = RoundTrips()
    trips.gate.set()
    batcher = Batcher(trips.run, max_items=10)
    before = asyncio.all_tasks()
    futures = [batcher.submit(1)]
    (worker,) = asyncio.all_tasks() - before
    worker.cancel()
    futures.append(batcher.submit(2))
    assert await asyncio.gather(*futures) == [10, 20]
    assert await batcher.submit(3) == 30


async def test_no_batch_runs_in_the_context_of_a_caller() -> None:
    """What a request keeps in its context would live as long as whatever the batch makes, such as a connection."""
    name: ContextVar[str] = ContextVar("name", default="")

    async def run(items: Sequence[int]) -> list[str]:
        return [name.get()] * len(items)

    batcher: Any = Batcher(run, max_items=10)
    for each in ("first", "second"):
        name.set(each)
        assert await batcher.submit(0) == ""
