"""The log of a task's output: the chunks that a store keeps for readers, and the places in the log.

A chunk is one value that the task sends. A log holds the chunks of one *epoch*, numbered 1, 2, 3 … without a gap. An
epoch is the output of one producer, such as one attempt of the task. The producer numbers the chunks, and sends some of
them at a time in a *flush*. The store keeps each flush as one *entry*: a JSON list of chunks. It refuses a flush that
is not newer than its last entry. So a repeated flush changes nothing, and a producer that another one has superseded
cannot write. An *end mark* is an entry without chunks that ends the output.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from .exceptions import InvalidCursor

__all__ = ["CLOSED", "OUTPUT_TOPIC", "START", "TAIL", "Entry", "Flush", "OutputNews", "Page", "PageRequest", "Place"]

#: Prefix of the hub's topic (the name of a subscription) for a task's output; the task's id follows it.
OUTPUT_TOPIC: Final = "\x00output "
#: The cursor (the text of a place) for the present end of a log: a reader that begins there gets only later chunks.
TAIL: Final = "tail"
#: The state in an end mark that the producer wrote before the task ended. Other end marks have the task's final state.
CLOSED: Final = "CLOSED"

_CURSOR = re.compile(r"(\d{1,20})-(\d{1,20})", re.ASCII)


class Place(NamedTuple):
    """A place in a log: directly after chunk ``seq`` of ``epoch``. Its text, such as ``"1-20"``, is a cursor."""

    epoch: int
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}"

    @classmethod
    def parse(cls, cursor: str) -> Place:
        """Return the place that ``cursor`` names. Raises `InvalidCursor` if it is not a cursor of this library."""
        found = _CURSOR.fullmatch(cursor) if isinstance(cursor, str) else None
        if found is None:
            raise InvalidCursor(
                f"{str(cursor)[:50]!r} is not a cursor; pass the cursor of a stream or a page, None to begin with the "
                f"first chunk, or aioresult.TAIL to get only chunks that are sent from now on"
            )
        return cls(int(found[1]), int(found[2]))


#: The place before the first chunk of any epoch.
START: Final = Place(0, 0)


class Flush(NamedTuple):
    """Some chunks to append to a log. The store appends and publishes them as one entry, in one atomic step."""

    task_id: str
    #: The id of the producer. If the producer repeats its first flush, the store assigns the same epoch again.
    writer: str
    #: The epoch; 0 opens the output: the store assigns an epoch above all earlier ones, and drops the older chunks.
    epoch: int
    #: The number of the last chunk in this flush. For an end mark: that of the last chunk of the log, plus one.
    last: int
    #: The chunks as a JSON list; empty for an end mark, and for a flush that only extends the life of the log.
    data: bytes = b""
    #: For an end mark, how the output ends: `CLOSED`, or the task's state. Otherwise empty.
    state: str = ""
    #: The store may drop each entry whose last chunk has a lower number than this.
    keep_from: int = 0
    #: Seconds that the log lives from now on; 0 for ever, ``None`` to leave its expiry unchanged.
    expires: float | None = None
    #: The id of the run (one attempt of the task) that the producer belongs to; empty if there is none. The producer
    #: of a newer run takes over the output.
    run: str = ""


class Entry(NamedTuple):
    """One entry of a log: the chunks of one flush, or an end mark."""

    epoch: int
    #: The number of the last chunk in this entry.
    last: int
    #: The chunks as a JSON list; empty for an end mark.
    data: bytes
    #: How the output ended; empty unless this is an end mark.
    state: str = ""


class PageRequest(NamedTuple):
    """A request for a page: some consecutive entries of a log."""

    task_id: str
    #: Return the entries after this place. If it is ``None``, return only the last entry.
    after: Place | None
    #: The maximum number of entries.
    limit: int


class Page(NamedTuple):
    """Some consecutive entries of a log, as the store returns them to a reader.

    The store reads first whether the task is over, and then the log. So if `final` is true, the log was complete.
    """

    #: True if the task was over before the log was read.
    final: bool
    entries: tuple[Entry, ...]
    #: True if the log has more entries after these.
    more: bool
    #: The place at the end of the log; `START` if there is no log. Readers need it only if `entries` is empty.
    top: Place = START


class OutputNews(NamedTuple):
    """The message in which the hub announces new chunks of an output."""

    epoch: int
    #: The number of the last new chunk.
    last: int
    #: The new chunks, as in `Entry`; ``None`` if the message does not carry them.
    data: bytes | None
