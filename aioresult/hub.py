"""The hub: it maps each *topic*, which is a task id or the name of an event, to its waiters, and notifies them.

One asyncio task and one connection serve all waiters of a backend. The hub registers the waiter, subscribes, gets the
confirmation of the server, and *then* reads. So no wake-up is lost: the read finds a result that was stored before it,
and a result that is stored after it arrives as a message. After a lost connection the hub does the same again for every
topic, so nothing is missed during a reconnect either.

The read before the subscription is only a fast path: a result that is stored already needs no subscription. If the
caller has just read the result, the topic starts at "to subscribe".

::

           watch()                read: not ready              subscribed, confirmed, read         final or unwatch()
    (none) ──────▶ to read first ────────────────▶ to subscribe ─────────────────────▶ live ─▶ to unsubscribe ─▶ (none)
                                                        ▲                               │
                                                        └──────────── lost() ───────────┘

Each waiter first receives the state that is known when it joins, then each change, and no state twice. For this,
the hub remembers the last state of each id and passes it to waiters that join later. And every state has a *mark*, a
value that is equal for equal stored bytes: if a read finds the same state again, the hub does not pass it on.

A fault affects only its cause. If a waiter raises, the hub drops that waiter alone. If the server refuses a batch, the
hub splits it until the bad id is alone, and only the waiters of that id get the error.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import TypeVar

from .exceptions import AioResultError, BackendConnectionError, BackendError
from .health import Health
from .retry import Backoff, Pauses, affects_whole_batch
from .source import Source
from .tasks import CALLBACKS_PER_TURN, EMPTY, StandingTask, chunked, copy_of_error
from .topic import Topic
from .unheard import Unheard
from .waiter import Outcome, Waiter

__all__ = ["Hub", "chunked"]

logger: logging.Logger = logging.getLogger("aioresult")

T = TypeVar("T")

#: After so many seconds the hub tries again for an id that the server cannot serve now, while it serves others.
_LATER = 1.0


class Hub:
    """Connects waiters to ``source``, a backend, with one asyncio task that subscribes and reads for all waiters.

    The hub passes at most ``chunk`` ids to one call of the source. Every ``recheck`` seconds the hub reads all ids with
    waiters again, in case a message was lost; 0 turns this off. ``pauses`` are those between attempts in an outage.
    ``health`` records outages and their ends. ``where`` names the whole store in warnings. ``hand_over(ids)`` is called
    with the ids that the hub is about to read or subscribe to; it may `release` what another hub serves now.
    """

    def __init__(
        self,
        source: Source,
        *,
        chunk: int = 500,
        recheck: float = 0.0,
        backoff: Backoff | None = None,
        pauses: Pauses | None = None,
        health: Health | None = None,
        where: str = "the store",
        hand_over: Callable[[Sequence[str]], None] = lambda _: None,
    ) -> None:
        self._source, self._hand_over = source, hand_over
        self._chunk = chunk
        #: The most ids for one call at present. It shrinks while connections die: one of the ids may be the cause.
        self._limit = chunk
        self._deaths = 0
        self._recheck = recheck
        self._timer: asyncio.TimerHandle | None = None
        self._backoff, self._pauses = backoff or Backoff(), pauses or Pauses()
        self._health = health or Health("the store")
        self._topics: dict[str, Topic] = {}
        # Dicts serve as ordered sets: the ids are served in order of arrival.
        self._to_read_first: dict[str, None] = {}
        self._to_read: dict[str, None] = {}
        self._to_subscribe: dict[str, None] = {}
        self._to_unsubscribe: dict[str, None] = {}
        #: The ids for which the source is making subscriptions.
        self._subscribing: set[str] = set()
        queues = (self._to_read_first, self._to_subscribe, self._to_read)
        self.unheard: Unheard = Unheard(self._topics, queues, self._wake, where)
        self._work = asyncio.Event()
        self._task = StandingTask(self._run, "aioresult-hub", lambda: bool(self._topics or self._to_unsubscribe))
        self._closed: Exception | None = None
        #: News for many waiters: ``(id, topic, news, waiters that have not received it)``. See `_notify_some`.
        self._crowds: deque[tuple[str, Topic, Outcome, deque[Waiter]]] = deque()

    def __len__(self) -> int:
        """The number of ids that have waiters."""
        return len(self._topics)

    def counts(self) -> tuple[int, int, int]:
        """Return the numbers of waiters, of ids that have waiters, and of ids that are subscribed."""
        waiters = subscribed = 0
        for topic in self._topics.values():
            waiters += 1 if topic._more is None else len(topic._more)
            subscribed += topic.subscribed
        return waiters, len(self._topics), subscribed

    def start(self) -> None:
        """Start the hub's asyncio task. Needs a running event loop."""
        self._task.start()
        self._set_timer()

    async def close(self, error: Exception) -> None:
        """End the hub's asyncio task and pass ``error`` to every waiter. Later calls of `watch` raise ``error``."""
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
            if self._topics.get(task_id) is topic:  # the topic's waiters have not left in the meantime
                told += len(topic)
                self._finish(task_id, topic, error)
            while self._crowds or told >= CALLBACKS_PER_TURN:
                told = 0
                await asyncio.sleep(0)

    # -- the waiters' side: plain calls, no await, nothing to cancel ------------------------------------------------

    def watch(self, task_id: str, waiter: Waiter, read_first: bool = True) -> None:
        """Pass the stored state of ``task_id`` to ``waiter``, and then each change, up to a final state or an error.

        With ``read_first=False`` the hub subscribes before it reads. Pass it when you have just read the result.
        After `close`, raises the error that was passed to `close`.
        """
        if self._closed is not None:
            raise copy_of_error(self._closed)
        topic = self._topics.get(task_id)
        if topic is not None:
            topic.add(waiter)
            if topic.known is not None:
                if topic.newcomers is None:
                    topic.newcomers = []
                    asyncio.get_running_loop().call_soon(self._welcome, task_id, topic)
                topic.newcomers.append(waiter)
        else:
            topic = self._topics[task_id] = Topic(waiter)
            if task_id in self._to_unsubscribe:  # the subscription still exists; the new topic takes it over
                del self._to_unsubscribe[task_id]
                topic.subscribed = True
            (self._to_read_first if read_first else self._to_subscribe)[task_id] = None
            if self.unheard.timer is None:
                self.unheard.set_timer()
            self._wake()

    def unwatch(self, task_id: str, waiter: Waiter) -> None:
        """Remove ``waiter``. If it was the last waiter, end the subscription. Does nothing if its wait has ended."""
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
        self._task.start()  # restarts the hub's task if code outside the library has cancelled it

    def _detach(self, task_id: str) -> None:
        del self._topics[task_id]
        self._to_read_first.pop(task_id, None)
        self._to_read.pop(task_id, None)
        self._to_subscribe.pop(task_id, None)

    def _end_subscription(self, task_id: str, topic: Topic) -> None:
        if topic.subscribed:
            successor = self._topics.get(task_id)
            if successor is not None:  # a waiter that has just received the final state waits again
                successor.subscribed = True
            else:
                self._to_unsubscribe[task_id] = None
                self._wake()

    # -- the source's side: also plain calls, made when bytes arrive ------------------------------------------------

    def has_waiters(self, task_id: str) -> bool:
        """True if ``task_id`` has waiters. Otherwise its messages need not be decoded."""
        return task_id in self._topics

    def receive(self, task_id: str, outcome: Outcome, mark: Hashable = None, remember: bool = True) -> None:
        """Pass ``outcome``, a meta or the error in its place, to the waiters of ``task_id``.

        With ``remember=False``, ``outcome`` is an event and not a state: waiters that join later do not receive it.
        What a read finds is not out of date if an event arrives during the read.
        """
        topic = self._topics.get(task_id)
        if topic is not None:
            if remember:
                topic.heard += 1
                self._pass_on(task_id, topic, outcome, mark)
            else:
                self._notify(task_id, topic, outcome)

    def mark_stale(self, task_id: str) -> None:
        """Read ``task_id`` soon, because its state has changed. For backends whose messages do not carry the state."""
        if task_id in self._topics:
            self._to_read[task_id] = None
            self._wake()

    def lost(self, task_ids: Iterable[str] | None = None, outage: bool = True) -> None:
        """Subscribe to these ids again and read them, because their subscriptions are lost; by default to all ids.

        With ``outage=False`` the listener is still connected: the server alone has ended these subscriptions.
        """
        ids = list(self._topics) if task_ids is None else [task_id for task_id in task_ids if task_id in self._topics]
        # If only some are lost, the call that is subscribing to them may succeed. Then they must be ended later.
        coming = () if task_ids is None else self._subscribing
        for task_id in ids:
            self._topics[task_id].subscribed = task_id in coming
            self._to_subscribe[task_id] = None
        for task_id in tuple(self._to_unsubscribe) if task_ids is None else task_ids:
            if task_id not in coming:
                self._to_unsubscribe.pop(task_id, None)
        if outage:
            self._health.listener_lost(len(self._to_subscribe))
        self._wake()

    def release(self, task_id: str) -> Topic | None:
        """Give up an id, and return its topic, so that another hub can `adopt` it.

        Returns ``None``, and keeps the id, if news is being delivered: what the other hub delivers could overtake it.
        The same if a subscription is being made, which the other hub would not know of.
        """
        topic = self._topics.get(task_id)
        if topic is None or topic.queued or topic.newcomers or task_id in self._subscribing:
            return None
        self._detach(task_id)
        return topic

    def adopt(self, task_id: str, topic: Topic) -> None:
        """Serve an id from now on that another hub has released: subscribe to it, and read it."""
        self._to_unsubscribe.pop(task_id, None)
        self._topics[task_id] = topic
        self._to_subscribe[task_id] = None
        if self.unheard.timer is None:
            self.unheard.set_timer()
        self._wake()

    def inherit(self, task_id: str) -> bool:
        """Take over the subscription to an id that another hub gives up. False if the id has no waiters here."""
        topic = self._topics.get(task_id)
        if topic is not None:
            topic.subscribed = True
        return topic is not None

    # -- notifying waiters ------------------------------------------------------------------------------------------

    def _pass_on(self, task_id: str, topic: Topic, outcome: Outcome, mark: Hashable) -> None:
        if isinstance(outcome, Exception) or outcome.ready:
            self._finish(task_id, topic, outcome)
        elif mark is None or mark != topic.mark:
            topic.known, topic.mark = outcome, mark
            topic.newcomers = None
            self._notify(task_id, topic, outcome)

    def _finish(self, task_id: str, topic: Topic, outcome: Outcome) -> None:
        """Deliver the last news of a topic, and drop the topic. A waiter that joins later starts a new topic."""
        self._detach(task_id)
        self._notify(task_id, topic, outcome)  # first, so that the waiters run before the hub ends the subscription
        self._end_subscription(task_id, topic)

    def _notify(self, task_id: str, topic: Topic, outcome: Outcome) -> None:
        if topic.sole is not None and not topic.queued:
            self._give(task_id, topic, topic.sole, outcome)
            return
        if topic.queued or len(topic) > CALLBACKS_PER_TURN:
            if not self._crowds:
                asyncio.get_running_loop().call_soon(self._notify_some)
            topic.queued += 1
            self._crowds.append((task_id, topic, outcome, deque(topic.waiters())))
            return
        for waiter in topic.waiters():
            self._give(task_id, topic, waiter, outcome)

    def _notify_some(self) -> None:
        """Notify some of the many waiters of a topic, and schedule the rest, so that the event loop is not blocked."""
        if not self._crowds:
            return
        task_id, topic, outcome, crowd = self._crowds[0]
        for _ in range(min(CALLBACKS_PER_TURN, len(crowd))):
            self._give(task_id, topic, crowd.popleft(), outcome)
        if not crowd:
            topic.queued -= 1
            self._crowds.popleft()
        if self._crowds:
            asyncio.get_running_loop().call_soon(self._notify_some)

    def _give(self, task_id: str, topic: Topic, waiter: Waiter, outcome: Outcome) -> None:
        """Notify one waiter, unless it has left. If the waiter raises, drop it; other waiters are not affected."""
        if waiter is not topic.sole and waiter not in topic:
            return
        try:
            waiter.receive(task_id, copy_of_error(outcome) if isinstance(outcome, Exception) else outcome)
        except (Exception, asyncio.CancelledError):
            logger.exception("a waiter for %s raised an exception, and gets no more news", task_id)
            if self._topics.get(task_id) is topic:
                self.unwatch(task_id, waiter)

    def _welcome(self, task_id: str, topic: Topic) -> None:
        newcomers, topic.newcomers = topic.newcomers or (), None
        if topic.known is not None and self._topics.get(task_id) is topic:
            for waiter in newcomers:
                self._give(task_id, topic, waiter, topic.known)

    # -- the hub's asyncio task -------------------------------------------------------------------------------------

    def _set_timer(self) -> None:
        if self._recheck:
            self._timer = asyncio.get_running_loop().call_later(self._recheck, self._read_again, context=EMPTY.context)

    def _read_again(self) -> None:
        self._to_read.update(dict.fromkeys(self._topics))
        if self._to_read:
            self._wake()
        self._set_timer()

    async def _run(self) -> None:
        # If code outside the library has cancelled the hub's task, the work that was in progress begins again.
        self._to_subscribe.update(
            dict.fromkeys(task_id for task_id in self._topics if task_id not in self._to_read_first)
        )
        self._work.set()
        while self._closed is None:  # in case a source swallows the cancellation by `close`
            await self._work.wait()
            self._work.clear()
            try:
                while self._has_work():
                    # Do one chunk of each kind of work in turn, so that a flood of one kind does not delay the others.
                    await self._read(self._still_here(self._take(self._to_read)))
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
                # Subscribe to all ids again. Do not call `lost`: if only a read failed, the subscriptions still exist.
                self._to_subscribe.update(dict.fromkeys(self._topics))
                self._health.failed(exc)
                self._health.listener_lost(len(self._to_subscribe))
                self._work.set()
                if self._topics or self._to_unsubscribe:
                    pause = self._backoff.pause()
                    logger.warning("cannot read or subscribe to results (%s); trying again in %.2f s", exc, pause)
                    await self._pauses.sleep(pause)
            except Exception as exc:
                # The server refuses and a retry will not help, or there is a bug. End all waits, so that none hangs.
                error = _named(exc)
                self._health.failed(error)
                for task_id, topic in tuple(self._topics.items()):
                    if self._topics.get(task_id) is topic:  # a notified waiter may have ended another waiter's wait
                        self._finish(task_id, topic, error)

    def _has_work(self) -> bool:
        queued = self._to_read or self._to_read_first or self._to_subscribe or self._to_unsubscribe
        return bool(queued) or self.unheard.due

    async def _read_first(self) -> None:
        ids = self._still_here(self._take(self._to_read_first))
        await self._read(ids)
        self._to_subscribe.update((task_id, None) for task_id in ids if task_id in self._topics)

    async def _add(self) -> None:
        taken, outage = self._take(self._to_subscribe), self._health.outage
        if ids := self._still_here(taken):
            for task_id in ids:
                self._topics[task_id].subscribed = True
            self._subscribing = set(ids)
            try:
                await self._split(self._subscribe, ids)
            finally:
                self._subscribing = set()
            await self._read(ids)
        if taken and outage is not None:  # what was handed over is missing here no more
            self._health.subscribed(outage, len(taken))

    async def _subscribe(self, ids: Sequence[str]) -> None:
        refused = await self._source.subscribe(ids)
        for task_id, error in (refused or {}).items():
            if isinstance(error, BackendConnectionError):
                self._later(partial(self.lost, outage=False), [task_id])
            else:
                self._refuse(task_id, error)

    @staticmethod
    def _later(callback: Callable[[T], None], argument: T) -> None:
        asyncio.get_running_loop().call_later(_LATER, callback, argument, context=EMPTY.context)

    async def _drop(self) -> None:
        ids = self._take(self._to_unsubscribe)
        try:
            if ids:
                await self._source.unsubscribe(ids)
        except (BackendConnectionError, asyncio.CancelledError):
            # A busy server may refuse the call and keep the connection. Then the subscriptions still exist.
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
            if isinstance(outcome, BackendConnectionError):  # the waiters of the id wait until the outage ends
                if outcome.partial:
                    self._later(self.mark_stale, task_id)
                else:
                    broken = outcome
                continue
            # A message during the read is at least as new as the state that was read. Only a final state still counts.
            if topic.heard == before or isinstance(outcome, Exception) or outcome.ready:
                self._pass_on(task_id, topic, outcome, mark)
        if broken is not None:
            raise broken

    async def _split(self, operation: Callable[[Sequence[str]], Awaitable[None]], ids: Sequence[str]) -> None:
        """Await ``operation(ids)``. If the server refuses it, do it for each half of the ids, down to single ids."""
        try:
            await operation(ids)
        except BackendConnectionError:
            raise
        except Exception as exc:
            if affects_whole_batch(exc):
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

    def _still_here(self, ids: Sequence[str]) -> Sequence[str]:
        """Return the ids that no other hub serves. The others would wait here for a server that may be away."""
        self._hand_over(ids)
        return [task_id for task_id in ids if task_id in self._topics]


def _named(error: Exception) -> Exception:
    """Return ``error`` if it is one of this library. Otherwise it is a bug: log it and wrap it in a `BackendError`."""
    if isinstance(error, AioResultError):
        return error
    logger.error("the listener failed", exc_info=error)
    named = BackendError(f"the listener failed: {type(error).__name__}: {error}")
    named.__cause__ = error
    return named
