"""Adds to a backend's primitives what all backends share: batches, retries, one hub, and opening and closing.

A *primitive* is a method that the author of a backend writes; see `contract`. A *topic* is what a waiter waits for: a
task id, or a text that begins with NUL and stands for a chord, an output, a group or workers.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from threading import get_ident
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from ..chord import (
    CHORD_TOPIC,
    READY_TOPIC,
)
from ..exceptions import (
    AioResultError,
    BackendClosedError,
    BackendNotOpenError,
    UsageError,
    WrongEventLoopError,
)
from ..log import OUTPUT_TOPIC, OutputNews
from ..meta import TaskMeta
from ..progress import GROUP_TOPIC
from ..record import Record
from ..run import WORKER_TOPIC, WORKERS_TOPIC
from ..tasks import EMPTY, fail, run_to_completion, spawn
from .contract import BackendContract, CoreOptions, Removal
from .opening import connect_patiently
from .shard import Shard

__all__ = ["BackendCore", "CoreOptions", "Removal"]

logger: logging.Logger = logging.getLogger("aioresult")

T = TypeVar("T")

#: The most seconds that `_say_goodbye` may take.
_GOODBYE = 1.0


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
        self._shards: list[Shard] = []

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
        shard = self._shard_of(task_id)
        if shard.hub.has_waiters(task_id):
            shard.hub.receive(task_id, *shard.finding(task_id, stored))

    def _chord_news(self, group_id: str, ready: bool) -> None:
        """A backend calls this with each message about a chord. If ``ready``, a callback may wait to be dispatched."""
        topic = CHORD_TOPIC + group_id
        self._shard_of(topic).hub.mark_stale(topic)
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
        self._shard_of(topic).hub.receive(topic, TaskMeta(topic, "NEWS", news), remember=False)

    def read_again(self, topic: str) -> None:
        """Have the hub read ``topic`` again in its next batch. A topic is what a waiter waits for. Used by chords."""
        if self._loop is not None:
            self._shard_of(topic).hub.mark_stale(topic)

    def _listener_lost(self, reason: BaseException) -> None:
        """A backend calls this when its listener, the connection that carries messages, has broken."""
        for shard in self._shards if self._loop is not None else ():  # otherwise `aclose` closed the listener
            shard.listener_lost(reason)

    # -- shards -----------------------------------------------------------------------------------------------------

    def _shard_names(self) -> Sequence[str]:
        """Return a URL without a password for each shard that the store has when it is opened."""
        return [self.as_uri()]

    def _new_shard(self, where: str) -> Shard:
        return Shard(self, where)

    def _shard_of(self, topic: str) -> Shard:
        """Return the shard that serves ``topic``."""
        return self._shards[0]

    def _extending(self, change: asyncio.Future[T], record: Record | None) -> asyncio.Future[T]:
        """Return a future for ``change``, which has been submitted. It is done when the record's group is kept, too.

        The group may be in another shard. Its keeping must not hold up the batch of the record, and its error does not
        concern the caller: the record is stored.
        """
        if record is None or not record.group_id or not self.groups_apart:
            return change
        group = CHORD_TOPIC + record.group_id
        both: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def conclude(_: object) -> None:
            if not both.done():
                both.set_result(change.result())

        def extend(_: object) -> None:
            if change.cancelled() or (both.cancelled() and not change.done()):
                return
            if (error := change.exception()) is not None:
                if not both.done():
                    fail(both, error)
                return
            try:
                self._shard_of(group).extensions.submit(record).add_done_callback(conclude, context=EMPTY.context)
            except AioResultError:  # the backend was closed
                conclude(None)

        def give_up(_: object) -> None:
            if both.cancelled():
                change.cancel()

        change.add_done_callback(extend, context=EMPTY.context)
        both.add_done_callback(give_up, context=EMPTY.context)
        return both

    def _is_away(self, shard: Shard) -> bool:
        """True if the part of the store cannot be reached, as far as the backend knows."""
        return shard.failing

    def _by_shard(self, topics: Iterable[str]) -> dict[Shard, list[str]]:
        """Group topics by the shards that serve them."""
        if len(self._shards) == 1:
            return {self._shards[0]: list(topics)}
        found: dict[Shard, list[str]] = {}
        for topic in topics:
            found.setdefault(self._shard_of(topic), []).append(topic)
        return found

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
        self._shards = [self._new_shard(where) for where in self._shard_names()]
        for shard in self._shards:
            shard.start()

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
            await asyncio.gather(*(shard.close(error) for shard in self._shards))
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

    async def _call(self, operation: Callable[[], Awaitable[T]], topic: str = "", in_order: bool = False) -> T:
        """Await ``operation()``, which is about ``topic``, and retry it while the server is away.

        Use it for calls that cannot be batched. An asyncio task of the backend runs the call, and `aclose` ends that
        task. With ``in_order``, calls about the same topic run one after the other.
        """
        return await self._shard_of(topic).call(operation, topic if in_order else None)

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
