"""Running tasks in PostgreSQL: their output, the notes about their runs, and the leases of the workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ...exceptions import BackendRefusedError
from ...log import START, Entry, Flush, Page, PageRequest, Place
from ...run import RunState, RunStep, Verdict
from ..runs import superseded
from .schema import Tables, id_channel_sql, instant_sql, prefix_sql
from .statements import CLEANUP_BATCH, STEP_COLUMNS, Statements, versions_sql
from .storing import Storing, rounds

__all__ = ["RunTable", "Version"]

#: The largest number that a column can hold. A cursor with a larger number is after every entry.
_MAX_BIGINT = 2**63 - 1
#: An output may expire early, by this fraction of its life. So not every flush must write the expiry again.
_SLACK = 0.01


class Version(NamedTuple):
    """The version of everything that is stored for a task, so that `forget` removes nothing that came later.

    A field is ``None`` if there is no result, no output or no note of a run.
    """

    result: str | None
    epoch: int | None = None
    run: str | None = None


class RunTable:
    """The running tasks in one set of tables. The caller passes the connection to each method.

    If ``durable``, a flush (some output of a task) is on the server's disk before it counts as written. ``there`` is
    true if the database has the tables; without them every method raises `BackendRefusedError`. ``where`` names the
    database in that error. ``text`` is a function that escapes what the database cannot hold.
    """

    def __init__(
        self,
        names: Tables,
        storing: Storing,
        text: Callable[[str], str | None],
        durable: bool,
        there: bool,
        where: str,
    ) -> None:
        self._storing = storing
        self._text = text
        self._there = there
        self._where = where
        statements = storing.statements
        #: The indexes in `STEP_COLUMNS` of the columns that this database has.
        self._places = [STEP_COLUMNS.index(name) for name in ("task_id", *statements.columns)]
        self._append = _append_sql(names, durable)
        self._open = f"""
            SELECT epoch FROM {names.append}({prefix_sql(names)}, $1, $2, $3, $4, $5, $6, $7, $8, $9)"""
        if not durable:
            self._open += " CROSS JOIN (SELECT set_config('synchronous_commit', 'off', true) OFFSET 0) AS lazy"
        self._pages = _pages_sql(names, statements)
        self._given = (statements.insert_step, statements.update_step, *statements.rule)
        given = ", ".join(f"${number}" for number in range(1, 33))
        self._steps = f"""
            WITH taken AS MATERIALIZED (SELECT * FROM {names.run_steps}({prefix_sql(names)}, {given})),
            living_on AS ({statements.living_on_of_runs})
            SELECT * FROM taken"""
        self._beat = _beat_sql(names)
        self._alive = f"SELECT id FROM {names.workers} WHERE id = ANY($1::text[]) AND expires_at > now()"
        #: Selects a `Version` for each id of ``$1`` for which anything is stored.
        self.versions: str = versions_sql(names.tasks)
        if there:
            self.versions = f"""
            SELECT wanted.id, t.version, l.epoch, r.run FROM unnest($1::varchar[]) AS wanted(id)
            LEFT JOIN LATERAL (
                SELECT xmin::text AS version FROM {names.tasks} WHERE task_id = wanted.id LIMIT 1
            ) t ON true
            LEFT JOIN LATERAL (SELECT epoch FROM {names.logs} WHERE task_id = wanted.id LIMIT 1) l ON true
            LEFT JOIN LATERAL (SELECT run FROM {names.runs} WHERE task_id = wanted.id LIMIT 1) r ON true
            WHERE t.version IS NOT NULL OR l.epoch IS NOT NULL OR r.run IS NOT NULL"""
        self._forget_logs = _forget_sql(names.logs, "epoch", "int8")
        self._forget_output = f"""
            DELETE FROM {names.output} o USING (
                SELECT o.tableoid AS part, o.ctid AS place FROM unnest($1::text[], $2::int8[]) AS wanted(id, epoch)
                CROSS JOIN LATERAL (
                    SELECT o.tableoid, o.ctid FROM {names.output} o
                    WHERE o.task_id = wanted.id AND o.epoch <= wanted.epoch LIMIT {_MAX_BIGINT}
                ) o
            ) old WHERE o.ctid = old.place AND o.tableoid = old.part"""
        self._forget_runs = _forget_sql(names.runs, "run", "text")
        #: Further statements of the kind of `Statements.cleanup`.
        self.cleanup: list[str] = [_cleanup_sql(names.logs, names.output), _cleanup_sql(names.runs)] if there else []

    def _check(self) -> None:
        if not self._there:
            raise BackendRefusedError(
                f"the database of {self._where} was made by an older aioresult and lacks the tables of running tasks; "
                f"create them once with 'await backend.create_schema()' or connect(…, create=True), or run "
                f"aioresult.backends.postgres.schema_sql() in a migration"
            )

    async def append(self, flushes: Sequence[Flush], connection: Any) -> list[int | BaseException]:
        """Do what `BackendContract._append` says. Repeating a flush that was written changes nothing."""
        self._check()
        # Sort by id, so that two batches lock common rows in the same order.
        order = sorted(range(len(flushes)), key=lambda index: flushes[index].task_id)
        outcomes: list[int | BaseException] = [0] * len(flushes)
        known = [index for index in order if flushes[index].epoch]
        open_there: set[str] = set()
        if known:
            columns = zip(*(_columns(flushes[index]) for index in known), strict=True)
            open_there = {row["id"] for row in await connection.fetch(self._append, *columns)}
        rest = []
        for index in order:
            if flushes[index].epoch and flushes[index].task_id in open_there:
                outcomes[index] = flushes[index].epoch
            else:
                rest.append(index)
        if rest:
            rows = [(*_columns(flush), flush.writer, flush.run) for flush in map(flushes.__getitem__, rest)]
            epochs = await connection.fetch(self._open, *zip(*rows, strict=True))
            for index, (epoch,) in zip(rest, epochs, strict=True):
                outcomes[index] = superseded(flushes[index].task_id) if epoch is None else epoch
        return outcomes

    async def pages(self, requests: Sequence[PageRequest], connection: Any) -> list[Page | BaseException]:
        """Do what `BackendContract._pages` says. All pages come from one snapshot."""
        self._check()
        rows = await connection.fetch(self._pages, *zip(*map(_page_arguments, requests), strict=True))
        found: list[list[Any]] = [[] for _ in requests]
        for row in rows:
            found[row["place"] - 1].append(row)
        return [_page(request, some) for request, some in zip(requests, found, strict=True)]

    async def take(self, steps: Sequence[RunStep], connection: Any) -> list[RunState | BaseException]:
        """Do what `BackendContract._run_steps` says."""
        self._check()
        states: list[RunState | BaseException] = [RunState(Verdict.NOTED)] * len(steps)
        for indexes in rounds([(step.task_id, False) for step in steps]):
            indexes.sort(key=lambda index: steps[index].task_id)
            columns = zip(*(self._step(steps[index]) for index in indexes), strict=True)
            rows = await connection.fetch(self._steps, *self._given, *columns)
            for index, row in zip(indexes, rows, strict=True):
                states[index] = RunState(Verdict(row["verdict"]), row["run"], row["worker"], row["wish"])
        return states

    def _step(self, step: RunStep) -> tuple[Any, ...]:
        columns: list[Any] = [None] * len(STEP_COLUMNS)
        if step.record is not None:
            *stored, meta, seconds, group_id, group_seconds = self._storing.row(step.record)
            for place, value in zip(self._places, stored, strict=True):
                columns[place] = value
            columns[-4:] = meta, seconds, group_id, group_seconds
        return (
            step.task_id,
            step.op.value,
            step.run,
            step.worker,
            _seconds(step.lives),
            step.state,
            self._text(step.reason),
            step.skip_done,
            None if step.output is None else step.output.epoch,
            None if step.output is None else step.output.seq,
            step.gone,
            step.record is not None,
            *columns[1:],
        )

    async def beat(self, worker: str, lease: float, last: float | None, connection: Any) -> float:
        """Do what `BackendContract._beat` says."""
        self._check()
        clock: float = await connection.fetchval(self._beat, worker, lease, last)
        return clock

    async def alive(self, workers: Sequence[str], connection: Any) -> list[bool]:
        """Do what `BackendContract._alive` says."""
        self._check()
        alive = {row["id"] for row in await connection.fetch(self._alive, workers)}
        return [worker in alive for worker in workers]

    async def forget(self, versions: Sequence[tuple[str, Version]], connection: Any) -> None:
        """Remove the logs and the notes that still have these versions. ``versions`` is in order of the ids."""
        logs = [(task_id, version.epoch) for task_id, version in versions if version.epoch is not None]
        if logs:
            async with connection.transaction():
                # The first statement waits for flushes in flight, and locks the logs. The second removes their entries.
                # Other transactions lock entries only after their log, so the second statement does not wait.
                gone = await connection.fetch(self._forget_logs, *zip(*logs, strict=True))
                if gone:
                    await connection.execute(self._forget_output, *zip(*gone, strict=True))
        runs = [(task_id, version.run) for task_id, version in versions if version.run is not None]
        if runs:
            await connection.execute(self._forget_runs, *zip(*runs, strict=True))


def _unnest(*types: str) -> str:
    """SQL for the rows of the arrays ``$1``, ``$2`` …. It hides their lengths, so that the server keeps its plan.

    If the server sees how short the arrays are, it makes a new plan for each call. Planning takes longer than the work.
    """
    return f"unnest({', '.join(f'(SELECT ${number}::{name}[])' for number, name in enumerate(types, 1))})"


def _append_sql(names: Tables, durable: bool) -> str:
    """SQL that writes flushes in order of their ids, and returns the ids of the open outputs. It skips other outputs.

    It is one statement, because a function that handles one flush after the other costs much more.
    """
    lazily = "" if durable else "WHERE (SELECT set_config('synchronous_commit', 'off', true)) IS NOT NULL"
    until = instant_sql("lives")
    channel = id_channel_sql(prefix_sql(names), "task_id")
    return f"""
        WITH flush AS MATERIALIZED (
            SELECT * FROM {_unnest("text", "int8", "int8", "bytea", "text", "int8", "float8")}
                AS f(id, epoch, last, data, state, keep, lives) {lazily}
        ), held AS MATERIALIZED (
            -- Lock the logs, so that no other transaction opens or removes an output meanwhile.
            SELECT flush.*, l.expires_at FROM flush CROSS JOIN LATERAL (
                SELECT l.expires_at FROM {names.logs} l
                WHERE l.task_id = flush.id AND l.epoch = flush.epoch AND l.expires_at > clock_timestamp()
                LIMIT 1 FOR NO KEY UPDATE
            ) l
        ), fresh AS MATERIALIZED (
            SELECT held.* FROM held
            LEFT JOIN LATERAL (
                SELECT o.seq FROM {names.output} o WHERE o.task_id = held.id AND o.epoch = held.epoch
                ORDER BY o.task_id DESC, o.epoch DESC, o.seq DESC LIMIT 1
            ) top ON true
            WHERE (data <> '' OR state <> '') AND last > coalesce(top.seq, -1)
        ), added AS (
            INSERT INTO {names.output} (task_id, epoch, seq, data, state)
            SELECT id, epoch, last, data, state FROM fresh
            ON CONFLICT DO NOTHING RETURNING task_id, epoch, seq
        ), old AS MATERIALIZED (
            SELECT o.tableoid AS part, o.ctid AS place FROM fresh CROSS JOIN LATERAL (
                SELECT o.tableoid, o.ctid FROM {names.output} o
                WHERE o.task_id = fresh.id AND o.epoch = fresh.epoch AND o.seq < fresh.keep
                ORDER BY o.task_id, o.epoch, o.seq LIMIT {CLEANUP_BATCH}
            ) o WHERE fresh.keep > 0
        ), trimmed AS (
            DELETE FROM {names.output} o USING old WHERE o.ctid = old.place AND o.tableoid = old.part
        ), longer AS (
            INSERT INTO {names.logs} (task_id, epoch, expires_at)
            SELECT id, epoch, {until} FROM held
            WHERE lives IS NOT NULL AND CASE WHEN lives = 'infinity' THEN expires_at <> 'infinity'
                ELSE expires_at NOT BETWEEN now() + lives * interval '{1 - _SLACK} second' AND {until} END
            ON CONFLICT (task_id) DO UPDATE SET expires_at = excluded.expires_at
        )
        SELECT id, NULL AS sent FROM held
        UNION ALL
        SELECT NULL, pg_notify({channel}, 'output ' || epoch || '-' || seq || ' ' || task_id)::text FROM added"""


def _pages_sql(names: Tables, statements: Statements) -> str:
    """SQL that finds the entries after the given places, and the end of each log, all in one snapshot."""
    return f"""
        SELECT wanted.place, task.final, top.epoch AS top_epoch, top.seq AS top_seq,
               o.epoch, o.seq, o.data, o.state
        FROM {_unnest("text", "int8", "int8", "int8")}
            WITH ORDINALITY AS wanted(id, after_epoch, after_seq, count, place)
        CROSS JOIN LATERAL (SELECT {statements.is_final} AS final OFFSET 0) task -- once for all entries
        LEFT JOIN LATERAL (
            SELECT l.epoch FROM {names.logs} l WHERE l.task_id = wanted.id AND l.expires_at > clock_timestamp() LIMIT 1
        ) log ON true
        LEFT JOIN LATERAL (
            SELECT o.epoch, o.seq FROM {names.output} o WHERE o.task_id = wanted.id AND o.epoch = log.epoch
            ORDER BY o.task_id DESC, o.epoch DESC, o.seq DESC LIMIT 1
        ) top ON true
        LEFT JOIN LATERAL (
            SELECT o.epoch, o.seq, o.data, o.state FROM {names.output} o
            -- Do not compare rows: with the equality of the epochs, that would read the index from the log's start.
            WHERE o.task_id = wanted.id AND o.epoch = log.epoch AND o.seq > CASE
                WHEN after_epoch IS NULL THEN top.seq - 1 WHEN after_epoch = log.epoch THEN after_seq
                WHEN after_epoch < log.epoch THEN -1 ELSE {_MAX_BIGINT} END
            ORDER BY o.task_id, o.epoch, o.seq LIMIT wanted.count
        ) o ON true
        ORDER BY wanted.place, o.epoch, o.seq"""


def _beat_sql(names: Tables) -> str:
    """SQL that sets the lease of the worker ``$1`` to ``$2`` seconds, 0 if it shuts down, and removes dead workers.

    A worker is dead if its lease has ended. No worker is removed if the caller's last beat, at ``$3``, was long ago:
    perhaps the server was away, and no worker could renew its lease.
    """
    lease = "$2::float8 * interval '1 second'"
    return f"""
        WITH beating AS (
            INSERT INTO {names.workers} AS w (id, expires_at)
            SELECT $1::text, now() + {lease} WHERE $1::text <> '' AND $2::float8 > 0
            ON CONFLICT (id) DO UPDATE SET expires_at = excluded.expires_at
        ), ended AS (
            DELETE FROM {names.workers} WHERE id = $1::text AND $2::float8 = 0 RETURNING id
        ), due AS MATERIALIZED (
            -- Lock the rows, because a worker may be renewing its lease at this moment.
            SELECT w.id, w.expires_at + {lease} <= now() AS long_since FROM {names.workers} w
            WHERE extract(epoch FROM now()) - $3::float8 <= $2::float8 / 2
                AND w.expires_at <= now() AND w.id <> $1::text FOR UPDATE SKIP LOCKED
        ), spared AS (
            UPDATE {names.workers} SET expires_at = now() + {lease} / 2
            WHERE id = ANY(ARRAY(SELECT id FROM due WHERE long_since))
        ), dead AS (
            DELETE FROM {names.workers} WHERE id = ANY(ARRAY(SELECT id FROM due WHERE NOT long_since)) RETURNING id
        )
        SELECT extract(epoch FROM now())::float8 FROM (
            SELECT count(pg_notify({prefix_sql(names)} || 'workers', 'gone ' || id)::text)
            FROM (SELECT id FROM ended UNION ALL SELECT id FROM dead) AS gone
        ) AS told"""


def _forget_sql(table: str, version: str, kind: str) -> str:
    """SQL that deletes the rows of the ids ``$1`` with the versions ``$2`` in the column ``version``, in this order."""
    return f"""
        WITH found AS MATERIALIZED (
            SELECT t.part, t.place FROM unnest($1::text[], $2::{kind}[]) AS wanted(id, version)
            CROSS JOIN LATERAL (
                SELECT x.tableoid AS part, x.ctid AS place, x.{version} AS version FROM {table} x
                WHERE x.task_id = wanted.id LIMIT 1 FOR UPDATE
            ) t WHERE t.version = wanted.version
        )
        DELETE FROM {table} t USING found WHERE t.ctid = found.place AND t.tableoid = found.part
        RETURNING t.task_id, t.{version}"""


def _cleanup_sql(table: str, entries: str | None = None) -> str:
    """SQL that removes a batch of expired rows of ``table``, and the rows in ``entries`` of the same tasks."""
    with_entries = (
        ""
        if entries is None
        else f"gone AS (DELETE FROM {entries} WHERE task_id = ANY(ARRAY(SELECT task_id FROM old))), "
    )
    return f"""
        WITH old AS MATERIALIZED (
            SELECT task_id FROM {table} WHERE expires_at <= now() LIMIT {CLEANUP_BATCH} FOR UPDATE SKIP LOCKED
        ), {with_entries}deleted AS (
            DELETE FROM {table} WHERE task_id = ANY(ARRAY(SELECT task_id FROM old)) RETURNING 1
        )
        SELECT count(*)::int AS forgotten, count(*)::int AS removed FROM deleted"""


def _columns(flush: Flush) -> tuple[Any, ...]:
    return (
        flush.task_id,
        flush.epoch,
        flush.last,
        flush.data,
        flush.state,
        flush.keep_from,
        _seconds(flush.expires),
    )


def _seconds(lives: float | None) -> float | None:
    return None if lives is None else lives or math.inf


def _page_arguments(request: PageRequest) -> tuple[str, int | None, int | None, int]:
    if request.after is None:
        return request.task_id, None, None, 1
    # Ask for one entry more than the limit, to see whether there are more.
    return (
        request.task_id,
        min(request.after.epoch, _MAX_BIGINT),
        min(request.after.seq, _MAX_BIGINT),
        request.limit + 1,
    )


def _page(request: PageRequest, rows: Sequence[Any]) -> Page:
    first = rows[0]
    entries = [Entry(row["epoch"], row["seq"], row["data"], row["state"]) for row in rows if row["epoch"] is not None]
    more = request.after is not None and len(entries) > request.limit
    top = START if first["top_epoch"] is None else Place(first["top_epoch"], first["top_seq"])
    return Page(first["final"], tuple(entries[: request.limit] if more else entries), more, top)
