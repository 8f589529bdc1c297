"""The SQL of the PostgreSQL backend. Ids and values are parameters; the texts contain only quoted names.

When does a row expire? If our table of expiry has a row for it, that row says when. Otherwise Celery's rule holds:
``date_done`` plus the reader's default. A row of ours counts only while its ``date_done`` is that of the result. If the
two differ, another program, such as a Celery worker, has stored the result again since.

Every look-up is written so that the server must use an index (a LATERAL with a LIMIT, an array, a ctid), and our
connections have ``enable_seqscan`` off (`connections`). The server may use a plan for hours that it made while a table
was empty. Such a plan must not read the table from end to end when it has a million rows.

Dates go in and out as numbers: Python cannot represent the year 20000, and a connection of the caller's may have a
custom codec for dates.
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

#: The columns that most results need; the others are null.
PLAIN_COLUMNS = ("status", "result", "date_done")

#: All columns that a result may have. The function that does steps of runs numbers its values in this order.
STEP_COLUMNS = (
    *("task_id", *PLAIN_COLUMNS, "traceback", "children", *EXTENDED_COLUMNS),
    *("meta", "seconds", "group_id", "group_seconds"),
)

#: The most rows that one statement of `Statements.cleanup` deletes.
CLEANUP_BATCH = 1000
#: How many rows of the table of expiry one cleanup checks for orphans: rows that belong to no result or group.
ORPHANS = 10_000

#: The condition under which a store may replace the stored result.
_REPLACEABLE = f"""
    t.status IS DISTINCT FROM 'SUCCESS'
        -- a final state stays if a state of the task's own making comes late
        AND (t.status IS NULL OR t.status NOT IN ('FAILURE', 'REVOKED')
             OR excluded.status IN ({", ".join(map(literal_sql, sorted(ALL_STATES)))}))
    -- or the caller repeats the same store because its reply was lost
    OR (t.status, t.date_done, t.result) IS NOT DISTINCT FROM (excluded.status, excluded.date_done, excluded.result)"""


class _Kept:
    """SQL about one of Celery's two tables, its table of expiry, and the rule by which its rows expire.

    ``key`` is the column with the id, ``expiry`` the table of expiry. ``zone`` is the time zone in which the table
    keeps its dates (expiry.sql). ``expires`` is the reader's default, in seconds, 0 for never.
    """

    def __init__(self, table: str, key: str, expiry: str, zone: str, expires: float) -> None:
        self._table = table
        self._key = key
        self._expiry = expiry
        self._zone = zone
        self._default = f"{expires!r} * interval '1 second'" if expires else None

    def turned(self, moment: str) -> str:
        """SQL that converts a moment to a date in the table's time zone, or such a date to a moment."""
        return f"(({moment}) AT TIME ZONE {literal_sql(self._zone)})"

    def ours(self, row: str) -> str:
        """SQL that joins ``e``, the row of the table of expiry that belongs to ``row``."""
        return f"LEFT JOIN LATERAL (SELECT * FROM {self._expiry} x WHERE {self._belongs('x', row)} LIMIT 1) e ON true"

    def _belongs(self, ours: str, row: str) -> str:
        return f"{ours}.id = {row}.{self._key} AND {ours}.date_done IS NOT DISTINCT FROM {row}.date_done"

    def expires_at(self, row: str) -> str:
        """SQL for the moment when ``row`` expires. ``e`` is its row in the table of expiry.

        The moment is infinity or null if the row never expires.
        """
        if self._default is None:
            return "CASE WHEN e.stored_at IS NULL THEN coalesce(e.expires_at, 'infinity') ELSE 'infinity' END"
        by_default = f"coalesce(e.stored_at, {self.turned(f'{row}.date_done')}) + {self._default}"
        return (
            "CASE WHEN e.expires_at IS NOT NULL AND e.stored_at IS NULL THEN e.expires_at "
            f"ELSE greatest(e.expires_at, {by_default}) END"
        )

    def gone(self, row: str) -> str:
        """SQL that is true if ``row`` has expired."""
        return f"coalesce({self.expires_at(row)} <= now(), false)"

    def cleanup(self) -> list[str]:
        """Statements that remove what has expired by the table of expiry. See `Statements.cleanup`.

        Each removes at most `CLEANUP_BATCH` rows. They skip rows that another program is writing, so they never wait
        for a lock.
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
        """SQL that checks `ORPHANS` rows of the table of expiry after the id ``$1``, and removes the orphans."""
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
        """SQL that checks `CLEANUP_BATCH` rows after date ``$1`` and id ``$2``, and removes those that have expired.

        It removes only rows that expire by the reader's default, that is, without a row in the table of expiry.

        The first comparisons have no arithmetic on ``date_done``, so that its index can be used. The last comparison
        decides: some hours of a date come twice in a time zone that sets its clock back.
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
        """SQL for the rest of a statement that removes rows of the table of expiry, and the results of these rows.

        ``due`` names the query that has locked these rows. In a partitioned table a ctid alone does not identify a row.
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
        """SQL that removes the rows with these ids from the table of expiry."""
        return f"DELETE FROM {self._expiry} e WHERE e.id = ANY(ARRAY({ids})::text[])"


class Statements:
    """The statements for one set of tables.

    ``zones`` are the time zones of the dates of results and of groups. ``optional`` names the optional columns that the
    table of results has. ``expires`` is the reader's default, in seconds.
    """

    def __init__(self, names: Tables, zones: tuple[str, str], optional: Sequence[str], expires: float) -> None:
        tasks, groups = names.tasks, names.groups
        kept = _Kept(tasks, "task_id", names.task_expiry, zones[0], expires)
        kept_groups = _Kept(groups, "taskset_id", names.group_expiry, zones[1], expires)
        #: The columns of a result in the order of the arguments of `store`. The id comes before them, and the values
        #: for the table of expiry come after them.
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
            """SQL that keeps the saved group of each member for as long as the member.

            It locks the groups in order of their ids. Otherwise two batches could wait for each other.
            """
            return f"""
                INSERT INTO {names.group_expiry} AS old (id, expires_at, stored_at, date_done)
                SELECT g.taskset_id, greatest(max({instant_sql("group_seconds")}), e.expires_at),
                       CASE WHEN e.expires_at IS NULL OR e.stored_at IS NOT NULL
                            THEN coalesce(e.stored_at, {kept_groups.turned("g.date_done")}) END, -- by the default
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

        #: Runs together with the steps of runs. It keeps the groups of the results that the steps have stored: the
        #: groups in ``taken``.
        self.living_on_of_runs: str = living_on("taken")
        #: Runs together with the steps of chords. It keeps each group in ``$2`` for the seconds in ``$13``,
        #: unless these are null.
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

        #: The statements that store results: with the key ``True`` only under new ids, with ``False`` under any id.
        self.store: dict[bool, str] = {only_new: store(only_new, plain=False) for only_new in (False, True)}
        #: The same statements, for rows with only the `PLAIN_COLUMNS`.
        self.store_plain: dict[bool, str] = {only_new: store(only_new, plain=True) for only_new in (False, True)}
        # The next two are for the function that does steps of runs. It decides by itself what to store. It plans them
        # on every call, so they are short and store one row. Their columns have the numbers of `STEP_COLUMNS`.
        dated = kept.turned("timestamptz 'epoch' + $4 * interval '1 microsecond'")
        numbers = {name: f"${number}" for number, name in enumerate(STEP_COLUMNS, 1)} | {"date_done": dated}
        listed_numbers = ", ".join(numbers[column] for column in columns)
        self.insert_step: str = f"""
            INSERT INTO {tasks} (id, task_id, {listed})
            VALUES (nextval({literal_sql(names.task_sequence)}), $1, {listed_numbers})
            ON CONFLICT (task_id) DO NOTHING RETURNING date_done"""
        self.update_step: str = f"""
            UPDATE {tasks} SET ({listed}) = ROW({listed_numbers}) WHERE task_id = $1 RETURNING date_done"""
        #: Further arguments of the function that does steps of runs: the time zone, and the reader's default in seconds
        #: (``None`` for never).
        self.rule: tuple[str, float | None] = (zones[0], expires or None)
        #: An SQL expression that is true if the task ``wanted.id`` is over.
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

        #: Repeat each statement until its column ``forgotten``, the number of rows removed from the table of expiry,
        #: is 0. The column ``removed`` is the number of removed results or groups.
        self.cleanup: list[str] = [*kept.cleanup(), *kept_groups.cleanup()]
        #: Repeat each statement with the ``date_done`` and the ``key`` that it returned, until it has ``looked`` at
        #: fewer than `CLEANUP_BATCH` rows.
        self.by_default: list[str] = [sql for sql in (kept.by_default(), kept_groups.by_default()) if sql is not None]
        #: Begin the next run of each statement after the ``last`` id that it returned. If it has ``looked`` at fewer
        #: than `ORPHANS` rows, begin with the first id again.
        self.orphans: list[str] = [kept.orphans(), kept_groups.orphans()]


def epoch_sql(moment: str) -> str:
    """SQL for a moment as seconds since 1970. It is a number even for infinity, and for years unknown to Python."""
    return f"extract(epoch FROM {moment})::float8"


def versions_sql(tasks: str) -> str:
    """SQL that selects a version for each id of ``$1``: the transaction that wrote its row. A later row has another."""
    return f"""
            SELECT t.task_id, t.version FROM unnest($1::varchar[]) AS wanted(id)
            CROSS JOIN LATERAL (
                SELECT task_id, xmin::text AS version FROM {tasks} WHERE task_id = wanted.id LIMIT 1
            ) t"""


def delete_sql(tasks: str, then: str) -> str:
    """SQL that locks the rows of the ids ``$1`` with the versions ``$2`` in this order, deletes them, does ``then``."""
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
