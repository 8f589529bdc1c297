"""The connections of one PostgreSQL backend: makes them, runs operations on them, and translates their errors."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from inspect import signature
from typing import Any, TypeVar
from weakref import WeakSet

import asyncpg

from ...exceptions import (
    AioResultError,
    BackendConnectionError,
    BackendError,
    BackendRefusedError,
    ImproperlyConfigured,
    UsageError,
)
from ...options import checked_function, checked_option, did_you_mean
from ...sockets import silence
from ...urls import hide_lone_user
from .dsn import Dsn
from .listener import bounded

__all__ = ["Connections"]

T = TypeVar("T")
E = TypeVar("E", bound=BackendError)

#: SQLSTATE classes and codes after which a repeated statement may succeed: connection trouble, a transaction that lost
#: a race or its time, a server that is full, starting or stopping, a lock or statement timeout, a standby that may be
#: promoted.
_TRANSIENT = ("08", "40", "25P03", "25P04", "53300", "57", "55P03", "25006")
#: SQLSTATE classes after which the same statement will fail again for every caller: authentication, permission, no such
#: statement, database, schema, table or column.
_REFUSED = ("26", "28", "3D", "3F", "42")
#: SQLSTATE classes whose texts may quote the name of the user, or of a database with the same name. If the URL lacks a
#: colon, that name may be the password.
_WHO = ("28", "3D")
#: SQLSTATE classes that concern the server, and so the whole batch instead of one record in it.
_WHOLE_BATCH = ("53", "54", "58")

_OF_A_POOLER = "; behind a pooler in transaction mode, pass connect_options={'statement_cache_size': 0}"

CANNOT_REACH = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError)

#: Settings of the connections that aioresult makes. The server may make a plan while a table is empty, and
#: use it as long as the connection lives. Such a plan must not read the table from end to end. See `statements`.
_PLANNING = {"enable_seqscan": "off", "jit": "off"}


class Connections:
    """Makes connections to ``dsn``, or with the caller's ``connect``, and runs operations on a pool of them.

    ``where`` names the server in errors. ``heartbeat`` and ``patience`` are in seconds. ``given`` is the caller's pool,
    which the caller closes. While that pool is full for less than ``patience``, an operation raises an error that
    allows a retry.
    """

    def __init__(
        self,
        dsn: Dsn,
        where: str,
        heartbeat: float,
        patience: float,
        options: Mapping[str, Any],
        given: asyncpg.Pool[Any] | None,
        connect: Callable[[], Awaitable[asyncpg.Connection[Any]]] | None,
    ) -> None:
        checked_option("connect_options", options, Mapping, "a mapping or None")
        if unknown := sorted(options.keys() - signature(asyncpg.connect).parameters.keys()):
            hint = did_you_mean(unknown[0], signature(asyncpg.connect).parameters)
            raise ImproperlyConfigured(
                f"{where}: asyncpg.connect has no argument {unknown[0]!r} of connect_options{hint}"
            )
        checked_function("connect", connect)
        if given is not None and not callable(getattr(given, "acquire", None)):
            raise ImproperlyConfigured(f"pool must be an asyncpg.Pool or None, not {type(given).__qualname__}")
        self.given = given
        self._dsn = dsn
        self._where = where
        self._heartbeat = heartbeat
        self._patience = patience
        self._options = options
        self._connect = connect
        self._pool: asyncpg.Pool[Any] | None = None
        #: The running attempt to connect: a future that is done when the attempt ends, with its exception if it fails.
        self._attempt: asyncio.Future[None] | None = None
        self._made: WeakSet[asyncpg.Connection[Any]] = WeakSet()
        self._planning: Mapping[str, str] = _PLANNING
        #: The number of operations that are running.
        self._in_use = 0
        #: The time since which the caller has held all connections of its pool; ``None`` if it does not.
        self._full_since: float | None = None

    @property
    def pooled(self) -> bool:
        """True if there is a pool to run operations on."""
        return self._pool is not None or self.given is not None

    async def open(self) -> None:
        """Make the pool, unless the caller has given one. The pool connects when the first operation runs."""
        if self.given is not None:
            if getattr(self.given, "_loop", None) not in (None, asyncio.get_running_loop()):
                raise UsageError(
                    f"the pool given for {self._where} belongs to another event loop or process; make one in this loop"
                )
            self._pool = self.given
        else:
            # min_size=0, so that asyncpg makes no connection by itself: its attempts would outlive the reported outage.
            self._pool = await asyncpg.create_pool(
                min_size=0, max_size=6, connect=lambda *_, **__: self._in_turn(), reset=_reset
            )

    async def close(self) -> None:
        """Close the pool, unless it belongs to the caller."""
        pool, self._pool = self._pool, None
        if pool is not None and pool is not self.given:
            try:
                async with asyncio.timeout(1.0):
                    await pool.close()
            except (*CANNOT_REACH, asyncpg.PostgresError):
                pool.terminate()

    def abandon(self) -> None:
        """Drop every connection without using the event loop, which has ended or belongs to the parent process."""
        self._pool = self._attempt = None
        self._in_use = 0
        for connection in tuple(self._made):
            transport = getattr(connection, "_transport", None)
            if isinstance(transport, asyncio.BaseTransport):
                silence(transport)

    async def new(self, dsn: Dsn | None = None) -> asyncpg.Connection[Any]:
        """Connect to ``dsn``. Without it, call the caller's ``connect``; without that, connect to the URL."""
        if dsn is None and self._connect is not None:
            made = await self._connect()
            self._made.add(made)
            return made
        text, arguments = (dsn or self._dsn).with_options(self._options)
        settings = {**self._planning, **arguments.get("server_settings", {})}
        try:
            connection: asyncpg.Connection[Any] = await asyncpg.connect(
                text, **{"timeout": 2 * self._heartbeat, **arguments, "server_settings": settings}
            )
        except asyncpg.ProtocolViolationError as exc:
            if not self._planning or "parameter" not in str(exc):
                raise
            self._planning = {}  # a PgBouncer refuses settings that it does not know: connect without them
            return await self.new(dsn)
        except ssl.SSLCertVerificationError as exc:
            raise BackendRefusedError(f"{self._where}: {exc}") from exc
        except (ValueError, TypeError) as exc:  # asyncpg raises these for a malformed DSN or option
            raise ImproperlyConfigured(f"{self._where}: {hide_lone_user(str(exc), text)}") from None
        self._made.add(connection)
        return connection

    async def _in_turn(self) -> asyncpg.Connection[Any]:
        """Make a connection for the pool. Only one attempt runs at a time; if it fails, all waiting calls fail."""
        while self._attempt is not None:
            await asyncio.shield(self._attempt)
        attempt = self._attempt = asyncio.get_running_loop().create_future()
        try:
            return await self.new()
        except Exception as exc:
            attempt.set_exception(exc)
            attempt.exception()  # mark it as retrieved: perhaps no other call waits for this attempt
            raise
        finally:
            self._attempt = None
            if not attempt.done():
                attempt.set_result(None)

    async def run(self, operation: Callable[[Any], Awaitable[T]], otherwise: type[BackendError] = BackendError) -> T:
        """Run ``operation`` on a connection of the pool, and translate its errors."""
        return await self.translated(self.on_connection(operation), otherwise)

    async def on_connection(self, operation: Callable[[Any], Awaitable[T]]) -> T:
        """Run ``operation`` on a connection of the pool. Errors of statements are those of asyncpg.

        A server that is silent for too long raises `BackendConnectionError`.
        """
        pool = self._pool or self.given
        if pool is None:
            raise BackendConnectionError(f"the pool of {self._where} is closed")
        async with self._acquired(pool) as connection:
            try:
                return await bounded(connection, operation(connection), 3 * self._heartbeat)
            except AioResultError:
                raise
            except (*CANNOT_REACH, asyncpg.PostgresConnectionError) as exc:
                broken = self._error_of(exc, BackendConnectionError)
                if isinstance(broken, BackendConnectionError):
                    broken.in_flight = True
                raise broken from exc

    @asynccontextmanager
    async def _acquired(self, pool: asyncpg.Pool[Any]) -> AsyncIterator[Any]:
        connection = await self.acquire(pool)
        self._in_use += 1
        try:
            yield connection
        finally:
            self._in_use -= 1
            await pool.release(connection)

    async def acquire(self, pool: asyncpg.Pool[Any]) -> Any:
        """Take a connection from the pool. The caller must release it.

        Raises `BackendRefusedError` if the caller's pool is closed, or if all of its connections are in use for too
        long. The latter happens if request handlers hold a connection while they wait for a result.
        """
        try:
            connection = await pool.acquire(timeout=2 * self._heartbeat)
            self._full_since = None
            return connection
        except asyncpg.InterfaceError as exc:
            if pool is self.given and pool.is_closing():
                raise BackendRefusedError(f"the pool given for {self._where} is closed") from exc
            raise
        except TimeoutError as exc:
            if pool is not self.given or pool.get_size() < pool.get_max_size() or pool.get_idle_size():
                raise
            now = asyncio.get_running_loop().time()
            if self._in_use or self._full_since is None:
                self._full_since = now
            # At first the cause may be a server that does not answer the caller's queries: let the backend retry.
            kind = BackendConnectionError if now - self._full_since < self._patience else BackendRefusedError
            raise kind(
                f"none of the {pool.get_max_size()} connections of the pool given for {self._where} has become free "
                f"within {2 * self._heartbeat:g} s: make it larger, or hold no connection while waiting for a result"
            ) from exc

    async def query(self, sql: str, *args: Any, otherwise: type[BackendError] = BackendError) -> Any:
        """Run ``sql``, and return its first row."""
        return await self.run(lambda connection: connection.fetchrow(sql, *args), otherwise)

    async def translated(self, operation: Awaitable[T], otherwise: type[BackendError] = BackendError) -> T:
        """Await ``operation``, and turn an error of asyncpg into an error of this library. This happens nowhere else.

        The new error is of the class ``otherwise``, unless the SQLSTATE tells more.
        """
        try:
            return await operation
        except AioResultError:
            raise
        except (*CANNOT_REACH, asyncpg.PostgresError) as exc:
            raise self._error_of(exc, otherwise) from exc

    def _error_of(self, exc: Exception, otherwise: type[E]) -> E | BackendConnectionError | BackendRefusedError:
        if not isinstance(exc, asyncpg.PostgresError):
            return BackendConnectionError(f"cannot reach {self._where}: {str(exc) or type(exc).__name__}")
        # The text leaves out the details of the server's error, because they quote the row.
        code = exc.sqlstate or ""
        kind: type[E | BackendConnectionError | BackendRefusedError] = otherwise
        if code.startswith(_TRANSIENT):
            kind = BackendConnectionError
        elif code.startswith(_REFUSED):
            kind = BackendRefusedError
        remedy = _OF_A_POOLER if code in ("26000", "42P05") else ""
        if code.startswith(_WHO):  # changes asyncpg's error, too: that is the cause of our error, and is shown with it
            exc.args = (hide_lone_user(str(exc.args[0]), self._dsn.text), *exc.args[1:])
        error = kind(f"{self._where}: {exc.args[0]} [{code}]{remedy}")
        if code.startswith(_WHOLE_BATCH):
            error.of_server = True
        return error


async def _reset(connection: Any) -> None:
    """Reset a connection of the pool. asyncpg's own reset would cost a round trip after every use.

    An operation of this library can leave only one thing behind: an open transaction, if it was interrupted.
    """
    if connection.is_in_transaction():
        await connection.execute("ROLLBACK")
