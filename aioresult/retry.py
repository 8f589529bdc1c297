"""Retries: a call is repeated while the server cannot be reached, and a refused batch is split.

Results, groups, reads and chords all use this module. If the server refuses a whole batch, the batch is halved until
the item that causes the error is alone. The same happens to a batch if the connection died twice while the batch was in
flight: one of its items may make the server drop the connection. The other callers of that batch succeed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Hashable, Sequence
from math import inf
from typing import Any, TypeVar

from .exceptions import BackendConnectionError, BackendError, ImproperlyConfigured, UsageError
from .health import Health
from .tasks import EMPTY

__all__ = ["Backoff", "Pauses", "Persistence", "affects_whole_batch", "retry_outages"]

Item = TypeVar("Item")
Out = TypeVar("Out")


class Backoff:
    """Computes the pauses between attempts, in seconds: exponential back-off with jitter and a cap."""

    def __init__(self, first: float = 0.05, cap: float = 2.0) -> None:
        self._first, self._cap = first, cap
        self._next = first

    def reset(self) -> None:
        """Start over with the shortest pause."""
        self._next = self._first

    def pause(self) -> float:
        """Return the next pause in seconds: a random part, from half to all, of a value that doubles each time."""
        pause, self._next = self._next, min(self._next * 2, self._cap)
        return pause * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards nothing


class Pauses:
    """The pauses between attempts. `end` cuts them short, because the server may be back."""

    def __init__(self) -> None:
        self._sleepers: set[asyncio.Future[None]] = set()

    async def sleep(self, seconds: float) -> None:
        """Return after so many seconds, or when `end` is called."""
        loop = asyncio.get_running_loop()
        sleeper: asyncio.Future[None] = loop.create_future()
        self._sleepers.add(sleeper)
        timer = loop.call_later(seconds, _wake, sleeper, context=EMPTY.context)
        try:
            await sleeper
        finally:
            timer.cancel()
            self._sleepers.discard(sleeper)

    def end(self) -> None:
        """End every pause now."""
        for sleeper in tuple(self._sleepers):
            _wake(sleeper)


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)


async def retry_outages(operation: Callable[[], Awaitable[Out]]) -> Out:
    """Await ``operation()``, and repeat it for as long as it raises `BackendConnectionError`, without a limit."""
    backoff = Backoff()
    while True:
        try:
            return await operation()
        except BackendConnectionError:
            await asyncio.sleep(backoff.pause())


def affects_whole_batch(error: Exception) -> bool:
    """True if the error concerns the server or the whole call, so that each item alone would get the same error."""
    if isinstance(error, BackendError):
        return error.of_server
    return isinstance(error, (UsageError, ImproperlyConfigured))


class Persistence:
    """Repeats failed calls while the server cannot be reached. All calls of one backend share one instance.

    ``retry_for`` is in seconds and counts from the first failure of *any* call. When an outage has lasted that long,
    each further call fails after its first attempt, instead of being repeated for ``retry_for`` seconds again. Each
    failed attempt then also calls ``on_outage(error)``, so that the queued calls fail, too.

    If more than ``retry_for`` seconds lie between the last failure and the next attempt, a failure of that attempt
    counts as a new outage. ``health`` keeps the errors and counts the outages that have ended.
    """

    def __init__(
        self, retry_for: float, on_outage: Callable[[BackendConnectionError], None], health: Health | None = None
    ) -> None:
        self._retry_for = retry_for
        self._health = health or Health("")
        self._on_outage = on_outage
        #: The pauses between the attempts.
        self.pauses: Pauses = Pauses()
        self._down_since: float | None = None
        self._down_at = 0.0

    @property
    def down_since(self) -> float | None:
        """When the present outage began, by the event loop's clock; ``None`` if there is no outage."""
        return self._down_since

    def reached(self) -> None:
        """Note that the server has answered. If there was an outage, it has ended."""
        if self._down_since is not None:
            self._down_since = None
            self._health.back()

    def not_reached(self, error: BaseException, began: float | None = None) -> float:
        """Note that a call failed with ``error``; return the start of the outage.

        ``began`` is the time at which the attempt began. If that was more than ``retry_for`` seconds after the last
        failure, the server may have been reachable in between, so a new outage begins now.
        """
        now = asyncio.get_running_loop().time()
        if self._down_since is None or (now if began is None else began) - self._down_at > self._retry_for:
            self._down_since = now
        self._down_at = now
        self._health.lost(error)
        return self._down_since

    async def perform(
        self,
        run: Callable[[Sequence[Item]], Awaitable[Sequence[Out | BaseException]]],
        items: Sequence[Item],
        settle: Callable[[Sequence[int], Sequence[Out | BaseException]], None],
        wanted: Callable[[int], bool],
        key: Callable[[int], Hashable] = lambda _: None,
        patient: bool = True,
    ) -> None:
        """Have ``run`` process all ``items``, and report the outcomes through ``settle(indexes, outcomes)``.

        Each call of ``settle`` passes the outcomes of some items; each index is passed only one time. An item for which
        ``wanted(index)`` is false is neither sent again nor settled. Items with the same ``key(index)`` are processed
        in order, unless the key is ``None``. An item that has to be repeated alone does not delay the others. Without
        ``patient``, an item that the server alone cannot serve now is settled with that error, and not repeated.
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
                if len(outcomes) != len(part):  # otherwise callers without an outcome would wait for ever
                    raise _miscounted(len(outcomes), len(part))
            except BackendConnectionError as exc:
                # The server that has failed for some ids alone is not away.
                down_since = inf if exc.partial else self.not_reached(exc, began)
                now = asyncio.get_running_loop().time()
                if backoff is None:
                    backoff, first = Backoff(), now
                if now - down_since >= self._retry_for:
                    self._on_outage(exc)  # before `settle`: after it, the queued calls would be sent next
                    for failed in (part, *parts):
                        settle(failed, [exc] * len(failed))
                    return
                # The server answers other calls, but fails on this part.
                if now - first >= self._retry_for or (exc.partial and not patient and len(part) == 1):
                    settle(part, [exc] * len(part))
                    backoff = None
                    continue
                deaths += exc.in_flight
                one_is_the_cause = exc.partial or (exc.in_flight and deaths > 1)
                if one_is_the_cause and len(part) > 1:
                    parts += _halves([index for index in part if wanted(index)])
                    continue
                if one_is_the_cause and parts:
                    _put_off(part[0], parts, key)
                    if part[0] not in late:  # the first time there is no pause: the other items have waited long enough
                        late.add(part[0])
                        continue
                else:
                    parts.append(part)
                await self.pauses.sleep(backoff.pause())
                parts = [kept for part in parts if (kept := [index for index in part if wanted(index)])]
            except Exception as exc:
                if affects_whole_batch(exc):
                    self._health.failed(exc)
                if len(part) == 1 or affects_whole_batch(exc):
                    settle(part, [exc] * len(part))
                else:
                    parts += _halves([index for index in part if wanted(index)])
            else:
                self.reached()
                settle(part, outcomes)

    async def collect(
        self,
        run: Callable[[Sequence[Item]], Awaitable[Sequence[Out | BaseException]]],
        items: Sequence[Item],
        patient: bool = True,
    ) -> list[Out | BaseException]:
        """Call `perform` and return all outcomes, in the order of ``items``.

        Raises `BackendConnectionError` if every item has that outcome because the server is away.
        """
        found: list[Any] = [None] * len(items)

        def settle(indexes: Sequence[int], outcomes: Sequence[Out | BaseException]) -> None:
            if len(indexes) == len(found):
                found[:] = outcomes
            else:
                for index, outcome in zip(indexes, outcomes, strict=True):
                    found[index] = outcome

        await self.perform(run, items, settle, lambda _: True, patient=patient)
        if found and all(isinstance(outcome, BackendConnectionError) and not outcome.partial for outcome in found):
            raise found[0]
        return found

    async def call(self, operation: Callable[[], Awaitable[Out]]) -> Out:
        """Await ``operation()``, and repeat it in an outage for at most ``retry_for`` seconds. Raises its error."""

        async def run(_: Sequence[None]) -> Sequence[Out]:
            return [await operation()]

        (outcome,) = await self.collect(run, [None])
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def _halves(part: Sequence[int]) -> list[Sequence[int]]:
    """Return the halves of ``part``. The first half comes last, because `perform` takes the next part from the end."""
    middle = (len(part) + 1) // 2
    return [half for half in (part[middle:], part[:middle]) if half]


def _put_off(index: int, parts: list[Sequence[int]], key: Callable[[int], Hashable]) -> None:
    """Move ``index`` behind all other items, followed by the items with the same key, in their order."""
    late = [index]
    if key(index) is not None:
        late += [other for part in reversed(parts) for other in part if key(other) == key(index)]
    rest = [[other for other in part if other not in late] for part in parts]
    parts[:] = [*([other] for other in reversed(late)), *(part for part in rest if part)]


def _miscounted(outcomes: int, items: int) -> BackendError:
    error = BackendError(
        f"{outcomes} outcomes came back for {items} items; the backend must return one outcome per item"
    )
    error.of_server = True
    return error
