"""`Completions`: waits for many results at once, on any number of backends, and yields them as they finish.

Joins (`gather`, `wait`), groups and `as_completed` all use it. It needs one waiter per backend, and for a large join
also one asyncio task per backend. It needs no waiter or asyncio task per result.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any, Generic, Self, TypeVar

from .exceptions import AioResultError, BackendConnectionError, UsageError
from .handle import Leaf, ResultStore, is_over
from .hub import chunked
from .lineage import Ancestor, Lineage
from .meta import TaskMeta
from .seconds import Timeout, checked_timeout
from .states import IGNORED, PENDING, SUCCESS
from .tasks import EMPTY, StandingTask
from .waiter import FINAL_READ, Outcome, timed_out

__all__ = ["Completions"]

#: The most results that a join leaves to the hub, the listener that all waiters of a backend share. The hub reads them
#: together with the results of other joins.
_FEW = 100

L = TypeVar("L", bound=Leaf)


class _Inbox(Generic[L]):
    """The waiter at one backend. It passes each outcome to the handles with its task id: leaves and ancestors.

    A leaf is a single result that the join waits for. An ancestor is a result that leaves depend on.
    """

    def __init__(self, owner: Completions[L]) -> None:
        self._owner = owner
        self.pending: dict[str, list[L | Ancestor[L]]] = {}

    def receive(self, task_id: str, outcome: Outcome) -> None:
        for each in self.pending.get(task_id, ()):
            each.set_outcome(outcome)
        if isinstance(outcome, Exception) or outcome.ready:
            self._owner.finish(self.pending.pop(task_id, ()), outcome)

    def leaves(self) -> Iterator[L]:
        """Return the leaves (single results of the join) that have no outcome yet."""
        return (each for waiting in self.pending.values() for each in waiting if not isinstance(each, Ancestor))


class Completions(Generic[L]):
    """An async iterator: each step yields a list of the leaves that have finished since the last step.

    An item of that list is ``(leaf, outcome)``. A leaf is a handle on a single result. Its outcome is its final meta,
    or an error that prevents a final meta. If an ancestor has failed, such as a parent in a chain, the leaf never runs
    or fails too. Its outcome is then the meta of that ancestor. The ancestors of a failed leaf are read before the leaf
    is yielded, so that early and late callers get the same failure.

    Use it in ``with``, which ends the remaining subscriptions. ``timeout`` is in seconds from now. After it, the next
    step that would have to wait raises `aioresult.TimeoutError`. A timeout of 0 reads all results and does not wait. A
    timeout below one second may end before the first read has; the missing results are then read one more time.

    If there are many leaves, or if they are in several shards of the store, this iterator first reads them itself, a
    chunk at a time. Then it needs the hub (the listener that all waiters of a shard share) only for leaves that have
    not finished. After that, it also watches the ancestors of these leaves.
    """

    def __init__(self, lineage: Lineage[L], timeout: Timeout = None) -> None:
        #: Without a ``timeout``, the ``default_timeout`` of this leaf's backend decides how long to wait.
        first = next((leaf.store for leaf in lineage.leaves if leaf.store is not None), None)
        self._timeout = checked_timeout(timeout, None if first is None else first.default_timeout)
        self._once = self._timeout is not None and self._timeout <= 0
        self._expired = False
        self._lineage = lineage
        self._reads: list[StandingTask] = []
        #: The error of `_look_once`, if it has failed.
        self._error: Exception | None = None
        self._finished: list[tuple[L, Outcome]] = []
        #: Leaves that failed, each with the failure that is known so far. An ancestor may be the cause; see `_settle`.
        self._doubtful: list[tuple[L, TaskMeta]] = []
        self._settler: StandingTask | None = None
        self._followed: set[Ancestor[L]] = set()
        self._inboxes: dict[ResultStore, _Inbox[L]] = {}
        self._wake: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._unfinished = 0
        for leaf in lineage.leaves:
            known, store = leaf.outcome, leaf.store
            if isinstance(known, TaskMeta) and (known.ready or known.status == IGNORED or store is None):
                if known.status != SUCCESS and known.propagates and self._is_doubtful(leaf):
                    self._unfinished += 1
                    self._doubtful.append((leaf, known))
                else:
                    self._finished.append((leaf, known))
            elif store is None:
                error = UsageError(f"{leaf!r} has no backend; make it with backend.result(task_id)")
                leaf.set_outcome(error)
                self._finished.append((leaf, error))
            else:
                self._unfinished += 1
                self._inbox(store).pending.setdefault(leaf.id, []).append(leaf)
        if self._inboxes:
            self._meet_ancestors()

    def _inbox(self, store: ResultStore) -> _Inbox[L]:
        if (inbox := self._inboxes.get(store)) is None:
            inbox = self._inboxes[store] = _Inbox(self)
        return inbox

    def _meet_ancestors(self) -> None:
        for ancestor in self._lineage.ancestors.values():
            if (failure := ancestor.failure) is not None:
                self._fell(ancestor, failure)
            elif ancestor.handle.store is not None and not is_over(ancestor.handle):
                self._inbox(ancestor.handle.store)

    def __enter__(self) -> Self:
        for store in self._inboxes:
            store.check()
        if not self._unfinished:
            return self
        if self._once:
            self._begin(self._look_once)
            return self
        if self._timeout is not None:
            expire = self._expire if self._timeout >= FINAL_READ else partial(self._begin, self._read_at_the_end)
            self._timer = asyncio.get_running_loop().call_later(self._timeout, expire, context=EMPTY.context)
        self._start_to_settle()
        few: list[_Inbox[L]] = []
        for store, inbox in self._inboxes.items():
            # The hub reads together what belongs to one shard (a part of the store). If there are several shards, one
            # read for all of them tells the caller at once of every result that is ready.
            if len(inbox.pending) > _FEW or store.spans_shards(inbox.pending):
                self._begin(partial(self._look_through, store, inbox))
            else:
                self._watch(store, inbox, tuple(inbox.pending), read_first=True)
                few.append(inbox)
        self._follow(few)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._settler is not None:
            self._settler.cancel()
        for each in self._reads:
            each.cancel()
        if self._timer is not None:
            self._timer.cancel()
        for store, inbox in self._inboxes.items():
            for task_id in inbox.pending:
                store.unwatch(task_id, inbox)

    def _begin(self, read: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = StandingTask(read, "aioresult-read", lambda: True)
        self._reads.append(task)
        task.start()

    # -- reading results --------------------------------------------------------------------------------------------

    async def _look_once(self) -> None:
        try:
            await self._settle()
            await self._look_all()
        except Exception as exc:
            self._error = exc
        self._expire()

    async def _read_at_the_end(self) -> None:
        with suppress(TimeoutError, AioResultError):  # if the read fails, the deadline counts
            async with asyncio.timeout(FINAL_READ):
                await self._look_all()
        self._expire()

    async def _look_all(self) -> None:
        inboxes = tuple(self._inboxes.values())
        if sum(len(inbox.pending) for inbox in inboxes) <= _FEW:
            self._add_ancestors(inboxes)
        for store, inbox in tuple(self._inboxes.items()):
            await self._look_up(store, inbox, inbox.pending)
        for store, task_ids in self._add_ancestors(inboxes).items():  # empty if they were added above
            await self._look_up(store, self._inboxes[store], task_ids)

    async def _look_through(self, store: ResultStore, inbox: _Inbox[L]) -> None:
        await self._look_and_watch(store, inbox, inbox.pending)
        self._follow([inbox])

    async def _look_and_watch(self, store: ResultStore, inbox: _Inbox[L], task_ids: Iterable[str]) -> None:
        for some in chunked(task_ids, store.fetch_chunk):
            # Ignore an error of this read: the hub reads the ids again, and reports an error that lasts.
            with suppress(Exception):
                for task_id, outcome in zip(some, await store.read_reachable(some), strict=True):
                    if isinstance(outcome, Exception) or (outcome is not None and outcome.status != PENDING):
                        inbox.receive(task_id, outcome)
            self._watch(store, inbox, [task_id for task_id in some if task_id in inbox.pending], read_first=False)

    async def _look_up(self, store: ResultStore, inbox: _Inbox[L], task_ids: Iterable[str]) -> None:
        """Read results. Raises if a part of the store cannot be reached, after the other results were passed on."""
        away: BackendConnectionError | None = None
        for some in chunked(task_ids, store.fetch_chunk):
            for task_id, outcome in zip(some, await store.get_outcomes(some), strict=True):
                if isinstance(outcome, BackendConnectionError):
                    away = outcome
                elif isinstance(outcome, Exception) or outcome.status != PENDING:
                    inbox.receive(task_id, outcome)
        if away is not None:
            raise away

    def _watch(self, store: ResultStore, inbox: _Inbox[L], task_ids: Iterable[str], read_first: bool) -> None:
        for task_id in task_ids:
            try:
                store.watch(task_id, inbox, read_first)
            except AioResultError as exc:  # the backend was closed in the meantime, or the id is not valid
                inbox.receive(task_id, exc)

    # -- ancestors --------------------------------------------------------------------------------------------------

    def _follow(self, inboxes: Sequence[_Inbox[L]]) -> None:
        """Watch the ancestors (results that a leaf depends on) of the leaves in these inboxes."""
        for store, task_ids in self._add_ancestors(inboxes).items():
            inbox = self._inboxes[store]
            if len(task_ids) > _FEW:
                self._begin(partial(self._look_and_watch, store, inbox, task_ids))
            else:
                self._watch(store, inbox, task_ids, read_first=True)

    def _add_ancestors(self, inboxes: Sequence[_Inbox[L]]) -> dict[ResultStore, list[str]]:
        """Add the ancestors of the leaves in these inboxes to the ids that the join waits for. Returns the new ids."""
        fresh: dict[ResultStore, list[str]] = {}
        if not self._lineage.ancestors:
            return fresh
        for ancestor in self._lineage.above(leaf for inbox in inboxes for leaf in inbox.leaves()):
            handle = ancestor.handle
            if ancestor in self._followed or handle.store is None or handle.ignored or is_over(handle):
                continue
            self._followed.add(ancestor)
            waiting = self._inbox(handle.store).pending.setdefault(handle.id, [])
            if not waiting:
                fresh.setdefault(handle.store, []).append(handle.id)
            waiting.append(ancestor)
        return fresh

    def _fell(self, ancestor: Ancestor[L], failure: TaskMeta) -> None:
        """Record that an ancestor has failed: the leaves that depend on it and are not over will never run."""
        for leaf in self._lineage.below(ancestor):
            inbox = None if leaf.store is None else self._inboxes.get(leaf.store)
            waiting = () if inbox is None else inbox.pending.get(leaf.id, ())
            others = [each for each in waiting if each is not leaf]
            if leaf.store is None or inbox is None or len(others) == len(waiting):
                continue
            self._doubtful += [(leaf, failure)] * (len(waiting) - len(others))
            if others:
                inbox.pending[leaf.id] = others
            else:
                del inbox.pending[leaf.id]
                leaf.store.unwatch(leaf.id, inbox)

    def _is_doubtful(self, leaf: L) -> bool:
        """True if an ancestor may be the cause of the leaf's failure."""
        return not is_over(leaf) or (leaf.failure is None and self._lineage.has_parents(leaf))

    def _start_to_settle(self) -> None:
        if self._doubtful and self._settler is None and not self._once:
            self._settler = StandingTask(self._settle, "aioresult-settle", lambda: True)
            self._settler.start()

    async def _settle(self) -> None:
        """Read the ancestors of the failed leaves, and pass these leaves to the caller.

        If a leaf has no outcome of its own and counts as failed because of an ancestor, it is read, too: a stored
        success always takes precedence. A result that cannot be read within one second counts as unknown.
        """
        while self._doubtful:
            some = [leaf for leaf, _ in self._doubtful[:_FEW]]
            with suppress(Exception):
                async with asyncio.timeout(FINAL_READ):
                    await self._look_above(some)
            self._conclude(len(some))
        self._settler = None

    async def _look_above(self, leaves: Sequence[L]) -> None:
        unknown: dict[ResultStore, dict[str, list[L]]] = {}
        for handle in chain(leaves, (ancestor.handle for ancestor in self._lineage.above(leaves))):
            if handle.store is not None and not handle.ignored and not is_over(handle):
                unknown.setdefault(handle.store, {}).setdefault(handle.id, []).append(handle)
        for store, handles in unknown.items():
            with suppress(Exception):
                for task_id, outcome in zip(handles, await store.get_outcomes(handles), strict=True):
                    for handle in handles[task_id]:
                        handle.set_outcome(outcome)

    def _conclude(self, count: int) -> None:
        """Pass the first ``count`` leaves in `_doubtful` to the caller, with the failure that is known now."""
        some = self._doubtful[:count]
        del self._doubtful[:count]
        for (leaf, failure), cause in zip(some, self._lineage.causes([leaf for leaf, _ in some]), strict=True):
            outcome = leaf.meta
            if outcome is None or not outcome.ready or outcome.propagates:
                outcome = leaf.failure or cause or failure
                leaf.set_failure(outcome)
            self._unfinished -= 1
            self._finished.append((leaf, outcome))
        self._rouse()

    # -- the iterator -----------------------------------------------------------------------------------------------

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[tuple[L, Outcome]]:
        while not self._finished:
            if not self._unfinished:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error
            if self._expired and self._timeout is not None:
                raise timed_out(self._describe(), self._timeout)
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        finished, self._finished = self._finished, []
        return finished

    def finish(self, handles: Iterable[L | Ancestor[L]], outcome: Outcome) -> None:
        """Record that these handles are over. An `_Inbox` calls this."""
        failure = outcome if self._lineage.ancestors and isinstance(outcome, TaskMeta) and outcome.propagates else None
        for each in handles:
            if isinstance(each, Ancestor):
                if failure is not None and each.failure is not None:
                    self._fell(each, failure)
            elif failure is not None and self._is_doubtful(each):
                self._doubtful.append((each, failure))
            else:
                self._unfinished -= 1
                self._finished.append((each, outcome))
        self._start_to_settle()
        self._rouse()

    def _expire(self) -> None:
        self._expired = True
        self._conclude(len(self._doubtful))
        self._rouse()

    def _rouse(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _describe(self) -> str:
        first = next(leaf.id for inbox in self._inboxes.values() for leaf in inbox.leaves())
        others = self._unfinished - 1
        return f"task {first}" + (f", with {others:,} more," if others else "")
