"""The reader's side of a backend: what is stored is looked up, waited for, and forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial
from typing import cast
from uuid import UUID

from ..exceptions import BackendConnectionError, BackendGetMetaError, SerializationError, UsageError
from ..existence import when_stored
from ..hub import chunked
from ..meta import TaskMeta
from ..seconds import Timeout, checked_timeout
from ..waiter import FINAL_READ, Outcome, SingleWaiter, Waiter, timed_out
from .core import Removal
from .worker import WorkerSide

__all__ = ["ReaderSide"]


class ReaderSide(WorkerSide):
    """What callers use that wait for results; see `aioresult.backends.base.Backend`."""

    async def get_task_meta(self, task_id: str | UUID) -> TaskMeta:
        """What is stored of ``task_id`` now; an unknown id reads as PENDING, as in Celery.

        :raises DecodeError: what is stored cannot be read. `ContentDisallowed`: its serializer is not in ``accept``.
        :raises BackendConnectionError: the server was away for longer than ``retry_for``.
        """
        self.check()
        task_id = self._valid_id(task_id)
        return cast("TaskMeta | None", await self._fetches.submit(task_id)) or TaskMeta.pending(task_id)

    async def get_many(self, task_ids: Iterable[str | UUID]) -> list[TaskMeta]:
        """What is stored of each id, in order: one round trip per `fetch_chunk` ids. Raises as `get_task_meta`."""
        metas: list[TaskMeta] = []
        for outcome in await self.get_outcomes(task_ids):
            if isinstance(outcome, Exception):
                raise outcome
            metas.append(outcome)
        return metas

    async def get_outcomes(self, task_ids: Iterable[str | UUID]) -> list[Outcome]:
        """As `get_many`, but a result that cannot be read is an exception in its place and spoils no other."""
        self.check()
        outcomes: list[Outcome] = []
        for ids in chunked(self._valid_ids(task_ids), self.fetch_chunk):
            found = await self._calls.submit(partial(self._outcomes, ids))
            outcomes += [
                TaskMeta.pending(task_id) if outcome is None else outcome
                for task_id, outcome in zip(ids, found, strict=True)
            ]
        return outcomes

    def _valid_ids(self, task_ids: Iterable[str | UUID]) -> list[str]:
        if isinstance(task_ids, (str, UUID)):
            raise UsageError(f"pass several ids, not {task_ids!r}: a list, a generator, …")
        return [self._valid_id(task_id) for task_id in task_ids]

    async def exists(self, task_id: str | UUID) -> bool:
        """Whether anything is stored under ``task_id``: also if it is only pending, or cannot be read."""
        self.check()
        try:
            return await self._fetches.submit(self._valid_id(task_id)) is not None
        except (SerializationError, BackendGetMetaError):
            return True

    async def wait_for(self, task_id: str | UUID, timeout: Timeout = None, must_exist: bool = False) -> TaskMeta:
        """The meta of ``task_id`` once the task is over, well or not: this does not raise the task's exception.

        :param timeout: seconds, or a `timedelta`; ``None`` for ``default_timeout``, infinity for ever. 0 looks once. A
            result that is stored beats a deadline that has passed: a timeout below a second may take a second more, to
            read the store.
        :param must_exist: raise `TaskNotFoundError` at once if nothing is stored under the id.
        :raises TimeoutError: the time is up.
        :raises BackendClosedError: the backend was closed meanwhile. Otherwise raises as `get_task_meta`.
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
        # As `wait_for_topic`, but not through it: with ten thousand who wait, a frame less is two megabytes.
        waiter = SingleWaiter(f"task {task_id}", seconds)
        self._hub.watch(task_id, waiter)
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
            self._hub.unwatch(task_id, waiter)
            waiter.stop()

    async def wait_for_topic(self, topic: str, waiter: SingleWaiter, patient: bool) -> TaskMeta | None:
        """Wait for a chord by its topic; for handles.

        Unless the caller is ``patient``, the end of the waiter's timeout is answered with what is stored then.
        """
        self.check()
        self._hub.watch(topic, waiter)
        try:
            return await waiter.future
        except TimeoutError:
            if patient:
                raise
            return await self._final_read(topic)
        finally:
            self._hub.unwatch(topic, waiter)
            waiter.stop()

    async def _final_read(self, topic: str) -> TaskMeta | None:
        """What is stored, as far as that can be had within a second."""
        try:
            async with asyncio.timeout(FINAL_READ):
                return cast("TaskMeta | None", await self._fetches.submit(topic))
        except (TimeoutError, BackendConnectionError):
            return None

    def watch(self, task_id: str | UUID, waiter: Waiter, read_first: bool = True) -> None:
        """Notify ``waiter`` of the state of ``task_id`` and of each change: the layer below `wait_for`.

        Pair it with `unwatch`. After a final state the waiter hears no more. With ``read_first=False`` the backend
        subscribes without reading first. Pass it when you have just read the result yourself.
        """
        self.check()
        self._hub.watch(self._valid_id(task_id), waiter, read_first)

    def unwatch(self, task_id: str | UUID, waiter: Waiter) -> None:
        """End what `watch` began; harmless if it has ended."""
        if self._loop is not None:
            self._hub.unwatch(str(task_id), waiter)

    def watch_topic(self, topic: str, waiter: Waiter, read_first: bool = True) -> None:
        """As `watch`, of what is no task; for chords and running tasks."""
        self.check()
        self._hub.watch(topic, waiter, read_first)

    # -- forgetting -------------------------------------------------------------------------------------------------

    async def forget(self, task_id: str | UUID) -> None:
        """Remove the result. Does not wake its waiters: the task may yet be run again.

        A store that was called before is removed, one that is called afterwards stays.
        """
        self.check()
        task_id = self._valid_id(task_id)
        if self._writes.full:  # not to overtake the stores that wait
            await self._writes.wait_for_room()
        await self._writes.submit(Removal(task_id), task_id)

    async def forget_many(self, task_ids: Iterable[str | UUID]) -> None:
        """Remove many results, in few round trips; see `forget`."""
        self.check()
        for ids in chunked(self._valid_ids(task_ids), self.fetch_chunk):
            if self._writes.full:
                await self._writes.wait_for_room()
            await asyncio.gather(*(self._writes.submit(Removal(task_id), task_id) for task_id in ids))

    async def cleanup(self) -> int:
        """Remove what has expired and return how many; 0 where the server expires by itself."""
        self.check()
        return await self._call(self._cleanup)
