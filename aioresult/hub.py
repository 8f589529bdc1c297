"""The hub: task id → the waiters for it.

One task and one connection serve every waiter of a backend. The order that never loses a wake-up is: register the
waiter, subscribe, have the subscription confirmed, *then* read what is stored. A result stored before that read is
found by it; one stored after it arrives as a message. A lost connection throws every subscription back to the start
of that order, so the gap of a reconnect is closed by the same rule.

The read before the subscription is only a fast path: a result that is stored already never costs a subscription. A
caller that has just read the result enters at "to subscribe".

::

           watch()                read: not ready              subscribed, confirmed, read         final or unwatch()
    (none) ──────▶ to read first ────────────────▶ to subscribe ─────────────────────▶ live ─▶ to unsubscribe ─▶ (none)
                                                        ▲                               │
                                                        └──────────── lost() ───────────┘

Each waiter is told what is known when it comes, once, and then each change, none twice. Two things make that true. The
hub remembers the last state of each id, and tells it to waiters that join later. And every state comes with a *mark*,
equal for equal stored bytes: a state that a read finds again is not told again.

A fault stays with its cause. An exception out of a waiter ends that waiter; an id that the server refuses is refused to
its own waiters, after the batch it was in has been split.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from itertools import islice
from typing import Protocol, TypeAlias

from .exceptions import AioResultError, BackendConnectionError, BackendError
from .health import Health
from .retry import Backoff, concerns_everyone
from .tasks import EMPTY, SLICE, StandingTask, chunked, twin
from .unheard import Unheard
from .waiter import Outcome, Waiter

__all__ = ["Finding", "Hub", "Source", "chunked"]

logger: logging.Logger = logging.getLogger("aioresult")

#: What a read finds: an outcome and its mark. A state with the mark of the one before is the same state; ``None`` is
#: the mark of none.
Finding: TypeAlias = tuple[Outcome, Hashable]


class Source(Protocol):
    """What the hub needs of a backend. Each method raises `BackendConnectionError` if a retry may mend the failure."""

    async def subscribe(self, task_ids: Sequence[str]) -> Mapping[str, Exception] | None:
        """Have news of these ids sent to `Hub.receive`, and return once the server has confirmed it.

        Connects the listener if it is not connected. Ids that are subscribed already are confirmed again. Returns the
        error of each id that is refused alone.
        """

    async def unsubscribe(self, task_ids: Sequence[str]) -> None:
        """The opposite. Ids that are not subscribed are ignored."""

    async def read(self, task_ids: Sequence[str]) -> Sequence[Finding | None]:
        """What is stored, in the order of the ids; ``None`` for nothing, an exception for what cannot be read."""


class _Topic:
    """An id that somebody waits for. There may be a hundred thousand, nearly all with a single waiter."""

    __slots__ = ("_more", "heard", "known", "looks", "mark", "newcomers", "queued", "sole", "subscribed")

    def __init__(self, waiter: Waiter) -> None:
        #: The only waiter, unless there are or were more.
        self.sole: Waiter | None = waiter
        #: Two and more, by identity, in the order in which they came: leaving costs the same however many there are.
        self._more: dict[int, Waiter] | None = None
        #: Whether a subscription was asked for: then dropping the id has something to undo.
        self.subscribed = False
        #: The last state that the waiters were told, and its mark.
        self.known: Outcome | None = None
        self.mark: Hashable = None
        #: Waiters that came after that, and have not been told it.
        self.newcomers: list[Waiter] | None = None
        #: How many messages have come: what a read brings may be older than one that came meanwhile.
        self.heard = 0
        #: How many of its news are being told, a slice at a time.
        self.queued = 0
        #: How many looks have found that nothing is stored under the id; see `Unheard`.
        self.looks = 0

    def __len__(self) -> int:
        return len(self._more) if self._more is not None else int(self.sole is not None)

    def __contains__(self, waiter: Waiter) -> bool:
        return self.sole is waiter if self._more is None else id(waiter) in self._more

    def add(self, waiter: Waiter) -> None:
        """One that is there already stays where it is."""
        if self._more is None:
            self._more = {} if self.sole is None else {id(self.sole): self.sole}
            self.sole = None
        self._more[id(waiter)] = waiter

    def discard(self, waiter: Waiter) -> bool:
        """Whether it was there."""
        if self._more is not None:
            return self._more.pop(id(waiter), None) is not None
        found = self.sole is waiter
        if found:
            self.sole = None
        return found

    def waiters(self) -> tuple[Waiter, ...]:
        """As they are now, in the order in which they came."""
        if self._more is not None:
            return tuple(self._more.values())
        return () if self.sole is None else (self.sole,)


class Hub:
    """Waiters on one side, a `Source` on the other, and the one task between them.

    ``chunk`` bounds how many ids go into one call of the source. Every ``recheck`` seconds, unless that is 0, whatever
    is waited for is read again, for messages that were lost on the way. ``health`` is told of trouble, and when it is
    over.
    """

    def __init__(
        self,
        source: Source,
        *,
        chunk: int = 500,
        recheck: float = 0.0,
        backoff: Backoff | None = None,
        health: Health | None = None,
    ) -> None:
        self._source = source
        self._chunk = chunk
        #: The same for now: it shrinks while connections die, for one of the ids may be why.
        self._limit = chunk
        self._deaths = 0
        self._recheck = recheck
        self._timer: asyncio.TimerHandle | None = None
        self._backoff = backoff or Backoff()
        self._health = health or Health("the store")
        self._topics: dict[str, _Topic] = {}
        # Dicts for their order: first come, first served.
        self._to_read_first: dict[str, None] = {}
        self._to_read: dict[str, None] = {}
        self._to_subscribe: dict[str, None] = {}
        self._to_unsubscribe: dict[str, None] = {}
        queues = (self._to_read_first, self._to_subscribe, self._to_read)
        self.unheard: Unheard = Unheard(self._topics, queues, self._wake, self._health.where)
        self._work = asyncio.Event()
        self._task = StandingTask(self._run, "aioresult-hub", lambda: bool(self._topics or self._to_unsubscribe))
        self._closed: Exception | None = None
        #: News for more waiters than are told in one step, each with the waiters that have not been told yet.
        self._crowds: deque[tuple[str, _Topic, Outcome, deque[Waiter]]] = deque()

    def __len__(self) -> int:
        """How many ids are waited for."""
        return len(self._topics)

    def counts(self) -> tuple[int, int, int]:
        """How many waiters there are, for how many ids of any kind, and how many of these are subscribed."""
        waiters = subscribed = 0
        for topic in self._topics.values():
            waiters += 1 if topic._more is None else len(topic._more)
            subscribed += topic.subscribed
        return waiters, len(self._topics), subscribed

    def start(self) -> None:
        """Start the task. Needs a running event loop."""
        self._task.start()
        self._set_timer()

    async def close(self, error: Exception) -> None:
        """End the task and tell every waiter ``error``; whoever comes later gets it, too."""
        self._closed = error
        if self._timer is not None:
            self._timer.cancel()
        self.unheard.close()
        await self._task.stop()
        while self._crowds:
            self._notify_some()
            await asyncio.sleep(0)
        told = 0
        for task_id, topic in tuple(self._topics.items()):
            if self._topics.get(task_id) is topic:  # not left meanwhile
                told += len(topic)
                self._finish(task_id, topic, error)
            while self._crowds or told >= SLICE:
                told = 0
                await asyncio.sleep(0)

    # -- the waiters' side: plain calls, no await, nothing to cancel ------------------------------------------------

    def watch(self, task_id: str, waiter: Waiter, read_first: bool = True) -> None:
        """Tell ``waiter`` what is stored of ``task_id``, and then of every change; a final state is the last.

        With ``read_first=False`` the hub subscribes before it reads. Pass it when you have just read the result.
        Raises the error given to `close` if that was called.
        """
        if self._closed is not None:
            raise twin(self._closed)
        topic = self._topics.get(task_id)
        if topic is not None:
            topic.add(waiter)
            if topic.known is not None:
                if topic.newcomers is None:
                    topic.newcomers = []
                    asyncio.get_running_loop().call_soon(self._welcome, task_id, topic)
                topic.newcomers.append(waiter)
        else:
            topic = self._topics[task_id] = _Topic(waiter)
            if task_id in self._to_unsubscribe:  # its subscription still stands, and is this topic's to undo now
                del self._to_unsubscribe[task_id]
                topic.subscribed = True
            (self._to_read_first if read_first else self._to_subscribe)[task_id] = None
            if self.unheard.timer is None:
                self.unheard.set_timer()
            self._wake()

    def unwatch(self, task_id: str, waiter: Waiter) -> None:
        """``waiter`` no longer cares; the last one ends the subscription. Does nothing if it was told the end."""
        topic = self._topics.get(task_id)
        if topic is not None and topic.discard(waiter):
            if not topic:
                self._detach(task_id)
                self._end_subscription(task_id, topic)
        elif self._crowds:
            for crowded, ending, _, _ in self._crowds:
                if crowded == task_id:
                    ending.discard(waiter)

    def _wake(self) -> None:
        self._work.set()
        self._task.start()  # unless it runs, as it does if nobody cancelled it

    def _detach(self, task_id: str) -> None:
        del self._topics[task_id]
        self._to_read_first.pop(task_id, None)
        self._to_read.pop(task_id, None)
        self._to_subscribe.pop(task_id, None)

    def _end_subscription(self, task_id: str, topic: _Topic) -> None:
        if topic.subscribed:
            successor = self._topics.get(task_id)
            if successor is not None:  # a waiter that was just told the end waits anew
                successor.subscribed = True
            else:
                self._to_unsubscribe[task_id] = None
                self._wake()

    # -- the source's side: also plain calls, made as the bytes arrive ----------------------------------------------

    def has_waiters(self, task_id: str) -> bool:
        """Whether anybody waits for ``task_id``: a message for nobody need not be decoded."""
        return task_id in self._topics

    def receive(self, task_id: str, outcome: Outcome, mark: Hashable = None, remember: bool = True) -> None:
        """Pass on a meta, or the error that stands in its place.

        With ``remember=False`` it is no state but an event: later waiters are not told, and what a read brings is not
        older than it.
        """
        topic = self._topics.get(task_id)
        if topic is not None:
            if remember:
                topic.heard += 1
                self._pass_on(task_id, topic, outcome, mark)
            else:
                self._notify(task_id, topic, outcome)

    def mark_stale(self, task_id: str) -> None:
        """There is something new to read: for sources whose messages do not carry the value."""
        if task_id in self._topics:
            self._to_read[task_id] = None
            self._wake()

    def lost(self) -> None:
        """The listener's connection is gone, and every subscription with it: subscribe, then read, all anew."""
        for topic in self._topics.values():
            topic.subscribed = False
        self._to_subscribe.update(dict.fromkeys(self._topics))
        self._to_unsubscribe.clear()
        self._health.listener_lost(len(self._to_subscribe))
        self._wake()

    # -- telling ----------------------------------------------------------------------------------------------------

    def _pass_on(self, task_id: str, topic: _Topic, outcome: Outcome, mark: Hashable) -> None:
        if isinstance(outcome, Exception) or outcome.ready:
            self._finish(task_id, topic, outcome)
        elif mark is None or mark != topic.mark:
            topic.known, topic.mark = outcome, mark
            topic.newcomers = None
            self._notify(task_id, topic, outcome)

    def _finish(self, task_id: str, topic: _Topic, outcome: Outcome) -> None:
        """The last news of a topic: a waiter that comes from now on has one of its own."""
        self._detach(task_id)
        self._notify(task_id, topic, outcome)  # first: the waiters are to run before the subscription is ended
        self._end_subscription(task_id, topic)

    def _notify(self, task_id: str, topic: _Topic, outcome: Outcome) -> None:
        if topic.sole is not None and not topic.queued:
            self._give(task_id, topic, topic.sole, outcome)
            return
        if topic.queued or len(topic) > SLICE:
            if not self._crowds:
                asyncio.get_running_loop().call_soon(self._notify_some)
            topic.queued += 1
            self._crowds.append((task_id, topic, outcome, deque(topic.waiters())))
            return
        for waiter in topic.waiters():
            self._give(task_id, topic, waiter, outcome)

    def _notify_some(self) -> None:
        """Go on telling a crowd: a few hundred, and then the event loop has its turn."""
        if not self._crowds:
            return
        task_id, topic, outcome, crowd = self._crowds[0]
        for _ in range(min(SLICE, len(crowd))):
            self._give(task_id, topic, crowd.popleft(), outcome)
        if not crowd:
            topic.queued -= 1
            self._crowds.popleft()
        if self._crowds:
            asyncio.get_running_loop().call_soon(self._notify_some)

    def _give(self, task_id: str, topic: _Topic, waiter: Waiter, outcome: Outcome) -> None:
        """Tell one waiter, unless it has left. What it raises is its own affair."""
        if waiter is not topic.sole and waiter not in topic:
            return
        try:
            waiter.receive(task_id, twin(outcome) if isinstance(outcome, Exception) else outcome)
        except (Exception, asyncio.CancelledError):
            logger.exception("a waiter for %s raised, and is told no more", task_id)
            if self._topics.get(task_id) is topic:
                self.unwatch(task_id, waiter)

    def _welcome(self, task_id: str, topic: _Topic) -> None:
        newcomers, topic.newcomers = topic.newcomers or (), None
        if topic.known is not None and self._topics.get(task_id) is topic:
            for waiter in newcomers:
                self._give(task_id, topic, waiter, topic.known)

    # -- the task ---------------------------------------------------------------------------------------------------

    def _set_timer(self) -> None:
        if self._recheck:
            self._timer = asyncio.get_running_loop().call_later(self._recheck, self._read_again, context=EMPTY)

    def _read_again(self) -> None:
        self._to_read.update(dict.fromkeys(self._topics))
        if self._to_read:
            self._wake()
        self._set_timer()

    async def _run(self) -> None:
        # What was under way when somebody cancelled this task, if that happened, is begun again.
        self._to_subscribe.update(
            dict.fromkeys(task_id for task_id in self._topics if task_id not in self._to_read_first)
        )
        self._work.set()
        while self._closed is None:  # should a source swallow the cancellation in `close`
            await self._work.wait()
            self._work.clear()
            try:
                while self._has_work():
                    # A chunk of each in turn, so that a flood of one kind does not starve the others.
                    await self._read(self._take(self._to_read))
                    await self._read_first()
                    await self._add()
                    await self._drop()
                    if self.unheard.due:
                        await self.unheard.look()
                self._health.all_subscribed()
                self._backoff.reset()
                self._limit, self._deaths = self._chunk, 0
            except BackendConnectionError as exc:
                self._deaths += exc.in_flight
                if self._deaths > 1:
                    self._limit = max(1, self._limit // 2)
                # Begin again with everyone. Not `lost`: if only a read failed, the subscriptions still stand.
                self._to_subscribe.update(dict.fromkeys(self._topics))
                self._health.failed(exc)
                self._health.listener_lost(len(self._to_subscribe))
                self._work.set()
                if self._topics or self._to_unsubscribe:
                    pause = self._backoff.pause()
                    logger.warning("lost the way to the results (%s); trying again in %.2f s", exc, pause)
                    await asyncio.sleep(pause)
            except Exception as exc:
                # The server refuses, for good; or a bug. Nobody may hang for it, and the next wait starts afresh.
                error = _named(exc)
                self._health.failed(error)
                for task_id, topic in tuple(self._topics.items()):
                    if self._topics.get(task_id) is topic:  # a waiter that was told may have ended another's wait
                        self._finish(task_id, topic, error)

    def _has_work(self) -> bool:
        queued = self._to_read or self._to_read_first or self._to_subscribe or self._to_unsubscribe
        return bool(queued) or self.unheard.due

    async def _read_first(self) -> None:
        ids = self._take(self._to_read_first)
        await self._read(ids)
        self._to_subscribe.update((task_id, None) for task_id in ids if task_id in self._topics)

    async def _add(self) -> None:
        ids, outage = self._take(self._to_subscribe), self._health.outage
        if ids:
            for task_id in ids:
                self._topics[task_id].subscribed = True
            await self._split(self._subscribe, ids)
            await self._read(ids)
            if outage is not None:
                self._health.subscribed(outage, len(ids))

    async def _subscribe(self, ids: Sequence[str]) -> None:
        refused = await self._source.subscribe(ids)
        for task_id, error in (refused or {}).items():
            self._refuse(task_id, error)

    async def _drop(self) -> None:
        ids = self._take(self._to_unsubscribe)
        try:
            if ids:
                await self._source.unsubscribe(ids)
        except (BackendConnectionError, asyncio.CancelledError):
            # A server that is busy refuses and keeps the connection: then the subscriptions still stand.
            for task_id in ids:
                if task_id in self._topics:
                    self._topics[task_id].subscribed = True
                else:
                    self._to_unsubscribe[task_id] = None
            raise

    async def _read(self, ids: Sequence[str]) -> None:
        ids = [task_id for task_id in ids if task_id in self._topics]
        if ids:
            await self._split(self._read_some, ids)

    async def _read_some(self, ids: Sequence[str]) -> None:
        asked = [self._topics.get(task_id) for task_id in ids]
        heard = [0 if topic is None else topic.heard for topic in asked]
        broken: BackendConnectionError | None = None
        for task_id, before, finding in zip(ids, heard, await self._source.read(ids), strict=True):
            topic = self._topics.get(task_id)
            if finding is None or topic is None:
                continue
            outcome, mark = finding
            if isinstance(outcome, BackendConnectionError):  # its waiters wait on, however long that lasts
                broken = outcome
                continue
            # A message that came meanwhile is as new as what was read, or newer, unless that is the end.
            if topic.heard == before or isinstance(outcome, Exception) or outcome.ready:
                self._pass_on(task_id, topic, outcome, mark)
        if broken is not None:
            raise broken

    async def _split(self, operation: Callable[[Sequence[str]], Awaitable[None]], ids: Sequence[str]) -> None:
        """``operation(ids)``; where that is refused as a whole, in halves, until the culprit stands alone."""
        try:
            await operation(ids)
        except BackendConnectionError:
            raise
        except Exception as exc:
            if concerns_everyone(exc):
                raise
            if len(ids) == 1:
                self._refuse(ids[0], _named(exc))
                return
            middle = len(ids) // 2
            await self._split(operation, ids[:middle])
            await self._split(operation, ids[middle:])

    def _refuse(self, task_id: str, error: Exception) -> None:
        topic = self._topics.get(task_id)
        if topic is not None:
            self._finish(task_id, topic, error)

    def _take(self, ids: dict[str, None]) -> list[str]:
        taken = list(islice(ids, self._limit))
        for task_id in taken:
            del ids[task_id]
        return taken


def _named(error: Exception) -> Exception:
    """``error`` as one of ours: a bug, here or in a backend, is logged."""
    if isinstance(error, AioResultError):
        return error
    logger.error("the listener failed", exc_info=error)
    named = BackendError(f"the listener failed: {type(error).__name__}: {error}")
    named.__cause__ = error
    return named
