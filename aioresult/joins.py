"""`gather`, `wait` and `as_completed`: they do for results, of any backends, what asyncio's functions do for tasks."""

from __future__ import annotations

from asyncio import ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION
from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from typing import Any

from .completion import Completions
from .exceptions import TimeoutError, UsageError
from .foreign import not_a_handle
from .lineage import Lineage
from .remedies import kind_of
from .result import AsyncResult, ResultBase, ResultSet
from .seconds import Timeout, checked_timeout

__all__ = ["as_completed", "gather", "wait"]


async def gather(*results: ResultBase, return_exceptions: bool = False) -> list[Any]:
    """Wait for all results, and return their values in the order of the arguments. The value of a group is a list.

    Raises the exception of the first task that fails, as soon as it fails. With ``return_exceptions`` it waits for all
    results and returns exceptions as values. If a parent of a result fails, the result counts as failed; see
    `ResultSet.get`.
    """
    return await ResultSet(_checked(results)).get(propagate=not return_exceptions)


async def wait(
    results: Iterable[ResultBase], timeout: Timeout = None, return_when: str = ALL_COMPLETED
) -> tuple[set[ResultBase], set[ResultBase]]:
    """Wait for results, and return ``(done, pending)``, as `asyncio.wait` does.

    Neither a failed task nor the end of ``timeout`` (in seconds) raises. Without a ``timeout``, the
    ``default_timeout`` of the first result's backend ends the wait. ``return_when`` is ``ALL_COMPLETED``,
    ``FIRST_COMPLETED`` or ``FIRST_EXCEPTION``, as in asyncio. A group is done when all its members are done. A result
    whose parent failed is done, and counts as failed. You may pass several equal handles (the same task twice). Each of
    them gets its result. But a set holds only one of them, which is done as soon as any of them is done.
    """
    if return_when not in (ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION):
        raise UsageError(
            f"return_when must be asyncio.ALL_COMPLETED, FIRST_COMPLETED or FIRST_EXCEPTION, not {return_when!r}"
        )
    checked_timeout(timeout)
    checked = _checked(results)
    pending = set(checked)
    lineage = Lineage[AsyncResult[Any]]()
    # The keys of both dicts are `id(handle)`, because equal handles must each get the result. `owners` maps a single
    # handle to the arguments that contain it: one handle may be in several groups. `missing` maps an argument to the
    # number of its members that are not done.
    owners: dict[int, list[ResultBase]] = {}
    missing: dict[int, int] = {}
    done: set[ResultBase] = set()
    for result in {id(result): result for result in checked}.values():
        members = {id(leaf) for leaf in lineage.add([result])}
        missing[id(result)] = len(members)
        if not members:
            done.add(result)
        for key in members:
            owners.setdefault(key, []).append(result)
    if done and return_when == FIRST_COMPLETED:
        return done, pending - done
    enough = False
    with suppress(TimeoutError), Completions(lineage, timeout) as completions:
        async for finished in completions:
            for leaf, outcome in finished:
                for result in owners.pop(id(leaf), ()):
                    missing[id(result)] -= 1
                    if not missing[id(result)]:
                        done.add(result)
                failed = isinstance(outcome, Exception) or outcome.propagates
                enough |= bool(done) if return_when == FIRST_COMPLETED else failed and return_when == FIRST_EXCEPTION
            if enough:
                break
    return done, pending - done


def as_completed(results: Iterable[ResultBase], timeout: Timeout = None) -> AsyncGenerator[AsyncResult[Any], None]:
    """Iterate over the single results, and the members of groups, in the order in which they finish.

    See `ResultSet.as_completed`.
    """
    checked_timeout(timeout)
    return ResultSet(_checked(results)).as_completed(timeout)


def _checked(results: Iterable[ResultBase]) -> list[ResultBase]:
    if isinstance(results, AsyncResult) or not isinstance(results, Iterable):
        raise UsageError(f"pass several results, not a single {kind_of(results)}: a list, a group, …")
    checked = list(results)
    for result in checked:
        if not isinstance(result, ResultBase):
            raise UsageError(not_a_handle(result))
    return checked
