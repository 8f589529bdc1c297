"""The batcher: concurrent calls become one round trip.

Whatever is asked for in one turn of the event loop, or while as many round trips as may be are in flight, goes out
together in the next one. A lone call therefore pays one round trip and no delay, a thousand concurrent ones pay a few;
nothing waits for a timer. A caller that comes alone again and again is not even kept for that turn, if there is a way
to send at once.

Calls with the same key take effect in the order in which they were submitted: none of them is sent while an earlier one
is in another batch. So a batch may be repeated, split or delayed without one call overtaking another of its key::

    due:   a1 ── a2 ── a3      b1      c1 ── c2         one chain of calls per key, of which the first stands in line
           └─ sent together ┘                           a batch takes as much of each chain as is of one kind
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from .exceptions import BackendError
from .retry import Persistence
from .tasks import EMPTY, RESTART_AFTER, fail, fail_all, spawn, twin

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
        #: Whether it is the last of its key in its batch: what comes next may be sent once this is settled.
        self.last = True


class Batcher(Generic[Item, Out]):
    """Gathers the items of concurrent callers, hands them to ``run`` and each outcome back to its caller.

    ``run(items)`` returns one outcome per item, in order; an outcome that is an exception is raised to that caller
    alone. An exception out of ``run`` itself goes to every caller of the batch, unless there is a ``persistence``: that
    repeats and splits the batch (see `Persistence.perform`). At most ``max_items`` go into one batch, and no more than
    ``max_bytes`` unless a single item is larger; at most ``parallel`` batches are in flight.

    The batch runs in a task of its own: a caller that is cancelled stops waiting, its item is not sent from then on,
    and nobody's cancellation reaches the I/O.

    ``at_once(item, done)`` is tried for an item that comes while nothing is under way, if the last batch was of one. It
    sends the item in this very call and returns true, or does nothing and returns false. Once, and not before it has
    returned, it calls ``done`` with the outcome, or with ``None`` after any trouble: then ``run`` gets the item. What
    comes meanwhile is kept until then, so that trouble cannot put one item behind another.

    While more than ``max_held`` bytes are queued or in flight, `full` is true, and callers wait in
    `wait_for_room` before they submit more.
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
        #: The calls that may be sent: the first of each key, and all without one.
        self._due: deque[_Call[Item, Out]] = deque()
        #: The last call of each key that has any, in line or in flight.
        self._tails: dict[Hashable, _Call[Item, Out]] = {}
        self._in_flight: set[_Call[Item, Out]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        #: What was sent at once and has not been answered.
        self._lone: _Call[Item, Out] | None = None
        #: Whether the last batch was of more than one: so, most likely, is the next.
        self._expect_company = True
        self._working = 0
        #: A task that has not begun: it will take what is submitted until then.
        self._starting: asyncio.Task[None] | None = None
        self._closed: Exception | None = None
        #: Bytes of the calls that are queued or in flight, and the callers that wait for them to become fewer.
        self._held = 0
        self._waiting: dict[asyncio.Future[None], None] = {}
        #: The turn of the caller that may submit now, and has not done so.
        self._admitted: asyncio.Future[None] | None = None

    # -- callers ----------------------------------------------------------------------------------------------------

    def submit(self, item: Item, key: Hashable = None, size: int = 0) -> asyncio.Future[Out]:
        """The outcome for ``item``, to be awaited: whatever ``run`` has for it, or the error given to `close`.

        ``size`` is in bytes.
        """
        if self._closed is not None:
            raise twin(self._closed)
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

    @property
    def full(self) -> bool:
        """Whether a caller ought to wait in `wait_for_room` before it submits."""
        if self._max_held is None:
            return False
        return self._held > self._max_held or self._admitted is not None or bool(self._waiting)

    async def wait_for_room(self) -> None:
        """Return when it is this caller's turn to submit. Raises the error given to `close` or `fail_queued`."""
        turn: asyncio.Future[None] = self._loop.create_future()
        self._waiting[turn] = None
        self._admit()
        try:
            await turn
        finally:
            self._waiting.pop(turn, None)
            if turn is self._admitted:
                self._admitted = None
            # The next one has its turn when this one has submitted, or has not: it does so without another await.
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

    # -- the short way ----------------------------------------------------------------------------------------------

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
                    fail(future, twin(self._closed))
            self._release(call)
        if self._due:
            self._start()

    # -- batches ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._working < self._parallel and self._starting is None and self._lone is None:
            self._working += 1
            task = self._starting = spawn(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._ended, context=EMPTY)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():  # by a stranger: what it had taken is in line again
            self._working -= 1
            if self._starting is task:
                self._starting = None
            # At the end of `asyncio.run` the callers are cancelled in the same sweep, and this timer never fires.
            self._loop.call_later(RESTART_AFTER, self._start_again, context=EMPTY)

    def _start_again(self) -> None:
        while self._due and self._due[0].future.done():
            self._discard(self._due.popleft())
        self._admit()
        if self._due:
            self._start()

    async def _work(self) -> None:
        # Only now, and not in `submit`: every coroutine that was ready to run in this turn of the loop is in the batch.
        self._starting = None
        while self._due:
            calls = self._take()
            if self._due:
                self._start()
            if calls:
                await self._perform(calls)
        self._working -= 1  # in the step that found the queue empty: nothing can be submitted between

    def _take(self) -> list[_Call[Item, Out]]:
        due, most, room = self._due, self._max_items, self._max_bytes
        calls: list[_Call[Item, Out]] = []
        while due and len(calls) < most and (room is None or not calls or due[0].size <= room):
            call = due.popleft()
            if call.future.done():  # its caller was cancelled
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
        if self._waiting:  # those that have gone have made room
            self._admit()
        return calls

    def _discard(self, call: _Call[Item, Out]) -> None:
        """Leave out a call that was in line: its caller has gone."""
        self._held -= call.size
        if call.next is not None:
            self._due.appendleft(call.next)
        elif call.key is not None:
            del self._tails[call.key]

    def _release(self, call: _Call[Item, Out]) -> None:
        """A call that was in flight is over: the next of its key has its turn."""
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
                        fail(future, twin(outcome) if outcome is failed else outcome)
                        failed = outcome
                    else:
                        future.set_result(outcome)
                if call.next is None and call.last:  # as `_release`, for what nearly all are like
                    in_flight.discard(call)
                    self._held -= call.size
                    if call.key is not None:
                        del self._tails[call.key]
                else:
                    self._release(call)
            if self._waiting:
                self._admit()
            if self._due and len(indexes) < len(calls):  # the rest of this batch may take long
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
                everybody = range(len(calls))
                try:
                    outcomes = await self._run(items)
                    if len(outcomes) != len(items):  # otherwise those beyond the last outcome would wait for ever
                        raise BackendError(f"{len(outcomes)} outcomes came back for {len(items)} items")
                except Exception as exc:
                    settle(everybody, [exc] * len(calls))
                else:
                    settle(everybody, outcomes)
        except asyncio.CancelledError:
            # By `close`, or by a stranger that cancels every task of the loop: then others shall send it.
            left = [call for call in calls if call in self._in_flight]
            if self._closed is not None:
                fail_all([call.future for call in left], self._closed)
            for call in left:
                if not call.last and call.next not in self._in_flight:
                    # Nobody waits for it, and what comes after it was settled without it: it is in no chain any more.
                    call.next = call.key = None
            self._put_back(left)
            raise
        for call in calls:
            if call in self._in_flight:  # not sent again, for its caller has gone
                self._release(call)

    def _put_back(self, calls: Sequence[_Call[Item, Out]]) -> None:
        """Put calls that were in flight in line again, in front, each chain by its first."""
        self._in_flight.difference_update(calls)
        behind = {call.next for call in calls if not call.last}
        self._due.extendleft(call for call in reversed(calls) if call not in behind)

    async def close(self, error: Exception) -> None:
        """Refuse new items, fail the queued ones with ``error``, let what is in flight finish for a moment."""
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
    """``call`` and all that come after it with its key."""
    while call is not None:
        yield call
        call = call.next
