"""The connection that LISTENs. It asks the server for signs of life; asyncpg calls it back for each notification."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Self, TypeVar, cast
from uuid import uuid4

import asyncpg

from ...exceptions import BackendConnectionError, BackendRefusedError
from ...tasks import StandingTask

__all__ = ["Listener", "bounded", "close_connection"]

T = TypeVar("T")

#: `bounded` checks so many times within its time limit whether bytes have come or gone.
_STEPS = 10

#: The errors of a broken connection. `BackendConnectionError` is an `OSError`, too.
_TROUBLE = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)


async def bounded(
    connection: Any, operation: Awaitable[T], seconds: float, on_silence: Callable[[BaseException], None] | None = None
) -> T:
    """Await ``operation`` on ``connection``. If no byte moves for ``seconds``, raise `BackendConnectionError`.

    Any byte that arrives or leaves is a sign of life, so a long operation is not interrupted. After a silence, and also
    if the caller is cancelled, the connection is torn down. Before that, ``on_silence`` is called with the error.

    asyncpg's own timeout is not enough: it asks the server over a further connection to cancel the query, and waits for
    that. A server that has vanished never answers.
    """
    task = asyncio.ensure_future(operation)
    try:
        # Count steps instead of seconds. If this event loop was blocked for a long time, the answer may have arrived.
        await asyncio.wait({task}, timeout=3 * seconds / _STEPS)
        if not task.done():
            with _Traffic(connection) as traffic:
                quiet = 3
                while not task.done():
                    await asyncio.wait({task}, timeout=seconds / _STEPS)
                    quiet = 0 if traffic.moved() else quiet + 1
                    if quiet > _STEPS and not task.done():
                        error = BackendConnectionError(f"the server has not answered for {seconds:g} s")
                        error.in_flight = True
                        if on_silence is not None:
                            on_silence(error)
                        raise error
        return task.result()
    finally:
        if not task.done():
            # The teardown makes this asyncio task fail. Retrieve that error, or asyncio logs it.
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
            _tear_down(connection)
            await asyncio.wait({task})


class _Traffic(asyncio.Protocol):
    """Stands between the transport of an asyncpg connection and asyncpg, and sees whether bytes come or go.

    It is used only while an operation takes long, because it costs a call for each piece of data. It needs asyncpg's
    private attribute for the transport (0.32). Without that attribute only an answer is a sign of life.
    """

    def __init__(self, connection: Any) -> None:
        transport = getattr(connection, "_transport", None)
        self._transport = transport if isinstance(transport, asyncio.Transport) else None
        self._protocol: Any = None
        self._arrived = False
        self._unsent = 0

    def __enter__(self) -> Self:
        transport = self._transport
        if transport is not None and not transport.is_closing():
            protocol = transport.get_protocol()
            if hasattr(protocol, "data_received") and not isinstance(protocol, asyncio.BufferedProtocol):
                self._protocol = protocol
                self._unsent = transport.get_write_buffer_size()
                transport.set_protocol(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._transport is not None and self._protocol is not None:
            self._transport.set_protocol(self._protocol)

    def moved(self) -> bool:
        """True if any byte has come or gone since the last call."""
        if self._transport is None:
            return False
        before, self._unsent = self._unsent, self._transport.get_write_buffer_size()
        arrived, self._arrived = self._arrived, False
        return arrived or self._unsent < before

    def data_received(self, data: bytes) -> None:
        self._arrived = True
        self._protocol.data_received(data)

    def eof_received(self) -> bool | None:
        return cast("bool | None", self._protocol.eof_received())

    def connection_lost(self, exc: Exception | None) -> None:
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()


async def close_connection(connection: Any) -> None:
    """Close the connection; abort it if the server does not answer within a second."""
    try:
        await connection.close(timeout=1.0)
    except _TROUBLE:
        _tear_down(connection)


def _tear_down(connection: Any) -> None:
    with suppress(asyncpg.InterfaceError):  # the pool has torn down its connection already
        connection.terminate()


class Listener:
    """Listens to channels on one asyncpg connection.

    ``on_notify(payload)`` is called for each notification, and ``on_lost(reason)`` when the connection breaks.
    Neither is called after `close`. Every query fails if the server is silent for twice ``heartbeat`` seconds. `close`
    closes the connection. If there is a function ``give_back``, `close` passes it the connection instead, without any
    channel.
    """

    def __init__(
        self,
        connection: Any,
        heartbeat: float,
        on_notify: Callable[[str], None],
        on_lost: Callable[[BaseException], None],
        give_back: Callable[[Any], Awaitable[None]] | None = None,
    ) -> None:
        self.lost: bool = False
        self._connection = connection
        self._heartbeat = heartbeat
        self._on_notify: Callable[[str], None] | None = on_notify
        self._on_lost: Callable[[BaseException], None] | None = on_lost
        self._give_back = give_back
        self._channels: set[str] = set()
        #: The process id of the server's side of the connection, which listens.
        self._process: int | None = None
        # asyncpg allows one query at a time on a connection, and LISTEN is a query.
        self._turn = asyncio.Lock()
        connection.add_termination_listener(self._terminated)
        self._beating = StandingTask(self._beat, "aioresult-heartbeat", lambda: not self.lost)
        self._beating.start()

    async def listen(self, channels: Iterable[str]) -> None:
        """Listen to the channels, and return when the server has confirmed that. A repetition costs nothing."""
        new = [channel for channel in dict.fromkeys(channels) if channel not in self._channels]
        await self._all_at_once("LISTEN", new)
        for channel in new:
            await self._ask(partial(self._connection.add_listener, channel, self._notified))
            self._channels.add(channel)

    async def unlisten(self, channels: Iterable[str]) -> None:
        """Stop listening to the channels, and return when the server has confirmed that."""
        old = [channel for channel in dict.fromkeys(channels) if channel in self._channels]
        await self._all_at_once("UNLISTEN", old)
        for channel in old:
            await self._ask(partial(self._connection.remove_listener, channel, self._notified))
            self._channels.discard(channel)

    async def _all_at_once(self, command: str, channels: Sequence[str]) -> None:
        """Send all statements in one round trip, instead of one round trip per channel.

        asyncpg's own methods send a statement for each channel that is not in its private table of listeners (0.32). So
        this method also updates that table. If asyncpg has no such table, this method does nothing, and asyncpg's
        methods send the statements.
        """
        known = getattr(self._connection, "_listeners", None)
        if len(channels) > 1 and isinstance(known, dict):
            statements = "; ".join(f'{command} "{channel}"' for channel in channels)
            await self._ask(partial(self._connection.execute, statements))
            for channel in channels:
                if command == "LISTEN":
                    known.setdefault(channel, set())
                else:
                    known.pop(channel, None)

    async def hears(self, notify: Callable[[str], Awaitable[object]]) -> bool:
        """True if a notification that ``notify(channel)`` sends over another connection arrives here."""
        channel = f"aioresult_test_{uuid4().hex}"
        arrived = asyncio.Event()

        def hear(*_: Any) -> None:
            arrived.set()

        await self._ask(partial(self._connection.add_listener, channel, hear))
        try:
            await notify(channel)
            await self._ping()  # the server sends its answer after all notifications before it
        finally:
            await self._ask(partial(self._connection.remove_listener, channel, hear))
        return arrived.is_set()

    async def close(self) -> None:
        """Stop the callbacks and the heartbeat, and close the connection or give it back."""
        self._on_notify = self._on_lost = None
        await self._beating.stop()
        if self._give_back is None:
            await close_connection(self._connection)
            return
        try:
            self._connection.remove_termination_listener(self._terminated)
            await self.unlisten(tuple(self._channels))
        except _TROUBLE:
            _tear_down(self._connection)
        with suppress(*_TROUBLE):
            await self._give_back(self._connection)

    async def _ask(self, query: Callable[[], Awaitable[T]]) -> T:
        async with self._turn:
            return await bounded(self._connection, query(), 2 * self._heartbeat, self._break)

    async def _ping(self) -> None:
        """Ask the server for a sign of life.

        Raises `BackendRefusedError` if a pooler has replaced the session: the new session listens to nothing.
        """
        process: int = await self._ask(lambda: self._connection.fetchval("SELECT pg_backend_pid()"))
        if self._process not in (None, process):
            raise BackendRefusedError(
                "a pooler in transaction mode has replaced the session that listens; pass a direct listen_dsn="
            )
        self._process = process

    async def _beat(self) -> None:
        while not self.lost:
            await asyncio.sleep(self._heartbeat)
            try:
                await self._ping()
            except Exception as exc:  # any error: a connection that cannot be watched is of no use
                self._break(exc)
                _tear_down(self._connection)

    def _notified(self, connection: Any, pid: int, channel: str, payload: object) -> None:
        if self._on_notify is not None:
            self._on_notify(str(payload))

    def _terminated(self, connection: Any) -> None:
        self._break(BackendConnectionError("the connection was closed"))

    def _break(self, reason: BaseException) -> None:
        self.lost = True
        if (on_lost := self._on_lost) is not None:
            self._on_notify = self._on_lost = None
            on_lost(reason)
