"""The hub: task id → those who wait for it.

One task and one connection serve every waiter of a backend. The order that never loses a wake-up is: register the
waiter, subscribe, have the subscription confirmed, *then* read what is stored. A result stored before that read is
found by it; one stored after it arrives as a message. A lost connection throws every subscription back to the start
of that order, so the gap of a reconnect is closed by the same rule.

A first look, before subscribing, is only a fast path: what has finished already never costs a subscription. Whoever
has just looked enters at "to add".

::

              watch()          look: not ready          subscribed, confirmed, read       final meta, or unwatch()
    (nothing) ──────▶ to look ───────────────▶ to add ────────────────────────────▶ live ─────▶ to drop ─▶ (nothing)
                                                 ▲                                   │
                                                 └────────────── lost() ─────────────┘
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from operator import attrgetter
from typing import Protocol, TypeVar

from .batch import fail
from .exceptions import AioResultError, BackendConnectionError, BackendError, TimeoutError
from .meta import TaskMeta

__all__ = ["Backoff", "Hub", "Outcome", "SingleWaiter", "Source", "Waiter", "chunked", "timed_out"]

logger: logging.Logger = logging.getLogger("aioresult")

T = TypeVar("T")

#: What a waiter is told: a meta, or why there will be none.
Outcome = TaskMeta | Exception


class Waiter(Protocol):
    """Whoever waits. `receive` is called from the event loop; it must neither block nor raise."""

    def receive(self, task_id: str, outcome: Outcome) -> None:
        """News of ``task_id``: any meta, final or not, or an exception. After either of the last two, no more."""


class SingleWaiter:
    """Waits for the end of one task, with the caller's deadline on a timer: no lock, no task, no cancellation.

    ``what`` is waited for, as the error names it, for ``timeout`` seconds at most, until a meta is ``enough``: by
    default one that is ready. Whichever comes first, the result or the deadline, settles `future`.
    """

    __slots__ = ("_enough", "_timer", "future")

    def __init__(
        self, what: str, timeout: float | None, enough: Callable[[TaskMeta], bool] = attrgetter("ready")
    ) -> None:
        loop = asyncio.get_running_loop()
        self.future: asyncio.Future[TaskMeta] = loop.create_future()
        self._enough = enough
        self._timer = None if timeout is None else loop.call_later(timeout, self._expire, what, timeout)

    def receive(self, task_id: str, outcome: Outcome) -> None:
        if self.future.done():
            return
        if isinstance(outcome, Exception):
            fail(self.future, outcome)
        elif self._enough(outcome):
            self.future.set_result(outcome)

    def _expire(self, what: str, timeout: float) -> None:
        if not self.future.done():
            fail(self.future, timed_out(what, timeout))

    def stop(self) -> None:
        """Drop the timer."""
        if self._timer is not None:
            self._timer.cancel()


def timed_out(what: str, timeout: float) -> TimeoutError:
    """The error for a caller whose own deadline has passed."""
    return TimeoutError(f"{what} was not ready within timeout={timeout:g} seconds; it may be awaited again")


class Source(Protocol):
    """What the hub needs of a backend. Each method raises `BackendConnectionError` if a retry may mend the failure."""

    async def subscribe(self, task_ids: Sequence[str]) -> None:
        """Have news of these ids sent to `Hub.receive`, and return once the server has confirmed it.

        Connects the listener if it is not connected. Ids that are subscribed already are confirmed again.
        """

    async def unsubscribe(self, task_ids: Sequence[str]) -> None:
        """The opposite. Ids that are not subscribed are ignored."""

    async def read(self, task_ids: Sequence[str]) -> Sequence[Outcome | None]:
        """What is stored, in the order of the ids; ``None`` for nothing, an exception for what cannot be read."""


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


class _Topic:
    """An id that somebody waits for."""

    __slots__ = ("subscribed", "waiters")

    def __init__(self, waiter: Waiter) -> None:
        self.waiters = [waiter]
        #: Whether a subscription was asked for: then dropping the id has something to undo.
        self.subscribed = False


class Hub:
    """Waiters on one side, a `Source` on the other, and the one task between them.

    ``chunk`` bounds how many ids go into one call of the source. Every ``recheck`` seconds, unless that is 0, whatever
    is waited for is read again, for messages that were lost on the way.
    """

    def __init__(
        self, source: Source, *, chunk: int = 500, recheck: float = 0.0, backoff: Backoff | None = None
    ) -> None:
        self._source = source
        self._chunk = chunk
        self._recheck = recheck
        self._timer: asyncio.TimerHandle | None = None
        self._backoff = backoff or Backoff()
        self._topics: dict[str, _Topic] = {}
        # Dicts for their order: first come, first served.
        self._to_look: dict[str, None] = {}
        self._to_read: dict[str, None] = {}
        self._to_add: dict[str, None] = {}
        self._to_drop: dict[str, None] = {}
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed: Exception | None = None

    def __len__(self) -> int:
        """How many ids are waited for."""
        return len(self._topics)

    def start(self) -> None:
        """Start the task. Needs a running event loop."""
        self._task = asyncio.create_task(self._run(), name="aioresult-hub")
        self._set_timer()

    async def close(self, error: Exception) -> None:
        """End the task and tell every waiter ``error``; whoever comes later gets it, too."""
        self._closed = error
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._tell_everyone(error)

    # -- the waiters' side: plain calls, no await, nothing to cancel ------------------------------------------------

    def watch(self, task_id: str, waiter: Waiter, look: bool = True) -> None:
        """Tell ``waiter`` of every meta of ``task_id`` from now on; what is stored already comes first.

        Without ``look`` it is read only after subscribing: for who has just looked and found nothing that is final.
        Raises the error given to `close` if that was called.
        """
        if self._closed is not None:
            raise self._closed
        topic = self._topics.get(task_id)
        if topic is not None:
            topic.waiters.append(waiter)
        else:
            topic = self._topics[task_id] = _Topic(waiter)
            if task_id in self._to_drop:  # its subscription still stands, and is this topic's to undo now
                del self._to_drop[task_id]
                topic.subscribed = True
            (self._to_look if look else self._to_add)[task_id] = None
            self._work.set()

    def unwatch(self, task_id: str, waiter: Waiter) -> None:
        """``waiter`` no longer cares; the last one ends the subscription. Does nothing if it was told the end."""
        topic = self._topics.get(task_id)
        if topic is not None and waiter in topic.waiters:
            topic.waiters.remove(waiter)
            if not topic.waiters:
                self._remove(task_id, topic)

    def _remove(self, task_id: str, topic: _Topic) -> None:
        del self._topics[task_id]
        self._to_look.pop(task_id, None)
        self._to_read.pop(task_id, None)
        self._to_add.pop(task_id, None)
        if topic.subscribed:
            self._to_drop[task_id] = None
            self._work.set()

    # -- the source's side: also plain calls, made as the bytes arrive ----------------------------------------------

    def wants(self, task_id: str) -> bool:
        """Whether anybody waits for ``task_id``: a message for nobody need not be decoded."""
        return task_id in self._topics

    def receive(self, task_id: str, outcome: Outcome) -> None:
        """Pass on a meta, or the error that stands in its place."""
        topic = self._topics.get(task_id)
        if topic is None:
            return
        for waiter in tuple(topic.waiters):
            waiter.receive(task_id, outcome)
        # Those first: they are to run before the subscription is ended.
        if self._topics.get(task_id) is topic and (isinstance(outcome, Exception) or outcome.ready):
            # Whoever comes after this needs a topic of their own, for there will be no further message.
            self._remove(task_id, topic)

    def news(self, task_id: str) -> None:
        """There is something new to read: for sources whose messages do not carry the value."""
        if task_id in self._topics:
            self._to_read[task_id] = None
            self._work.set()

    def lost(self) -> None:
        """The listener's connection is gone, and every subscription with it: subscribe, then read, all anew."""
        for task_id, topic in self._topics.items():
            topic.subscribed = False
            self._to_add[task_id] = None
        self._to_drop.clear()
        self._work.set()

    # -- the task ---------------------------------------------------------------------------------------------------

    def _set_timer(self) -> None:
        if self._recheck:
            self._timer = asyncio.get_running_loop().call_later(self._recheck, self._read_again)

    def _read_again(self) -> None:
        self._to_read.update(dict.fromkeys(self._topics))
        if self._to_read:
            self._work.set()
        self._set_timer()

    async def _run(self) -> None:
        while self._closed is None:  # should a source swallow the cancellation in `close`
            await self._work.wait()
            self._work.clear()
            try:
                while self._to_read or self._to_look or self._to_add or self._to_drop:
                    # A chunk of each in turn, so that a flood of one kind does not starve the others.
                    await self._read(self._take(self._to_read))
                    await self._look()
                    await self._add()
                    await self._drop()
                self._backoff.reset()
            except BackendConnectionError as exc:
                # Begin again with everyone. Not `lost`: if only a read failed, the subscriptions still stand.
                self._to_add.update(dict.fromkeys(self._topics))
                self._work.set()
                if self._topics or self._to_drop:
                    pause = self._backoff.pause()
                    logger.warning("lost the way to the results (%s); trying again in %.2f s", exc, pause)
                    await asyncio.sleep(pause)
            except AioResultError as exc:
                self._tell_everyone(exc)  # a retry cannot mend this: nobody may wait for it
            except Exception as exc:
                # A bug, here or in a backend. Nobody may hang for it, and the next wait starts afresh.
                logger.exception("the listener failed")
                error = BackendError(f"the listener failed: {type(exc).__name__}: {exc}")
                error.__cause__ = exc
                self._tell_everyone(error)

    async def _look(self) -> None:
        ids = self._take(self._to_look)
        await self._read(ids)
        self._to_add.update((task_id, None) for task_id in ids if task_id in self._topics)

    async def _add(self) -> None:
        ids = self._take(self._to_add)
        for task_id in ids:
            self._topics[task_id].subscribed = True
        if ids:
            await self._source.subscribe(ids)
            await self._read(ids)

    async def _drop(self) -> None:
        ids = self._take(self._to_drop)
        try:
            if ids:
                await self._source.unsubscribe(ids)
        except BackendConnectionError:
            # A server that is busy refuses and keeps the connection: then the subscriptions still stand.
            for task_id in ids:
                if task_id in self._topics:
                    self._topics[task_id].subscribed = True
                else:
                    self._to_drop[task_id] = None
            raise

    async def _read(self, ids: Sequence[str]) -> None:
        ids = [task_id for task_id in ids if task_id in self._topics]
        if ids:
            for task_id, outcome in zip(ids, await self._source.read(ids), strict=True):
                if outcome is not None:
                    self.receive(task_id, outcome)

    def _take(self, ids: dict[str, None]) -> list[str]:
        taken = list(islice(ids, self._chunk))
        for task_id in taken:
            del ids[task_id]
        return taken

    def _tell_everyone(self, error: Exception) -> None:
        for task_id in list(self._topics):
            self.receive(task_id, error)


def chunked(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """``items`` in tuples of at most ``size``; taken from a snapshot, so that the original may change meanwhile."""
    source = iter(tuple(items))
    while chunk := tuple(islice(source, size)):
        yield chunk
