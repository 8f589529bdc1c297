"""Adds to a backend's primitives what all backends share: batches, retries, one hub, and opening and closing.

A *primitive* is a method that the author of a backend writes; see `contract`. A *topic* is what a waiter waits for: a
task id, or a text that begins with NUL and stands for a chord, an output, a group or workers.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from threading import get_ident
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, cast

from ..batch import Batcher
from ..chord import (
    CHORD_TOPIC,
    READY_TOPIC,
    ChordOp,
    ChordState,
    ChordStep,
    chord_meta,
)
from ..exceptions import (
    AioResultError,
    BackendClosedError,
    BackendConnectionError,
    BackendError,
    BackendNotOpenError,
    UsageError,
    WrongEventLoopError,
)
from ..health import Health
from ..hub import Finding, Hub
from ..log import OUTPUT_TOPIC, Flush, OutputNews, Page, PageRequest
from ..meta import TaskMeta
from ..progress import GROUP_TOPIC
from ..record import Record
from ..retry import Persistence
from ..run import WORKER_TOPIC, WORKERS_TOPIC, RunState, RunStep
from ..serialization import unreadable
from ..states import EXCEPTION_STATES
from ..tasks import LONGEST_STEP, copy_of_error, run_to_completion, spawn
from ..waiter import Outcome
from .contract import BackendContract, CoreOptions, Removal
from .opening import connect_patiently

__all__ = ["BackendCore", "CoreOptions", "Removal"]

logger: logging.Logger = logging.getLogger("aioresult")

T = TypeVar("T")

#: The most calls in flight at once, if they are of a kind that cannot be batched.
_PARALLEL_CALLS = 8
#: The most seconds that `_say_goodbye` may take.
_GOODBYE = 1.0
#: How many ids go into the first read, while the size of the values is unknown.
_FIRST_READ = 100
#: The estimated size of a value shrinks at most by this factor from one read to the next.
_ESTIMATE_SINKS = 8


class BackendCore(BackendContract):
    """Has what every backend shares, below the public coroutines of `aioresult.backends.base.Backend`."""

    def __init__(self, url: str = "", **options: Unpack[CoreOptions]) -> None:
        super().__init__(url, **options)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = self._pid = 0
        #: A future that is done when the running call of `open` or `aclose` ends; ``None`` if there is no such call.
        self._changing: asyncio.Future[None] | None = None
        self._opening: asyncio.Task[None] | None = None
        self._was_closed = False
        #: The estimated size of a stored value. It decides how many ids go into a read, to stay within `chunk_bytes`.
        self._value_size = self.chunk_bytes / _FIRST_READ

    def __repr__(self) -> str:
        state = "open" if self.is_open else "closed"
        return f"<{type(self).__name__} {self.as_uri()!r} {state}>"

    @property
    def is_open(self) -> bool:
        """True if the backend is open in this process."""
        return self._loop is not None and self._pid == os.getpid() and not self._loop.is_closed()

    # -- what authors call ------------------------------------------------------------------------------------------

    def _received(self, task_id: str, stored: Any) -> None:
        """A backend calls this with each result that arrives as a message. ``stored`` is as `_fetch` returns it."""
        if self._hub.has_waiters(task_id):
            self._hub.receive(task_id, *self._finding(task_id, stored))

    def _chord_news(self, group_id: str, ready: bool) -> None:
        """A backend calls this with each message about a chord. If ``ready``, a callback may wait to be dispatched."""
        self._hub.mark_stale(CHORD_TOPIC + group_id)
        if ready and self._is_id(group_id):
            self._notify_topic(READY_TOPIC, group_id)

    def _output_news(self, task_id: str, epoch: int, last: int, data: bytes | None) -> None:
        """A backend calls this with each message about the output of a task. For ``data`` see `OutputNews`."""
        self._notify_topic(OUTPUT_TOPIC + task_id, OutputNews(epoch, last, data))

    def _worker_news(self, worker: str) -> None:
        """A backend calls this with the id of each worker that has died or shut down."""
        self._notify_topic(WORKERS_TOPIC, worker)

    def _group_news(self, group_id: str) -> None:
        """A backend calls this when the counts of a group have changed."""
        self._notify_topic(GROUP_TOPIC + group_id, group_id)

    def _revoke_news(self, worker: str, run: str) -> None:
        """A backend calls this in the process of ``worker`` with the id of each run that the worker is to stop."""
        self._notify_topic(WORKER_TOPIC + worker, run)

    def _notify_topic(self, topic: str, news: object) -> None:
        self._hub.receive(topic, TaskMeta(topic, "NEWS", news), remember=False)

    def _listener_lost(self, reason: BaseException) -> None:
        """A backend calls this when its listener, the connection that carries messages, has broken."""
        if self._loop is None:  # `aclose` closed the listener
            return
        logger.warning("the listener of %s was lost (%s); its subscriptions will be restored", self.as_uri(), reason)
        self._health.failed(reason)
        self._hub.lost()

    # -- life -------------------------------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Connect to the server, and return the backend itself.

        A closed backend may be opened again, also in another event loop. This includes a backend whose event loop ended
        without `aclose`. A child process may open a backend that its parent has open.

        :raises BackendConnectionError: the server cannot be reached within ``wait_for_server`` seconds.
        :raises BackendRefusedError: the server refuses, for instance because of the password.
        :raises UsageError: the backend is open or is being opened or closed, or no asyncio event loop runs.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise UsageError("aioresult needs a running asyncio event loop; it does not run on trio") from None
        self._leave_behind()
        if self._loop is not None:
            raise UsageError(f"{self!r} is open already; open a backend once and share it")
        if self._changing is not None:
            raise UsageError(f"{self!r} is being opened or closed by another call; wait for that call to return")
        self._changing = loop.create_future()
        self._thread, self._pid = get_ident(), os.getpid()
        try:
            while not await self._opened():
                await run_to_completion(self._close)  # other code cancelled the attempt, and not this caller
            if self._opening is None:  # `aclose` was called
                raise self._closed()
            self._start(loop)
        except BaseException:
            await run_to_completion(self._close)
            if self._opening is None:
                raise self._closed() from None
            raise
        finally:
            self._opening = None
            self._settle_change()
        return self

    async def _opened(self) -> bool:
        """Open in an asyncio task with an empty context. False if other code cancelled that task and not the caller."""
        opening = self._opening = spawn(connect_patiently(self))
        try:
            await opening
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if self._opening is None or not opening.cancelled() or (me is not None and me.cancelling()):
                raise
            return False
        return True

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._health = Health(self.as_uri())
        self._persistence = Persistence(self.retry_for, self._outage, self._health)
        self._hub = Hub(
            _HubSource(self),
            chunk=self.fetch_chunk,
            recheck=self.recheck,
            health=self._health,
        )
        batcher = partial(Batcher[Any, Any], max_bytes=self.chunk_bytes)
        self._writes: Batcher[Record | Removal, bool] = batcher(
            self._write_batch,
            max_items=self.store_chunk,
            parallel=self.store_parallel,
            max_held=self.max_pending_bytes,
            persistence=self._persistence,
            at_once=self._write_at_once,
        )
        self._fetches: Batcher[str, Outcome | None] = batcher(self._outcomes, max_items=self.fetch_chunk, parallel=2)
        self._calls: Batcher[Callable[[], Awaitable[Any]], Any] = batcher(
            self._perform_calls, max_items=1, parallel=_PARALLEL_CALLS
        )
        self._steps: Batcher[ChordStep, ChordState] = batcher(
            self._perform_steps,
            max_items=self.fetch_chunk,
            parallel=2,
            max_held=self.max_pending_bytes,
            persistence=self._persistence,
        )
        self._appends: Batcher[Flush, int] = batcher(
            self._perform_appends,
            max_items=self.store_chunk,
            parallel=self.store_parallel,
            persistence=self._persistence,
            at_once=self._append_at_once,
        )
        self._page_reads: Batcher[PageRequest, Page] = batcher(
            self._perform_page_reads, max_items=self.fetch_chunk, parallel=2, persistence=self._persistence
        )
        self._runs: Batcher[RunStep, RunState] = batcher(
            self._perform_runs,
            max_items=self.store_chunk,
            parallel=self.store_parallel,
            max_held=self.max_pending_bytes,
            persistence=self._persistence,
        )
        # Pings are not in `_calls`: a ping must not wait for other calls, and must not be retried.
        self._pings: Batcher[None, float] = batcher(self._perform_pings, max_items=self.fetch_chunk, parallel=2)
        results = (self._writes, self._fetches, self._calls, self._steps, self._pings)
        self._batchers = (*results, self._appends, self._page_reads, self._runs)
        self._hub.start()

    def _settle_change(self) -> None:
        changing, self._changing = self._changing, None
        if changing is not None and not changing.done():
            changing.set_result(None)

    async def aclose(self) -> None:
        """Close the backend: every waiter gets `BackendClosedError`, and every connection is closed.

        May be called more than once. A call of `open` that has not returned raises that error, too.
        """
        self._leave_behind()
        if self._changing is not None:
            if self._changing.get_loop() is not asyncio.get_running_loop():
                raise self._foreign()
            if self._opening is not None:
                self._was_closed = True
                self._opening.cancel()
                self._opening = None
            await asyncio.shield(self._changing)
        if self._loop is None:
            return
        self.check()
        self._changing = self._loop.create_future()
        self._loop = None
        self._was_closed = True
        await run_to_completion(partial(self._shut_down, self._closed()))

    async def _shut_down(self, error: Exception) -> None:
        try:
            await self._hub.close(error)
            await asyncio.gather(*(batcher.close(error) for batcher in self._batchers))
            try:
                await asyncio.wait_for(self._say_goodbye(), _GOODBYE)
            except Exception as exc:
                logger.debug("closed %s without telling the server: %s", self.as_uri(), exc)
            await self._close()
        finally:
            self._settle_change()

    async def _say_goodbye(self) -> None:
        """Tell the server that this backend closes. A subclass overrides it; the connections are still open."""

    def _leave_behind(self) -> None:
        """Drop what belongs to an event loop that has ended, or to the process that this process was forked from."""
        loop = self._loop or (self._changing.get_loop() if self._changing is not None else None)
        if loop is None:
            return
        forked = self._pid != os.getpid()
        if forked or loop.is_closed():
            self._was_closed = True
            self._abandon(forked)
            # Keep them as long as the backend: if its tasks and transports were collected, they would use their loop.
            self._left_behind = (self.__dict__.copy(), getattr(self, "_left_behind", None)) if forked else None
            self._loop = self._changing = self._opening = None

    def _closed(self) -> BackendClosedError:
        return BackendClosedError(f"the backend {self.as_uri()!r} was closed")

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    def check(self) -> None:
        """Raise a clear error if the backend is not open, or was opened in another event loop, thread or process."""
        if self._loop is None and self._was_closed:
            raise self._closed()
        if self._loop is None:
            raise BackendNotOpenError(
                f"{self!r} is not open: use it inside 'async with aioresult.connect(…) as backend:' "
                f"or call 'await backend.open()' first"
            )
        # Compare threads, because a thread runs one event loop at a time. Asking asyncio for the running loop costs a
        # system call on Python 3.11. In a forked child, thread and loop look the same, but the process id differs.
        if get_ident() != self._thread or os.getpid() != self._pid or not self._loop.is_running():
            raise self._foreign()

    def _foreign(self) -> WrongEventLoopError:
        if os.getpid() != self._pid:
            return WrongEventLoopError(
                f"{self!r} was opened in another process, {self._pid}; this is its child process, {os.getpid()}; "
                f"call 'await backend.open()' here, or open one backend per process"
            )
        if get_ident() != self._thread:
            return WrongEventLoopError(
                f"{self!r} belongs to the event loop of another thread. In a plain thread, call "
                f"'asyncio.run_coroutine_threadsafe(coroutine, loop).result()' with that loop; in a worker thread of "
                f"anyio, Starlette or FastAPI, call 'anyio.from_thread.run(function, *args)'. Where each thread runs "
                f"an event loop of its own, open one backend per event loop: 'aioresult.per_loop(url)'"
            )
        return WrongEventLoopError(
            f"{self!r} was opened in another event loop; open one backend per event loop: 'aioresult.per_loop(url)'"
        )

    # -- what the batchers and the hub run --------------------------------------------------------------------------

    def _outage(self, error: BackendConnectionError) -> None:
        """Make the queued calls raise ``error``, because the server has been away for ``retry_for`` seconds."""
        for batcher in self._batchers:
            batcher.fail_queued(copy_of_error(error))

    async def _call(self, operation: Callable[[], Awaitable[T]], key: Hashable = None) -> T:
        """Await ``operation()``, and retry it while the server is away. For calls that cannot be batched.

        An asyncio task of the backend runs it, and `aclose` ends that task. Calls with the same ``key`` run in order.
        """
        return cast("T", await self._calls.submit(partial(self._persistence.call, operation), key))

    async def _perform_calls(self, calls: Sequence[Callable[[], Awaitable[Any]]]) -> Sequence[Any]:
        return [await call() for call in calls]

    async def _perform_pings(self, pings: Sequence[None]) -> Sequence[float]:
        now = asyncio.get_running_loop().time
        began = now()
        try:
            await self._ping()
        except BackendConnectionError as exc:
            self._health.lost(exc)
            raise
        except Exception as exc:
            self._health.failed(exc)
            raise _as_error(exc) from exc.__cause__
        # This does not end the outage for `Persistence`: a server may answer a ping before it is ready to store.
        self._health.connected = True
        return [now() - began] * len(pings)

    async def _perform_steps(self, steps: Sequence[ChordStep]) -> Sequence[ChordState | BaseException]:
        return await self._chord_steps(steps)

    async def _perform_appends(self, flushes: Sequence[Flush]) -> Sequence[int | BaseException]:
        return await self._append(flushes)

    async def _perform_page_reads(self, requests: Sequence[PageRequest]) -> Sequence[Page | BaseException]:
        return await self._pages(requests)

    async def _perform_runs(self, steps: Sequence[RunStep]) -> Sequence[RunState | BaseException]:
        return await self._run_steps(steps)

    def _write_at_once(self, write: Record | Removal, done: Callable[[bool | None], None]) -> bool:
        return isinstance(write, Record) and self._store_at_once(write, done)

    async def _write_batch(self, writes: Sequence[Record | Removal]) -> Sequence[bool | BaseException]:
        """Do stores and removals. Their order does not matter: no id has both a store and a removal in one batch."""
        records = [write for write in writes if isinstance(write, Record)]
        if len(records) == len(writes):
            return await self._store(records)
        removals = [write for write in writes if isinstance(write, Removal)]
        removed, stored = await asyncio.gather(
            self._remove(removals), self._store(records) if records else _nothing(), return_exceptions=True
        )
        if isinstance(removed, BaseException):
            raise removed
        if isinstance(stored, BaseException):
            raise stored
        outcomes = {True: iter(stored), False: iter(removed)}
        return [next(outcomes[isinstance(write, Record)]) for write in writes]

    async def _remove(self, removals: Sequence[Removal]) -> Sequence[bool | BaseException]:
        unseen = [removal for removal in removals if removal.version is None]
        errors: dict[Removal, BaseException] = {}
        if unseen:
            versions = await self._versions([removal.task_id for removal in unseen])
            for removal, version in zip(unseen, versions, strict=True):
                if isinstance(version, BaseException):
                    errors[removal] = version
                else:
                    removal.version = _NOTHING if version is None else version
        due = [removal for removal in removals if removal.version not in (None, _NOTHING)]
        if due:
            refused = await self._delete([removal.task_id for removal in due], [removal.version for removal in due])
            errors.update(
                (removal, error) for removal, error in zip(due, refused or (), strict=False) if error is not None
            )
        return [errors.get(removal, True) for removal in removals]

    async def _outcomes(self, task_ids: Sequence[str]) -> Sequence[Outcome | None]:
        return [None if finding is None else finding[0] for finding in await self._read(task_ids)]

    async def _read(self, task_ids: Sequence[str]) -> Sequence[Finding | None]:
        """Fetch and decode. If one result cannot be decoded, an error takes its place; the others are not affected."""
        if min(task_ids) < "\x01":  # a topic that is not a task begins with NUL, so it sorts before every task id
            return await self._read_topics(task_ids)
        found: list[Finding | None] = []
        while len(found) < len(task_ids):
            some = task_ids[len(found) : len(found) + max(1, int(self.chunk_bytes / self._value_size))]
            stored = await self._persistence.collect(self._fetch, some)
            seen = sum(self._stored_size(value) for value in stored if value is not None) / len(stored)
            self._value_size = max(seen, self._value_size / _ESTIMATE_SINKS, 1.0)
            await self._decode_into(found, some, stored)
        return found

    async def _decode_into(self, found: list[Finding | None], task_ids: Sequence[str], stored: Sequence[Any]) -> None:
        """Decode ``stored`` into ``found``, and give the event loop a turn every few milliseconds."""
        now = asyncio.get_running_loop().time
        pause_at = now() + LONGEST_STEP
        for task_id, value in zip(task_ids, stored, strict=True):
            found.append(None if value is None else self._finding(task_id, value))
            if now() >= pause_at:
                await asyncio.sleep(0)
                pause_at = now() + LONGEST_STEP

    async def _read_topics(self, topics: Sequence[str]) -> Sequence[Finding | None]:
        """Do the same as `_read`, for a list of topics that are not all task ids."""
        tasks = [topic for topic in topics if not topic.startswith("\x00")]
        chords = [topic for topic in topics if topic.startswith(CHORD_TOPIC)]
        found: dict[str, Finding | None] = dict(zip(tasks, await self._read(tasks) if tasks else (), strict=True))
        steps = [ChordStep(ChordOp.READ, topic.removeprefix(CHORD_TOPIC)) for topic in chords]
        states = await self._persistence.collect(self._chord_steps, steps) if steps else ()
        for topic, state in zip(chords, states, strict=True):
            if isinstance(state, ChordState):
                found[topic] = chord_meta(state), (state.count, state.size, state.done, state.failure, state.body_id)
            else:
                found[topic] = _as_error(state), None
        # The other topics carry events and have no state. Their waiters find out themselves what happened before.
        for topic in topics:
            found.setdefault(topic, (TaskMeta(topic, "NEWS"), None))
        return [found[topic] for topic in topics]

    def _finding(self, task_id: str, stored: Any) -> Finding:
        """Return the meta in ``stored``, or an error instead; and a mark, which is equal for equal stored bytes."""
        if isinstance(stored, BaseException):
            return _as_error(stored), None
        try:
            meta = self._decode(task_id, stored)
            if meta.status in EXCEPTION_STATES:
                # Each caller raises its own instance of the exception, which is decoded again for it.
                meta = replace(meta, _again=partial(self._decode, task_id, stored))
            return meta, None if meta.ready else _mark(stored)
        except BaseException as exc:
            return unreadable(f"the result of task {task_id}", exc), None


class _HubSource:
    """Gives the hub the part of a backend that it uses; see `aioresult.hub.Source`."""

    def __init__(self, backend: BackendCore) -> None:
        self.subscribe = backend._subscribe
        self.unsubscribe = backend._unsubscribe
        self.read = backend._read


#: Stands for the version of a result that did not exist when its removal began.
_NOTHING = object()


async def _nothing() -> Sequence[bool]:
    return ()


def _mark(stored: Any) -> int | None:
    try:
        return hash(stored)
    except TypeError:
        return None


def _as_error(error: BaseException) -> Exception:
    if isinstance(error, AioResultError):
        return error
    named = BackendError(f"the backend failed: {type(error).__name__}: {error}")
    named.__cause__ = error
    return named
