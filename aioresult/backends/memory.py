"""The memory backend keeps results in this process. It is the reference for authors of backends: read it first.

It encodes everything to bytes with the same codec as the other backends. So a value that can be stored here can be
stored on a server, too.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import deque
from collections.abc import Hashable, Sequence
from contextlib import suppress
from time import monotonic
from time import time as wall_clock
from types import NoneType
from typing import Protocol, TypeVar, Unpack

from ..chord import ChordOp, ChordState, ChordStep
from ..exceptions import AioResultError, SerializationError
from ..log import Flush, Page, PageRequest
from ..options import checked_option
from ..run import RunState, RunStep
from ..tasks import LONGEST_STEP
from .base import BackendOptions
from .keyvalue import KeyValueStoreBackend, Op, Write, output_message, sibling
from .runs import Log, Note, superseded

_Kept = TypeVar("_Kept", bound="_Expiring")

__all__ = ["MemoryBackend", "MemoryStore"]


class _Chord:
    """One chord: the reference implementation of what a `ChordStep` does."""

    def __init__(self) -> None:
        self.run = ""
        self.size: int | None = None
        #: The encoded outcomes of the header's tasks, in order of arrival. The key is the task's id and its index in
        #: the header, which is the group of tasks that the callback waits for.
        self.parts: dict[tuple[str, int | None], bytes] = {}
        self.body: bytes | None = None
        self.failure: bytes | None = None
        self.done = False
        self.token = ""  # names the holder of the last claim
        self.claimed_until = 0.0
        self.expires_at = -math.inf

    def take(self, step: ChordStep) -> tuple[ChordState, bool]:
        """Do the step. Returns the state after it, and true if the waiters must be notified."""
        op, now, news, claimed = step.op, monotonic(), False, False
        mine = self.token == step.token != ""
        if self.done:
            claimed = mine and op is ChordOp.FINISH  # the caller repeats this step because its reply was lost
        else:
            adding = op in (ChordOp.CREATE, ChordOp.SIZE, ChordOp.PART)
            if adding:
                self.size = self.size if step.size is None else step.size
                self.body = self.body or step.body
            if op is ChordOp.CREATE:
                self.run = step.run
            if op is ChordOp.PART and (step.task_id, step.index) not in self.parts:
                self.parts[step.task_id, step.index] = step.part
                if step.failed and self.failure is None:
                    self.failure, news = step.part, True
            if self.size is not None and len(self.parts) >= self.size:
                if adding or op in (ChordOp.CLAIM, ChordOp.RENEW):
                    news = news or adding
                    claimed = step.token != "" and (mine or self.claimed_until <= now)
                    if claimed:
                        self.token, self.claimed_until = step.token, now + step.lease
                elif mine and op in (ChordOp.RELEASE, ChordOp.FINISH):
                    # The lease may have run out. That does no harm: no other process has claimed the chord since.
                    self.claimed_until, news = 0.0, True
                    if op is ChordOp.FINISH:
                        self.done, self.body, self.size, claimed = True, None, len(self.parts), True
                    else:
                        self.token = ""
            if adding or claimed:
                # Never shorten the life: another backend may keep its chords for longer.
                self.expires_at = max(self.expires_at, now + step.expires if step.expires else math.inf)
        looking = op in (ChordOp.READ, ChordOp.PARTS)
        state = ChordState(
            len(self.parts),
            self.size,
            claimed,
            self.done,
            self.body if claimed and op is not ChordOp.RENEW else None,
            self.failure if looking else None,
            self.claimed_until - now if self.claimed_until > now else None,
            self._in_order() if op is ChordOp.PARTS else (),
        )
        return state, news

    def _in_order(self) -> tuple[bytes, ...]:
        def place(key: tuple[str, int | None]) -> float:
            return math.inf if key[1] is None else key[1]

        return tuple(self.parts[key] for key in sorted(self.parts, key=place))


class MemoryStore:
    """Holds what a server would hold: the values, their expiry, and the backends that listen to each channel.

    To share results between several backends, pass the same store to each of them. Their event loops may differ, even
    in threads: for tests of code that opens a backend for each loop. Only one of the backends may store at a time.
    """

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.listeners: dict[str, set[MemoryBackend]] = {}
        self.chords: dict[str, _Chord] = {}
        #: The output of each running task, by the key of its result.
        self.logs: dict[str, Log] = {}
        #: What the store knows of the last run of each running task, by the key of the task's result.
        self.notes: dict[str, Note] = {}
        #: When the lease of each worker ends. A worker without a valid lease counts as dead.
        self.workers: dict[str, float] = {}
        self._kept_left = 100
        self._expiry: dict[str, float] = {}
        self._queue: list[tuple[float, str]] = []

    def get(self, key: str) -> bytes | None:
        """Return the value; ``None`` if there is no value or it has expired."""
        return self.values.get(key) if self._expiry.get(key, monotonic() + 1) > monotonic() else None

    def put(self, key: str, value: bytes, expires: float) -> None:
        """Store the value. It replaces the old value and the old expiry."""
        self.values[key] = value
        self._expiry.pop(key, None)
        if expires:
            self._expire(key, expires)

    def extend(self, key: str, expires: float) -> bool:
        """Keep the value for at least ``expires`` seconds from now, 0 for ever. Return false if there is no value."""
        if self.get(key) is None:
            return False
        if not expires:
            self._expiry.pop(key, None)
        elif key in self._expiry and monotonic() + expires > self._expiry[key]:
            self._expire(key, expires)
        return True

    def _expire(self, key: str, expires: float) -> None:
        self._expiry[key] = until = monotonic() + expires
        heapq.heappush(self._queue, (until, key))
        self._compact()

    def _compact(self) -> None:
        """Rebuild the queue of expiries if most entries are stale: their values were replaced, extended or removed."""
        if len(self._queue) > 2 * len(self._expiry) + 100:
            self._queue = [(until, key) for key, until in self._expiry.items()]
            heapq.heapify(self._queue)

    def seconds_left(self, key: str) -> float | None:
        """Return the seconds until the value expires; ``None`` if it never does."""
        until = self._expiry.get(key)
        return None if until is None else until - monotonic()

    def delete(self, key: str) -> bool:
        """Remove the value, and the output and the note of its task. Return false if there was no value."""
        self.logs.pop(key, None)
        self.notes.pop(key, None)
        self._expiry.pop(key, None)
        self._compact()
        return self.values.pop(key, None) is not None

    def purge(self, thoroughly: bool = False) -> int:
        """Remove the entries that have expired, and return their number.

        Chords, outputs and notes of runs are looked through only if many have been added since the last time, or with
        ``thoroughly``.
        """
        removed, now = 0, monotonic()
        while self._queue and self._queue[0][0] <= now:
            until, key = heapq.heappop(self._queue)
            if self._expiry.get(key) == until:  # otherwise the value was replaced or extended since
                del self._expiry[key]
                removed += self.values.pop(key, None) is not None
        if thoroughly or len(self.chords) + len(self.logs) + len(self.notes) > 2 * self._kept_left:
            removed += _drop(self.chords, now) + _drop(self.logs, now) + _drop(self.notes, now)
            self._kept_left = max(len(self.chords) + len(self.logs) + len(self.notes), 100)
        return removed


class _Expiring(Protocol):
    expires_at: float


def _drop(kept: dict[str, _Kept], now: float) -> int:
    """Remove the entries that have expired, and return their number."""
    expired = [key for key, value in kept.items() if value.expires_at <= now]
    for key in expired:
        del kept[key]
    return len(expired)


class MemoryBackend(KeyValueStoreBackend):
    """Keeps results in this process. The URL is ``memory://``.

    It has one further option, ``store``: a `MemoryStore` to share. Without it, the backend makes a store of its own.

    Results survive `aclose`: they live as long as the backend object or the store.
    """

    def __init__(
        self,
        url: str = "memory://",
        *,
        store: MemoryStore | None = None,
        global_keyprefix: str = "",
        **options: Unpack[BackendOptions],
    ) -> None:
        super().__init__(url, global_keyprefix=global_keyprefix, **options)
        checked_option("store", store, (MemoryStore, NoneType), "a MemoryStore or None")
        self.store: MemoryStore = MemoryStore() if store is None else store
        self._channels: set[str] = set()
        #: Messages that were published and are not delivered yet.
        self._messages: deque[tuple[str, bytes]] = deque()

    @property
    def store_id(self) -> Hashable:
        """Return what identifies the store: the `MemoryStore` and the prefix."""
        return id(self.store), self._task_prefix

    async def _open(self) -> None:
        pass

    async def _close(self) -> None:
        await self._unlisten(tuple(self._channels))
        self._messages.clear()

    async def _get(self, keys: Sequence[str]) -> list[bytes | None]:
        return [self.store.get(key) for key in keys]

    async def _write(self, writes: Sequence[Write]) -> list[bool | BaseException]:
        self.store.purge()
        return [self._write_one(write) for write in writes]

    def _write_one(self, write: Write) -> bool | BaseException:
        try:
            return self._do(write)
        except SerializationError as exc:
            return exc

    def _do(self, write: Write) -> bool:
        store, key, current = self.store, write.key, self.store.get(write.key)
        match write.op:
            case Op.EXTEND:
                return store.extend(key, write.expires)
            case Op.DELETE:
                return store.delete(key)
            case Op.PUT:
                store.put(key, write.value, write.expires)
                return True
            case Op.PUT_IF_ABSENT if current is not None:
                return False
            case Op.PUT_UNLESS_SUCCESS if current is not None and self.codec.is_success(current):
                return False
            case Op.PUT_UNLESS_FINAL if current is not None and self.codec.is_final(current):
                return False
        store.put(key, write.value, write.expires)
        self._publish(key, write.value)
        return True

    def _publish(self, channel: str, value: bytes) -> None:
        for backend in tuple(self.store.listeners.get(channel, ())):
            loop = backend._loop
            if loop is self._loop or loop is asyncio.get_running_loop():
                backend._post(channel, value)
            elif loop is not None:
                with suppress(RuntimeError):  # that event loop has ended
                    loop.call_soon_threadsafe(backend._post, channel, value)

    def _post(self, channel: str, value: bytes) -> None:
        """Deliver a message in a later turn of the event loop: no waiter may run inside the store's atomic step."""
        if not self._messages:
            asyncio.get_running_loop().call_soon(self._deliver_some)
        self._messages.append((channel, value))

    def _deliver_some(self) -> None:
        """Deliver messages for a few milliseconds. Then the event loop has a turn before the rest is delivered."""
        pause_at = monotonic() + LONGEST_STEP
        while self._messages:
            self._deliver(*self._messages[0])
            self._messages.popleft()
            if self._messages and monotonic() >= pause_at:
                asyncio.get_running_loop().call_soon(self._deliver_some)
                break

    def _deliver(self, channel: str, value: bytes) -> None:
        if channel in self._channels:
            self._published(channel.encode("utf-8", "surrogateescape"), value)

    async def _listen(self, channels: Sequence[str]) -> None:
        for channel in channels:
            self._channels.add(channel)
            self.store.listeners.setdefault(channel, set()).add(self)

    async def _unlisten(self, channels: Sequence[str]) -> None:
        for channel in channels:
            self._channels.discard(channel)
            if (listeners := self.store.listeners.get(channel)) is not None:
                listeners.discard(self)
                if not listeners:
                    del self.store.listeners[channel]

    async def _chord_steps(self, steps: Sequence[ChordStep]) -> list[ChordState | BaseException]:
        self.store.purge()
        return [self._chord_step(step) for step in steps]

    def _chord_step(self, step: ChordStep) -> ChordState:
        key = self._group_key(step.group_id)
        chord = self.store.chords.get(key)
        anew = chord is not None and chord.done and step.op is ChordOp.CREATE and chord.run != step.run
        adding = step.op in (ChordOp.CREATE, ChordOp.SIZE, ChordOp.PART)
        if chord is None or anew or chord.expires_at <= monotonic():
            chord = _Chord()
            if adding:
                self.store.chords[key] = chord
        was_done = chord.done
        state, news = chord.take(step)
        if not was_done and (adding or state.claimed):
            # Keep the saved group as long as the chord: it says how the groups in the header are nested.
            self.store.extend(key, step.group_expires)
        if news:
            self._publish(key, b"")
            if state.complete and not state.done:
                self._publish(self._ready_channel, step.group_id.encode())
        return state

    async def _active_chords(self) -> list[str]:
        return [key.removeprefix(self._group_prefix) for key, chord in self.store.chords.items() if not chord.done]

    # -- running tasks ----------------------------------------------------------------------------------------------

    async def _append(self, flushes: Sequence[Flush]) -> list[int | BaseException]:
        self.store.purge()
        return [self._append_one(flush) for flush in flushes]

    def _append_one(self, flush: Flush) -> int | BaseException:
        key, now = self._task_key(flush.task_id), monotonic()
        note = _current(self.store.notes, key, now)
        if not flush.epoch and flush.run and note is not None and (note.run != flush.run or note.over):
            return superseded(flush.task_id)
        log = _current(self.store.logs, key, now) or Log()
        try:
            epoch, news = log.take(flush, wall_clock())
        except AioResultError as exc:
            return exc
        self.store.logs[key] = log
        if flush.expires is not None:
            log.expires_at = now + flush.expires if flush.expires else math.inf
        if news:
            self._publish(sibling(key, ".out"), output_message(epoch, flush.last, flush.data))
        return epoch

    async def _pages(self, requests: Sequence[PageRequest]) -> list[Page | BaseException]:
        return [self._page(request) for request in requests]

    def _page(self, request: PageRequest) -> Page:
        key = self._task_key(request.task_id)
        log = _current(self.store.logs, key, monotonic()) or Log()
        return Page(self._is_final(key), *log.page(request))

    def _is_final(self, key: str) -> bool:
        """True if the task is over. A result that cannot be decoded counts as final, so that its readers learn why."""
        current = self.store.get(key)
        try:
            return current is not None and self.codec.is_final(current)
        except SerializationError:
            return True

    async def _run_steps(self, steps: Sequence[RunStep]) -> list[RunState | BaseException]:
        self.store.purge()
        return [self._run_step(step) for step in steps]

    def _run_step(self, step: RunStep) -> RunState | BaseException:
        key, now = self._task_key(step.task_id), monotonic()
        current = self.store.get(key)
        try:
            status = None if current is None else self.codec.status(current)
        except SerializationError as exc:
            return exc
        note = _current(self.store.notes, key, now) or Note()
        worker = note.worker
        taken = note.take(step, status, step.record is not None and current == step.record.payload)
        if note.run or note.wish is not None:
            self.store.notes[key] = note
        if step.lives is not None:
            note.expires_at = now + step.lives if step.lives else math.inf
        if (record := taken.store) is not None:
            self._do(self._put(record))
            if record.group_id:
                self.store.extend(self._group_key(record.group_id), record.expires)
        log = _current(self.store.logs, key, now) or Log()
        if taken.mark and (place := log.end(step.output, taken.void)) is not None:
            epoch, last = place
            expires = None if step.record is None else step.record.expires
            self._append_one(Flush(step.task_id, "", epoch, last + 1, state=taken.mark, expires=expires))
        if taken.tell:
            self._publish(self._worker_prefix + worker, note.run.encode())
        return note.state(taken.verdict)

    async def _beat(self, worker: str, lease: float, last: float | None = None) -> float:
        workers, now = self.store.workers, monotonic()
        if worker and lease:
            workers[worker] = now + lease
        gone = [worker] if worker and not lease and workers.pop(worker, None) is not None else []
        if last is not None and now - last <= lease / 2:
            for other, until in tuple(workers.items()):
                if until + lease <= now:
                    workers[other] = now + lease / 2
                elif until <= now:
                    del workers[other]
                    gone.append(other)
        for other in gone:
            self._publish(self._workers_channel, other.encode())
        return now

    async def _alive(self, workers: Sequence[str]) -> list[bool]:
        now = monotonic()
        return [self.store.workers.get(worker, 0.0) > now for worker in workers]

    async def _cleanup(self) -> int:
        return self.store.purge(thoroughly=True)


def _current(kept: dict[str, _Kept], key: str, now: float) -> _Kept | None:
    """Return the entry under ``key``; ``None`` if there is none or it has expired."""
    found = kept.get(key)
    return found if found is not None and found.expires_at > now else None
