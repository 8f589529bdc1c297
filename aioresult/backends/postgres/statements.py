"""The SQL of the PostgreSQL backend. Ids and values are parameters; only quoted names are written into it.

When a row expires: by our table of expiry where that has a row for it, otherwise by Celery's rule, ``date_done`` plus
the reader's default. A row of ours counts only while its ``date_done`` is that of the result: another program that has
stored since then, such as a Celery worker, has left it behind.

Every look-up is written so that an index is the only way to do it (a LATERAL with a LIMIT, an array, a ctid), and our
connections have ``enable_seqscan`` off (`connections`). A plan that was made while a table was empty is used for hours;
it must not read the table from end to end once there are a million rows.

Dates go in and out as numbers: Python has no place for the year 20000, and a connection of the caller's may have a
codec of its own for dates.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...states import ALL_STATES, READY_STATES
from .schema import EXTENDED_COLUMNS, Tables, instant_sql, literal_sql

__all__ = [
    "CLEANUP_BATCH",
    "ORPHANS",
    "PLAIN_COLUMNS",
    "STEP_COLUMNS",
    "Statements",
    "delete_sql",
    "epoch_sql",
    "versions_sql",
]

#: All that most results have.
PLAIN_COLUMNS = ("status", "result", "date_done")

#: All that there may be of a result: the function that takes steps of runs numbers them alike in every database.
STEP_COLUMNS = (
    *("task_id", *PLAIN_COLUMNS, "traceback", "children", *EXTENDED_COLUMNS),
    *("meta", "seconds", "group_id", "group_seconds"),
)

#: How many rows one statement of `Statements.cleanup` deletes at most.
CLEANUP_BATCH = 1000
#: How many rows of ours one run of cleanup looks through for those that belong to nothing.
ORPHANS = 10_000

#: What a store may take the place of.
_REPLACEABLE = f"""
    t.status IS DISTINCT FROM 'SUCCESS'
        -- a state of the task's own making that comes late changes nothing
        AND (t.status IS NULL OR t.status NOT IN ('FAILURE', 'REVOKED')
             OR excluded.status IN ({", ".join(map(literal_sql, sorted(ALL_STATES)))}))
    -- the very same store, repeated because its reply was lost
    OR (t.status, t.date_done, t.result) IS NOT DISTINCT FROM (excluded.status, excluded.date_done, excluded.result)"""


class _Kept:
    """One of the two tables, ours beside it, and the rule by which its rows expire.

    ``zone`` is the time zone in which the table keeps its dates (expiry.sql); ``expires`` is the reader's default, in
    seconds, 0 for never.
    """

    def __init__(self, table: str, key: str, expiry: str, zone: str, expires: float) -> None:
        self._table = table
        self._key = key
        self._expiry = expiry
        self._zone = zone
        self._default = f"{expires!r} * interval '1 second'" if expires else None

    def turned(self, moment: str) -> str:
        """A moment as the table keeps it; or what the table keeps, as a moment."""
        return f"(({moment}) AT TIME ZONE {literal_sql(self._zone)})"

    def ours(self, row: str) -> str:
        """Joins ``e``, the row of ours that says when ``row`` expires."""
        return f"LEFT JOIN LATERAL (SELECT * FROM {self._expiry} x WHERE {self._belongs('x', row)} LIMIT 1) e ON true"

    def _belongs(self, ours: str, row: str) -> str:
        return f"{ours}.id = {row}.{self._key} AND {ours}.date_done IS NOT DISTINCT FROM {row}.date_done"

    def expires_at(self, row: str) -> str:
        """When a row expires, with its row ``e`` of ours; infinity, or null, if neither that nor a default says so."""
        if self._default is None:
            return "CASE WHEN e.stored_at IS NULL THEN coalesce(e.expires_at, 'infinity') ELSE 'infinity' END"
        by_default = f"coalesce(e.stored_at, {self.turned(f'{row}.date_done')}) + {self._default}"
        return (
            "CASE WHEN e.expires_at IS NOT NULL AND e.stored_at IS NULL THEN e.expires_at "
            f"ELSE greatest(e.expires_at, {by_default}) END"
        )

    def gone(self, row: str) -> str:
        """Whether it has expired."""
        return f"coalesce({self.expires_at(row)} <= now(), false)"

    def cleanup(self) -> list[str]:
        """Removes what has expired, `CLEANUP_BATCH` rows at most, by each of our rules; see `Statements.cleanup`.

        Rows that another program is writing are passed over: nothing here waits for a lock.
        """
        by_ours = ["e.expires_at <= now() AND e.stored_at IS NULL"]
        if self._default is not None:
            by_ours.append(
                f"e.stored_at <= now() - {self._default} AND (e.expires_at IS NULL OR e.expires_at <= now())"
            )
        return [
            f"""
            WITH due AS MATERIALIZED (
                SELECT e.id AS key, e.date_done FROM {self._expiry} e
                WHERE {expired} LIMIT {CLEANUP_BATCH} FOR UPDATE SKIP LOCKED
            ), {self._removing("due")}"""
            for expired in by_ours
        ]

    def orphans(self) -> str:
        """Looks through `ORPHANS` rows of ours behind the id ``$1``, and removes those that belong to nothing."""
        return f"""
            WITH seen AS MATERIALIZED (
                SELECT e.id AS key, e.date_done FROM {self._expiry} e
                WHERE e.id > $1::text ORDER BY e.id LIMIT {ORPHANS}
            ), lost AS MATERIALIZED (
                SELECT e.id AS key FROM seen CROSS JOIN LATERAL (
                    SELECT e.id FROM {self._expiry} e WHERE e.id = seen.key
                    AND e.date_done IS NOT DISTINCT FROM seen.date_done LIMIT 1 FOR UPDATE SKIP LOCKED
                ) e
                LEFT JOIN LATERAL (
                    SELECT true AS there FROM {self._table} t
                    WHERE t.{self._key} = seen.key AND t.date_done IS NOT DISTINCT FROM seen.date_done LIMIT 1
                ) t ON true
                WHERE t.there IS NULL
            ), forgotten AS (
                {self.forget("SELECT key FROM lost")}
            )
            SELECT count(*)::int AS looked, max(key) AS last FROM seen"""

    def by_default(self) -> str | None:
        """Looks through `CLEANUP_BATCH` rows behind date ``$1`` and id ``$2``, and removes what has expired by default.

        Written so that the index on ``date_done`` serves: the first comparisons have no arithmetic on the column. The
        last one decides, for there are hours that a time zone has twice.
        """
        if self._default is None:
            return None
        key = f"coalesce(t.{self._key}, '')"
        return f"""
            WITH seen AS MATERIALIZED (
                SELECT t.part, t.place, t.key, t.date_done, e.id AS own
                FROM (
                    SELECT t.tableoid AS part, t.ctid AS place, {key} AS key, t.{self._key}, t.date_done
                    FROM {self._table} t
                    WHERE t.date_done >= $1::text::timestamp
                      AND (t.date_done > $1::text::timestamp OR {key} > $2::text)
                      AND t.date_done <= {self.turned(f"now() - {self._default}")}
                      AND {self.turned("t.date_done")} <= now() - {self._default}
                    ORDER BY t.date_done, {key} LIMIT {CLEANUP_BATCH}
                ) t {self.ours("t")}
            ), held AS MATERIALIZED (
                SELECT t.part, t.place, seen.key FROM seen CROSS JOIN LATERAL (
                    SELECT t.tableoid AS part, t.ctid AS place FROM {self._table} t
                    WHERE t.ctid = seen.place AND t.tableoid = seen.part AND t.date_done = seen.date_done
                    FOR UPDATE SKIP LOCKED
                ) t WHERE seen.own IS NULL
            ), forgotten AS (
                {self.forget("SELECT key FROM held")}
            ), deleted AS (
                DELETE FROM {self._table} t USING held WHERE t.ctid = held.place AND t.tableoid = held.part RETURNING 1
            ), last AS (
                SELECT * FROM seen ORDER BY date_done DESC, key DESC LIMIT 1
            )
            SELECT (SELECT count(*) FROM seen)::int AS looked, (SELECT count(*) FROM deleted)::int AS removed,
                   (SELECT to_json(date_done) #>> '{{}}' FROM last) AS date_done, (SELECT key FROM last) AS key"""

    def _removing(self, due: str) -> str:
        """The rest of a statement: removes the rows ``due`` of ours, which are locked, and those that they belong to.

        Of a partitioned table, a ctid alone is no row.
        """
        belongs = f"t.{self._key} = {due}.key AND t.date_done IS NOT DISTINCT FROM {due}.date_done"
        return f"""held AS MATERIALIZED (
                SELECT {due}.key, t.part, t.place FROM {due} LEFT JOIN LATERAL (
                    SELECT t.tableoid AS part, t.ctid AS place FROM {self._table} t
                    WHERE {belongs} LIMIT 1 FOR UPDATE SKIP LOCKED
                ) t ON true
                LEFT JOIN LATERAL (SELECT true AS there FROM {self._table} t WHERE {belongs} LIMIT 1) other ON true
                WHERE t.place IS NOT NULL OR other.there IS NULL
            ), forgotten AS (
                {self.forget("SELECT key FROM held")} RETURNING 1
            ), deleted AS (
                DELETE FROM {self._table} t USING held WHERE t.ctid = held.place AND t.tableoid = held.part RETURNING 1
            )
            SELECT (SELECT count(*) FROM forgotten)::int AS forgotten, count(*)::int AS removed FROM deleted"""

    def forget(self, ids: str) -> str:
        """Removes the rows of ours of these ids."""
        return f"DELETE FROM {self._expiry} e WHERE e.id = ANY(ARRAY({ids})::text[])"


class Statements:
    """What is sent, for one set of tables, their time zones, the ``optional`` columns that there are, and one default.

    ``zones`` are those of the results and of the groups, ``optional`` names columns of the results, and ``expires`` is
    in seconds.
    """

    def __init__(self, names: Tables, zones: tuple[str, str], optional: Sequence[str], expires: float) -> None:
        tasks, groups = names.tasks, names.groups
        kept = _Kept(tasks, "task_id", names.task_expiry, zones[0], expires)
        kept_groups = _Kept(groups, "taskset_id", names.group_expiry, zones[1], expires)
        #: Of a result, in the order in which `store` takes them, between the id and what goes into our own table.
        self.columns: list[str] = [*PLAIN_COLUMNS, "traceback", *optional]
        columns = self.columns
        listed = ", ".join(columns)
        types = {
            **EXTENDED_COLUMNS,
            "date_done": "int8",  # microseconds since 1970
            "result": "bytea",
            "children": "bytea",
            "meta": "bytea",
            "seconds": "float8",
            "group_seconds": "float8",
        }
        date_done = kept.turned("timestamptz 'epoch' + date_done * interval '1 microsecond'")

        self.fetch: str = f"""
            SELECT t.task_id, t.status, t.result, {epoch_sql(kept.turned("t.date_done"))} AS date_done,
                   {epoch_sql("e.stored_at")} AS stored_at, t.traceback, e.meta
                   {"".join(f", t.{column}" for column in optional)}
            FROM unnest($1::varchar[]) AS wanted(id)
            CROSS JOIN LATERAL (SELECT * FROM {tasks} WHERE task_id = wanted.id LIMIT 1) t
            {kept.ours("t")}
            WHERE NOT {kept.gone("t")}"""

        def living_on(members: str) -> str:
            """Has the saved group of each member live as long. In order, or two batches could wait for each other."""
            return f"""
                INSERT INTO {names.group_expiry} AS old (id, expires_at, stored_at, date_done)
                SELECT g.taskset_id, greatest(max({instant_sql("group_seconds")}), e.expires_at),
                       CASE WHEN e.expires_at IS NULL OR e.stored_at IS NOT NULL
                            THEN coalesce(e.stored_at, {kept_groups.turned("g.date_done")}) END, -- a reader's default
                       g.date_done
                FROM {members}
                CROSS JOIN LATERAL (SELECT * FROM {groups} WHERE taskset_id = group_id LIMIT 1) g
                {kept_groups.ours("g")}
                WHERE NOT {kept_groups.gone("g")}
                GROUP BY g.taskset_id, g.date_done, e.expires_at, e.stored_at ORDER BY g.taskset_id
                ON CONFLICT (id) DO UPDATE SET date_done = excluded.date_done,
                    (expires_at, stored_at) = ROW(
                        CASE WHEN old.date_done IS DISTINCT FROM excluded.date_done THEN excluded.expires_at
                             ELSE greatest(old.expires_at, excluded.expires_at) END,
                        CASE WHEN old.date_done IS DISTINCT FROM excluded.date_done THEN excluded.stored_at
                             WHEN old.expires_at IS NULL OR old.stored_at IS NOT NULL
                             THEN coalesce(old.stored_at, excluded.stored_at) END)"""

        #: To be run beside steps of runs: for the groups of what they ``taken`` store.
        self.living_on_of_runs: str = living_on("taken")
        #: To be run beside steps of chords: for the groups ``$2``, where the seconds to live, ``$13``, are not null.
        self.living_on: str = living_on("""(
                    SELECT gid, max(ttl) FROM unnest($2::text[], $13::float8[]) AS step(gid, ttl)
                    WHERE ttl IS NOT NULL GROUP BY gid
                ) AS part(group_id, group_seconds)""")

        def store(only_new: bool, plain: bool) -> str:
            given = PLAIN_COLUMNS if plain else columns
            inputs = ["task_id", *given, *(() if plain else ("meta", "seconds", "group_id", "group_seconds"))]
            arrays = ", ".join(
                f"${index}::{types.get(name, 'text').partition('(')[0]}[]" for index, name in enumerate(inputs, 1)
            )
            values = {column: column if column in given else "NULL" for column in columns} | {"date_done": date_done}
            replaceable = "false" if only_new else _REPLACEABLE
            steps = {
                "input AS MATERIALIZED": f"SELECT * FROM unnest({arrays}) AS input({', '.join(inputs)})",
                "stored AS": f"""
                INSERT INTO {tasks} AS t (id, task_id, {listed})
                SELECT nextval({literal_sql(names.task_sequence)}), task_id, {", ".join(values.values())} FROM input
                ON CONFLICT (task_id) DO UPDATE SET ({listed}) = ROW({", ".join(f"excluded.{c}" for c in columns)})
                WHERE {replaceable}
                   OR (SELECT {kept.gone("t")} FROM (SELECT 1) one {kept.ours("t")})
                RETURNING task_id, date_done AS done""",
                "by_default AS": kept.forget(
                    "SELECT task_id FROM stored"
                    if plain
                    else "SELECT task_id FROM input JOIN stored USING (task_id) WHERE seconds IS NULL"
                ),
            }
            if not plain:
                steps["expiring AS"] = f"""
                INSERT INTO {names.task_expiry} AS e (id, expires_at, date_done, meta)
                SELECT task_id, {instant_sql("seconds")}, done, meta FROM input JOIN stored USING (task_id)
                WHERE seconds IS NOT NULL
                ON CONFLICT (id) DO UPDATE SET expires_at = excluded.expires_at, stored_at = NULL,
                    date_done = excluded.date_done, meta = excluded.meta"""
                # A group lives at least as long as its members.
                steps["living_on AS"] = living_on("input JOIN stored USING (task_id)")
            return f"WITH {', '.join(f'{name} ({sql})' for name, sql in steps.items())} SELECT task_id FROM stored"

        #: By whether it stores only what is new.
        self.store: dict[bool, str] = {only_new: store(only_new, plain=False) for only_new in (False, True)}
        #: The same, for rows of which no more than the `PLAIN_COLUMNS` are given.
        self.store_plain: dict[bool, str] = {only_new: store(only_new, plain=True) for only_new in (False, True)}
        # For the function that takes steps of runs, which decides by itself, and plans these two every time: they are
        # short for that, and of one row. The columns are numbered as `STEP_COLUMNS`.
        dated = kept.turned("timestamptz 'epoch' + $4 * interval '1 microsecond'")
        numbers = {name: f"${number}" for number, name in enumerate(STEP_COLUMNS, 1)} | {"date_done": dated}
        listed_numbers = ", ".join(numbers[column] for column in columns)
        self.insert_step: str = f"""
            INSERT INTO {tasks} (id, task_id, {listed})
            VALUES (nextval({literal_sql(names.task_sequence)}), $1, {listed_numbers})
            ON CONFLICT (task_id) DO NOTHING RETURNING date_done"""
        self.update_step: str = f"""
            UPDATE {tasks} SET ({listed}) = ROW({listed_numbers}) WHERE task_id = $1 RETURNING date_done"""
        #: Further arguments of that function: the time zone, and the default in seconds, ``None`` for never.
        self.rule: tuple[str, float | None] = (zones[0], expires or None)
        #: Whether the task ``wanted.id`` is over: an expression.
        self.is_final: str = f"""coalesce((
                SELECT t.status IN ({", ".join(map(literal_sql, sorted(READY_STATES)))})
                FROM (SELECT * FROM {tasks} WHERE task_id = wanted.id LIMIT 1) t {kept.ours("t")}
                WHERE NOT {kept.gone("t")}), false)"""
        self.delete: str = delete_sql(tasks, kept.forget("SELECT task_id FROM deleted"))

        self.fetch_group: str = f"""
            SELECT g.result FROM (SELECT * FROM {groups} WHERE taskset_id = $1::varchar LIMIT 1) g
            {kept_groups.ours("g")}
            WHERE NOT {kept_groups.gone("g")}"""
        self.store_group: str = f"""
            WITH stored AS (
                INSERT INTO {groups} AS g (id, taskset_id, result, date_done)
                VALUES (nextval({literal_sql(names.group_sequence)}), $1::varchar, $2, {kept_groups.turned("now()")})
                ON CONFLICT (taskset_id) DO UPDATE SET result = excluded.result, date_done = excluded.date_done
                RETURNING date_done
            ), by_default AS (
                DELETE FROM {names.group_expiry} WHERE id = $1::varchar AND $3::float8 IS NULL
            )
            INSERT INTO {names.group_expiry} AS e (id, expires_at, date_done)
            SELECT $1::varchar, {instant_sql("$3::float8")}, date_done FROM stored WHERE $3::float8 IS NOT NULL
            ON CONFLICT (id) DO UPDATE SET expires_at = excluded.expires_at, stored_at = NULL,
                date_done = excluded.date_done"""
        self.delete_group: str = f"""
            WITH gone AS (DELETE FROM {names.group_expiry} WHERE id = $1::varchar)
            DELETE FROM {groups} WHERE taskset_id = $1::varchar"""

        #: Each is repeated while it has ``forgotten`` rows of ours; ``removed`` of them were results or groups.
        self.cleanup: list[str] = [*kept.cleanup(), *kept_groups.cleanup()]
        #: Each goes on behind ``date_done`` and ``key`` until it has ``looked`` at fewer than `CLEANUP_BATCH` rows.
        self.by_default: list[str] = [sql for sql in (kept.by_default(), kept_groups.by_default()) if sql is not None]
        #: Each goes on behind the ``last`` id, and begins anew when it has ``looked`` at fewer than `ORPHANS` rows.
        self.orphans: list[str] = [kept.orphans(), kept_groups.orphans()]


def epoch_sql(moment: str) -> str:
    """A moment as seconds since 1970: a number also if it is infinite, or in a year that Python has not."""
    return f"extract(epoch FROM {moment})::float8"


def versions_sql(tasks: str) -> str:
    """Of each id of ``$1``, what tells its row from any later one: the transaction that wrote it."""
    return f"""
            SELECT t.task_id, t.version FROM unnest($1::varchar[]) AS wanted(id)
            CROSS JOIN LATERAL (
                SELECT task_id, xmin::text AS version FROM {tasks} WHERE task_id = wanted.id LIMIT 1
            ) t"""


def delete_sql(tasks: str, then: str) -> str:
    """Deletes the rows of the ids ``$1`` that are of the versions ``$2``, locked in this order, and does ``then``."""
    return f"""
            WITH found AS MATERIALIZED (
                SELECT t.part, t.place FROM unnest($1::varchar[], $2::text[]) AS wanted(id, version)
                CROSS JOIN LATERAL (
                    SELECT x.tableoid AS part, x.ctid AS place, x.xmin::text AS version
                    FROM {tasks} x WHERE x.task_id = wanted.id LIMIT 1 FOR UPDATE
                ) t
                WHERE t.version = wanted.version OR wanted.version = ''
            ), deleted AS (
                DELETE FROM {tasks} t USING found WHERE t.ctid = found.place AND t.tableoid = found.part
                RETURNING t.task_id
            )
            {then}"""
