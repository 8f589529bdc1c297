"""Dispatches chords: finds complete chords and claims them one after the other, for this process.

A chord is complete when all its parts (the results of its header tasks) are stored. A claim is a lease: for some
seconds, only the process that holds the claim may dispatch the chord's callback. A dispatcher learns of a chord in
three ways. A message announces each chord that becomes complete. If the dispatcher was not subscribed at that time, it
finds the chord in the list of open chords, which it reads at the start and after every reconnect. If the process that
held the claim died, a timer (a reminder) makes the dispatcher try the chord again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from itertools import islice

from .chord import READY_TOPIC, ChordOp, Chords, ChordState, ChordStep, ChordStore, ReadyChord
from .exceptions import BackendClosedError, BackendConnectionError, UsageError
from .retry import Backoff
from .tasks import EMPTY
from .waiter import Outcome

__all__ = ["ready_chords"]

logger: logging.Logger = logging.getLogger("aioresult")

#: The most open chords that a dispatcher checks in one step. After each step it claims the announced chords.
_SCAN_CHUNK = 500
#: The most chords that a dispatcher remembers as impossible to dispatch.
_MAX_ASIDE = 10_000


async def ready_chords(chords: Chords, store: ChordStore) -> AsyncGenerator[ReadyChord, None]:
    """See `aioresult.backends.base.Backend.ready_chords`."""
    waiter, backoff = _ReadyWaiter(), Backoff()
    dispatcher = _Dispatcher(chords, store, waiter)
    store.watch_topic(READY_TOPIC, waiter)
    try:
        while True:
            await waiter.due()
            try:
                ready = await dispatcher.step()
                backoff.reset()
            except BackendConnectionError as exc:
                pause = backoff.pause()
                logger.warning("cannot look for complete chords (%s); trying again in %.2f s", exc, pause)
                await asyncio.sleep(pause)
                continue
            if ready is not None:
                yield ready
    finally:
        store.unwatch(READY_TOPIC, waiter)
        waiter.stop()


class _Dispatcher:
    """Checks and claims one chord after the other.

    A chord that this process cannot dispatch is logged only once, and then ignored until its state changes.
    """

    def __init__(self, chords: Chords, store: ChordStore, waiter: _ReadyWaiter) -> None:
        self._chords = chords
        self._store = store
        self._waiter = waiter
        #: The chords that this process cannot dispatch → the state of the chord at the last check, if there was one.
        self._aside: dict[str, ChordState | None] = {}

    async def step(self) -> ReadyChord | None:
        """Take the next step: claim one announced chord, read the list of open chords, or check some of that list.

        Returns a chord to dispatch if the step has claimed one. Announced chords come first. They wait for one round
        trip at most, even if very many chords are open. Raises `BackendConnectionError`; then call `step` again.
        """
        waiter = self._waiter
        if waiter.announced:
            return await self._claim(waiter.take())
        if waiter.list_all:
            waiter.list_all = False
            try:
                waiter.open = deque(await self._store.active_chords())
            except BackendConnectionError:
                waiter.list_all = True
                raise
        else:
            some = list(islice(waiter.open, _SCAN_CHUNK))
            await self._check(some)
            for _ in some:
                waiter.open.popleft()
        return None

    async def _claim(self, group_id: str) -> ReadyChord | None:
        try:
            ready, state = await self._chords.claim(group_id)
        except BackendConnectionError:
            self._waiter.announce(group_id)
            raise
        except (BackendClosedError, UsageError):
            raise
        except Exception as exc:
            # The server may hold the claim nevertheless. Its lease runs out; then another process can try the chord.
            self._set_aside(group_id, exc)
            return None
        if ready is not None:
            self._aside.pop(group_id, None)
        elif group_id in self._aside:
            return None  # it is claimed, perhaps by the call that failed here; other processes try the chord again
        left = state.lease_left if ready is None else self._store.chord_lease
        if left is not None:
            self._waiter.remind(group_id, left)  # no message would announce the death of the process with the claim
        return ready

    async def _check(self, group_ids: Sequence[str]) -> None:
        """Read the states of these open chords, and announce the complete chords, so that they are claimed next."""
        states = await self._store.chord_steps([ChordStep(ChordOp.READ, group_id) for group_id in group_ids])
        for state in states:
            if isinstance(state, (BackendConnectionError, BackendClosedError)):
                raise state
        over: list[ChordStep] = []
        for group_id, state in zip(group_ids, states, strict=True):
            if isinstance(state, BaseException):
                self._set_aside(group_id, state)
            elif state.done or state == ChordState():
                # The chord has expired or is finished. A CLAIM without a token claims nothing, but removes the chord
                # from the list of open chords.
                over.append(ChordStep(ChordOp.CLAIM, group_id, expires=self._store.chord_expires))
            elif state.complete:
                likeness = replace(state, lease_left=None)
                if group_id in self._aside:
                    if self._aside[group_id] == likeness:
                        continue
                    self._aside[group_id] = likeness
                if state.lease_left is None:
                    self._waiter.announce(group_id)
                else:
                    self._waiter.remind(group_id, state.lease_left)
        if over:
            await self._store.chord_steps(over)

    def _set_aside(self, group_id: str, error: BaseException) -> None:
        if group_id not in self._aside:
            logger.error("chord %s cannot be dispatched here, and is ignored until it changes: %s", group_id, error)
            self._aside[group_id] = None
        if len(self._aside) > _MAX_ASIDE:
            del self._aside[next(iter(self._aside))]


class _ReadyWaiter:
    """Gathers the chords to check, from messages, reminders and the list of open chords."""

    def __init__(self) -> None:
        #: The group ids of the chords to claim, in the order in which they were announced.
        self.announced: dict[str, None] = {}
        #: True if the dispatcher must read the list of open chords. It was not subscribed for some time, and chords may
        #: have become complete in that time.
        self.list_all = False
        #: The group ids from the list of open chords that are not checked yet.
        self.open: deque[str] = deque()
        self._error: Exception | None = None
        self._reminders: dict[str, asyncio.TimerHandle] = {}
        self._wake = asyncio.Event()

    def receive(self, task_id: str, outcome: Outcome) -> None:
        if isinstance(outcome, Exception):
            self._error = outcome
        elif outcome.result is None:
            self.list_all = True
        else:
            self.announce(outcome.result)
        self._wake.set()

    def announce(self, group_id: str) -> None:
        """Make the dispatcher claim the chord as soon as possible."""
        self.announced[group_id] = None
        self._wake.set()

    def take(self) -> str:
        """Remove and return the chord that was announced first. A later announcement of the chord adds it again."""
        group_id = next(iter(self.announced))
        del self.announced[group_id]
        return group_id

    def remind(self, group_id: str, seconds: float) -> None:
        """Announce the chord after ``seconds``. The call replaces an earlier reminder for the same chord."""
        if (former := self._reminders.get(group_id)) is not None:
            former.cancel()
        self._reminders[group_id] = asyncio.get_running_loop().call_later(
            seconds, self._remember, group_id, context=EMPTY.context
        )

    def _remember(self, group_id: str) -> None:
        del self._reminders[group_id]
        self.announce(group_id)

    async def due(self) -> None:
        """Return as soon as there is a chord to check. Raises the error that has ended the subscription."""
        while not (self.announced or self.list_all or self.open):
            if self._error is not None:
                raise self._error
            self._wake.clear()
            await self._wake.wait()

    def stop(self) -> None:
        """Cancel all reminders."""
        for reminder in self._reminders.values():
            reminder.cancel()
