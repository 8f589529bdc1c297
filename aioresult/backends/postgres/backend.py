"""The PostgreSQL backend: Celery's tables, and a trigger that pushes results where Celery polls.

On every store, by aioresult or by a Celery worker, the trigger sends the id and the state to one of a fixed set of
channels. A waiting backend listens to the channels of its ids, and reads each result that it hears of. Concurrent
stores become one statement and one commit, because at a commit NOTIFY takes a lock of the whole database.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar, Unpack
from uuid import UUID

import asyncpg

from ...chord import CHORD_TOPIC, READY_TOPIC, ChordState, ChordStep
from ...exceptions import (
    BackendClosedError,
    BackendConnectionError,
    BackendGetMetaError,
    BackendRefusedError,
    BackendStoreError,
    DecodeError,
    ImproperlyConfigured,
    InvalidCursor,
    UsageError,
)
from ...log import OUTPUT_TOPIC, Flush, Page, PageRequest, Place
from ...meta import TaskMeta
from ...options import checked_flag, checked_text
from ...record import Record
from ...run import WORKER_TOPIC, WORKERS_TOPIC, RunState, RunStep
from ...seconds import checked_seconds
from ...tasks import StandingTask, spawn
from ..base import Backend, BackendOptions
from ..core import logger
from .chords import ChordTable
from .cleanup import Cleaner
from .connections import Connections
from .django import GROUP_TABLE, MAX_ID_LENGTH, TABLE, DjangoRows, DjangoStatements
from .dsn import parse_dsn
from .inspection import Found, inspect_tables
from .listener import Listener, bounded, close_connection
from .rows import CeleryRows
from .runs import RunTable, Version
from .schema import EXTENDED_COLUMNS, SHARD_DIGITS, Tables, schema_sql, trigger_sql
from .statements import Statements
from .storing import Storing

__all__ = ["PostgresBackend"]

T = TypeVar("T")

#: The length of an id in Celery's table.
_MAX_ID_LENGTH = 155
#: Seconds of silence after which `create_schema` gives up. The statements wait for any lock for a shorter time.
_SCHEMA_BOUND = 15.0
#: Topic → channel, for the topics without an id. A topic is the hub's name for what its waiters wait for.
_CHANNELS = {READY_TOPIC: "ready", WORKERS_TOPIC: "workers"}
#: Celery's names for its tables.
_USUAL = Tables()


class PostgresBackend(Backend):
    """PostgreSQL 14 or later: ``postgresql://user:password@host/database``, or Celery's ``db+postgresql+driver://``.

    Further options:

    - ``schema``, ``table``, ``group_table``: names of Celery's tables, if they differ from the usual ones. Without
      ``schema`` the ``search_path`` decides. The tables of django-celery-results are read and awaited, but not written:
      ``table="django_celery_results_taskresult"``. Without ``table`` they are found if Celery's own tables are missing.
    - ``create``: true creates what is missing (`create_schema`) on open; false never does. By default tables are
      created in an empty database only, and a database that has Celery's tables is not changed.
    - ``listen_dsn``: where to LISTEN, if the URL leads through a pooler in transaction mode.
    - ``pool``: an `asyncpg.Pool` of yours, instead of the URL. You close it, after the backend. The backend holds one
      of its connections for listening, unless ``listen_dsn`` or ``connect`` is given.
    - ``connect``: a coroutine function that returns a new `asyncpg.Connection`, instead of the URL.
    - ``connect_options``: arguments for `asyncpg.connect` (``ssl``, ``statement_cache_size``, ``server_settings``, …).
    - ``durable_output``: whether output of a running task is on the server's disk before it counts as sent. Without it
      a crash of the server loses the last moments of output of tasks that run. It never loses output of tasks that have
      a result.
    - ``cleanup_interval``: seconds between background runs of `cleanup`, by one process at a time; 0 for none.
    """

    def __init__(
        self,
        url: str = "postgresql://",
        *,
        schema: str | None = None,
        table: str | None = None,
        group_table: str | None = None,
        create: bool | None = None,
        listen_dsn: str | None = None,
        pool: asyncpg.Pool[Any] | None = None,
        connect: Callable[[], Awaitable[asyncpg.Connection[Any]]] | None = None,
        connect_options: Mapping[str, Any] | None = None,
        durable_output: bool = False,
        cleanup_interval: float = 0.0,
        **options: Unpack[BackendOptions],
    ) -> None:
        super().__init__(url, **options)
        self._listen_dsn = None if listen_dsn is None else parse_dsn(checked_text("listen_dsn", listen_dsn))
        self._connections = Connections(
            parse_dsn(url), self.as_uri(), self.heartbeat, self.retry_for, connect_options or {}, pool, connect
        )
        celerys = Tables(
            schema,
            _USUAL.table if table is None else table,
            _USUAL.group_table if group_table is None else group_table,
        )
        djangos = Tables(schema, TABLE, GROUP_TABLE if group_table is None else group_table)
        #: The tables that may have the results, in the order in which the backend looks for them.
        self._places = [djangos] if table == TABLE else [celerys, djangos] if table is None else [celerys]
        self._tables = self._places[0]
        self._max_id_length = MAX_ID_LENGTH if table == TABLE else _MAX_ID_LENGTH
        self._create: bool | None = None if create is None else checked_flag("create", create)
        self._has_factory = connect is not None
        if pool is not None and listen_dsn is None and connect is None and pool.get_max_size() < 2:
            raise ImproperlyConfigured(
                f"the pool given for {self.as_uri()} has one connection, and one is needed for listening: make it with "
                f"max_size=2 or more, or pass listen_dsn="
            )
        self._durable_output = checked_flag("durable_output", durable_output)
        self._cleanup_interval: float = checked_seconds("cleanup_interval", cleanup_interval)
        self._listener: Listener | None = None
        self._has_listened = False
        self._waiting: dict[str, set[str]] = {}  # channel → the topics that are waited for on it
        self._cleaning: StandingTask | None = None

    @property
    def store_id(self) -> Hashable:
        """Return what identifies the store: the URL and the tables.

        Return the backend itself if the caller's own connections may lead to another database than the URL.
        """
        alone = self._connections.given is not None or self._has_factory
        return self if alone else (self.as_uri(), self._tables)

    # -- schema -----------------------------------------------------------------------------------------------------

    async def create_schema(self) -> None:
        """Create the tables, triggers and indexes that are missing; see `schema_sql`.

        The backend need not be open. It is safe to repeat the call, and to call it in several processes at once.
        Existing tables of Celery get two triggers and, if they are small, an index. Those of django-celery-results get
        one trigger.

        :raises BackendConnectionError: a transaction kept a table locked for more than two seconds, or the server was
            away. Nothing was created; try again.
        :raises BackendRefusedError: the user lacks a right.
        """
        # Use an empty context, because a new connection keeps the context in which it was made.
        await spawn(self._on_any_connection(self._run_schema))

    async def _on_any_connection(self, operation: Callable[[Any], Awaitable[T]]) -> T:
        if self._connections.pooled:
            return await self._connections.run(operation)
        connection = await self._connections.translated(self._connections.new())
        try:
            bound = max(_SCHEMA_BOUND, 3 * self.heartbeat)
            return await self._connections.translated(bounded(connection, operation(connection), bound))
        finally:
            await close_connection(connection)

    async def _find_tables(self, connection: Any) -> Found:
        """Inspect Celery's tables; or those of django-celery-results, if they are in use and Celery's are missing."""
        found = [await inspect_tables(connection, names, self.as_uri()) for names in self._places]
        return found[-1] if found[0].tasks is None and (found[-1].notifies or found[-1].in_use) else found[0]

    async def _run_schema(self, connection: Any) -> None:
        found = await self._find_tables(connection)
        names = found.names
        text = trigger_sql(names) if found.only_read else schema_sql(names.schema, names.table, names.group_table)
        try:
            connection.add_log_listener(_warn)
            async with connection.transaction():
                await connection.execute(text)
        except asyncpg.LockNotAvailableError as exc:
            raise BackendConnectionError(
                f"the tables of {self.as_uri()} cannot be locked: a transaction that has used them is still open. "
                f"Nothing was created; try again once it has ended"
            ) from exc
        finally:
            connection.remove_log_listener(_warn)

    async def _inspect(self) -> None:
        """Find out which tables and columns exist, create them if the options say so, and prepare the statements."""
        found = await self._connections.run(self._find_tables)
        nothing = found.tasks is None and found.groups is None
        if (self._create and not found.up_to_date) or (self._create is None and nothing):
            await self.create_schema()
            found = await self._connections.run(self._find_tables)
        if not found.usable:
            raise BackendRefusedError(
                f"the database of {self.as_uri()} lacks tables or the trigger that wakes waiters; create them once "
                f"with 'await backend.create_schema()' or connect(…, create=True), or run "
                f"aioresult.backends.postgres.schema_sql() in a migration"
            )
        if found.outdated:
            logger.warning(
                "the functions in the database of %s are those of another version of aioresult; "
                "run create_schema once all processes have this one",
                self.as_uri(),
            )
        self._channel_prefix = _channel_prefix(found.tasks)
        self._tables = names = found.names
        if found.only_read:
            logger.info("the results of %s are in %s", self.as_uri(), TABLE)
            self._sql: Statements | DjangoStatements = DjangoStatements(names, found.columns)
            self._rows: CeleryRows | DjangoRows = DjangoRows(self.codec, self.as_uri())
            self._max_id_length = MAX_ID_LENGTH
            self._cleaner = Cleaner(self._connections, self._sql, [], self._channel_prefix)
            return
        if self.extended and (lacking := {*EXTENDED_COLUMNS} - {"stamps"} - found.columns):
            raise BackendRefusedError(
                f"{names.tasks} has no columns for extended=True (it lacks {', '.join(sorted(lacking))}); "
                f"it was created without result_extended"
            )
        optional = [column for column in ("children", *EXTENDED_COLUMNS) if column in found.columns]
        self._sql = Statements(names, found.zones, optional, self.expires)
        self._rows = CeleryRows(self.codec, optional, found.encoding)
        self._max_id_length = _MAX_ID_LENGTH
        self._storing = Storing(self._sql, self.expires, self._connections)
        self._chord_table = ChordTable(names, self._sql)
        self._run_table = RunTable(
            names, self._storing, self._rows.text, self._durable_output, found.runs, self.as_uri()
        )
        beside = [self._chord_table.cleanup, *self._run_table.cleanup]
        self._cleaner = Cleaner(self._connections, self._sql, beside, self._channel_prefix)

    # -- connections ------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        await self._connections.open()
        await self._inspect()
        if self._cleanup_interval:
            self._cleaning = StandingTask(self._keep_clean, "aioresult-cleanup", lambda: True)
            self._cleaning.start()

    async def _close(self) -> None:
        if self._cleaning is not None:
            await self._cleaning.stop()
            self._cleaning = None
        await self._drop_listener()
        self._waiting.clear()
        self._has_listened = False
        await self._connections.close()

    def _abandon(self, forked: bool) -> None:
        self._connections.abandon()
        self._listener = self._cleaning = None
        self._waiting = {}
        self._has_listened = False

    async def _ping(self) -> None:
        await self._connections.query("SELECT 1")

    # -- results ----------------------------------------------------------------------------------------------------

    def _valid_id(self, task_id: str | UUID) -> str:
        task_id = super()._valid_id(task_id)
        if len(task_id) > self._max_id_length or "\x00" in task_id:
            raise UsageError(
                f"an id must have at most {self._max_id_length} characters and no NUL, because the table of results "
                f"keeps no others; this one has {len(task_id)}"
            )
        return task_id

    async def _fetch(self, task_ids: Sequence[str]) -> Sequence[Any]:
        async def fetch(connection: Any) -> Any:
            try:
                return await connection.fetch(self._sql.fetch, task_ids)
            except ValueError as exc:  # from asyncpg, for text in a database without an encoding (SQL_ASCII)
                raise DecodeError(f"a stored result cannot be read: {exc}") from exc

        rows = await self._connections.run(fetch, BackendGetMetaError)
        found = {row["task_id"]: row for row in rows}
        return [found.get(task_id) for task_id in task_ids]

    def _encode(self, meta: TaskMeta) -> tuple[Any, ...]:
        """Return the columns of the result, from ``status`` on; only `PLAIN_COLUMNS` if all others are null."""
        return self._rows.encode(meta)

    def _payload_size(self, payload: tuple[Any, ...]) -> int:
        return sum(len(column) for column in payload if isinstance(column, (bytes, str)))

    def _stored_size(self, stored: Any) -> int:
        return 0 if isinstance(stored, BaseException) else len(stored["result"] or b"") + len(stored["meta"] or b"")

    def _decode(self, task_id: str, stored: Any) -> TaskMeta:
        return self._rows.decode(task_id, stored)

    async def _store(self, records: Sequence[Record]) -> Sequence[bool | BaseException]:
        return await self._connections.run(partial(self._stores().store, records), BackendStoreError)

    def _stores(self) -> Storing:
        """Return the object that stores results. Raises `BackendRefusedError` if aioresult only reads these tables."""
        if isinstance(self._rows, DjangoRows):
            raise self._rows.refusal()
        return self._storing

    async def _versions(self, task_ids: Sequence[str]) -> list[Version | None]:
        return await self._connections.run(partial(self._versions_on, task_ids))

    async def _versions_on(self, task_ids: Sequence[str], connection: Any) -> list[Version | None]:
        sql = self._sql.versions if isinstance(self._sql, DjangoStatements) else self._run_table.versions
        found = {task_id: Version(*versions) for task_id, *versions in await connection.fetch(sql, task_ids)}
        return [found.get(task_id) for task_id in task_ids]

    async def _delete(self, task_ids: Sequence[str], versions: Sequence[Version]) -> None:
        # Sort by id, so that two batches in flight lock their common rows in the same order.
        found = sorted(zip(task_ids, versions, strict=True), key=lambda pair: pair[0])
        await self._connections.run(partial(self._delete_on, found))

    async def _delete_on(self, found: Sequence[tuple[str, Version]], connection: Any) -> None:
        results = [(task_id, version.result) for task_id, version in found if version.result is not None]
        if results:
            await connection.execute(self._sql.delete, *zip(*results, strict=True))
        if not isinstance(self._rows, DjangoRows):
            await self._run_table.forget(found, connection)

    # -- groups -----------------------------------------------------------------------------------------------------

    async def _fetch_group(self, group_id: str) -> bytes | None:
        row = await self._connections.query(self._sql.fetch_group, group_id)
        return None if row is None else self._rows.group(group_id, row)

    async def _store_group(self, group_id: str, payload: bytes, expires: float) -> None:
        seconds = None if expires == self.expires else expires or math.inf
        sql = self._stores().statements.store_group
        await self._connections.query(sql, group_id, payload, seconds, otherwise=BackendStoreError)

    async def _delete_group(self, group_id: str) -> None:
        await self._connections.query(self._sql.delete_group, group_id)

    # -- chords -----------------------------------------------------------------------------------------------------

    async def _chord_steps(self, steps: Sequence[ChordStep]) -> Sequence[ChordState | BaseException]:
        self._stores()
        return await self._connections.run(
            lambda connection: self._chord_table.take(connection, steps), BackendStoreError
        )

    async def _active_chords(self) -> Sequence[str]:
        self._stores()
        return await self._connections.run(self._chord_table.active)

    # -- running tasks ----------------------------------------------------------------------------------------------

    async def _append(self, flushes: Sequence[Flush]) -> Sequence[int | BaseException]:
        return await self._connections.run(partial(self._runs_of_tasks().append, flushes), BackendStoreError)

    async def _pages(self, requests: Sequence[PageRequest]) -> Sequence[Page | BaseException]:
        return await self._connections.run(partial(self._runs_of_tasks().pages, requests), BackendGetMetaError)

    async def _run_steps(self, steps: Sequence[RunStep]) -> Sequence[RunState | BaseException]:
        return await self._connections.run(partial(self._runs_of_tasks().take, steps), BackendStoreError)

    async def _beat(self, worker: str, lease: float, last: float | None = None) -> float:
        return await self._connections.run(partial(self._runs_of_tasks().beat, worker, lease, last))

    async def _alive(self, workers: Sequence[str]) -> Sequence[bool]:
        return await self._connections.run(partial(self._runs_of_tasks().alive, workers))

    def _runs_of_tasks(self) -> RunTable:
        self._stores()
        return self._run_table

    # -- listening --------------------------------------------------------------------------------------------------

    def _channel(self, topic: str) -> str:
        if topic in _CHANNELS:
            return self._channel_prefix + _CHANNELS[topic]
        id = topic
        if topic[0] == "\x00":
            for kind in (CHORD_TOPIC, OUTPUT_TOPIC, WORKER_TOPIC):
                id = id.removeprefix(kind)
        return self._channel_prefix + hashlib.sha256(id.encode()).hexdigest()[:SHARD_DIGITS]

    async def _subscribe(self, task_ids: Sequence[str]) -> None:
        if self._listener is None or self._listener.lost:
            await self._drop_listener()
            self._listener = await self._connections.translated(self._open_listener())
        channels = [self._channel(task_id) for task_id in task_ids]
        for task_id, channel in zip(task_ids, channels, strict=True):
            self._waiting.setdefault(channel, set()).add(task_id)
        await self._connections.translated(self._listener.listen(channels))

    async def _unsubscribe(self, task_ids: Sequence[str]) -> None:
        channels = dict.fromkeys(map(self._channel, task_ids))
        for task_id in task_ids:
            self._waiting.get(self._channel(task_id), set()).discard(task_id)
        silent = [channel for channel in channels if not self._waiting.get(channel)]
        if self._listener is not None and not self._listener.lost:
            await self._connections.translated(self._listener.unlisten(silent))
        for channel in silent:  # only after UNLISTEN: the hub repeats the call if the server has refused it
            self._waiting.pop(channel, None)

    async def _open_listener(self) -> Listener:
        pool = self._connections.given if self._listen_dsn is None and not self._has_factory else None
        connection: Any
        if pool is None:
            connection = await self._connections.new(self._listen_dsn)
        else:
            connection = await self._connections.acquire(pool)
        give_back = None if pool is None else pool.release
        listener = Listener(connection, self.heartbeat, self._notified, self._listener_lost, give_back)
        try:
            heard = await listener.hears(self._notify)
        except asyncpg.ReadOnlySQLTransactionError as exc:
            await listener.close()
            if self._has_listened:  # after a failover the host name may soon lead to the new primary: reconnect
                raise
            raise BackendRefusedError(
                f"{self.as_uri()} is a standby, and LISTEN does not work there: use the URL of the primary server"
            ) from exc
        except BaseException:
            await listener.close()
            raise
        if not heard:
            await listener.close()
            raise BackendRefusedError(
                f"a notification sent through {self.as_uri()} does not arrive: LISTEN does not work through a pooler "
                f"in transaction mode; pass listen_dsn= with a direct connection to the same database"
            )
        self._has_listened = True
        return listener

    async def _notify(self, channel: str) -> None:
        """Send the listener a notification that proves that it hears the server.

        Also read the OID of the table: after a reconnect the server may be another one.
        """
        query = "SELECT to_regclass($1)::oid::int8 AS tasks, pg_notify($2, '')"
        row = await self._connections.on_connection(
            lambda connection: connection.fetchrow(query, self._tables.tasks, channel)
        )
        self._channel_prefix = _channel_prefix(row["tasks"])

    def _notified(self, payload: str) -> None:
        kind, _, rest = payload.partition(" ")
        if kind in ("chord", "ready"):
            self._chord_news(rest, ready=kind == "ready")
        elif kind == "output":
            place, _, task_id = rest.partition(" ")
            with suppress(InvalidCursor):
                self._output_news(task_id, *Place.parse(place), None)
        elif kind == "revoke":
            length, _, rest = rest.partition(" ")
            if length.isdecimal():
                self._revoke_news(rest[int(length[:4]) :], rest[: int(length[:4])])
        elif kind == "gone":
            self._worker_news(rest)
        elif kind.isdecimal():  # any user of the database can send anything, so ignore everything else
            self.read_again(rest[int(kind[:4]) :])  # ``kind`` is the length of the state before the id

    def _listener_lost(self, reason: BaseException) -> None:
        self._waiting.clear()
        super()._listener_lost(reason)

    async def _drop_listener(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            await listener.close()

    # -- expiry -----------------------------------------------------------------------------------------------------

    async def _cleanup(self) -> int:
        return await self._cleaner.run()

    async def _keep_clean(self) -> None:
        """Run `cleanup` at intervals, in one process at a time. The intervals vary, so that processes spread out."""
        while True:
            await asyncio.sleep(self._cleanup_interval * random.uniform(0.8, 1.2))  # noqa: S311
            try:
                await self._call(partial(self._cleaner.run, alone=True))
            except BackendClosedError:
                return
            except Exception as exc:
                logger.warning("background cleanup of %s failed, and will be retried: %s", self.as_uri(), exc)


def _warn(connection: object, message: Any) -> None:
    """Log the warnings of the schema, such as the warning about a large table without an index."""
    if message.severity_en == "WARNING":
        logger.warning("%s", message.message)


def _channel_prefix(table: int | None) -> str:
    return f"aioresult_{table}_"
