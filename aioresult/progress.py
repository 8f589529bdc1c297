"""`GroupProgress`: how many members of a group are over, while the other members run.

A store may count the members of a saved group that are over, by the index in each member's request. Then a group of any
size costs one subscription, and one small read for each change that is shown.

A process that does not count stores results without an index. To find such results, the members are read: at first, and
when the counts have not changed for a while. If more members are over than were counted, or if the store does not
count, each member gets a waiter (`Completions`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from functools import partial
from math import inf
from typing import Any, Final, NamedTuple

from .completion import Completions, L
from .handle import ResultStore, is_over, refresh
from .lineage import Lineage
from .retry import retry_outages
from .seconds import Seconds, checked_seconds
from .tasks import copy_of_error
from .waiter import Outcome

__all__ = ["GROUP_TOPIC", "GroupCounts", "GroupProgress", "progress_of"]

#: Prefix of the hub's topic (the name of a subscription) for a group's counts; the group's id follows it.
GROUP_TOPIC: Final = "\x00group "
#: Seconds without a change of the counts after which the members are read: the first pause and the longest. It doubles.
_FIRST_LOOK, _LAST_LOOK = 1.0, 60.0


class GroupProgress(NamedTuple):
    """How many members of a group are over."""

    #: The number of members that are over, including the failed ones.
    done: int
    #: The number of members that failed, were revoked, or never run because a parent failed or was revoked.
    failed: int
    #: The number of all members. Members of nested groups count one by one.
    total: int


class GroupCounts(NamedTuple):
    """The numbers of members of a group that a store has counted as succeeded and as failed."""

    succeeded: int
    failed: int


async def progress_of(
    lineage: Lineage[L], interval: Seconds, group_id: str | None
) -> AsyncGenerator[GroupProgress, None]:
    """Yield the progress of a group; see `aioresult.ResultSet.progress`."""
    pause = checked_seconds("interval", interval)
    total = len(lineage.leaves)
    shown: GroupProgress | None = None
    stores = {leaf.store for leaf in lineage.leaves}
    if group_id is not None and not lineage.ancestors and len(stores) == 1:
        (store,) = stores
        if store is not None:
            counter = _Counter(lineage, store, group_id)
            try:
                while (counts := await counter.next()) is not None:
                    progress = GroupProgress(counts.succeeded + counts.failed, counts.failed, total)
                    if progress != shown:
                        shown = progress
                        yield progress
                    if progress.done >= total:
                        return
                    await asyncio.sleep(pause)
            finally:
                counter.stop()
    await refresh(lineage.leaves)
    known = [leaf.outcome for leaf in lineage.leaves if leaf.ignored or is_over(leaf)]
    if len(known) < total or not total:
        progress = GroupProgress(len(known), sum(map(_failed, known)), total)
        if progress != shown:
            shown = progress
            yield progress
    done = failed = 0
    with Completions(lineage, inf) as completions:
        async for finished in completions:
            done += len(finished)
            failed += sum(_failed(outcome) for _, outcome in finished)
            progress = GroupProgress(done, failed, total)
            if shown is None or (done >= shown.done and progress != shown):
                shown = progress
                yield progress
                if done < total:
                    await asyncio.sleep(pause)


class _Counter:
    """Reads the counts of one group, for as long as the counts are reliable."""

    def __init__(self, lineage: Lineage[Any], store: ResultStore, group_id: str) -> None:
        self._leaves = lineage.leaves
        self._store = store
        self._group_id = group_id
        self._watching = False
        self._counted = 0
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._patience = _FIRST_LOOK

    def receive(self, topic: str, outcome: Outcome) -> None:
        """Note that the counts may have changed. The hub calls this (`aioresult.waiter.Waiter`)."""
        if isinstance(outcome, Exception):
            self._error = outcome
        self._news.set()

    async def next(self) -> GroupCounts | None:
        """Return the present counts at the first call. Later calls wait for a change and return the new counts.

        Returns ``None`` if the counts are not reliable.
        """
        if self._watching:
            if not await self._changed() and not await self._right():
                return None
            counts = await self._counts()
        else:
            if await retry_outages(partial(self._store.group_size, self._group_id)) != len(self._leaves):
                return None
            counts = await self._counts()
            if not sum(counts) and not await self._right():
                return None
            self._store.watch_topic(GROUP_TOPIC + self._group_id, self, read_first=False)
            self._watching = True
        if sum(counts) < self._counted:  # the server has lost some of the counts
            return None
        self._counted = sum(counts)
        return counts

    async def _counts(self) -> GroupCounts:
        counts: GroupCounts = await retry_outages(partial(self._store.group_counts, self._group_id))
        return counts

    async def _changed(self) -> bool:
        try:
            async with asyncio.timeout(self._patience):
                await self._news.wait()
        except TimeoutError:
            self._patience = min(2 * self._patience, _LAST_LOOK)
            return False
        if self._error is not None:
            raise copy_of_error(self._error)
        self._news.clear()
        self._patience = _FIRST_LOOK
        return True

    async def _right(self) -> bool:
        """True if the store has counted every member that is over. Reads the members that are not known to be over."""
        await refresh(self._leaves)
        over = sum(is_over(leaf) for leaf in self._leaves)
        return sum(await self._counts()) >= over

    def stop(self) -> None:
        """End the subscription to the counts."""
        if self._watching:
            self._watching = False
            self._store.unwatch(GROUP_TOPIC + self._group_id, self)


def _failed(outcome: Outcome | None) -> bool:
    return isinstance(outcome, Exception) or (outcome is not None and outcome.propagates)
