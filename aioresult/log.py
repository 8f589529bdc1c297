"""The log of a task's output: what a store does to it, and how a place in it is written.

A log holds numbered chunks, 1, 2, 3 … without a hole, of one *epoch*: one attempt of the task, or one producer. The
producer gives the numbers; the store refuses what is not newer than what it has, so a flush that is repeated changes
nothing and a producer that was superseded cannot write. One flush is one entry: some chunks as one JSON list.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from .exceptions import InvalidCursor

__all__ = ["CLOSED", "OUTPUT_TOPIC", "START", "TAIL", "Entry", "Flush", "OutputNews", "Page", "PageRequest", "Place"]

#: What the hub knows the output of a task by, before the task's id.
OUTPUT_TOPIC: Final = "\x00output "
#: The cursor behind everything that is there now.
TAIL: Final = "tail"
#: How an output ends whose producer says nothing of the task's end.
CLOSED: Final = "CLOSED"

_CURSOR = re.compile(r"(\d{1,20})-(\d{1,20})", re.ASCII)


class Place(NamedTuple):
    """A place in a log: behind chunk ``seq`` of ``epoch``."""

    epoch: int
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}"

    @classmethod
    def parse(cls, cursor: str) -> Place:
        """The place that ``cursor`` names. Raises `InvalidCursor` unless it is one of ours."""
        found = _CURSOR.fullmatch(cursor) if isinstance(cursor, str) else None
        if found is None:
            raise InvalidCursor(
                f"{str(cursor)[:50]!r} is no cursor; pass what a stream or a page gave as its cursor, None for the "
                f"start, or aioresult.TAIL for now"
            )
        return cls(int(found[1]), int(found[2]))


#: Before the first chunk of whatever there is.
START: Final = Place(0, 0)


class Flush(NamedTuple):
    """Some chunks on their way into the log; the entry and the message that tells of it are one step."""

    task_id: str
    #: Names the producer: an opening flush that is repeated gets the same epoch again.
    writer: str
    #: 0 opens the output: the store gives an epoch, above every one that the log has, and drops what is older.
    epoch: int
    #: The number of the last chunk. That of an end mark is one more.
    last: int
    #: The chunks, a JSON list; empty for an end mark, and for a flush that only lets the log live longer.
    data: bytes = b""
    #: How the output ends: `CLOSED`, or the task's state.
    state: str = ""
    #: Entries whose last chunk is below that number may be dropped.
    keep_from: int = 0
    #: Seconds that the log lives from now on; 0 for ever, ``None`` to leave that as it is.
    expires: float | None = None
    #: The run that the producer belongs to; empty if none. A newer run has the output.
    run: str = ""


class Entry(NamedTuple):
    """One entry of a log."""

    epoch: int
    #: The number of its last chunk.
    last: int
    #: The chunks, a JSON list; empty for an end mark.
    data: bytes
    #: How the output ended; empty unless this is an end mark.
    state: str = ""


class PageRequest(NamedTuple):
    """A look into a log."""

    task_id: str
    #: ``None`` asks for the last entry alone.
    after: Place | None
    #: At most so many entries.
    limit: int


class Page(NamedTuple):
    """What a look finds. Whether the task is over is read first, and then the log: never the other way round."""

    #: Whether the task was over.
    final: bool
    entries: tuple[Entry, ...]
    #: Whether there are more entries behind these.
    more: bool
    #: The end of the log; `START` if there is none. It is needed only where there are no entries.
    top: Place = START


class OutputNews(NamedTuple):
    """What a message about an output says."""

    epoch: int
    last: int
    #: The chunks, as in `Entry`; ``None`` where the message does not carry them.
    data: bytes | None
