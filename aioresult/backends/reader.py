"""The reader's side of a backend: reading, awaiting and removing results."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast
from uuid import UUID

from ..exceptions import BackendConnectionError, BackendGetMetaError, SerializationError, UsageError
from ..existence import when_stored
from ..hub import chunked
from ..meta import TaskMeta
from ..seconds import Timeout, checked_timeout
from ..waiter import FINAL_READ, Outcome, SingleWaiter, Waiter, timed_out
from .core import Removal
from .shard import Shard, as_error
from .worker import WorkerSide

__all__ = ["ReaderSide"]


#: So few results are read in one round trip with those that other calls read at the same time.
_FEW = 100
#: Seconds from one look to the next at whether a shard has turned out to be away while it is read.
_LOOK = 0.02


class ReaderSide(WorkerSide):
    """The methods for callers that wait for results; see `aioresult.backends.base.Backend`."""

    async def get_task_meta(self, task_id: str | UUID) -> TaskMeta:
        """Read what is stored under ``task_id`` now: the state, the value and the other fields of the task.

        An id under which nothing is stored has the state PENDING, as in Celery.

        :raises DecodeError: what is stored cannot be read. If its serializer is not in ``accept``, this is a
            `ContentDisallowed`.
        :raises ResultTooLargeError: what is stored is larger than ``max_result_size``.
        :raises BackendGetMetaError: the server refuses to read this result.
        :raises BackendConnectionError: the server was away for longer than ``retry_for``.
        """
        self.check()
        task_id = self._valid_id(task_id)
        return cast("TaskMeta | None", await self._shard_of(task_id).fetches.submit(task_id)) or TaskMeta.pending(
            task_id
        )

    async def get_many(self, task_ids: Iterable[str | UUID]) -> list[TaskMeta]:
        """Read what is stored under each id, in order. Raises the same errors as `get_task_meta`.

        It makes one round trip for each `fetch_chunk` (500) ids. If any of the results cannot be read, it raises.
        """
        metas: list[TaskMeta] = []
        for outcome in await self.get_outcomes(task_ids):
            if isinstance(outcome, Exception):
                raise outcome
            metas.append(outcome)
        return metas

    async def get_outcomes(self, task_ids: Iterable[str | UUID]) -> list[Outcome]:
        """Do the same as `get_many`, but raise nothing for a result that cannot be read: its error takes its place."""
        self.check()
        outcomes: list[Outcome] = []
        for ids in chunked(self._valid_ids(task_ids), self.fetch_chunk):
            found: dict[str, Outcome | None] = {}
            by_shard = self._by_shard(ids)
            reads = [shard.calls.submit(partial(shard.outcomes, some)) for shard, some in by_shard.items()]
            # If the store has one shard, its error is raised. Otherwise it takes the place of that shard's results.
            several = await asyncio.gather(*reads, return_exceptions=len(reads) > 1)
            for some, read in zip(by_shard.values(), several, strict=True):
                there = [as_error(read)] * len(some) if isinstance(read, BaseException) else read
                found.update(zip(some, there, strict=True))
            outcomes += [found[task_id] or TaskMeta.pending(task_id) for task_id in ids]
        return outcomes

    async def read_reachable(self, task_ids: Iterable[str]) -> list[Outcome | None]:
        """Do the same as `get_outcomes`, but do not wait for shards that cannot be reached. Used by joins.

        A shard is a part of the store; see `aioresult.backends.shard`. If there are several, ``None`` takes the place
        of the results of a shard that is away.
        """
        if len(self._shards) == 1:
            return [*await self.get_outcomes(task_ids)]
        ids = self._valid_ids(task_ids)
        by_shard = {shard: some for shard, some in self._by_shard(ids).items() if not self._is_away(shard)}
        reads = {shard: self._begin_read(shard, some, few=len(ids) <= _FEW) for shard, some in by_shard.items()}
        while pending := [read for shard, read in reads.items() if not read.done() and not self._is_away(shard)]:
            await asyncio.wait(pending, timeout=min(_LOOK, self.heartbeat / 4))
        found: dict[str, Outcome | BaseException | None] = {}
        for shard, read in reads.items():
            if read.done() and read.exception() is None:
                for task_id, outcome in zip(by_shard[shard], read.result(), strict=True):
                    if not isinstance(outcome, BackendConnectionError):
                        found[task_id] = outcome or TaskMeta.pending(task_id)
        seen = (found.get(task_id) for task_id in ids)
        return [as_error(each) if isinstance(each, BaseException) else each for each in seen]

    @staticmethod
    def _begin_read(shard: Shard, task_ids: Sequence[str], few: bool) -> asyncio.Future[Any]:
        """Begin to read results in one shard. If they are ``few``, they share a round trip with other reads.

        The result of the future is a list with an outcome, an error or ``None`` for each id.
        """
        if few:
            return asyncio.gather(*map(shard.fetches.submit, task_ids), return_exceptions=True)
        return shard.calls.submit(partial(shard.outcomes, task_ids))

    def spans_shards(self, task_ids: Iterable[str]) -> bool:
        """True if these ids are in several shards, which are parts of the store. Used by joins."""
        return len(self._shards) > 1 and len({self._shard_of(task_id) for task_id in task_ids}) > 1

    def _valid_ids(self, task_ids: Iterable[str | UUID]) -> list[str]:
        if isinstance(task_ids, (str, UUID)):
            raise UsageError(f"pass several ids, not {task_ids!r}: for instance a list or a generator of ids")
        return [self._valid_id(task_id) for task_id in task_ids]

    async def exists(self, task_id: str | UUID) -> bool:
        """True if anything is stored under ``task_id``, even a pending state, or a result that cannot be read."""
        self.check()
        task_id = self._valid_id(task_id)
        try:
            return await self._shard_of(task_id).fetches.submit(task_id) is not None
        except (SerializationError, BackendGetMetaError):
            return True

    async def wait_for(self, task_id: str | UUID, timeout: Timeout = None, must_exist: bool = False) -> TaskMeta:
        """Wait until the task is over, and return its meta. It does not raise the exception of the task.

        Otherwise it raises the same errors as `get_task_meta`, but it waits while the server is away.

        :param timeout: how long to wait, in seconds or as a `timedelta`. ``None`` means ``default_timeout``, infinity
            means for ever, and 0 reads the store without waiting. A timeout of less than a second may take up to one
            second longer: it ends with a read of the store, so that a stored result is not missed.
        :param must_exist: raise `TaskNotFoundError` at once if nothing is stored under the id.
        :raises TimeoutError: the task was not over in time. The task itself goes on.
        :raises BackendClosedError: the backend was closed during the wait.
        """
        self.check()
        task_id = self._valid_id(task_id)
        if must_exist:
            return await when_stored(self, task_id, timeout, partial(self.wait_for, task_id))
        seconds = checked_timeout(timeout, self.default_timeout)
        if seconds is not None and seconds <= 0:
            meta = await self.get_task_meta(task_id)
            if meta.ready:
                return meta
            raise timed_out(f"task {task_id}", seconds)
        # This repeats `wait_for_topic` instead of calling it: with 10,000 waiters, one frame less saves two megabytes.
        waiter = SingleWaiter(f"task {task_id}", seconds)
        self._shard_of(task_id).hub.watch(task_id, waiter)
        try:
            return (await waiter.future).with_new_exception()
        except TimeoutError:
            if seconds is None or seconds >= FINAL_READ:
                raise
            found = await self._final_read(task_id)
            if found is None or not found.ready:
                raise
            return found
        finally:
            self._shard_of(task_id).hub.unwatch(task_id, waiter)
            waiter.stop()

    async def wait_for_topic(self, topic: str, waiter: SingleWaiter, patient: bool) -> TaskMeta | None:
        """Wait for a chord by its topic, which is the chord's name in the hub. Used by handles.

        When the waiter's timeout ends, this method reads the store once more and returns what it finds. With
        ``patient`` it raises `TimeoutError` instead.
        """
        self.check()
        self._shard_of(topic).hub.watch(topic, waiter)
        try:
            return await waiter.future
        except TimeoutError:
            if patient:
                raise
            return await self._final_read(topic)
        finally:
            self._shard_of(topic).hub.unwatch(topic, waiter)
            waiter.stop()

    async def _final_read(self, topic: str) -> TaskMeta | None:
        """Read what is stored now; ``None`` if that takes more than `FINAL_READ` seconds or the server is away."""
        try:
            async with asyncio.timeout(FINAL_READ):
                return cast("TaskMeta | None", await self._shard_of(topic).fetches.submit(topic))
        except (TimeoutError, BackendConnectionError):
            return None

    def watch(self, task_id: str | UUID, waiter: Waiter, read_first: bool = True) -> None:
        """Call ``waiter.receive`` with the state of ``task_id``, and with each later state. `wait_for` is built on it.

        Pair it with `unwatch`. A final state or an error is the last that the waiter receives. With
        ``read_first=False`` the backend subscribes without reading first. Pass it when you have just read the result
        yourself.
        """
        self.check()
        self.watch_topic(self._valid_id(task_id), waiter, read_first)

    def unwatch(self, task_id: str | UUID, waiter: Waiter) -> None:
        """End what `watch` began. Does nothing if it has ended already."""
        if self._loop is not None:
            task_id = str(task_id)
            self._shard_of(task_id).hub.unwatch(task_id, waiter)

    def watch_topic(self, topic: str, waiter: Waiter, read_first: bool = True) -> None:
        """Do the same as `watch` for a topic of the hub that is not a task id. Used by chords and running tasks."""
        self.check()
        self._shard_of(topic).hub.watch(topic, waiter, read_first)

    # -- forgetting -------------------------------------------------------------------------------------------------

    async def forget(self, task_id: str | UUID) -> None:
        """Remove the result of a task. Its waiters go on waiting, because the task may run again.

        It removes what the same backend stored under this id in earlier calls, and keeps what later calls store.
        """
        self.check()
        task_id = self._valid_id(task_id)
        await self._forget([task_id])

    async def forget_many(self, task_ids: Iterable[str | UUID]) -> None:
        """Remove many results in few round trips; see `forget`."""
        self.check()
        for ids in chunked(self._valid_ids(task_ids), self.fetch_chunk):
            await self._forget(ids)

    async def _forget(self, task_ids: Sequence[str]) -> None:
        removals: list[asyncio.Future[bool]] = []
        for shard, ids in self._by_shard(task_ids).items():
            if shard.writes.full:  # so that these removals do not overtake the stores that wait
                await shard.writes.wait_for_room()
            removals += [shard.writes.submit(Removal(task_id), task_id) for task_id in ids]
        await asyncio.gather(*removals)

    async def cleanup(self) -> int:
        """Remove the results that have expired, and return how many. 0 if the server removes them by itself."""
        self.check()
        return await self._call(self._cleanup)
