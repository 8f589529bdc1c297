"""How long the library keeps the event loop from everything else: the longest turn of the loop, action by action.

The yardstick is a bare `asyncio.gather` of as many coroutines, each of which awaits a future; one loop resolves all.
Even that holds the event loop up for as long as all of them take to be woken. What does so for much longer is a stall.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from .subject import new_ids, text
from .work import Bench, Figures, settle

if TYPE_CHECKING:  # this module is part of a measurement, and so needs the standard library only
    from .runner import Outcome

__all__ = ["STALLS", "Stall", "stall", "table"]

#: Performs what is measured, and returns when that has completed: what came of each, if anything.
Action = Callable[[], Awaitable[Sequence[object]]]

_VALUE = text(100)
_ROWS = [{"id": i, "name": "some name", "v": i * 1.5, "w": None, "t": [1, 2, 3]} for i in range(2400)]
#: How many results are stored by one order to the storer, and how many of them at once: orders take their time, too.
_BATCH = 1000
_AT_ONCE = 100
_JOINED = 100
#: For so many each action is done once before it is measured.
_PRACTICE = 50


async def stall(bench: Bench, what: str, count: int) -> Figures:
    """The longest turn, in ms: during ``what``, and during the bare gather."""
    await bench.wake(_PRACTICE)
    measured = STALLS[what]
    if measured.repeatable:
        await (await measured.prepare(bench, _PRACTICE))()
    bare, _ = await _longest_turn(await _bare(count))
    turn, outcomes = await _longest_turn(await measured.prepare(bench, count))
    assert {type(outcome).__name__ for outcome in outcomes} <= {measured.outcome}
    return {"turn": turn, "bare": bare}


async def _longest_turn(action: Action) -> tuple[float, Sequence[object]]:
    """In ms, from the beginning of ``action`` to its end; and what that returned."""
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        before = perf_counter()
        while True:
            await asyncio.sleep(0)
            now = perf_counter()
            longest = max(longest, now - before)
            before = now

    gc.collect()
    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0)
    outcomes = await action()
    for _ in range(2):  # the turn in which it ended counts, whichever of the two tasks comes first in a turn
        await asyncio.sleep(0)
    watcher.cancel()
    return longest * 1e3, outcomes


async def _bare(count: int) -> Action:
    loop = asyncio.get_running_loop()
    futures: list[asyncio.Future[None]] = [loop.create_future() for _ in range(count)]

    async def one(future: asyncio.Future[None]) -> None:
        await future

    everybody = await _begun(map(one, futures))

    async def wake() -> Sequence[object]:
        for future in futures:
            future.set_result(None)
        return await everybody

    return wake


async def _begun(coroutines: Iterable[Awaitable[Any]]) -> asyncio.Future[list[Any]]:
    """All of them, in tasks that have come to where they wait."""
    everybody = asyncio.gather(*coroutines, return_exceptions=True)
    await settle()
    return everybody


async def _cancelling(
    coroutines: Iterable[Coroutine[Any, Any, object]], arrange: Callable[[list[asyncio.Task[Any]]], None]
) -> Action:
    tasks = list(map(asyncio.create_task, coroutines))
    everybody = await _begun(tasks)
    arrange(tasks)

    async def cancel() -> Sequence[object]:
        for task in tasks:
            task.cancel()
        return await everybody

    return cancel


async def _cancelled_at_random(bench: Bench, count: int) -> Action:
    (task_id,) = new_ids(1)
    return await _cancelling((bench.subject.wait(task_id) for _ in range(count)), random.shuffle)


async def _cancelled_in_reverse(bench: Bench, count: int) -> Action:
    (task_id,) = new_ids(1)
    return await _cancelling((bench.subject.wait(task_id) for _ in range(count)), list.reverse)


async def _woken_by_one(bench: Bench, count: int) -> Action:
    (task_id,) = new_ids(1)
    storer = await bench.storer()
    everybody = await _begun(bench.subject.wait(task_id) for _ in range(count))

    async def store() -> Sequence[object]:
        await storer.store_one(task_id, _VALUE)
        return await everybody

    return store


async def _woken_by_many(bench: Bench, count: int) -> Action:
    task_ids = new_ids(count)
    everybody = await _begun(map(bench.subject.wait, task_ids))

    async def store() -> Sequence[object]:
        await _store(bench, task_ids)
        return await everybody

    return store


async def _closing(bench: Bench, count: int) -> Action:
    everybody = await _begun(map(bench.subject.wait, new_ids(count)))

    async def close() -> Sequence[object]:
        await bench.subject.close()
        return await everybody

    return close


async def _joins_cancelled(bench: Bench, count: int) -> Action:
    task_ids = new_ids(_JOINED)
    return await _cancelling((bench.subject.join(task_ids) for _ in range(count)), random.shuffle)


async def _large(bench: Bench, count: int) -> Action:
    task_ids = new_ids(count)
    await (await bench.storer()).store_many(task_ids, _ROWS, 10)
    backend = _backend(bench)

    async def get() -> Sequence[object]:
        metas = await backend.get_many(task_ids)
        return [meta.result for meta in metas]

    return get


async def _forgetting(bench: Bench, count: int) -> Action:
    task_ids = new_ids(count)
    await _store(bench, task_ids)
    group = _backend(bench).group(task_ids)

    async def forget() -> Sequence[object]:
        await group.forget()
        return ()

    return forget


async def _store(bench: Bench, task_ids: Sequence[str]) -> None:
    storer = await bench.storer()
    for start in range(0, len(task_ids), _BATCH):
        await storer.store_many(task_ids[start : start + _BATCH], _VALUE, _AT_ONCE)


def _backend(bench: Bench) -> Any:
    """The library's own, for what no other `Subject` has."""
    return cast("Any", bench.subject)._backend


@dataclass(frozen=True)
class Stall:
    """One of the actions that are measured."""

    title: str
    prepare: Callable[[Bench, int], Awaitable[Action]]
    #: The class of what comes of each.
    outcome: str = "str"
    #: For how many it is measured, if for one number only.
    count: int | None = None
    #: Whether it leaves the backend open.
    repeatable: bool = True


STALLS = {
    "cancelled": Stall("waiters of one id, cancelled in any order", _cancelled_at_random, "CancelledError"),
    "reversed": Stall("waiters of one id, cancelled in reverse order", _cancelled_in_reverse, "CancelledError"),
    "crowd": Stall("waiters of one id, woken by one store", _woken_by_one),
    "woken": Stall("waiters of as many ids, woken", _woken_by_many),
    "closed": Stall("waiters of as many ids, backend closed", _closing, "BackendClosedError", repeatable=False),
    "forgotten": Stall("members of a group, forgotten", _forgetting),
    "joins": Stall(f"joins of the same {_JOINED} ids, cancelled", _joins_cancelled, "CancelledError", 3_000),
    "large": Stall("results of 178 kB, get_many", _large, "list", 500),
}

_TITLE = 48


def table(title: str, outcomes: list[Outcome]) -> str:
    """One row for each action and number."""
    lines = [title, f" {'':{_TITLE}}{'n':>9}{'longest turn':>15}{'bare gather':>15}{'ratio':>8}"]
    for outcome in outcomes:
        (measured,) = outcome.measured
        row = f" {outcome.case.title:{_TITLE}}{outcome.case.size:>9,}"
        if measured.runs:
            turns, bare = measured.values("turn"), measured.values("bare")
            ratio = median(turn / yardstick for turn, yardstick in zip(turns, bare, strict=True))
            row += f"{median(turns):>12,.1f} ms{median(bare):>12,.1f} ms{ratio:>8.1f}"
        lines.append(row)
        if measured.failure:
            lines.append(f"     {measured.failure}")
    return "\n".join(lines) + "\n"
