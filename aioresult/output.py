"""The output of a running task as its producer writes it: `Output`.

The producer keeps each chunk until the store has it, and sends the chunks in *flushes*, several at a time. Only one
flush is in flight at a time: if two flushes arrived in the wrong order, the store would refuse the earlier one for
good. The chunks that are sent while a flush is in flight form the next flush. So many small chunks share the cost of
one flush, and no timer is needed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, Self
from uuid import uuid4

from .exceptions import BackendClosedError, OutputFull, OutputSuperseded, UsageError
from .log import CLOSED, Flush, Place
from .tasks import EMPTY, copy_of_error, fail_all

__all__ = ["Keep", "Kept", "Output", "OutputStore", "Overflow", "joined"]

#: What happens when the log (the chunks in the store) is full: ``"trim"`` drops the oldest chunks, ``"fail"`` refuses
#: new ones.
Overflow = Literal["trim", "fail"]

#: `Output.send` waits if so many chunks or bytes are unsent: the store does not have them, and no flush carries them.
UNSENT_CHUNKS = 256
UNSENT_BYTES = 2**20
#: The most bytes in one flush, unless a single chunk is larger.
_FLUSH_BYTES = 64 * 2**10
#: A flush also extends the life of the log, but only if so many seconds have passed since the last extension. A
#: producer that sends nothing extends that life each time a quarter of it has passed.
_RENEW_AFTER = 1.0


class Keep(NamedTuple):
    """How much of an output the store keeps. Older chunks are dropped; a reader that needs them gets `OutputGap`."""

    chunks: int = 10_000
    bytes: int = 4 * 2**20


class OutputStore(Protocol):
    """What an output needs of a backend."""

    def check(self) -> None: ...
    def dumps_chunk(self, task_id: str, chunk: Any) -> bytes: ...
    def append(self, flush: Flush) -> asyncio.Future[int]: ...


class Kept:
    """Counts the entries that the log of an output keeps, to decide which entries to drop."""

    def __init__(self, keep: Keep | None) -> None:
        self.keep: Keep = Keep() if keep is None else Keep(*keep)
        if min(self.keep) < 1:
            raise UsageError(f"keep must be at least one chunk and one byte, not {keep}")
        #: For each entry: the number of its last chunk, how many chunks it has, and how many bytes.
        self._entries: deque[tuple[int, int, int]] = deque()
        self._chunks = self._bytes = 0

    def note(self, last: int, chunks: int, size: int) -> int:
        """Count a new entry. Returns the last chunk number of the oldest entry to keep, or 0 to drop no entry."""
        self._entries.append((last, chunks, size))
        self._chunks += chunks
        self._bytes += size
        dropped = False
        while len(self._entries) > 1 and (self._chunks > self.keep.chunks or self._bytes > self.keep.bytes):
            _, chunks, size = self._entries.popleft()
            self._chunks -= chunks
            self._bytes -= size
            dropped = True
        return self._entries[0][0] if dropped else 0


def joined(chunks: Iterable[bytes]) -> bytes:
    """Join encoded chunks to the JSON list that an entry of the log holds."""
    return b"[" + b",".join(chunks) + b"]"


class Output:
    """The output of a task: ``await output.send(chunk)``. Any number of readers may follow it.

    Get it from `aioresult.Backend.output`, or as ``task.output`` inside `aioresult.Backend.running`. It is an async
    context manager: leaving the block flushes and closes the output. If the block raises, the output is only flushed,
    and the end of the task ends it. To send from another thread, call
    ``loop.call_soon_threadsafe(output.send_nowait, chunk)``.
    """

    def __init__(
        self,
        store: OutputStore,
        task_id: str,
        *,
        expires: float,
        keep: Keep | None = None,
        on_full: Overflow = "trim",
        run: str = "",
    ) -> None:
        if on_full not in ("trim", "fail"):
            raise UsageError(f"on_full must be 'trim' or 'fail', not {on_full!r}")
        self._kept = Kept(keep)
        self._store = store
        self.task_id: str = task_id
        self._expires = expires
        self._fails_when_full = on_full == "fail"
        self._run = run
        self._writer = uuid4().hex
        self._loop = asyncio.get_running_loop()
        self._epoch = 0
        #: Numbers of chunks: the last one that the store has, the last one in a flush, and the last one that was sent.
        self._stored = self._flushed = self._sent = 0
        self._sent_bytes = 0
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        #: The flush that is in flight, or that has failed and must be repeated.
        self._flush: Flush | None = None
        #: True if `_flush` has failed. The next call repeats it.
        self._stalled = False
        self._scheduled = self._closed = self._stopped = False
        #: `_broken` is an error after which nothing can be sent any more. `_trouble` is the error of the last flush, if
        #: no caller has received it yet.
        self._broken: Exception | None = None
        self._trouble: Exception | None = None
        self._waiting: set[asyncio.Future[None]] = set()
        self._renewed_at = 0.0
        self._renewal: asyncio.TimerHandle | None = None

    # -- sending ----------------------------------------------------------------------------------------------------

    async def send(self, chunk: Any) -> None:
        """Send ``chunk``, any value that JSON can hold. It is encoded within the call, so you may change it afterwards.

        Returns at once, unless 256 chunks or one MiB are unsent. In that case it waits until there is room. If it
        raises, the chunk was not taken.

        :raises EncodeError: JSON cannot hold the chunk.
        :raises ResultTooLargeError: the chunk is larger than ``max_result_size`` bytes.
        :raises OutputSuperseded: another attempt of the task writes the output; nothing can be sent any more.
        :raises OutputFull: the log is full, and the output was made with ``on_full="fail"``.
        :raises BackendError: storing earlier chunks has failed. They are kept in order, and each further call tries to
            store them again. You may send this chunk again, too.
        """
        data = self._encoded(chunk)
        if self._unsent_is_full():
            await self._until(lambda: not self._unsent_is_full())
            self._check()  # the output may have been closed meanwhile
        self._add(data)

    def send_nowait(self, chunk: Any) -> None:
        """Send ``chunk`` from a plain callback. Works like `send`, but raises `OutputFull` if `send` would wait."""
        data = self._encoded(chunk)
        if self._unsent_is_full():
            raise OutputFull(
                f"{len(self._unsent):,} chunks of the output of task {self.task_id} are unsent; "
                f"'await output.send(chunk)' waits until there is room"
            )
        self._add(data)

    async def flush(self) -> None:
        """Wait until the store has all chunks that were sent so far. Raises the same errors as `send`."""
        self._check()
        self._trouble = None  # the failed flush is tried again, and this call reports the result of that
        sent = self._sent
        await self._until(lambda: self._stored >= sent)

    async def close(self) -> None:
        """Flush the output and end it, so that its readers stop. You may call this again, also after an error."""
        if self._stopped:
            return
        await self.settle()
        if not self.ended:
            self._post(self._flush_of(self._sent + 1, b"", CLOSED))
            await self._until(lambda: self.ended)
        self.stop()

    async def settle(self) -> None:
        """Refuse new chunks, and wait until the store has all chunks that were sent.

        You may call this again. Raises the same errors as `flush`.
        """
        if self._broken is not None:
            raise copy_of_error(self._broken)
        self._store.check()
        self._closed, self._trouble = True, None
        if self._stalled:
            self._again()
        await self._until(self._is_idle)

    def refuse(self, error: Exception) -> None:
        """Make every further `send` raise ``error``."""
        self._broken = error
        self.stop()

    def stop(self) -> None:
        """Send nothing more. No I/O."""
        self._closed = self._stopped = True
        if self._renewal is not None:
            self._renewal.cancel()

    @property
    def closed(self) -> bool:
        """True if nothing more can be sent."""
        return self._closed

    @property
    def ended(self) -> bool:
        """True if the store has the end mark, the entry that ends the output."""
        return self._stored > self._sent

    @property
    def place(self) -> Place | None:
        """The place in the log after the last chunk that was sent; ``None`` while the store has no chunk."""
        return Place(self._epoch, self._sent) if self._epoch else None

    @property
    def cursor(self) -> str:
        """The cursor after the last chunk that was sent: `aioresult.AsyncResult.stream` can begin there."""
        return str(Place(self._epoch, self._sent))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if exc is None:
            await self.close()
        else:
            try:
                await self.flush()
            finally:
                self.stop()

    def __repr__(self) -> str:
        return f"<Output of {self.task_id}, {self._sent:,} chunks sent>"

    # -- steps ------------------------------------------------------------------------------------------------------

    def _encoded(self, chunk: Any) -> bytes:
        """Encode ``chunk``. Raises an error if the chunk cannot be sent."""
        self._check()
        error, self._trouble = self._trouble, None
        if error is not None:
            raise error  # the error of the last flush; only one call raises it
        data = self._store.dumps_chunk(self.task_id, chunk)
        keep = self._kept.keep
        if self._fails_when_full and (self._sent >= keep.chunks or self._sent_bytes + len(data) > keep.bytes):
            raise OutputFull(
                f"the output of task {self.task_id} is full: {self._sent:,} chunks, {self._sent_bytes:,} bytes; "
                f"raise keep, or pass on_full='trim'"
            )
        return data

    def _check(self) -> None:
        """Raise an error if nothing can be sent. If the last flush has failed, begin to send it again."""
        if self._broken is not None:
            raise copy_of_error(self._broken)
        self._store.check()
        if self._closed:
            raise UsageError(f"the output of task {self.task_id} was closed; send all chunks before you close it")
        if self._stalled:
            self._again()

    def _is_idle(self) -> bool:
        """True if no chunk is unsent and no flush is in flight."""
        return self._flush is None and not self._unsent

    def _unsent_is_full(self) -> bool:
        return len(self._unsent) >= UNSENT_CHUNKS or self._unsent_bytes >= UNSENT_BYTES

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            if self._broken is not None:
                raise copy_of_error(self._broken)
            turn: asyncio.Future[None] = self._loop.create_future()
            self._waiting.add(turn)
            try:
                await turn
            finally:
                self._waiting.discard(turn)

    def _add(self, data: bytes) -> None:
        self._sent += 1
        self._sent_bytes += len(data)
        self._unsent.append(data)
        self._unsent_bytes += len(data)
        if self._flush is None and not self._scheduled:
            # Do not flush at once: the chunks that are sent in the same turn of the event loop share one flush.
            self._scheduled = True
            self._loop.call_soon(self._send_some, context=EMPTY.context)

    def _send_some(self) -> None:
        """Begin the next flush, if there are unsent chunks and no flush is in flight."""
        self._scheduled = False
        if self._flush is not None or not self._unsent or self._broken is not None:
            return
        chunks = [self._unsent.popleft()]
        size = len(chunks[0])
        while self._unsent and size + len(self._unsent[0]) <= _FLUSH_BYTES:
            chunks.append(self._unsent.popleft())
            size += len(chunks[-1])
        self._unsent_bytes -= size
        self._flushed += len(chunks)
        keep_from = 0 if self._fails_when_full else self._kept.note(self._flushed, len(chunks), size)
        self._post(self._flush_of(self._flushed, joined(chunks), keep_from=keep_from))

    def _flush_of(self, last: int, data: bytes, state: str = "", keep_from: int = 0) -> Flush:
        now = self._loop.time()
        expires = None
        if not (self._epoch and data) or now - self._renewed_at >= _RENEW_AFTER:
            expires, self._renewed_at = self._expires, now
        return Flush(self.task_id, self._writer, self._epoch, last, data, state, keep_from, expires, self._run)

    def _post(self, flush: Flush) -> None:
        self._flush = flush
        try:
            self._store.append(flush).add_done_callback(self._posted, context=EMPTY.context)
        except Exception as exc:  # the backend was closed meanwhile
            self._failed(exc)

    def _again(self) -> None:
        """Send the failed flush again. The flush must be unchanged, because the store may have it already."""
        self._stalled = False
        if self._flush is not None:
            self._post(self._flush)

    def _posted(self, stored: asyncio.Future[int]) -> None:
        error = stored.exception()
        flush = self._flush
        if error is not None or flush is None:
            self._failed(error if isinstance(error, Exception) else UsageError("the flush was cancelled"))
            return
        if not self._epoch:
            self._epoch = stored.result()
            self._renew_soon()
        self._stored = max(self._stored, flush.last)
        self._flush = None
        self._wake()
        self._send_some()

    def _failed(self, error: Exception) -> None:
        if isinstance(error, (OutputSuperseded, BackendClosedError)):
            self.refuse(error)
        else:
            self._stalled = True
            self._trouble = None if self._waiting else error
        waiting, self._waiting = self._waiting, set()
        fail_all(waiting, error)

    def _wake(self) -> None:
        for turn in self._waiting:
            if not turn.done():
                turn.set_result(None)

    # -- the life of the log ----------------------------------------------------------------------------------------

    def _renew_soon(self) -> None:
        if self._expires and not self._closed:
            self._renewal = self._loop.call_later(self._expires / 4, self._renew, context=EMPTY.context)

    def _renew(self) -> None:
        """Extend the life of the log, even if nothing is sent."""
        if self._flush is None and not self._scheduled:
            self._post(self._flush_of(self._flushed, b""))
        self._renew_soon()
