"""Records whether a backend can reach its server, without asking the server: for log messages and `Backend.stats`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic

__all__ = ["BackendStats", "Health", "Outage"]

logger: logging.Logger = logging.getLogger("aioresult")


@dataclass(frozen=True, slots=True)
class BackendStats:
    """What a backend is doing at this moment, and its troubles since `Backend.open`. `Backend.stats` returns it."""

    #: True if the backend is open in this process.
    is_open: bool
    #: True if the server could be reached when the backend last tried. `Backend.ping` tries now.
    connected: bool
    #: The number of waits that are under way: for results, for chords and for running tasks. It includes waits of the
    #: library itself, such as the wait for the news that a worker has died.
    waiters: int
    #: The number of different ids that these waits are for.
    waited_ids: int
    #: The number of subscriptions that exist or are being made.
    subscriptions: int
    #: The number of writes that are queued or in flight: results, parts of chords, and states and output of running
    #: tasks.
    queued_stores: int
    #: The size of these writes in bytes. The option `max_pending_bytes` limits it.
    queued_bytes: int
    #: How many times the backend has reconnected. An outage of the server counts at most twice: once for the connection
    #: of the waits, and once for all other calls.
    reconnects: int
    #: The text of the last error of the server or of a connection.
    last_error: str | None
    #: The time of that error, in UTC.
    last_error_at: datetime | None


class Outage:
    """A time in which waits get no news, because the listener (the connection that carries messages) is lost.

    ``since`` is its beginning, by `time.monotonic`. It is over when ``left`` ids are subscribed again; ``restored`` of
    them already are.
    """

    __slots__ = ("left", "restored", "since")

    def __init__(self, since: float, left: int) -> None:
        self.since: float = since
        self.left: int = left
        self.restored: int = 0


class Health:
    """Records the errors and the outages of one open backend. ``where`` is the backend's URL without the password."""

    def __init__(self, where: str) -> None:
        self.where: str = where
        self.reconnects: int = 0
        self.last_error: str | None = None
        self.last_error_at: datetime | None = None
        #: True if the server could be reached when the backend last tried.
        self.connected: bool = True
        #: The present outage, in which waits get no news; ``None`` if there is none.
        self.outage: Outage | None = None

    def failed(self, error: BaseException) -> None:
        """Record ``error``, an error of the server or of a connection to it."""
        self.last_error = str(error) or type(error).__name__
        self.last_error_at = datetime.now(UTC)

    def lost(self, error: BaseException) -> None:
        """Record that the server could not be reached; ``error`` says why."""
        self.failed(error)
        self.connected = False

    def back(self) -> None:
        """Record that a lost connection was made again."""
        self.connected = True
        self.reconnects += 1

    def listener_lost(self, subscriptions: int) -> None:
        """Record that the listener (the connection that carries messages) is lost, which begins an outage.

        ``subscriptions`` is the number of subscriptions that must be made again. A call during an outage replaces this
        number; the outage goes on.
        """
        if subscriptions:  # otherwise no waiter needs the listener, and no attempt to connect has failed
            self.connected = False
        self.outage = Outage(monotonic() if self.outage is None else self.outage.since, subscriptions)

    def subscribed(self, outage: Outage, count: int) -> None:
        """Record that ``count`` subscriptions were made again. The last subscription that was lost ends the outage.

        ``outage`` is the value of `outage` when these subscriptions were begun. If it has changed, the call does
        nothing, because these subscriptions were lost, too.
        """
        if outage is self.outage:
            outage.restored += count
            if outage.restored >= outage.left:
                self.all_subscribed()

    def all_subscribed(self) -> None:
        """Record that no subscription is missing. This ends an outage if a subscription was made again during it.

        Otherwise the outage goes on, because the server was not asked.
        """
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
