"""The output of a running task as its readers see it: `OutputStream`, and what the streams of one backend share.

A stream subscribes to a topic of the hub, whose messages announce new chunks and usually carry them. The reader reads a
page (some entries of the log after its place) when the subscription is confirmed, and after each message whose chunks
do not fit into its box, the chunks that wait in memory (see `aioresult.reading`). One `_Tail` per task decodes each
message only once, for all readers. A slow reader never delays a producer, and takes no memory beyond its box.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast

from .exceptions import AioResultError, UsageError, WorkerLostError
from .following import Following
from .liveness import Liveness
from .log import CLOSED, OUTPUT_TOPIC, START, TAIL, Entry, OutputNews, Page, PageRequest, Place
from .meta import TaskMeta
from .reading import END, Decoded, Reading
from .retry import retry_outages
from .seconds import Timeout
from .states import SUCCESS
from .tasks import copy_of_error
from .tree import raise_or_return
from .waiter import Outcome, Waiter

__all__ = ["OutputPage", "OutputStream", "StreamStore", "Streams"]

T = TypeVar("T")

#: The size of a page (a part of the log that is read at once): about so many bytes, and at most so many entries.
_PAGE_BYTES = 2**20
_PAGE_ENTRIES = 500
#: How many entries the first page has, when their size is not known. An entry has at most 64 KiB, or a single chunk.
_FIRST_PAGE = 16


class OutputPage(NamedTuple):
    """Some chunks of an output, as `AsyncResult.read_output` returns them."""

    chunks: list[Any]
    #: Pass it as ``after`` to get the chunks after these.
    cursor: str
    #: True if these are the last chunks: the task is over, or the output was closed.
    ended: bool


class StreamStore(Protocol):
    """What streams need of a backend."""

    @property
    def liveness(self) -> Liveness: ...
    def check(self) -> None: ...
    def dumps_text(self, task_id: str, value: Any) -> bytes: ...
    def loads_chunks(self, task_id: str, data: bytes) -> list[Any]: ...
    def watch(self, task_id: str, waiter: Waiter, read_first: bool = True) -> None: ...
    def unwatch(self, task_id: str, waiter: Waiter) -> None: ...
    def watch_topic(self, topic: str, waiter: Waiter, read_first: bool = True) -> None: ...
    async def page(self, ask: PageRequest) -> Page: ...
    async def wait_for(self, task_id: str, timeout: Timeout = None) -> TaskMeta: ...


class _Follower:
    """The part of a stream that its `_Tail` knows. It does not keep the stream itself from being garbage-collected."""

    def __init__(self, reading: Reading) -> None:
        self.reading: Reading = reading
        #: The error that has ended the subscription.
        self.failure: Exception | None = None
        #: The final outcome of the task; ``None`` until it is known.
        self.final: Outcome | None = None
        self._woken: asyncio.Future[None] | None = None

    def lost(self, error: Exception) -> None:
        """Note that the worker of the task is lost (`WorkerLostError`), or that its state cannot be found out."""
        if isinstance(error, WorkerLostError):
            self.reading.lost(error)
        else:
            self.failure = error
        self.wake()

    def wake(self) -> None:
        """Wake a waiting reader, so that it checks for news."""
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def news(self, deadline: float | None) -> bool:
        """Wait for the next call of `wake`. Returns false if ``deadline``, by the event loop's clock, comes first."""
        self._woken = asyncio.get_running_loop().create_future()
        try:
            if deadline is None:
                await self._woken
            else:
                async with asyncio.timeout_at(deadline):
                    await self._woken
        except TimeoutError:
            return False
        finally:
            self._woken = None
        return True


class _Tail:
    """Holds the subscriptions to the output and the result of one task, shared by all its readers in this process."""

    def __init__(self, store: StreamStore, task_id: str) -> None:
        self._store = store
        self._task_id = task_id
        self._topic = OUTPUT_TOPIC + task_id
        #: `_listens`: both subscriptions were made; an error ends them.
        #: `_confirmed`: the hub has confirmed the subscription to the output.
        self._listens = self._confirmed = False
        self._final: Outcome | None = None
        #: The followers by their ``id()``, in the order in which they joined.
        self._followers: dict[int, _Follower] = {}

    def __len__(self) -> int:
        return len(self._followers)

    def join(self, follower: _Follower) -> None:
        """Deliver news to ``follower`` from now on."""
        self._followers[id(follower)] = follower
        if not self._listens:
            self._listens, self._confirmed, self._final = True, False, None
            # The output comes first: a reader that gets the end of the task must already be subscribed to its output.
            self._store.watch_topic(self._topic, self, read_first=False)
            self._store.watch(self._task_id, self, read_first=False)
        elif self._confirmed:
            follower.reading.confirmed()
        if self._final is not None:
            self._end(follower, self._final)

    def leave(self, follower: _Follower) -> None:
        """Deliver nothing more to ``follower``. When the last follower leaves, the subscriptions end."""
        if self._followers.pop(id(follower), None) is not None and not self._followers:
            self._store.unwatch(self._topic, self)
            self._store.unwatch(self._task_id, self)

    def receive(self, topic: str, outcome: Outcome) -> None:
        """Take news of the output or of the result from the hub (`aioresult.waiter.Waiter`)."""
        if isinstance(outcome, Exception):
            self._listens = False  # the next reader subscribes to both again
        if topic != self._topic:
            if isinstance(outcome, Exception) or outcome.ready:
                self._final = outcome
                for follower in self._followers.values():
                    self._end(follower, outcome)
        elif isinstance(outcome, Exception):
            for follower in self._followers.values():
                follower.failure = copy_of_error(outcome)
                follower.wake()
        elif outcome.result is None:
            self._confirmed = True
            for follower in self._followers.values():
                follower.reading.confirmed()
                follower.wake()
        else:
            self._told(outcome.result)

    def _end(self, follower: _Follower, outcome: Outcome) -> None:
        follower.final = outcome
        follower.reading.ended()
        follower.wake()

    def _told(self, news: OutputNews) -> None:
        epoch, last, data = news
        size = 0 if data is None else len(data)
        chunks: list[Any] | None = None
        for follower in self._followers.values():
            reading = follower.reading
            if data is not None and not reading.behind:
                # A message that cannot be decoded may come from another program. If the log itself cannot be decoded,
                # its readers get that error when they read it.
                with suppress(AioResultError):
                    chunks = self._store.loads_chunks(self._task_id, data)
                data = None  # decoded only once, for all followers
            reading.receive(epoch, last, chunks, size)
            follower.wake()


class Streams:
    """Makes the streams of one backend, and holds a `_Tail` for each task that has readers."""

    def __init__(self, store: StreamStore) -> None:
        self._store = store
        self._tails: dict[str, _Tail] = {}

    def stream(
        self,
        task_id: str,
        after: str | None,
        on_lost: str = "wait",
        on_restart: str = "raise",
        on_gap: str = "raise",
    ) -> OutputStream[Any]:
        """Make a stream; see `aioresult.AsyncResult.stream`."""
        for name, value, other in (
            ("on_lost", on_lost, "wait"),
            ("on_restart", on_restart, "continue"),
            ("on_gap", on_gap, "skip"),
        ):
            if value not in ("raise", other):
                raise UsageError(f"{name} must be 'raise' or {other!r}, not {value!r}")
        place = None if after == TAIL else START if after is None else Place.parse(after)
        reading = Reading(place, gaps=on_gap == "skip", restarts=on_restart == "continue")
        return OutputStream(self, self._store, task_id, reading, on_lost, on_restart, on_gap)

    def join(self, task_id: str, follower: _Follower, lost: bool) -> None:
        """Deliver news of the output to ``follower``; if ``lost`` is true, also the news that the worker has died."""
        tail = self._tails.get(task_id)
        if tail is None:
            tail = self._tails[task_id] = _Tail(self._store, task_id)
        tail.join(follower)
        if lost:
            self._store.liveness.watch(task_id, follower.lost)

    def leave(self, task_id: str, follower: _Follower) -> None:
        """Deliver no more news to ``follower``. A second call does nothing."""
        tail = self._tails.get(task_id)
        if tail is not None:
            tail.leave(follower)
            self._store.liveness.unwatch(task_id, follower.lost)
            if not tail:
                del self._tails[task_id]


class OutputStream(Following[T], Generic[T]):
    """Iterates over the chunks of one output, in order, each exactly once: ``async for chunk in result.stream()``.

    The stream ends when the task has succeeded or its output was closed. If the task failed or was revoked, the stream
    raises the task's own exception after the last chunk. There is no I/O and no subscription before the first step.
    With ``async with result.stream() as stream`` the subscription ends with the block, also if the block ends early.
    """

    def __init__(
        self,
        streams: Streams,
        store: StreamStore,
        task_id: str,
        reading: Reading,
        on_lost: str,
        on_restart: str,
        on_gap: str,
    ) -> None:
        super().__init__()
        self._streams = streams
        self._store = store
        self._task_id = task_id
        self._reading = reading
        self._follower = _Follower(reading)
        self._on_lost = on_lost
        self._on_others = (on_restart, on_gap)
        self._reopened = False
        self._entries = _FIRST_PAGE

    @property
    def cursor(self) -> str:
        """The place after the last chunk that was returned: ``stream(after=cursor)`` goes on from there."""
        return str(self._reading.place)

    @property
    def attempt(self) -> int:
        """How many times another attempt has begun the output again; counted only with ``on_restart="continue"``."""
        return self._reading.attempt

    async def __anext__(self) -> T:
        self._begin()
        try:
            while await self._something(None):
                if self._reading.obstacle is None:
                    return cast("T", self._reading.take())
                await self._finish()
            raise StopAsyncIteration
        finally:
            self._busy = False

    async def batches(self) -> AsyncGenerator[list[T], None]:
        """Iterate over lists of chunks. Each list has all chunks that have arrived, to write them together."""
        while batch := await self.batch():
            yield [chunk for _, chunk in batch]

    async def batch(self) -> list[tuple[str, T]]:
        """Wait for a chunk, and return all chunks that have arrived, each with its cursor. Returns ``[]`` at the end.

        Use it in a web handler that passes the cursors on, as `aioresult.sse.events` does. Raises the same errors as
        iterating over the stream.
        """
        self._begin()
        try:
            while await self._something(None):
                if batch := self._taken(None):
                    return batch
                await self._finish()
            return []
        finally:
            self._busy = False

    async def page(self, limit: int, wait: float) -> OutputPage:
        """Return at most ``limit`` chunks that have arrived. If there are none, wait at most ``wait`` seconds."""
        self._begin()
        try:
            await self._something(asyncio.get_running_loop().time() + wait)
            reading = self._reading
            chunks = [chunk for _, chunk in self._taken(limit)]
            if not chunks and isinstance(error := reading.obstacle, AioResultError):
                raise error
            return OutputPage(chunks, self.cursor, reading.obstacle is END)
        finally:
            self._busy = False

    @property
    def state(self) -> str:
        """How the output ended: the task's state, or ``"CLOSED"``. Empty until the stream has ended."""
        return self._reading.state if self._closed else ""

    def resumed(self, cursor: str, on_lost: str | None = None) -> OutputStream[T]:
        """Make a stream of the same output that begins after ``cursor``, such as the cursor of an `OutputGap`.

        :param on_lost: as for `aioresult.AsyncResult.stream`. The default is the option of this stream. The other
            options are always those of this stream.
        :raises InvalidCursor: ``cursor`` is not a cursor.
        """
        return self._streams.stream(self._task_id, cursor, on_lost or self._on_lost, *self._on_others)

    def dumps(self, value: Any) -> bytes:
        """Encode ``value`` as one line of JSON for a browser.

        Types that JSON lacks are tagged as in the store. NaN becomes null.

        :raises EncodeError: JSON cannot hold ``value``.
        """
        return self._store.dumps_text(self._task_id, value)

    def __repr__(self) -> str:
        return f"<OutputStream of {self._task_id} after {self.cursor}>"

    # -- steps ------------------------------------------------------------------------------------------------------

    def _taken(self, limit: int | None) -> list[tuple[str, T]]:
        """Take at most ``limit`` chunks from the box (the chunks that wait in memory), each with its cursor.

        Stops at the end of the output, or at an error.
        """
        taken: list[tuple[str, T]] = []
        while len(self._reading) and self._reading.obstacle is None and (limit is None or len(taken) < limit):
            chunk = self._reading.take()
            taken.append((self.cursor, chunk))
        return taken

    async def _something(self, deadline: float | None) -> bool:
        """Wait until there is an item in the box: a chunk, an error, or the end. Waits at most until ``deadline``.

        If the log must be read, this reads it at least one time, even if the deadline has passed.

        Returns false if the stream is closed.
        """
        reading, follower = self._reading, self._follower
        if not self._closed:
            self._store.check()
        while not self._closed and not len(reading):
            if follower.failure is not None:
                self._close()
                raise copy_of_error(follower.failure)
            if reading.behind:
                await self._read_page(patient=deadline is None)
            elif deadline is not None and asyncio.get_running_loop().time() >= deadline:
                break
            elif self._leave is None:
                self._hold(partial(self._streams.leave, self._task_id, follower))
                self._streams.join(self._task_id, follower, self._on_lost == "raise")
            elif not await follower.news(deadline):
                break
        return not self._closed

    async def _read_page(self, patient: bool) -> None:
        """Read a page of the log. If ``patient`` is true, repeat it until an outage is over, as every wait does."""
        page, entries = await (retry_outages(self._read) if patient else self._read())
        self._reading.page(entries, page.more, page.final, page.top)
        if entries:
            size = sum(len(entry.data) for entry in page.entries) / len(entries)
            self._entries = int(min(max(_PAGE_BYTES / (size + 1), 1), _PAGE_ENTRIES))

    async def _read(self) -> tuple[Page, list[Decoded]]:
        after = self._reading.ask()
        try:
            page = await self._store.page(PageRequest(self._task_id, after, self._entries))
            return page, [self._decoded(entry) for entry in page.entries]
        except BaseException:
            self._reading.failed()
            raise

    def _decoded(self, entry: Entry) -> Decoded:
        chunks = () if entry.state else self._store.loads_chunks(self._task_id, entry.data)
        return Decoded(entry.epoch, entry.last, chunks, entry.state)

    async def _finish(self) -> None:
        """Handle the item after the last chunk: raise it if it is an error, or raise the exception of the task.

        Returns if the task has succeeded, or if there is more to read after all.
        """
        obstacle = self._reading.obstacle
        if isinstance(obstacle, AioResultError):
            self._close()
            raise obstacle
        outcome: Outcome | None = None
        if self._reading.state not in (SUCCESS, CLOSED):
            # The end mark, or the news that the task is over, may have arrived before the result itself.
            outcome = self._follower.final or await self._store.wait_for(self._task_id, inf)
            if isinstance(outcome, TaskMeta) and outcome.status != self._reading.state:
                if self._reading.state and not self._reopened:
                    # Another attempt has ended the task. It may have written output since the end mark was read.
                    self._reopened = True
                    self._reading.reopen()
                    return
                self._reading.state = outcome.status
        self._close()
        raise_or_return(outcome)

    def _wake(self) -> None:
        self._follower.wake()
