"""Where one reader of an output is: the rule by which messages and pages become chunks, each once and in order.

No I/O. Messages come on one connection and pages on another, so the order in which they arrive means nothing. What
holds is: a place in the log, a box of the chunks behind it, and whether the log must be read because something lies
behind the box that was not kept. tests/test_output_model.py goes through every order of events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from .exceptions import AioResultError, OutputGap, OutputRestarted
from .log import START, Place

__all__ = ["END", "Decoded", "Reading"]

#: How many chunks, and bytes of them, a box takes from messages; what comes then is read from the log.
BOX_CHUNKS = 64
BOX_BYTES = 64 * 2**10


class Decoded(NamedTuple):
    """An entry of the log as the reader's side has decoded it."""

    epoch: int
    last: int
    chunks: Sequence[Any]
    state: str = ""


class _End:
    """What stands in the box behind the last chunk."""


END = _End()


class Reading:
    """One reader. ``after`` is the place it begins behind; ``None`` for the end of the log as it is now."""

    def __init__(self, after: Place | None, *, gaps: bool = False, restarts: bool = False) -> None:
        #: Behind the chunk that was given last.
        self.place: Place = after or START
        #: How often another attempt began while this was read; only with ``restarts``.
        self.attempt: int = 0
        #: The log must be read. True at first, and after everything that is not in the box.
        self.behind: bool = True
        #: How the output ended, once that was read.
        self.state: str = ""
        #: Nothing comes behind what is in the box.
        self.over: bool = False
        self._gaps = gaps
        self._restarts = restarts
        self._box: deque[tuple[Place, Any]] = deque()
        self._bytes = 0
        #: Where the box ends.
        self._at = self.place
        self._at_the_end = after is None
        #: A page has been asked for; something came meanwhile; the task was over before it was asked for.
        self._asked = self._again = self._final_when_asked = False
        self._final = False
        #: Why nothing more will be written, unless another attempt begins; and whether that was known when a page was
        #: asked for.
        self._lost: AioResultError | None = None
        self._lost_when_asked = False

    # -- what happens -----------------------------------------------------------------------------------------------

    def confirmed(self) -> None:
        """The subscription stands: whatever was stored before is found by a read from now on."""
        self._look_again()

    def ended(self) -> None:
        """The task is over. What it wrote is in the log; the page that is on its way may be older."""
        self._final = True
        self._look_again()

    def lost(self, error: AioResultError) -> None:
        """The producer is gone. What it wrote comes first, and then ``error``."""
        self._lost = error
        self._look_again()

    def _look_again(self) -> None:
        self.behind = True
        self._again = self._asked

    def receive(self, epoch: int, last: int, chunks: Sequence[Any] | None, size: int = 0) -> None:
        """A message came, with ``chunks`` of ``size`` bytes or without them."""
        at = self._at
        if self.over or (epoch == at.epoch and last <= at.seq):
            return  # a repetition
        if self._asked:
            self._again = True
        elif not self.behind:
            # An older epoch: a producer that was superseded; or the log was lost, and the server's clock set back.
            fits = len(self._box) < BOX_CHUNKS and self._bytes + size <= BOX_BYTES
            if chunks is not None and epoch == at.epoch and last - len(chunks) <= at.seq and fits:
                self._bytes += size
                self._put(last, chunks)
            else:
                self.behind = True

    # -- reading the log --------------------------------------------------------------------------------------------

    def ask(self) -> Place | None:
        """A page is asked for, of what lies behind the place that is returned. The box must be empty."""
        self._asked, self._again, self._final_when_asked = True, False, self._final
        self._lost_when_asked = self._lost is not None
        return None if self._at_the_end else self._at

    def failed(self) -> None:
        """The page that was asked for did not come."""
        self._asked = False

    def page(self, entries: Sequence[Decoded], more: bool, final: bool, top: Place) -> None:
        """The page that was asked for."""
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
        """Put an entry into the box; false if nothing behind it is to be looked at."""
        if entry.epoch != self._at.epoch and not self._restart(entry.epoch):
            return False
        missed = entry.last - len(entry.chunks) - self._at.seq if not entry.state else entry.last - 1 - self._at.seq
        if missed > 0:
            place = Place(entry.epoch, self._at.seq + missed)
            if not self._gaps:
                self._stop(OutputGap(f"{missed:,} chunks are gone: trimmed, evicted or lost", missed, str(place)))
                return False
            self._at = place
        if entry.state:
            self._end(entry.state)
            return False
        self._put(entry.last, entry.chunks)
        return True

    def _restart(self, epoch: int) -> bool:
        """Go on with another epoch, from its beginning; false if that is an error here."""
        place = Place(epoch, 0)
        if self._at.epoch:
            if not self._restarts:
                self._stop(OutputRestarted("another attempt writes the output from the beginning", str(place)))
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
        """The task has ended otherwise than the mark in the box says: look for the output of another attempt."""
        self._box.clear()
        self.over, self.state = False, ""
        self._look_again()

    # -- the consumer -----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """How much is in the box."""
        return len(self._box)

    @property
    def obstacle(self) -> AioResultError | _End | None:
        """What is next in the box, unless that is a chunk: the end, or the error that stands in the way."""
        item = self._box[0][1] if self._box else None
        return item if isinstance(item, (AioResultError, _End)) else None

    def take(self) -> Any:
        """The chunk that is next in the box."""
        self.place, chunk = self._box.popleft()
        if not self._box:
            self._bytes = 0
        return chunk
