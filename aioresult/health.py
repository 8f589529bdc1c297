"""What is known of the server and the way to it, without asking: for the log, and for `Backend.stats`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic

__all__ = ["BackendStats", "Health", "Outage"]

logger: logging.Logger = logging.getLogger("aioresult")


@dataclass(frozen=True, slots=True)
class BackendStats:
    """What a backend is doing at this moment, from `Backend.stats`. Everything counts from `Backend.open` on."""

    #: Whether the backend is open in this process.
    is_open: bool
    #: Whether the server could be reached the last time that the backend tried. `Backend.ping` tries now.
    connected: bool
    #: How many waits are under way, for results, chords and running tasks; also those of the library itself, such as
    #: for the news that a worker has died.
    waiters: int
    #: How many different ids they wait for.
    waited_ids: int
    #: How many subscriptions stand or are being made.
    subscriptions: int
    #: How many stores are queued or in flight: results, parts of chords, steps and output of running tasks.
    queued_stores: int
    #: How many bytes these hold. `max_pending_bytes` bounds them.
    queued_bytes: int
    #: How many times a lost connection was made anew. An outage counts once for waits and once for all other calls.
    reconnects: int
    #: The text of the last error of the server or of a connection, and when it occurred (UTC).
    last_error: str | None
    last_error_at: datetime | None


class Outage:
    """A time in which waits hear nothing, and how many ids must be subscribed again before it is over."""

    __slots__ = ("left", "restored", "since")

    def __init__(self, since: float, left: int) -> None:
        self.since: float = since
        self.left: int = left
        self.restored: int = 0


class Health:
    """The troubles of one open backend. ``where`` is its URL, without the password."""

    def __init__(self, where: str) -> None:
        self.where: str = where
        self.reconnects: int = 0
        self.last_error: str | None = None
        self.last_error_at: datetime | None = None
        #: Whether the server could be reached when the backend last tried.
        self.connected: bool = True
        #: The outage that the waits are in.
        self.outage: Outage | None = None

    def failed(self, error: BaseException) -> None:
        """The server, or the way to it, has raised ``error``."""
        self.last_error = str(error) or type(error).__name__
        self.last_error_at = datetime.now(UTC)

    def lost(self, error: BaseException) -> None:
        """The server could not be reached: ``error`` says why."""
        self.failed(error)
        self.connected = False

    def back(self) -> None:
        """A connection that was lost is there again."""
        self.connected = True
        self.reconnects += 1

    def listener_lost(self, subscriptions: int) -> None:
        """The listener broke, and so many subscriptions must be made anew. May be called again during an outage."""
        if subscriptions:  # otherwise nobody needs the listener, and nobody has tried to connect it
            self.connected = False
        self.outage = Outage(monotonic() if self.outage is None else self.outage.since, subscriptions)

    def subscribed(self, outage: Outage, count: int) -> None:
        """So many subscriptions stand that were begun during ``outage``. The last one ends the outage."""
        if outage is self.outage:
            outage.restored += count
            if outage.restored >= outage.left:
                self.all_subscribed()

    def all_subscribed(self) -> None:
        """No subscription is missing. An outage in which nothing was subscribed goes on: the server was not asked."""
        outage = self.outage
        if outage is not None and outage.restored:
            self.outage = None
            self.back()
            logger.info(
                "the listener of %s is back after %.1f s; %s restored",
                self.where,
                monotonic() - outage.since,
                "1 subscription was" if outage.restored == 1 else f"{outage.restored:,} subscriptions were",
            )
