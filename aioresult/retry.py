"""What happens to a call that fails: repeated while the server is away, split where the server refuses many at once.

Both stand here, once, for results, groups, reads and chords. A batch that is refused as a whole is halved until the
culprit stands alone with its error. So is a batch on which a connection died twice: one item in it may be what the
server cannot take. Other callers of that batch succeed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any, TypeVar

from .exceptions import BackendConnectionError, BackendError, ImproperlyConfigured, UsageError

__all__ = ["Backoff", "Persistence", "concerns_everyone", "retry_outages"]

Item = TypeVar("Item")
Out = TypeVar("Out")


class Backoff:
    """Jittered exponential back-off, capped: the pauses between attempts, in seconds."""

    def __init__(self, first: float = 0.05, cap: float = 2.0) -> None:
        self._first, self._cap = first, cap
        self._next = first

    def reset(self) -> None:
        """Start over with the shortest pause."""
        self._next = self._first

    def pause(self) -> float:
        """The next pause: between half of and the whole of a value that doubles each time."""
        pause, self._next = self._next, min(self._next * 2, self._cap)
        return pause * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards nothing


async def retry_outages(operation: Callable[[], Awaitable[Out]]) -> Out:
    """``operation()``, repeated until the server can be reached: an outage is waited out, as every wait does."""
    backoff = Backoff()
    while True:
        try:
            return await operation()
        except BackendConnectionError:
            await asyncio.sleep(backoff.pause())


def concerns_everyone(error: Exception) -> bool:
    """Whether each item alone would get the same error: it says something of the server, or of the call."""
    if isinstance(error, BackendError):
        return error.of_server
    return isinstance(error, (UsageError, ImproperlyConfigured))


class Persistence:
    """How long calls are repeated while the server is away: one account for all calls of a backend.

    ``retry_for`` is in seconds. They count from the first failure of *any* call, so that in a long outage each further
    call fails after its first attempt, instead of waiting for the same disappointment. A failure so long ago that
    nobody knows what happened since does not count. When an outage has lasted that long, ``on_outage(error)`` is called
    with every failed attempt, so that the calls that have not had their turn learn of it, too.
    """

    def __init__(self, retry_for: float, on_outage: Callable[[BackendConnectionError], None]) -> None:
        self._retry_for = retry_for
        self._on_outage = on_outage
        self._down_since: float | None = None
        self._down_at = 0.0

    @property
    def down_since(self) -> float | None:
        """When the present outage began, by the event loop's clock; ``None`` if the server was reached since."""
        return self._down_since

    def reached(self) -> None:
        """The server has done something: an outage is over."""
        self._down_since = None

    def not_reached(self, began: float | None = None) -> tuple[float, float]:
        """A call has failed with `BackendConnectionError`. The time, and since when the server has been away.

        ``began`` is the time at which the attempt began: if that was long after the last failure, nobody knows what
        happened in between, and an outage begins.
        """
        now = asyncio.get_running_loop().time()
        if self._down_since is None or (now if began is None else began) - self._down_at > self._retry_for:
            self._down_since = now
        self._down_at = now
        return now, self._down_since

    async def perform(
        self,
        run: Callable[[Sequence[Item]], Awaitable[Sequence[Out | BaseException]]],
        items: Sequence[Item],
        settle: Callable[[Sequence[int], Sequence[Out | BaseException]], None],
        wanted: Callable[[int], bool],
        key: Callable[[int], Hashable] = lambda _: None,
    ) -> None:
        """Have ``run`` do all ``items``; ``settle(indexes, outcomes)`` is called for some at a time, each index once.

        An item for which ``wanted(index)`` is false is not sent again, and not settled. Items with the same ``key``, if
        that is not ``None``, are done in order. Others are not kept waiting by one that has to be repeated alone.
        """
        parts: list[Sequence[int]] = [range(len(items))]
        backoff: Backoff | None = None
        first, deaths = 0.0, 0
        late: set[int] = set()
        while parts:
            part = parts.pop()
            began = asyncio.get_running_loop().time()
            try:
                outcomes = await run(items if len(part) == len(items) else [items[index] for index in part])
                if len(outcomes) != len(part):  # otherwise those beyond the last outcome would wait for ever
                    raise _miscounted(len(outcomes), len(part))
            except BackendConnectionError as exc:
                now, down_since = self.not_reached(began)
                if backoff is None:
                    backoff, first = Backoff(), now
                if now - down_since >= self._retry_for:
                    self._on_outage(exc)  # first: to settle these would let others have their turn
                    for failed in (part, *parts):
                        settle(failed, [exc] * len(failed))
                    return
                if now - first >= self._retry_for:  # the server is there for others, and dies of this
                    settle(part, [exc] * len(part))
                    backoff = None
                    continue
                deaths += exc.in_flight
                if exc.in_flight and deaths > 1 and len(part) > 1:
                    parts += _halves([index for index in part if wanted(index)])
                    continue
                if exc.in_flight and deaths > 1 and parts:
                    _put_off(part[0], parts, key)
                    if part[0] not in late:  # once, without a pause: the others have waited long enough
                        late.add(part[0])
                        continue
                else:
                    parts.append(part)
                await asyncio.sleep(backoff.pause())
                parts = [kept for part in parts if (kept := [index for index in part if wanted(index)])]
            except Exception as exc:
                if len(part) == 1 or concerns_everyone(exc):
                    settle(part, [exc] * len(part))
                else:
                    parts += _halves([index for index in part if wanted(index)])
            else:
                self.reached()
                settle(part, outcomes)

    async def collect(
        self, run: Callable[[Sequence[Item]], Awaitable[Sequence[Out | BaseException]]], items: Sequence[Item]
    ) -> list[Out | BaseException]:
        """The outcomes of `perform`, in order, for a caller that wants them all.

        Raises `BackendConnectionError` if none could be had.
        """
        found: list[Any] = [None] * len(items)

        def settle(indexes: Sequence[int], outcomes: Sequence[Out | BaseException]) -> None:
            if len(indexes) == len(found):
                found[:] = outcomes
            else:
                for index, outcome in zip(indexes, outcomes, strict=True):
                    found[index] = outcome

        await self.perform(run, items, settle, lambda _: True)
        if found and all(isinstance(outcome, BackendConnectionError) for outcome in found):
            raise found[0]
        return found

    async def call(self, operation: Callable[[], Awaitable[Out]]) -> Out:
        """``await operation()``, repeated for as long as this persists. Raises what it raises."""

        async def run(_: Sequence[None]) -> Sequence[Out]:
            return [await operation()]

        (outcome,) = await self.collect(run, [None])
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def _halves(part: Sequence[int]) -> list[Sequence[int]]:
    """The halves of ``part``, the first one last: that is the end from which they are taken."""
    middle = (len(part) + 1) // 2
    return [half for half in (part[middle:], part[:middle]) if half]


def _put_off(index: int, parts: list[Sequence[int]], key: Callable[[int], Hashable]) -> None:
    """Have ``index`` come last, and behind it, in order, what has the same key."""
    late = [index]
    if key(index) is not None:
        late += [other for part in reversed(parts) for other in part if key(other) == key(index)]
    rest = [[other for other in part if other not in late] for part in parts]
    parts[:] = [*([other] for other in reversed(late)), *(part for part in rest if part)]


def _miscounted(outcomes: int, items: int) -> BackendError:
    error = BackendError(f"{outcomes} outcomes came back for {items} items")
    error.of_server = True
    return error
