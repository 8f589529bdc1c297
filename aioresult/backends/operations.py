"""The operator's side of a backend: `ping` checks the server, and `stats` shows what the backend is doing."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from ..exceptions import BackendConnectionError
from ..health import BackendStats
from .live import LiveSide

__all__ = ["OperationsSide"]

#: How many heartbeats a ping may take.
_HEARTBEATS: Final = 3


class OperationsSide(LiveSide):
    """The methods that health checks and metrics call; see `aioresult.backends.base.Backend`."""

    async def ping(self) -> float:
        """Make one round trip to the server, now and without retries. Return how many seconds it took.

        Use it for health checks. A lost connection is made anew. Concurrent calls share a round trip.

        :raises BackendConnectionError: the server cannot be reached, or does not answer within three heartbeats.
        :raises BackendRefusedError: the server answers, and refuses.
        """
        self.check()
        limit = _HEARTBEATS * self.heartbeat
        try:
            async with asyncio.timeout(limit):  # a new connection, or a ping before this one, may take longer
                return await self._shards[0].pings.submit(None)
        except TimeoutError:
            error = BackendConnectionError(f"{self.as_uri()} has not answered a ping for {limit:g} s")
            self._shards[0].health.lost(error)
            raise error from None

    def stats(self) -> BackendStats:
        """Return what the backend is doing at this moment. No I/O.

        Call it in the thread of the backend's event loop. It may be called while the backend is closed, too. It counts
        the awaited ids one by one: ten thousand ids take about a millisecond.
        """
        if not self.is_open:
            return _CLOSED
        shards = self._shards
        latest = max((shard.health for shard in shards), key=lambda health: health.last_error_at or _NEVER)
        waiters, ids, subscriptions = map(sum, zip(*(shard.hub.counts() for shard in shards), strict=True))
        stores = [batcher for shard in shards for batcher in shard.stores]
        return replace(
            _CLOSED,
            is_open=True,
            connected=all(shard.health.connected for shard in shards),
            waiters=waiters,
            waited_ids=ids,
            subscriptions=subscriptions,
            queued_stores=sum(batcher.queued for batcher in stores),
            queued_bytes=sum(batcher.held for batcher in stores),
            reconnects=sum(shard.health.reconnects for shard in shards),
            last_error=latest.last_error,
            last_error_at=latest.last_error_at,
        )


#: Before any error.
_NEVER = datetime.min.replace(tzinfo=UTC)
#: What `OperationsSide.stats` returns for a backend that is not open.
_CLOSED = BackendStats(
    is_open=False,
    connected=False,
    waiters=0,
    waited_ids=0,
    subscriptions=0,
    queued_stores=0,
    queued_bytes=0,
    reconnects=0,
    last_error=None,
    last_error_at=None,
)
