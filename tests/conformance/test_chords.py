"""Chords: the parts are counted once, the claim is one process's at a time, and whoever waits is told."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any
from uuid import UUID

import pytest

from aioresult import (
    Backend,
    BackendClosedError,
    BackendConnectionError,
    BackendError,
    ChordClaimLost,
    ChordError,
    ContentDisallowed,
    EncodeError,
    ImproperlyConfigured,
    StoredType,
    TaskRequest,
    TaskRevokedError,
    TimeoutError,
    UsageError,
)
from aioresult.chord import Chord, ChordOp, ChordState, ChordStep, ReadyChord
from aioresult.states import FAILURE, REVOKED, SUCCESS

from ..harness import Gate, Harness, count_calls, intercept, topics_of, until

Steps = Sequence[ChordStep]
Outcomes = Sequence[ChordState | BaseException]
TakeSteps = Callable[[Steps], Awaitable[Outcomes]]


async def part(backend: Backend, index: int, group_id: str = "g", **options: Any) -> ReadyChord | None:
    """Part ``t<index>``, whose value is ten times the index."""
    return await backend.on_chord_part_return(group_id, f"t{index}", SUCCESS, 10 * index, index, **options)


async def failing_part(backend: Backend, index: int, exc: Exception, group_id: str = "g") -> ReadyChord | None:
    return await backend.on_chord_part_return(group_id, f"t{index}", FAILURE, exc, index)


async def completed(backend: Backend, group_id: str = "g", size: int = 2, **options: Any) -> ReadyChord:
    """A chord all of whose parts have come, claimed by the last."""
    await backend.create_chord(group_id, body=f"body of {group_id}", size=size)
    readies = [await part(backend, index, group_id, **options) for index in range(size)]
    assert readies[:-1] == [None] * (size - 1)
    assert readies[-1] is not None
    return readies[-1]


async def claimed(chord: Chord) -> ReadyChord:
    """Claim it as soon as that can be done."""
    while True:
        if (ready := await chord.claim()) is not None:
            return ready
        await asyncio.sleep(0.002)


def waiting(chord: Chord, **options: Any) -> asyncio.Task[list[Any]]:
    return asyncio.create_task(chord.get(**options))


@asynccontextmanager
async def dispatcher(backend: Backend, dispatched: asyncio.Queue[tuple[str, Any]]) -> AsyncIterator[asyncio.Task[None]]:
    """Dispatches into the queue for as long as the block lasts."""

    async def dispatch() -> None:
        async with aclosing(backend.ready_chords()) as chords:
            async for ready in chords:
                async with ready:
                    dispatched.put_nowait((ready.id, ready.error or ready.results))

    task = asyncio.create_task(dispatch())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


# -- the claim ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 1, 2, 1, 2, 0]])
async def test_the_last_part_gets_the_claim_with_body_and_results(harness: Harness, order: list[int]) -> None:
    worker, other = await harness.pair()
    await worker.create_chord("g", body={"call": "sum"}, size=3)
    readies = [await part((worker, other)[n % 2], index) for n, index in enumerate(order)]
    *before, last = readies
    assert before == [None] * len(before)
    assert last is not None
    async with last:
        assert (last.id, last.body, last.results, last.error) == ("g", {"call": "sum"}, [0, 10, 20], None)


async def test_a_part_that_comes_again_gets_nothing_while_the_claim_is_held_and_once_it_is_done(
    harness: Harness,
) -> None:
    backend = await harness.connect()
    ready = await completed(backend)
    assert await part(backend, 1) is None
    async with ready:
        assert await part(backend, 0) is None
    assert await part(backend, 1) is None


async def test_a_part_that_comes_again_with_another_value_changes_nothing(harness: Harness) -> None:
    backend = await harness.connect()
    chord = await backend.create_chord("g", size=2)
    for value in ("first", "second"):
        await backend.on_chord_part_return("g", "a", SUCCESS, value, 0)
        await backend.on_chord_part_return("g", "b", SUCCESS, value)
        await backend.on_chord_part_return("g", "b", FAILURE, ValueError(value))
    assert await chord.progress() == (2, 2)
    assert await chord == ["first", "first"]


async def test_of_concurrent_parts_and_their_copies_one_gets_the_claim(harness: Harness) -> None:
    backends = [await harness.connect() for _ in range(3)]
    chord = await backends[0].create_chord("g", size=100)
    deliveries = [part(backend, index) for index in range(100) for backend in backends]
    random.shuffle(deliveries)
    readies = [ready for ready in await asyncio.gather(*deliveries) if ready is not None]
    assert len(readies) == 1
    assert readies[0].results == [10 * index for index in range(100)]
    assert await chord.progress() == (100, 100)


async def test_concurrent_parts_share_their_way_to_the_server(harness: Harness) -> None:
    backend = harness.make()
    calls = count_calls(backend)
    await harness.open(backend)
    await backend.create_chord("g", size=2000)
    calls.clear()
    await asyncio.gather(*(part(backend, index) for index in range(2000)))
    assert calls["_chord_steps"] <= 2000 / backend.fetch_chunk + 1  # and one that reads the parts


async def test_claim_takes_what_is_complete_and_nobodys(harness: Harness) -> None:
    backend = await harness.connect()
    chord = await backend.create_chord("g", body=1, size=1)
    assert await chord.claim() is None
    assert await part(backend, 0, lease=0) is None
    ready = await chord.claim()
    assert ready is not None
    assert (ready.body, ready.results) == (1, [0])
    assert await chord.claim() is None
    async with ready:
        pass
    assert await chord.claim() is None


@pytest.mark.parametrize("what", ["nothing", "a part"])
async def test_what_was_never_created_is_never_claimed(harness: Harness, what: str) -> None:
    backend = await harness.connect()
    if what == "a part":
        assert await part(backend, 0) is None
    assert await backend.chord("g").claim() is None


async def test_a_chord_created_again_after_it_was_finished_is_a_new_run(harness: Harness) -> None:
    backend = await harness.connect()
    async with await completed(backend, size=2):
        pass
    chord = await backend.create_chord("g", body="second", size=1)
    assert await chord.progress() == (0, 1)
    with pytest.raises(TimeoutError):
        await chord.get(timeout=0)
    ready = await backend.on_chord_part_return("g", "t0", SUCCESS, "new", 0)
    assert ready is not None
    assert (ready.body, ready.results) == ("second", ["new"])


async def test_a_chord_created_again_while_it_runs_keeps_its_parts_and_its_body(harness: Harness) -> None:
    backend = await harness.connect()
    await backend.create_chord("g", body="first", size=3)
    await part(backend, 0)
    await backend.create_chord("g", body="second", size=2)
    ready = await part(backend, 1)
    assert ready is not None
    assert (ready.body, ready.results) == ("first", [0, 10])


@pytest.mark.parametrize(
    "body",
    [
        None,
        False,
        0,
        "",
        "größe \x00",
        [],
        {"call": "sum", "args": [1, None, {"deep": [True]}]},
        {"at": datetime(2024, 2, 29, tzinfo=UTC), "id": UUID(int=7), "price": Decimal("1.10"), "raw": b"\xff"},
    ],
    ids=repr,
)
async def test_body_and_values_come_back_as_they_were(harness: Harness, body: Any) -> None:
    backend = await harness.connect()
    await backend.create_chord("g", body=body, size=1)
    ready = await backend.on_chord_part_return("g", "t", SUCCESS, body, 0)
    assert ready is not None
    assert repr(ready.body) == repr(ready.results[0]) == repr(body)


async def test_types_hold_in_the_body_and_in_the_parts(harness: Harness) -> None:
    half = Fraction(1, 2)
    backend = await harness.connect(types=[StoredType(Fraction, "fraction", str, Fraction)])
    await backend.create_chord("g", body=half, size=2)
    assert await backend.on_chord_part_return("g", "a", SUCCESS, [half], 0) is None
    ready = await backend.on_chord_part_return("g", "b", SUCCESS, half, 1)
    assert ready is not None
    async with ready:
        assert (ready.body, ready.results) == (half, [[half], half])
    await backend.create_chord("failed", size=1)
    failed = await backend.on_chord_part_return("failed", "c", FAILURE, ValueError(half), 0)
    assert failed is not None
    async with failed:
        assert failed.error is not None
        assert getattr(failed.error.__cause__, "args", None) == (half,)


async def test_what_cannot_be_stored_is_refused_and_changes_nothing(harness: Harness) -> None:
    backend = await harness.connect()
    with pytest.raises(EncodeError, match="the body of chord g cannot be stored"):
        await backend.create_chord("g", body={1, 2}, size=1)
    with pytest.raises(EncodeError, match="the part t of chord g cannot be stored"):
        await backend.on_chord_part_return("g", "t", SUCCESS, object())
    assert await harness.holdings() == {}


# -- the list of results --------------------------------------------------------------------------------------------


async def test_results_are_in_the_order_of_the_indexes(harness: Harness) -> None:
    backend = await harness.connect()
    chord = await backend.create_chord("g", size=120)
    for index in random.sample(range(120), 120):
        await part(backend, index)
    assert await chord == [10 * index for index in range(120)]


async def test_parts_without_an_index_come_last_and_in_order_of_arrival(harness: Harness) -> None:
    backend = await harness.connect()
    chord = await backend.create_chord("g", size=125)
    for n in range(120):  # many, for their places to be told apart however they are written
        await backend.on_chord_part_return("g", f"without {random.random()}", SUCCESS, n)
        if n % 30 == 0:
            await backend.on_chord_part_return("g", f"with {n}", SUCCESS, f"at {n}", 1000 - n)
    await backend.on_chord_part_return("g", "far", SUCCESS, "far", 10**15 - 1)
    assert await chord == ["at 90", "at 60", "at 30", "at 0", "far", *range(120)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"serializer": "pickle", "accept": ["pickle"]},
        {"serializer": "msgpack", "accept": ["msgpack"]},
        {"compression": "gzip"},
    ],
)
async def test_one_task_at_several_indexes_with_the_same_value(harness: Harness, options: dict[str, Any]) -> None:
    backend = await harness.connect(**options)
    chord = await backend.create_chord("g", size=4)
    for index in (2, 0, 1, None):
        await backend.on_chord_part_return("g", "same", SUCCESS, 32, index)  # 32 is a space, in msgpack
    assert await chord == [32, 32, 32, 32]


async def test_nested_groups_keep_their_shape(harness: Harness) -> None:
    backend, reader = await harness.pair()
    inner = backend.group(["t1", "t2"])
    group = backend.group(["t0", inner, backend.group([backend.group(["t3"]), "t4"])], "g")
    await backend.create_chord(group)
    assert await backend.chord("g").progress() == (0, 5)
    readies = [await part(backend, index) for index in (4, 2, 0, 1, 3)]
    assert readies[-1] is not None
    assert readies[-1].results == await reader.chord("g") == [0, [10, 20], [[30], 40]]


async def test_a_failure_in_a_nested_group_has_its_place(harness: Harness) -> None:
    backend = await harness.connect()
    chord = await backend.create_chord(backend.group(["t0", backend.group(["t1", "t2"])], "g"))
    for index in (0, 2):
        await part(backend, index)
    await failing_part(backend, 1, ValueError("one"))
    first, (failed, third) = await chord.get(propagate=False)
    assert (first, third) == (0, 20)
    assert isinstance(failed, ValueError)


async def test_a_group_of_somebody_elses_class_is_taken_by_its_tuple(harness: Harness) -> None:
    backend = await harness.connect()
    ours = backend.group(["t0", backend.group(["t1", "t2"])], "g")

    class Theirs:
        id = "g"

        def as_tuple(self) -> Any:
            return ours.as_tuple()

    chord = await backend.create_chord(Theirs())
    assert await chord.progress() == (0, 3)
    for index in range(3):
        await part(backend, index)
    assert await chord == [0, [10, 20]]


# -- its size -------------------------------------------------------------------------------------------------------


async def test_the_group_of_a_chord_is_saved_and_gives_its_size(harness: Harness) -> None:
    backend = await harness.connect()
    chord = await backend.create_chord(backend.group(["t0", "t1"], "g"))
    assert chord.id == "g"
    assert await chord.progress() == (0, 2)
    restored = await backend.restore_group("g")
    assert restored is not None
    assert [leaf.id for leaf in restored.leaves()] == ["t0", "t1"]


async def test_a_chord_without_parts_is_complete_at_once(harness: Harness) -> None:
    backend = await harness.connect()
    chord = await backend.create_chord(backend.group([], "g"), body="nothing to add up")
    assert await chord == []
    ready = await chord.claim()
    assert ready is not None
    async with ready:
        assert (ready.body, ready.results) == ("nothing to add up", [])
    assert await chord.get(timeout=0) == []
    assert await chord.progress() == (0, 0)


@pytest.mark.parametrize("created", [True, False])
async def test_a_size_that_comes_after_all_parts_gets_the_claim(harness: Harness, created: bool) -> None:
    backend = await harness.connect()
    if created:
        await backend.create_chord("g", body="body")
    for index in range(3):
        assert await part(backend, index) is None
    assert await backend.chord("g").progress() == (3, None)
    ready = await backend.set_chord_size("g", 3)
    assert ready is not None
    assert (ready.body, ready.results) == ("body" if created else None, [0, 10, 20])
    assert await backend.set_chord_size("g", 3) is None


async def test_a_chord_that_is_created_after_all_its_parts_is_there_to_be_claimed(harness: Harness) -> None:
    backend = await harness.connect()
    for index in range(2):
        await part(backend, index)
    chord = await backend.create_chord("g", body="late", size=2)
    assert await chord == [0, 10]
    ready = await chord.claim()
    assert ready is not None
    assert ready.body == "late"


async def test_a_size_that_comes_before_the_last_part_leaves_the_claim_to_that(harness: Harness) -> None:
    backend = await harness.connect()
    await backend.create_chord("g")
    await part(backend, 0)
    assert await backend.set_chord_size("g", 2) is None
    assert await part(backend, 1) is not None


async def test_without_a_size_nothing_is_ever_complete(harness: Harness) -> None:
    backend = await harness.connect()
    chord = await backend.create_chord("g")
    for index in range(5):
        assert await part(backend, index) is None
    assert await chord.claim() is None
    assert await chord.progress() == (5, None)
    with pytest.raises(TimeoutError, match="chord g was not ready within timeout=0 seconds"):
        await chord.get(timeout=0)


@pytest.mark.parametrize("size", [-1, 1.0, "3", True, 10**15])
async def test_what_is_no_size_is_refused(harness: Harness, size: Any) -> None:
    backend = await harness.connect()
    for attempt in (backend.create_chord("g", size=size), backend.set_chord_size("g", size)):
        with pytest.raises(UsageError, match="the size of a chord must be a whole number from 0 to"):
            await attempt
    assert await harness.holdings() == {}


async def test_what_is_no_size_index_or_lease_is_refused(harness: Harness) -> None:
    backend = await harness.connect()
    no_size: Any = None
    with pytest.raises(UsageError, match=r"the size of a chord must be a whole number .*, not None"):
        await backend.set_chord_size("g", no_size)
    for index in (-1, 2**70, "0", 0.5):
        with pytest.raises(UsageError, match="the index of a part must be a whole number from 0 to"):
            await backend.on_chord_part_return("g", "t", SUCCESS, 1, index)  # type: ignore[arg-type]
    with pytest.raises(ImproperlyConfigured, match="lease must be a number of seconds"):
        await backend.on_chord_part_return("g", "t", SUCCESS, 1, lease=-1)
    assert await harness.holdings() == {}


@pytest.mark.parametrize("group_id", ["", "\x00g", "g" * 2000])
async def test_what_is_no_id_is_refused(harness: Harness, group_id: str) -> None:
    backend = await harness.connect()
    for attempt in (
        lambda: backend.create_chord(group_id),
        lambda: backend.set_chord_size(group_id, 1),
        lambda: part(backend, 0, group_id),
        lambda: backend.on_chord_part_return("g", group_id, SUCCESS, 1),
    ):
        with pytest.raises(UsageError):
            await attempt()
    with pytest.raises(UsageError):
        backend.chord(group_id)


# -- failing parts --------------------------------------------------------------------------------------------------


async def test_a_failing_part_is_told_at_once_with_its_own_exception(harness: Harness) -> None:
    worker, reader = await harness.pair()
    await worker.create_chord("g", size=3)
    at_once, patient = waiting(reader.chord("g")), waiting(reader.chord("g"), propagate=False)
    await harness.subscribed(1)
    assert await failing_part(worker, 1, LookupError("no such key", 7)) is None
    with pytest.raises(ChordError, match=r"part t1 of chord g failed: LookupError\('no such key', 7\)") as caught:
        await at_once
    assert type(caught.value.__cause__) is LookupError
    assert caught.value.__cause__.args == ("no such key", 7)
    with pytest.raises(ChordError):  # whoever comes now
        await reader.chord("g").get(timeout=0)
    assert not patient.done()
    with pytest.raises(TimeoutError):
        await reader.chord("g").get(timeout=0, propagate=False)

    for index in (0, 2):
        await part(worker, index)
    assert repr(await patient) == "[0, LookupError('no such key', 7), 20]"


async def test_the_claimant_of_a_failed_chord_is_told_and_finishes_it(harness: Harness) -> None:
    backend = await harness.connect()
    chord = await backend.create_chord("g", body="body", size=2)
    await failing_part(backend, 0, KeyError("k"))
    ready = await part(backend, 1)
    assert ready is not None
    assert ready.body == "body"
    assert str(ready.error) == "part t0 of chord g failed: KeyError('k')"
    with pytest.raises(ChordError) as caught:
        async with ready:
            ready.results  # noqa: B018
    assert caught.value is ready.error
    assert isinstance(caught.value.__cause__, KeyError)
    assert await chord.claim() is None
    with pytest.raises(ChordError):
        await chord
    assert repr(await chord.get(propagate=False)) == "[KeyError('k'), 10]"


async def test_of_several_failures_the_first_that_came_is_told(harness: Harness) -> None:
    backend = await harness.connect()
    chord = await backend.create_chord("g", size=3)
    await failing_part(backend, 2, ValueError("first"))
    await failing_part(backend, 0, ValueError("second"))
    with pytest.raises(ChordError, match=r"part t2 .*first"):
        await chord
    ready = await part(backend, 1)
    assert ready is not None
    assert "first" in str(ready.error)


async def test_parts_after_a_failure_change_nothing_for_those_who_wait(harness: Harness) -> None:
    backend = await harness.connect()
    chord = await backend.create_chord("g", size=2)
    await failing_part(backend, 0, ValueError("stays"))
    await part(backend, 0)
    await part(backend, 1)
    with pytest.raises(ChordError, match="stays"):
        await chord
    assert await chord.progress() == (2, 2)


async def test_the_last_of_an_unknown_number_of_parts_fails(harness: Harness) -> None:
    backend = await harness.connect()
    await failing_part(backend, 0, ValueError("one"))
    with pytest.raises(ChordError, match="one"):
        await backend.chord("g")
    ready = await backend.set_chord_size("g", 1)
    assert ready is not None
    assert isinstance(ready.error, ChordError)


# -- waiting --------------------------------------------------------------------------------------------------------


async def test_many_wait_and_are_woken_by_the_last_part(harness: Harness) -> None:
    worker, reader = await harness.pair()
    tasks = [waiting((worker, reader)[n % 2].chord("g")) for n in range(50)]  # before it is created
    await until(lambda: len(topics_of(worker)) == len(topics_of(reader)) == 1)
    await worker.create_chord("g", size=2)
    await part(worker, 1)
    tasks.append(waiting(reader.chord("g"), timeout=60))
    await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    await part(worker, 0)
    assert await asyncio.gather(*tasks) == [[0, 10]] * 51
    await harness.subscribed(0)


async def test_who_waits_is_woken_though_nobody_dispatches(harness: Harness) -> None:
    worker, reader = await harness.pair()
    await worker.create_chord("g", size=1)
    task = waiting(reader.chord("g"))
    await harness.subscribed(1)
    await part(worker, 0, lease=0)
    assert await task == [0]


@pytest.mark.parametrize("when", ["claimed", "inside", "done"])
async def test_who_comes_later_has_the_results_at_once(harness: Harness, when: str) -> None:
    worker, reader = await harness.pair()
    ready = await completed(worker)
    if when == "inside":
        async with ready:
            assert await reader.chord("g").get(timeout=0) == [0, 10]
    if when == "done":
        async with ready:
            pass
    assert await reader.chord("g").get(timeout=0) == await reader.chord("g") == [0, 10]


async def test_the_time_is_up(harness: Harness) -> None:
    backend = await harness.connect()
    chord = await backend.create_chord("g", size=2)
    await part(backend, 0)
    with pytest.raises(TimeoutError, match=r"chord g was not ready within timeout=0\.01 seconds"):
        await chord.get(timeout=0.01)
    await harness.subscribed(0)
    await part(backend, 1)
    assert await chord == [0, 10]


async def test_waiting_is_cancelled_and_leaves_nothing(harness: Harness) -> None:
    backend = await harness.connect()
    tasks = [waiting(backend.chord("g")) for _ in range(3)]
    await harness.subscribed(1)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    await harness.subscribed(0)
    assert len(topics_of(backend)) == 0


async def test_closing_the_backend_tells_who_waits(harness: Harness) -> None:
    backend = await harness.connect()

    async def dispatch() -> None:
        async for _ in backend.ready_chords():
            pass

    tasks = [waiting(backend.chord("g")), asyncio.create_task(dispatch())]
    await harness.subscribed(2)
    await backend.aclose()
    for task in tasks:
        with pytest.raises(BackendClosedError):
            await task


async def test_a_task_and_a_chord_of_the_same_id_are_waited_for_apart(harness: Harness) -> None:
    worker, reader = await harness.pair()
    tasks = asyncio.gather(reader.chord("g").get(), reader.result("g").get())
    await harness.subscribed(2)
    await worker.mark_as_done("g", "the task")
    async with await completed(worker):
        pass
    results, value = await tasks
    assert (results, value) == ([0, 10], "the task")


async def test_progress(harness: Harness) -> None:
    backend = await harness.connect()
    chord = backend.chord("g")
    assert await chord.progress() == (0, None)
    await backend.create_chord("g", size=2)
    seen = []
    for index in (0, 0, 1):
        ready = await part(backend, index)
        seen.append(await chord.progress())
    assert seen == [(1, 2), (1, 2), (2, 2)]
    assert (seen[0].done, seen[0].size) == (1, 2)
    assert ready is not None
    async with ready:
        pass
    assert await chord.progress() == (2, 2)


async def test_what_has_expired_is_not_an_empty_list(harness: Harness) -> None:
    """Between the message and the reading of the parts, they may go."""
    backend = harness.make()

    async def expire(take: TakeSteps, steps: Steps) -> Outcomes:
        outcomes = await take(steps)
        return [
            ChordState() if step.op is ChordOp.PARTS else state for step, state in zip(steps, outcomes, strict=True)
        ]

    intercept(backend, "_chord_steps", expire)
    await harness.open(backend)
    await backend.create_chord("g", size=1)
    await part(backend, 0, lease=0)
    with pytest.raises(BackendError, match="the parts of chord g are gone"):
        await backend.chord("g")


# -- the lease ------------------------------------------------------------------------------------------------------


async def test_a_claim_runs_out_and_is_anothers_then(harness: Harness) -> None:
    slow, other = await harness.pair()
    late = await completed(slow, lease=0.05)
    taken = await claimed(other.chord("g"))
    assert (taken.body, taken.results) == (late.body, late.results)
    with pytest.raises(ChordClaimLost, match=r"the claim to chord g ran out after 0\.05 s; another worker has it"):
        async with late:
            pytest.fail("dispatched")
    async with taken:
        pass
    assert await other.chord("g").claim() is None


async def test_a_claim_that_ran_out_and_that_nobody_took_is_still_ones_own(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    backend = await harness.connect()
    ready = await completed(backend, lease=0.001)

    async def free() -> bool:
        return (await backend.chord_step(ChordStep(ChordOp.READ, "g"))).lease_left is None

    await until(free)
    async with ready:  # for a millisecond only, and then again it is nobody's
        await until(free)
    assert caplog.records == []
    assert await backend.chord("g").claim() is None


async def test_inside_the_block_the_claim_is_renewed(harness: Harness) -> None:
    backend = harness.make(chord_lease=0.3)
    renewed = asyncio.Semaphore(0)

    async def count(take: TakeSteps, steps: Steps) -> Outcomes:
        outcomes = await take(steps)
        for step in steps:
            if step.op is ChordOp.RENEW:
                renewed.release()
        return outcomes

    intercept(backend, "_chord_steps", count)
    await harness.open(backend)
    other = await harness.connect()
    async with await completed(backend):
        for _ in range(5):  # the first on entering, the others a third of the lease apart
            await renewed.acquire()
        assert await other.chord("g").claim() is None
    assert await other.chord("g").claim() is None


@pytest.mark.parametrize("how", ["exception", "cancellation"])
async def test_what_goes_wrong_inside_gives_the_claim_back(harness: Harness, how: str) -> None:
    backend, other = await harness.pair()
    ready = await completed(backend)
    inside = asyncio.Event()

    async def dispatch() -> None:
        async with ready:
            inside.set()
            if how == "exception":
                raise ConnectionRefusedError("the queue is down")
            await asyncio.Event().wait()

    task = asyncio.create_task(dispatch())
    await inside.wait()
    if how == "cancellation":
        task.cancel()
    await asyncio.wait({task})
    assert task.cancelled() or isinstance(task.exception(), ConnectionRefusedError)
    again = await other.chord("g").claim()
    assert again is not None
    assert (again.body, again.results) == ("body of g", [0, 10])
    with pytest.raises(ChordClaimLost):
        async with ready:
            pytest.fail("dispatched")


async def test_leaving_is_seen_through_though_cancelled(harness: Harness) -> None:
    backend = harness.make()
    await harness.open(backend)
    other = await harness.connect()
    ready = await completed(backend)
    gate = None

    async def dispatch() -> None:
        nonlocal gate
        async with ready:
            gate = Gate(backend, "_chord_steps")

    task = asyncio.create_task(dispatch())
    await until(lambda: gate is not None and gate.reached.is_set())
    assert gate is not None
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    gate.open.set()
    await asyncio.wait({task})
    assert task.cancelled()
    assert await other.chord("g").claim() is None


async def test_giving_back_waits_for_a_renewal_on_its_way(harness: Harness) -> None:
    """Or that would come after it, and hold the chord up for as long as the lease."""
    backend = harness.make(chord_lease=30, heartbeat=60)
    renewal_on_its_way, let_it_arrive = asyncio.Event(), asyncio.Event()
    arrived: list[ChordOp] = []

    async def hold_up(take: TakeSteps, steps: Steps) -> Outcomes:
        if steps[0].op is ChordOp.RENEW and ChordOp.RENEW in arrived:
            renewal_on_its_way.set()
            await let_it_arrive.wait()
        arrived.extend(step.op for step in steps)
        return await take(steps)

    intercept(backend, "_chord_steps", hold_up)
    await harness.open(backend)
    ready = await completed(backend)
    ready._lease = 0.01

    async def dispatch() -> None:
        async with ready:
            await renewal_on_its_way.wait()
            raise ConnectionRefusedError

    task = asyncio.create_task(dispatch())
    await renewal_on_its_way.wait()
    await asyncio.wait({task}, timeout=0.01)  # it does not wait for longer than this to do what it must not
    ready._lease = 30
    let_it_arrive.set()
    with pytest.raises(ConnectionRefusedError):
        await task
    assert arrived[-2:] == [ChordOp.RENEW, ChordOp.RELEASE]
    assert await backend.chord("g").claim() is not None


async def test_a_claim_lost_inside_the_block_is_logged_and_stays_anothers(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    backend, other = await harness.pair()
    ready = await completed(backend)
    async with ready:
        await backend.chord_step(ChordStep(ChordOp.RELEASE, "g", token=ready._token))
        taken = await other.chord("g").claim()
    assert [record.getMessage() for record in caplog.records] == [
        "the claim to chord g was lost: its callback may be dispatched twice"
    ]
    assert taken is not None
    async with taken:
        pass
    assert len(caplog.records) == 1


async def test_a_claim_lost_inside_the_block_hides_the_chord_from_nobody(harness: Harness) -> None:
    backend = await harness.connect()
    other = await harness.connect(chord_lease=0.05)
    ready = await completed(backend)
    async with ready:
        await backend.chord_step(ChordStep(ChordOp.RELEASE, "g", token=ready._token))
        assert await other.chord("g").claim() is not None  # and dies with it
    dispatched: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
    async with dispatcher(await harness.connect(), dispatched):
        assert await dispatched.get() == ("g", [0, 10])


async def test_what_cannot_be_given_back_does_not_hide_what_went_wrong(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    backend = await harness.connect()
    ready = await completed(backend)

    async def dispatch() -> None:
        async with ready:
            await backend.aclose()
            raise ConnectionRefusedError

    with pytest.raises(ConnectionRefusedError):
        await dispatch()
    assert "the claim to chord g could not be given back, and will run out" in caplog.text


# -- steps that are taken twice, because the reply to the first was lost --------------------------------------------


async def every_step_twice(take: TakeSteps, steps: Steps) -> Outcomes:
    first = await take(steps)
    second = await take(steps)
    for step, one, two in zip(steps, first, second, strict=True):
        assert isinstance(one, ChordState)
        assert isinstance(two, ChordState)
        assert (two.claimed, two.body, two.parts) == (one.claimed, one.body, one.parts), step
    return second


async def test_every_step_may_be_taken_twice(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    backend = harness.make()
    intercept(backend, "_chord_steps", every_step_twice)
    await harness.open(backend)
    await backend.create_chord("g", body="body")
    assert await part(backend, 0) is None
    assert await backend.set_chord_size("g", 2) is None
    first = await part(backend, 1)
    assert first is not None
    with pytest.raises(ConnectionRefusedError):
        async with first:
            raise ConnectionRefusedError
    second = await backend.chord("g").claim()
    assert second is not None
    async with second:
        assert (second.body, second.results) == ("body", [0, 10])
    late = await backend.set_chord_size("late", 0)
    assert late is not None
    async with late:
        pass
    assert caplog.records == []
    assert await backend.chord("g").claim() is None


@pytest.mark.parametrize("size", [0, 1])
async def test_creating_twice_does_not_begin_again_what_was_finished_in_between(harness: Harness, size: int) -> None:
    backend = harness.make()
    worker = await harness.connect()
    dispatched = 0

    async def finish_in_between(take: TakeSteps, steps: Steps) -> Outcomes:
        nonlocal dispatched
        outcomes = await take(steps)
        if steps[0].op is not ChordOp.CREATE:
            return outcomes
        for index in range(size):
            await part(worker, index, lease=0)
        async with await claimed(worker.chord("g")):
            dispatched += 1
        return await take(steps)

    intercept(backend, "_chord_steps", finish_in_between)
    await harness.open(backend)
    chord = await backend.create_chord("g", size=size)
    assert dispatched == 1
    assert await chord.claim() is None
    assert await chord.get(timeout=0) == [10 * index for index in range(size)]


# -- dispatchers ----------------------------------------------------------------------------------------------------


async def test_a_dispatcher_gets_what_is_complete_already_and_what_completes_later(harness: Harness) -> None:
    worker, other = await harness.pair()
    dispatched: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
    await worker.create_chord("incomplete", size=2)
    await part(worker, 0, "incomplete")
    for group_id in ("g1", "g2"):
        await worker.create_chord(group_id, size=1)
        await part(worker, 0, group_id, lease=0)
    async with dispatcher(other, dispatched):
        assert {(await dispatched.get())[0] for _ in range(2)} == {"g1", "g2"}
        await part(worker, 1, "incomplete", lease=0)
        assert await dispatched.get() == ("incomplete", [0, 10])
        await worker.create_chord("empty", size=0)
        assert await dispatched.get() == ("empty", [])
        await worker.create_chord("failing", size=1)
        await worker.on_chord_part_return("failing", "t", FAILURE, ValueError(), lease=0)
        assert isinstance((await dispatched.get())[1], ChordError)
    assert dispatched.empty()


async def test_a_dispatcher_takes_over_from_a_claimant_that_dies(harness: Harness) -> None:
    worker, other = await harness.pair()
    dispatched: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
    dead = [await completed(worker, "before", lease=0.1)]
    async with dispatcher(other, dispatched):
        await harness.subscribed(1)
        dead.append(await completed(worker, "meanwhile", lease=0.1))
        assert {(await dispatched.get())[0] for _ in range(2)} == {"before", "meanwhile"}
        for ready in dead:
            with pytest.raises(ChordClaimLost):
                async with ready:
                    pytest.fail("dispatched")


async def test_a_dispatcher_is_told_of_what_is_given_back(harness: Harness) -> None:
    worker, other = await harness.pair()
    dispatched: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
    ready = await completed(worker)  # for half a minute
    async with dispatcher(other, dispatched):
        await harness.subscribed(1)
        with pytest.raises(ConnectionRefusedError):
            async with ready:
                raise ConnectionRefusedError
        assert await dispatched.get() == ("g", [0, 10])


async def test_several_dispatchers_share(harness: Harness) -> None:
    worker = await harness.connect()
    dispatched: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
    ids = [f"g{n}" for n in range(30)]
    async with (
        dispatcher(await harness.connect(), dispatched),
        dispatcher(await harness.connect(), dispatched),
        dispatcher(worker, dispatched),
    ):
        for group_id in ids:
            await worker.create_chord(group_id, size=1)
        await asyncio.gather(*(part(worker, 0, group_id, lease=0) for group_id in ids))
        got = [await dispatched.get() for _ in ids]
        assert sorted(got) == sorted((group_id, [0]) for group_id in ids)

        async def all_finished() -> bool:
            states = [await worker.chord_step(ChordStep(ChordOp.READ, group_id)) for group_id in ids]
            return all(state.done for state in states)

        await until(all_finished)
    assert dispatched.empty()


async def test_a_dispatcher_that_passes_a_chord_over_gets_it_again(harness: Harness) -> None:
    backend = await harness.connect(chord_lease=0.05)
    await backend.create_chord("g", size=1)
    await part(backend, 0, lease=0)
    seen = 0
    async with aclosing(backend.ready_chords()) as chords:
        async for ready in chords:
            seen += 1
            if seen == 3:
                async with ready:
                    break
    assert await backend.chord("g").claim() is None


@pytest.mark.parametrize("primitive", ["_active_chords", "_chord_steps"])
async def test_a_dispatcher_outlasts_an_outage_that_fails_other_calls(harness: Harness, primitive: str) -> None:
    backend = harness.make(retry_for=0)
    failures = 0

    async def fail(original: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        nonlocal failures
        failures += 1
        if failures <= 3:
            raise BackendConnectionError("away")
        return await original(*args)

    intercept(backend, primitive, fail)
    await harness.open(backend)
    worker = await harness.connect()
    dispatched: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
    await worker.create_chord("g", size=0)
    async with dispatcher(backend, dispatched):
        assert await dispatched.get() == ("g", [])
    assert failures > 3


@pytest.mark.parametrize("where", ["waiting", "dispatching"])
async def test_a_cancelled_dispatcher_leaves_no_subscription_and_no_claim(harness: Harness, where: str) -> None:
    backend, other = await harness.pair()
    dispatching = asyncio.Event()

    async def dispatch() -> None:
        async with aclosing(backend.ready_chords()) as chords:
            async for ready in chords:
                async with ready:
                    dispatching.set()
                    await asyncio.Event().wait()

    task = asyncio.create_task(dispatch())
    await harness.subscribed(1)
    if where == "dispatching":
        await backend.create_chord("g", size=0)
        await dispatching.wait()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    await harness.subscribed(0)
    assert len(topics_of(backend)) == 0
    if where == "dispatching":
        assert await other.chord("g").claim() is not None


async def test_one_chord_that_cannot_be_read_stops_no_dispatcher(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    strange = await harness.connect(serializer="pickle", accept=["pickle"])
    backend = await harness.connect()
    dispatched: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
    for group_id, maker in (("strange", strange), ("sound", backend)):
        await maker.create_chord(group_id, body="body", size=1)
        await part(maker, 0, group_id, lease=0)
    async with dispatcher(backend, dispatched):
        assert await dispatched.get() == ("sound", [0])
        await until(lambda: "chord strange cannot be dispatched here" in caplog.text)
        with pytest.raises(ContentDisallowed, match="a part of chord strange was stored with pickle"):
            await backend.chord("strange")
        await backend.create_chord("sound again", size=0)
        assert await dispatched.get() == ("sound again", [])


# -- what workers call ----------------------------------------------------------------------------------------------


def request(index: int, **options: Any) -> TaskRequest:
    return TaskRequest(id=f"t{index}", **{"group": "g", "group_index": index, "chord": True, **options})


async def test_storing_a_result_with_a_request_of_a_chord_is_a_part(harness: Harness) -> None:
    worker, reader = await harness.pair()
    await worker.create_chord("g", body="body", size=4)
    assert await worker.mark_as_done("t0", "done", request(0))
    assert not await worker.mark_as_done("t1", "not kept", TaskRequestIgnoringResults(1))
    assert await worker.mark_as_failure("t2", KeyError("k"), request=request(2))
    assert await worker.chord("g").progress() == (3, 4)
    assert await worker.mark_as_revoked("t3", "no longer wanted", request=request(3))
    values = await reader.chord("g").get(propagate=False)
    assert values[:2] == ["done", "not kept"]
    failed, revoked = values[2:]
    assert isinstance(failed, KeyError)
    assert isinstance(revoked, TaskRevokedError)  # and Celery's too, where that is imported
    assert await reader.result("t0") == "done"
    assert not await reader.exists("t1")
    ready = await reader.chord("g").claim()  # nobody here to dispatch it, so it was left to others
    assert ready is not None
    assert ready.body == "body"


class TaskRequestIgnoringResults:
    ignore_result = True
    group = "g"
    chord = True

    def __init__(self, index: int) -> None:
        self.group_index = index


@pytest.mark.parametrize(
    "unrelated", [None, request(0, chord=None), request(0, group=None), TaskRequest(id="t0")], ids=repr
)
async def test_without_group_and_chord_in_the_request_nothing_is_counted(harness: Harness, unrelated: Any) -> None:
    backend = await harness.connect()
    chord = await backend.create_chord("g", size=1)
    await backend.mark_as_done("t0", 1, unrelated)
    assert await chord.progress() == (0, 1)


@pytest.mark.parametrize("state", [SUCCESS, REVOKED])
async def test_on_chord_ready_dispatches(harness: Harness, state: str) -> None:
    dispatched: list[tuple[Any, Any]] = []

    async def dispatch(ready: ReadyChord) -> None:
        dispatched.append((ready.body, ready.results if ready.error is None else ready.error))

    backend = await harness.connect(on_chord_ready=dispatch)
    await backend.create_chord("g", body="body", size=2)
    await backend.mark_as_done("t0", 0, request(0))
    assert dispatched == []
    if state == SUCCESS:
        await backend.mark_as_done("t1", 1, request(1))
        assert dispatched == [("body", [0, 1])]
    else:
        await backend.mark_as_revoked("t1", "why", request(1))
        assert isinstance(dispatched[0][1], ChordError)
        assert isinstance(dispatched[0][1].__cause__, TaskRevokedError)
    assert await backend.chord("g").claim() is None
    await backend.mark_as_done("t0", 0, request(0))
    assert len(dispatched) == 1


async def test_a_failed_part_is_no_failure_of_storing_the_last(harness: Harness) -> None:
    sent: list[Any] = []

    async def dispatch(ready: ReadyChord) -> None:
        sent.append(ready.results)  # raises, for the chord has failed

    backend = await harness.connect(on_chord_ready=dispatch)
    chord = await backend.create_chord("g", size=2)
    await backend.mark_as_failure("t0", ValueError("one"), request=request(0))
    assert await backend.mark_as_done("t1", 1, request(1))
    assert sent == []
    assert await chord.claim() is None


async def test_a_callback_that_cannot_be_dispatched_is_the_storers_to_know_and_anothers_to_dispatch(
    harness: Harness,
) -> None:
    async def dispatch(ready: ReadyChord) -> None:
        raise ConnectionRefusedError

    backend, other = await harness.connect(on_chord_ready=dispatch), await harness.connect()
    await backend.create_chord("g", size=1)
    with pytest.raises(ConnectionRefusedError):
        await backend.mark_as_done("t0", 0, request(0))
    assert await other.result("t0") == 0
    assert await other.chord("g").claim() is not None


async def test_requests_are_not_counted_if_others_count_them(harness: Harness) -> None:
    backend = await harness.connect(count_requests=False)
    await backend.mark_as_done("t0", 0, request(0))
    await backend.mark_as_failure("t1", ValueError(), request=request(1))
    await backend.mark_as_revoked("t2", request=request(2))
    assert await backend.result("t0") == 0
    assert await backend.chord("g").progress() == (0, None)
    await part(backend, 0)
    assert await backend.chord("g").progress() == (1, None)


async def test_a_failing_link_of_a_chain_fails_the_rest_and_counts_for_its_chord(harness: Harness) -> None:
    backend, other = await harness.pair()
    await backend.create_chord("g", size=2)
    last = {"options": {"task_id": "last", "group_id": "g", "group_index": 0, "chord": {"task": "body"}}}
    middle = {"task": "middle", "options": {"task_id": "middle"}}
    waiting = [asyncio.ensure_future(other.result(id).get(timeout=5)) for id in ("first", "middle", "last")]
    first = TaskRequest(id="first", chain=[last, middle])
    for _ in range(2):
        assert await backend.mark_as_failure("first", KeyError("no"), request=first)
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert repr(outcome) == "KeyError('no')"
    assert await backend.chord("g").progress() == (1, 2)
    ready = await part(backend, 1)
    assert ready is not None
    assert isinstance(ready.error, ChordError)
    assert "part last" in str(ready.error)


# -- what is left ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expires", [0, 1000])
async def test_all_that_is_held_lives_for_as_long_as_the_chord(harness: Harness, expires: int) -> None:
    backend = await harness.connect(expires=expires)
    await backend.create_chord(backend.group(["t0", "t1", "t2"], "running"), body="body")
    await part(backend, 0, "running")
    await failing_part(backend, 1, ValueError(), "running")
    await completed(backend, "claimed")
    async with await completed(backend, "done"):
        pass
    async with await completed(backend, "failed", size=1):
        pass
    held = await harness.holdings()
    assert len(held) > 4
    # A claim lives for as long as its lease.
    lives = {left for name, left in held.items() if not name.endswith(("claimed.c", "claimed}.c"))}
    if expires:
        assert all(left is not None and expires - 60 < left <= expires + 10 for left in lives)
    else:
        assert lives == {None}


async def test_the_time_to_live_starts_anew_with_every_part(harness: Harness) -> None:
    backend = await harness.connect(expires=1000)
    await backend.create_chord(backend.group(["t0", "t1"], "g"))
    patient = await harness.connect(expires=5000)
    await part(patient, 0)
    await part(patient, 0)
    held = await harness.holdings()
    groups = {name for name in held if "chord" not in name and "part" not in name}
    assert all(left is not None and left > 4900 for name, left in held.items() if name not in groups)


async def test_a_saved_group_lives_on_with_every_part(harness: Harness) -> None:
    """Or the nested groups of a chord that takes its time would lose their shape."""
    short, long = await harness.connect(expires=1000), await harness.connect(expires=5000)
    inner = short.group(["t1", "t2"], "inner")
    await short.create_chord(short.group([short.result("t0"), inner], "g"))
    await part(short, 0)
    left = await harness.group_seconds_left("g")
    assert left is not None
    assert 900 < left <= 1000
    await part(long, 1)
    left = await harness.group_seconds_left("g")
    assert left is not None
    assert 4900 < left <= 5000
    ready = await part(short, 2)
    assert ready is not None
    assert ready.results == [0, [10, 20]]


@pytest.mark.parametrize("long", [5000, 0])
async def test_nothing_of_a_chord_lives_shorter_for_a_later_step(harness: Harness, long: int) -> None:
    patient, hasty = await harness.connect(expires=long), await harness.connect(expires=1000)
    await patient.create_chord(patient.group(["t0", "t1"], "g"))
    await part(patient, 0)
    ready = await part(hasty, 1)
    assert ready is not None
    async with ready:
        pass
    held = await harness.holdings()
    lives = [left for name, left in held.items() if not name.endswith((".d", ".j"))]
    assert all(left is None if long == 0 else left is not None and left > 4900 for left in lives), held


async def test_chord_expires_is_for_chords_alone(harness: Harness) -> None:
    backend = await harness.connect(expires=1000, chord_expires=5000)
    await backend.create_chord(backend.group(["t0", "t1"], "g"))
    await part(backend, 0)
    assert all(left is not None and left > 4900 for left in (await harness.holdings()).values())
    await backend.mark_as_done("t", 1)
    left = await harness.seconds_left("t")
    assert left is not None
    assert left <= 1000


async def test_nothing_outlives_its_expiry(harness: Harness) -> None:
    backend = await harness.connect(expires=0.2)
    await backend.create_chord(backend.group(["a", "b"], "running"), body="body")
    await part(backend, 0, "running")
    async with await completed(backend, "done"):
        pass
    ready = await completed(backend, "claimed")

    async def nothing_left() -> bool:
        await backend.cleanup()
        return await harness.holdings() == {}

    await until(nothing_left)
    for group_id in ("running", "done", "claimed"):
        assert await backend.chord(group_id).progress() == (0, None)
        assert await backend.chord(group_id).claim() is None
    with pytest.raises(ChordClaimLost):
        async with ready:
            pytest.fail("dispatched")
    assert await harness.holdings() == {}


async def test_an_id_is_free_again_once_its_chord_has_expired(harness: Harness) -> None:
    short, backend = await harness.connect(expires=0.05), await harness.connect()
    await short.create_chord("g", body="old", size=2)
    await failing_part(short, 0, ValueError("old"))

    async def gone() -> bool:
        return await backend.chord("g").progress() == (0, None)

    await until(gone)
    with pytest.raises(TimeoutError):
        await backend.chord("g").get(timeout=0)
    ready = await completed(backend)
    assert (ready.body, ready.results) == ("body of g", [0, 10])


@pytest.mark.parametrize("late", ["part", "new part", "failing part", "size"])
async def test_what_comes_after_completion_changes_nothing_and_leaves_nothing(harness: Harness, late: str) -> None:
    backend = await harness.connect()
    patient = await harness.connect(expires=10**6)
    async with await completed(backend):
        pass
    before = await harness.holdings()
    if late == "size":
        assert await patient.set_chord_size("g", 5) is None
    elif late == "failing part":
        assert await failing_part(patient, 2, ValueError()) is None
    else:
        assert await part(patient, 0 if late == "part" else 7) is None
    after = await harness.holdings()
    assert after.keys() == before.keys()
    assert max(left for left in after.values() if left is not None) < 10**5
    assert await backend.chord("g").progress() == (2, 2)
    assert await backend.chord("g") == [0, 10]
    assert await backend.chord("g").claim() is None


async def test_sets_counters_and_markers_are_removed_with_the_completion(harness: Harness) -> None:
    backend = await harness.connect()
    ready = await completed(backend, size=50)
    before = await harness.holdings()
    async with ready:
        pass
    after = await harness.holdings()
    assert len(after) <= max(3, len(before))  # on Redis: the parts, their failure, and that it is done
    if harness.name == "redis":
        assert {name.rpartition(".")[2] for name in after} == {"a", "c", "r"}
