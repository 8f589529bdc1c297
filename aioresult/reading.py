"""The state of one reader of an output: it turns messages and pages into chunks, in order, each exactly once.

The log is what the store keeps of an output. A message announces new chunks of the log, and usually carries them. A
page is a part of the log that was read. Messages and pages arrive on different connections, in any order. So a reader
keeps three things: its place in the log; a *box*, the chunks after that place that wait in memory; and whether it must
read the log, because the log has chunks that are not in the box.

This module does no I/O. tests/test_output_model.py checks every order of events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from .exceptions import AioResultError, OutputGap, OutputRestarted
from .log import START, Place

__all__ = ["END", "Decoded", "Reading"]

#: The most chunks and bytes from messages that a box (the chunks that wait in memory) takes. Readers read later chunks
#: from the log.
BOX_CHUNKS = 64
BOX_BYTES = 64 * 2**10


class Decoded(NamedTuple):
    """An entry of the log with decoded chunks; for the fields see `aioresult.log.Entry`."""

    epoch: int
    last: int
    chunks: Sequence[Any]
    state: str = ""


class _End:
    """The type of `END`, the item that follows the last chunk of an output in a reader's box."""


END = _End()


class Reading:
    """The state of one reader. The reader begins after the place ``after``; ``None`` means the present end of the log.

    If ``gaps`` is true, the reader skips missing chunks. Otherwise it puts `OutputGap` into the box. If ``restarts`` is
    true, it goes on with the output of another attempt. Otherwise it puts `OutputRestarted` into the box.
    """

    def __init__(self, after: Place | None, *, gaps: bool = False, restarts: bool = False) -> None:
        #: The place after the last chunk that `take` has returned.
        self.place: Place = after or START
        #: How many times another attempt of the task began meanwhile; counted only if ``restarts`` is true.
        self.attempt: int = 0
        #: True if the reader must read the log: at first, and whenever the log may have chunks that are not in the box
        #: (the chunks that wait in memory).
        self.behind: bool = True
        #: How the output ended: a state of the task, or `CLOSED`. Empty until the reader has found the end.
        self.state: str = ""
        #: True if nothing follows the items in the box.
        self.over: bool = False
        self._gaps = gaps
        self._restarts = restarts
        self._box: deque[tuple[Place, Any]] = deque()
        self._bytes = 0
        #: The place after the last chunk in the box.
        self._at = self.place
        self._at_the_end = after is None
        #: `_asked`: a page was requested and has not arrived. `_again`: news has arrived since the request.
        #: `_final_when_asked`: the task was over at the request.
        self._asked = self._again = self._final_when_asked = False
        self._final = False
        #: `_lost` is an error if the producer is lost: its worker died, and only another attempt can write more chunks.
        #: `_lost_when_asked`: this was known when the page was requested.
        self._lost: AioResultError | None = None
        self._lost_when_asked = False

    # -- events -----------------------------------------------------------------------------------------------------

    def confirmed(self) -> None:
        """Note that the subscription has begun. A read of the log now finds all chunks that no message announced."""
        self._look_again()

    def ended(self) -> None:
        """Note that the task is over. The log has all its output now; a page that was requested before may not."""
        self._final = True
        self._look_again()

    def lost(self, error: AioResultError) -> None:
        """Note that the producer is lost: its worker died. The reader gives all stored chunks, and then ``error``."""
        self._lost = error
        self._look_again()

    def _look_again(self) -> None:
        self.behind = True
        self._again = self._asked

    def receive(self, epoch: int, last: int, chunks: Sequence[Any] | None, size: int = 0) -> None:
        """Take a message that announces the chunks up to number ``last``.

        ``chunks`` are the new chunks, of ``size`` bytes together; ``None`` if the message does not carry them.
        """
        at = self._at
        if self.over or (epoch == at.epoch and last <= at.seq):
            return  # the box has these chunks already
        if self._asked:
            self._again = True
        elif not self.behind:
            # A message of an older epoch may come from a producer that another attempt has superseded. Or the server
            # has lost the log, and its clock was set back. In both cases the reader reads the log.
            fits = len(self._box) < BOX_CHUNKS and self._bytes + size <= BOX_BYTES
            if chunks is not None and epoch == at.epoch and last - len(chunks) <= at.seq and fits:
                self._bytes += size
                self._put(last, chunks)
            else:
                self.behind = True

    # -- reading the log --------------------------------------------------------------------------------------------

    def ask(self) -> Place | None:
        """Begin to read a page of the log. Returns the place after which to read; ``None`` means only the last entry.

        The box must be empty.
        """
        self._asked, self._again, self._final_when_asked = True, False, self._final
        self._lost_when_asked = self._lost is not None
        return None if self._at_the_end else self._at

    def failed(self) -> None:
        """Note that reading the page has failed."""
        self._asked = False

    def page(self, entries: Sequence[Decoded], more: bool, final: bool, top: Place) -> None:
        """Take the page that was read from the log; for the arguments see `aioresult.log.Page`."""
        heard = self._again
        self._asked = self._again = False
        self.behind = more or heard
        if self._at_the_end:
            self._at_the_end = False
            self._at = self.place = Place(entries[-1].epoch, entries[-1].last) if entries else START
            entries = [entry for entry in entries[-1:] if entry.state]
            if entries:
                self._end(entries[0].state)
        for entry in entries:
            if not self._take(entry):
                return
        if not entries and top != START and top.epoch < self._at.epoch:
            self.behind = self._restart(top.epoch)
        if not self.behind and not self.over:
            if final or self._final_when_asked:
                self._end("")
            elif self._lost_when_asked and self._lost is not None:
                self._stop(self._lost)

    def _take(self, entry: Decoded) -> bool:
        """Put the chunks of an entry into the box. Returns false if the entries after it must be ignored."""
        if entry.epoch != self._at.epoch and not self._restart(entry.epoch):
            return False
        missed = entry.last - len(entry.chunks) - self._at.seq if not entry.state else entry.last - 1 - self._at.seq
        if missed > 0:
            place = Place(entry.epoch, self._at.seq + missed)
            if not self._gaps:
                self._stop(
                    OutputGap(
                        f"{missed:,} chunks are gone: trimmed, evicted or lost; go on with after=error.cursor",
                        missed,
                        str(place),
                    )
                )
                return False
            self._at = place
        if entry.state:
            self._end(entry.state)
            return False
        self._put(entry.last, entry.chunks)
        return True

    def _restart(self, epoch: int) -> bool:
        """Go on with the output of another attempt, from the start. Returns false if the reader must raise instead."""
        place = Place(epoch, 0)
        if self._at.epoch:
            if not self._restarts:
                self._stop(
                    OutputRestarted(
                        "another attempt writes the output from the beginning; go on with after=error.cursor",
                        str(place),
                    )
                )
                return False
            self.attempt += 1
            self._lost = None
        self._at = place
        return True

    def _put(self, last: int, chunks: Sequence[Any]) -> None:
        epoch, seq = at = self._at
        new = chunks[len(chunks) - (last - seq) :] if last - seq < len(chunks) else chunks
        for chunk in new:
            seq += 1
            at = Place(epoch, seq)
            self._box.append((at, chunk))
        self._at = at

    def _end(self, state: str) -> None:
        self.state = state
        self._stop(END)

    def _stop(self, item: Any) -> None:
        self._box.append((self._at, item))
        self.over, self.behind = True, False

    def reopen(self) -> None:
        """Drop the end mark, because the task has ended in another state. Look for the output of another attempt."""
        self._box.clear()
        self.over, self.state = False, ""
        self._look_again()

    # -- the consumer -----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of items in the box: the chunks that wait in memory, and the end or an error after them."""
        return len(self._box)

    @property
    def obstacle(self) -> AioResultError | _End | None:
        """The next item in the box if it is not a chunk: the end of the output, or an error. Otherwise ``None``."""
        item = self._box[0][1] if self._box else None
        return item if isinstance(item, (AioResultError, _End)) else None

    def take(self) -> Any:
        """Remove and return the next chunk in the box. The next item must be a chunk."""
        self.place, chunk = self._box.popleft()
        if not self._box:
            self._bytes = 0
        return chunk
