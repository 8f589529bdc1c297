"""`Batcher`: sends concurrent calls together, in one round trip.

The batcher sends all calls of one turn of the event loop together in one batch. The number of batches in flight has a
maximum. While it is reached, the batcher collects the calls that arrive, and sends them together in the next batch. A
lone call therefore pays one round trip and no delay; a thousand concurrent calls pay a few round trips. No call waits
for a timer. If the batcher was given a function that sends a single call immediately (``at_once``), a call that follows
a batch of one call does not even wait for the end of the turn.

Calls with the same key take effect in the order in which they were submitted: the batcher does not send a call while an
earlier call with the same key is in another batch. So the batcher may repeat, split or delay a batch, and no call
overtakes another call with the same key::

    due:   a1 ── a2 ── a3      b1      c1 ── c2         one chain of calls per key; only its first call is in `_due`
           └─ sent together ┘                           a batch takes calls of one chain while their items have one type
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from .exceptions import BackendError
from .retry import Persistence
from .tasks import EMPTY, RESTART_AFTER, copy_of_error, fail, fail_all, spawn

__all__ = ["Batcher"]

Item = TypeVar("Item")
Out = TypeVar("Out")


class _Call(Generic[Item, Out]):
    """An item, its caller's future, and the next call with the same key."""

    __slots__ = ("future", "item", "key", "last", "next", "size")

    def __init__(self, item: Item, future: asyncio.Future[Out], key: Hashable, size: int) -> None:
        self.item = item
        self.future = future
        self.key = key
        self.size = size
        self.next: _Call[Item, Out] | None = None
        #: True if no later call with the same key is in the same batch. After the outcome of this call, `next` may be
        #: sent.
        self.last = True


class Batcher(Generic[Item, Out]):
    """Gathers the items of concurrent callers, passes them to ``run``, and returns each outcome to its caller.

    ``run(items)`` sends the items in one round trip and returns one outcome per item, in order. If an outcome is an
    exception, only the caller of that item gets it. If ``run`` itself raises, every caller of the batch gets that
    exception. With a ``persistence`` (a `Persistence` object), the batcher repeats and splits the batch instead; see
    `Persistence.perform`. A batch has at most ``max_items`` items and at most ``max_bytes`` bytes, unless a single item
    is larger. At most ``parallel`` batches are in flight.

    Batches run in asyncio tasks of the batcher. When a caller is cancelled, it stops waiting. Its item is dropped if it
    was not sent yet. The cancellation never reaches the I/O.

    ``at_once(item, done)`` is an optional function that sends a single item without a task. The batcher tries it for an
    item that arrives while no call is in flight, if the last batch had one item. ``at_once`` either sends the item
    within the call and returns true, or does nothing and returns false. If it has returned true, it later calls
    ``done`` exactly once: with the outcome, or with ``None`` after any failure. After a failure the batcher passes
    the item to ``run``. The batcher holds back later items until ``done`` is called, so that a failure cannot change
    the order of items.

    While more than ``max_held`` bytes are queued or in flight, `full` is true. Callers then wait in `wait_for_room`
    before they submit more.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Awaitable[Sequence[Out | BaseException]]],
        *,
        max_items: int,
        parallel: int = 1,
        max_bytes: int | None = None,
        max_held: int | None = None,
        persistence: Persistence | None = None,
        at_once: Callable[[Item, Callable[[Out | None], None]], bool] | None = None,
    ) -> None:
        self._run = run
        self._at_once = at_once
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._max_held = max_held
        self._parallel = parallel
        self._persistence = persistence
        self._loop = asyncio.get_running_loop()
        #: The calls that may be sent: the first call of each key, and all calls without a key.
        self._due: deque[_Call[Item, Out]] = deque()
        #: For each key with calls that are queued or in flight, the last of these calls.
        self._tails: dict[Hashable, _Call[Item, Out]] = {}
        self._in_flight: set[_Call[Item, Out]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        #: The call that `at_once` has sent, until its outcome arrives; otherwise ``None``.
        self._lone: _Call[Item, Out] | None = None
        #: True if the last batch had more than one call. Then the next batch most likely has more than one call, too.
        self._expect_company = True
        self._working = 0
        #: An asyncio task that has not begun to run. When it begins, it takes all calls that were submitted until then.
        self._starting: asyncio.Task[None] | None = None
        self._closed: Exception | None = None
        #: The bytes of all calls that are queued or in flight.
        self._held = 0
        #: The futures of callers that wait until fewer bytes are held, in order of arrival.
        self._waiting: dict[asyncio.Future[None], None] = {}
        #: The future of the caller that may submit now and has not submitted yet.
        self._admitted: asyncio.Future[None] | None = None

    # -- callers ----------------------------------------------------------------------------------------------------

    def submit(self, item: Item, key: Hashable = None, size: int = 0) -> asyncio.Future[Out]:
        """Queue ``item`` and return a future of its outcome.

        The future gets what ``run`` returns or raises for the item, or the error passed to `close` or `fail_queued`.
        Items with the same ``key`` keep their order; items with the key ``None`` have no order. ``size`` is in bytes.
        After `close`, `submit` raises the error that was passed to `close`.
        """
        if self._closed is not None:
            raise copy_of_error(self._closed)
        future: asyncio.Future[Out] = self._loop.create_future()
        call = _Call(item, future, key, size)
        self._held += size
        if key is not None:
            former = self._tails.get(key)
            self._tails[key] = call
            if former is not None:
                former.next = call
                return future
        if not self._send_at_once(call):
            self._due.append(call)
            self._start()
        return future

    def __contains__(self, key: Hashable) -> bool:
        """True if calls with this key are queued or in flight."""
        return key in self._tails

    @property
    def queued(self) -> int:
        """The number of calls that are queued or in flight."""
        waiting = sum(1 for first in self._due for _ in _chain(first))
        behind = sum(1 for sent in self._in_flight if sent.last for _ in _chain(sent.next))
        return waiting + len(self._in_flight) + behind

    @property
    def held(self) -> int:
        """The size in bytes of all calls that are queued or in flight."""
        return self._held

    @property
    def full(self) -> bool:
        """True if a caller should wait in `wait_for_room` before it submits."""
        if self._max_held is None:
            return False
        return self._held > self._max_held or self._admitted is not None or bool(self._waiting)

    async def wait_for_room(self) -> None:
        """Return when it is this caller's turn to submit. Raises the error passed to `close` or `fail_queued`."""
        turn: asyncio.Future[None] = self._loop.create_future()
        self._waiting[turn] = None
        self._admit()
        try:
            await turn
        finally:
            self._waiting.pop(turn, None)
            if turn is self._admitted:
                self._admitted = None
            # A caller submits directly after `wait_for_room` returns, without another await. So when this callback
            # runs, the caller has either submitted or never will. Then the next caller may have its turn.
            self._loop.call_soon(self._admit)

    def _admit(self) -> None:
        if self._admitted is None and self._max_held is not None and self._held <= self._max_held:
            while self._waiting and self._admitted is None:
                turn = next(iter(self._waiting))
                del self._waiting[turn]
                if not turn.done():
                    turn.set_result(None)
                    self._admitted = turn

    def fail_queued(self, error: Exception) -> None:
        """Fail every item that is not sent yet, and every caller in `wait_for_room`. Items in flight go on."""
        queued = [call for first in self._due for call in _chain(first)]
        for sent in self._in_flight:
            if sent.last:
                queued += _chain(sent.next)
                sent.next = None
        self._due.clear()
        self._tails = {call.key: call for call in self._in_flight if call.last and call.key is not None}
        self._held -= sum(call.size for call in queued)
        fail_all([call.future for call in queued], error)
        waiting, self._waiting = self._waiting, {}
        fail_all(waiting, error)

    # -- sending a single call at once ------------------------------------------------------------------------------

    def _send_at_once(self, call: _Call[Item, Out]) -> bool:
        if self._expect_company or self._working or self._lone is not None or self._at_once is None:
            return False
        if not self._at_once(call.item, partial(self._done_at_once, call)):
            return False
        self._lone = call
        self._in_flight.add(call)
        return True

    def _done_at_once(self, call: _Call[Item, Out], outcome: Out | None) -> None:
        self._lone = None
        future = call.future
        if outcome is None and not future.done() and self._closed is None:
            self._in_flight.discard(call)
            self._due.appendleft(call)
        else:
            if not future.done():
                if outcome is not None:
                    future.set_result(outcome)
                elif self._closed is not None:
                    fail(future, copy_of_error(self._closed))
            self._release(call)
        if self._due:
            self._start()

    # -- batches ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._working < self._parallel and self._starting is None and self._lone is None:
            self._working += 1
            task = self._starting = spawn(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._ended, context=EMPTY.context)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():  # by a shutdown handler, for example; `_perform` has queued the task's calls again
            self._working -= 1
            if self._starting is task:
                self._starting = None
            # When `asyncio.run` ends, it cancels all tasks, also those of the callers. Then this timer never fires.
            self._loop.call_later(RESTART_AFTER, self._start_again, context=EMPTY.context)

    def _start_again(self) -> None:
        while self._due and self._due[0].future.done():
            self._discard(self._due.popleft())
        self._admit()
        if self._due:
            self._start()

    async def _work(self) -> None:
        # The batch is taken here and not in `submit`, so that it includes the calls of every coroutine that was ready
        # to run in this turn of the loop.
        self._starting = None
        while self._due:
            calls = self._take()
            if self._due:
                self._start()
            if calls:
                await self._perform(calls)
        self._working -= 1  # no await came after the check for an empty queue, so the queue is still empty

    def _take(self) -> list[_Call[Item, Out]]:
        due, most, room = self._due, self._max_items, self._max_bytes
        calls: list[_Call[Item, Out]] = []
        while due and len(calls) < most and (room is None or not calls or due[0].size <= room):
            call = due.popleft()
            if call.future.done():  # the caller was cancelled
                self._discard(call)
                continue
            call.last = True
            calls.append(call)
            if room is not None:
                room -= call.size
            while (later := call.next) is not None:
                if later.future.done():
                    call.next = later.next
                    self._held -= later.size
                    if later.next is None:
                        self._tails[later.key] = call
                    continue
                fits = len(calls) < most and (room is None or later.size <= room)
                if not fits or type(later.item) is not type(call.item):
                    break
                call.last = False
                call = later
                call.last = True
                calls.append(call)
                if room is not None:
                    room -= call.size
        self._expect_company = len(calls) > 1
        self._in_flight.update(calls)
        if self._waiting:  # the calls that were dropped have made room
            self._admit()
        return calls

    def _discard(self, call: _Call[Item, Out]) -> None:
        """Drop a queued call whose caller was cancelled."""
        self._held -= call.size
        if call.next is not None:
            self._due.appendleft(call.next)
        elif call.key is not None:
            del self._tails[call.key]

    def _release(self, call: _Call[Item, Out]) -> None:
        """Record that a call in flight is over, and queue the next call with its key."""
        self._in_flight.discard(call)
        self._held -= call.size
        if call.last and call.key is not None:
            if call.next is not None:
                self._due.append(call.next)
            else:
                del self._tails[call.key]
        if self._waiting:
            self._admit()

    async def _perform(self, calls: Sequence[_Call[Item, Out]]) -> None:
        items = [call.item for call in calls]

        def settle(indexes: Sequence[int], outcomes: Sequence[Out | BaseException]) -> None:
            failed: BaseException | None = None
            in_flight = self._in_flight
            for index, outcome in zip(indexes, outcomes, strict=True):
                call = calls[index]
                future = call.future
                if not future.done():
                    if isinstance(outcome, BaseException):
                        fail(future, copy_of_error(outcome) if outcome is failed else outcome)
                        failed = outcome
                    else:
                        future.set_result(outcome)
                if call.next is None and call.last:  # the usual case: does the same as `_release`, but faster
                    in_flight.discard(call)
                    self._held -= call.size
                    if call.key is not None:
                        del self._tails[call.key]
                else:
                    self._release(call)
            if self._waiting:
                self._admit()
            if self._due and len(indexes) < len(calls):  # the rest of this batch may take long; send due calls now
                self._start()

        try:
            if self._persistence is not None:
                await self._persistence.perform(
                    self._run,
                    items,
                    settle,
                    wanted=lambda index: not calls[index].future.done(),
                    key=lambda index: calls[index].key,
                )
            else:
                every_index = range(len(calls))
                try:
                    outcomes = await self._run(items)
                    if len(outcomes) != len(items):  # otherwise callers without an outcome would wait for ever
                        raise BackendError(
                            f"{len(outcomes)} outcomes came back for {len(items)} items; "
                            f"the backend must return one outcome per item"
                        )
                except Exception as exc:
                    settle(every_index, [exc] * len(calls))
                else:
                    settle(every_index, outcomes)
        except asyncio.CancelledError:
            # `close` has cancelled this asyncio task, or a shutdown handler has cancelled every task of the loop. In
            # the second case another asyncio task of this batcher sends these calls.
            left = [call for call in calls if call in self._in_flight]
            if self._closed is not None:
                fail_all([call.future for call in left], self._closed)
            for call in left:
                if not call.last and call.next not in self._in_flight:
                    # No caller waits for this call, and the next call with its key has its outcome already. So this
                    # call belongs to no chain any more.
                    call.next = call.key = None
            self._put_back(left)
            raise
        for call in calls:
            if call in self._in_flight:  # the call was left without an outcome, because its caller was cancelled
                self._release(call)

    def _put_back(self, calls: Sequence[_Call[Item, Out]]) -> None:
        """Queue calls again that were in flight, before all other calls. `_due` gets only the first call per key."""
        self._in_flight.difference_update(calls)
        behind = {call.next for call in calls if not call.last}
        self._due.extendleft(call for call in reversed(calls) if call not in behind)

    async def close(self, error: Exception) -> None:
        """Refuse new items, fail the queued items with ``error``, and give items in flight one second to finish."""
        self._closed = error
        self.fail_queued(error)
        under_way: list[asyncio.Future[Any]] = [*self._tasks]
        if self._lone is not None:
            under_way.append(self._lone.future)
        if under_way:
            _, late = await asyncio.wait(under_way, timeout=1.0)
            if self._lone is not None:
                fail_all([self._lone.future], error)
            for task in self._tasks:
                task.cancel()
            if late:
                await asyncio.wait(late)


def _chain(call: _Call[Item, Out] | None) -> Iterator[_Call[Item, Out]]:
    """Yield ``call`` and all later calls with its key."""
    while call is not None:
        yield call
        call = call.next
