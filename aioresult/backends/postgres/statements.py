"""The SQL of the PostgreSQL backend. Ids and values are parameters; only quoted names are written into it.

When a row expires: by our table of expiry where that has a row for it, else by Celery's rule, ``date_done`` plus the
reader's default. A row of ours counts only while its ``date_done`` is that of the result: whoever stored since then
without us, as a Celery worker does, has left it behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...states import ALL_STATES
from .schema import EXTENDED_COLUMNS, Tables, instant_sql, literal_sql

__all__ = ["CLEANUP_BATCH", "INSPECT", "PLAIN_COLUMNS", "Statements"]

#: All that most results have.
PLAIN_COLUMNS = ("status", "result", "date_done")

#: How many rows one statement of `Statements.cleanup` deletes at most.
CLEANUP_BATCH = 1000

#: What a store may take the place of.
_REPLACEABLE = f"""
    t.status IS DISTINCT FROM 'SUCCESS'
        -- a state of the task's own making that comes late changes nothing
        AND (t.status IS NULL OR t.status NOT IN ('FAILURE', 'REVOKED')
             OR excluded.status IN ({", ".join(map(literal_sql, sorted(ALL_STATES)))}))
    -- the very same store, repeated because its reply was lost
    OR (t.status, t.date_done, t.result) IS NOT DISTINCT FROM (excluded.status, excluded.date_done, excluded.result)"""

#: Which of the relations ``$1`` to ``$5`` there are, with the columns and the trigger of the first.
INSPECT = """
    SELECT to_regclass($1)::oid::int8 AS tasks, to_regclass($2)::oid::int8 AS groups,
           to_regclass($3)::oid::int8 AS task_expiry, to_regclass($4)::oid::int8 AS group_expiry,
           to_regclass($5)::oid::int8 AS chords,
           (SELECT oid::int8 FROM pg_trigger
            WHERE tgrelid = to_regclass($1) AND tgname = 'aioresult_notify' AND tgenabled <> 'D') AS trigger,
           ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = to_regclass($1) AND attnum > 0) AS columns"""


class Statements:
    """What is sent, for one set of tables, the ``optional`` columns that the first has, and one default expiry."""

    def __init__(self, names: Tables, optional: Sequence[str], expires: float) -> None:
        tasks, groups = names.tasks, names.groups
        task_expiry, group_expiry = names.task_expiry, names.group_expiry
        #: Of a result, in the order in which `store` takes them, between the id and ``seconds`` to live.
        self.columns: list[str] = [*PLAIN_COLUMNS, "traceback", "children", *optional]
        columns = self.columns
        listed = ", ".join(columns)
        types = {
            **EXTENDED_COLUMNS,
            # Aware on this side; the column is Celery's, without zone and in the session's, which a cast goes by.
            "date_done": "timestamptz",
            "result": "bytea",
            "children": "bytea",
            "seconds": "float8",
            "group_seconds": "float8",
        }
        # LATERAL with a LIMIT is one index look-up per id, whatever the planner believes of the tables: with a plan
        # made while they were empty, "= ANY" compares every row with every id, and takes seventy times as long.
        self.fetch: str = f"""
            SELECT t.task_id, t.status, t.result, t.date_done::timestamptz AS date_done, t.traceback, t.children
                   {"".join(f", t.{column}" for column in optional)}
            FROM unnest($1::varchar[]) AS wanted(id)
            CROSS JOIN LATERAL (SELECT * FROM {tasks} WHERE task_id = wanted.id LIMIT 1) t
            {_expiry_of("t.task_id", "t.date_done", task_expiry)}
            WHERE NOT {_gone("t.date_done", expires)}"""

        def store(only_new: bool, plain: bool) -> str:
            given = PLAIN_COLUMNS if plain else columns
            inputs = ["task_id", *given, *(() if plain else ("seconds", "group_id", "group_seconds"))]
            arrays = ", ".join(
                f"${index}::{types.get(name, 'text').partition('(')[0]}[]" for index, name in enumerate(inputs, 1)
            )
            replaceable = "false" if only_new else _REPLACEABLE
            steps = {
                "input AS MATERIALIZED": f"SELECT * FROM unnest({arrays}) AS input({', '.join(inputs)})",
                "stored AS": f"""
                INSERT INTO {tasks} AS t (id, task_id, {listed})
                SELECT nextval({literal_sql(names.task_sequence)}), task_id,
                       {", ".join(column if column in given else "NULL" for column in columns)} FROM input
                ON CONFLICT (task_id) DO UPDATE SET ({listed}) = ROW({", ".join(f"excluded.{c}" for c in columns)})
                WHERE {replaceable}
                   OR (SELECT {_gone("t.date_done", expires)}
                       FROM (SELECT 1) one {_expiry_of("t.task_id", "t.date_done", task_expiry)})
                RETURNING task_id, date_done AS done""",
                "by_default AS": f"""
                DELETE FROM {task_expiry} e USING input JOIN stored USING (task_id)
                WHERE e.id = task_id {"" if plain else "AND seconds IS NULL"}""",
            }
            if not plain:
                steps["expiring AS"] = f"""
                INSERT INTO {task_expiry} AS e (id, expires_at, date_done)
                SELECT task_id, {instant_sql("seconds")}, done FROM input JOIN stored USING (task_id)
                WHERE seconds IS NOT NULL
                ON CONFLICT (id) DO UPDATE SET (expires_at, date_done) = ROW(excluded.expires_at, excluded.date_done)"""
                # A group lives at least as long as its members. In order, or two batches could wait for each other.
                steps["living_on AS"] = f"""
                INSERT INTO {group_expiry} AS old (id, expires_at, date_done)
                SELECT g.taskset_id,
                       greatest(max({instant_sql("group_seconds")}), {_expires_at("g.date_done", expires)}), g.date_done
                FROM input JOIN stored USING (task_id)
                CROSS JOIN LATERAL (SELECT * FROM {groups} WHERE taskset_id = group_id LIMIT 1) g
                {_expiry_of("g.taskset_id", "g.date_done", group_expiry)}
                WHERE NOT {_gone("g.date_done", expires)}
                GROUP BY g.taskset_id, g.date_done, e.expires_at ORDER BY g.taskset_id
                ON CONFLICT (id) DO UPDATE SET date_done = excluded.date_done, expires_at =
                    CASE WHEN old.date_done IS DISTINCT FROM excluded.date_done THEN excluded.expires_at
                         ELSE greatest(old.expires_at, excluded.expires_at) END"""
            return f"WITH {', '.join(f'{name} ({sql})' for name, sql in steps.items())} SELECT task_id FROM stored"

        #: By whether it stores only what is new.
        self.store: dict[bool, str] = {only_new: store(only_new, plain=False) for only_new in (False, True)}
        #: The same, for rows of which no more than the `PLAIN_COLUMNS` are given.
        self.store_plain: dict[bool, str] = {only_new: store(only_new, plain=True) for only_new in (False, True)}
        #: What tells a row from any later one of its id: the transaction that wrote it.
        self.versions: str = f"""
            SELECT t.task_id, t.version FROM unnest($1::varchar[]) AS wanted(id)
            CROSS JOIN LATERAL (
                SELECT task_id, xmin::text AS version FROM {tasks} WHERE task_id = wanted.id LIMIT 1
            ) t"""
        self.delete: str = f"""
            WITH deleted AS (
                DELETE FROM {tasks} t WHERE t.ctid = ANY(ARRAY(
                    SELECT found.ctid FROM unnest($1::varchar[], $2::text[]) AS wanted(id, version)
                    CROSS JOIN LATERAL (
                        SELECT x.ctid, x.xmin::text AS version FROM {tasks} x WHERE x.task_id = wanted.id LIMIT 1
                    ) found
                    WHERE found.version = wanted.version OR wanted.version = ''))
                RETURNING t.task_id
            )
            DELETE FROM {task_expiry} e USING deleted WHERE e.id = deleted.task_id"""

        self.fetch_group: str = f"""
            SELECT g.result FROM {groups} g {_expiry_of("g.taskset_id", "g.date_done", group_expiry)}
            WHERE g.taskset_id = $1 AND NOT {_gone("g.date_done", expires)}"""
        self.store_group: str = f"""
            WITH stored AS (
                INSERT INTO {groups} AS g (id, taskset_id, result, date_done)
                VALUES (nextval({literal_sql(names.group_sequence)}), $1::varchar, $2, now())
                ON CONFLICT (taskset_id) DO UPDATE SET result = excluded.result, date_done = excluded.date_done
                RETURNING date_done
            ), by_default AS (
                DELETE FROM {group_expiry} WHERE id = $1::varchar AND $3::float8 IS NULL
            )
            INSERT INTO {group_expiry} AS e (id, expires_at, date_done)
            SELECT $1::varchar, {instant_sql("$3::float8")}, date_done FROM stored WHERE $3::float8 IS NOT NULL
            ON CONFLICT (id) DO UPDATE SET (expires_at, date_done) = ROW(excluded.expires_at, excluded.date_done)"""
        self.delete_group: str = f"""
            WITH gone AS (DELETE FROM {group_expiry} WHERE id = $1::varchar)
            DELETE FROM {groups} WHERE taskset_id = $1::varchar"""

        #: Each is repeated while it finds `CLEANUP_BATCH` rows; ``removed`` of them were results or groups.
        self.cleanup: list[str] = [
            *_cleanup(tasks, "task_id", task_expiry, expires),
            *_cleanup(groups, "taskset_id", group_expiry, expires),
        ]


def _expiry_of(key: str, date_done: str, expiry: str) -> str:
    """Joins ``e``, the row of ours that says when that one expires."""
    return f"LEFT JOIN LATERAL (SELECT * FROM {expiry} x WHERE {_belongs('x', key, date_done)} LIMIT 1) e ON true"


def _belongs(alias: str, key: str, date_done: str) -> str:
    return f"{alias}.id = {key} AND {alias}.date_done IS NOT DISTINCT FROM {date_done}"


def _expires_at(date_done: str, expires: float) -> str:
    """When a row expires, with its row ``e`` of ours; null, or never, if neither that nor a default says so."""
    by_default = f"{date_done}::timestamptz + {expires!r} * interval '1 second'" if expires else "'infinity'"
    return f"coalesce(e.expires_at, {by_default})"


def _gone(date_done: str, expires: float) -> str:
    return f"coalesce({_expires_at(date_done, expires)} <= now(), false)"


def _cleanup(table: str, key: str, expiry: str, expires: float) -> Iterator[str]:
    """What has expired by our table, rows of our table that belong to nothing, what has expired by default.

    Rows that somebody is writing are passed over, and both tables are locked in the order in which a store does it.
    """
    belongs = _belongs("e", f"t.{key}", "t.date_done")
    found_and_removed = "(SELECT count(*) FROM old)::int AS found, count(*)::int AS removed"
    yield f"""
        WITH old AS (
            SELECT t.id, e.id AS key FROM {table} t JOIN {expiry} e ON {belongs}
            WHERE e.expires_at <= now() LIMIT {CLEANUP_BATCH} FOR UPDATE SKIP LOCKED
        ), forgotten AS (
            DELETE FROM {expiry} WHERE id IN (SELECT key FROM old)
        ), deleted AS (
            DELETE FROM {table} WHERE id IN (SELECT id FROM old) RETURNING 1
        )
        SELECT {found_and_removed} FROM deleted"""
    yield f"""
        WITH old AS (
            SELECT id FROM {expiry} e
            WHERE expires_at <= now() AND NOT EXISTS (SELECT FROM {table} t WHERE {belongs})
            LIMIT {CLEANUP_BATCH} FOR UPDATE SKIP LOCKED
        ), forgotten AS (
            DELETE FROM {expiry} WHERE id IN (SELECT id FROM old)
        )
        SELECT count(*)::int AS found, 0 AS removed FROM old"""
    if expires:
        # Written so that the index on date_done serves: no arithmetic on the column.
        yield f"""
        WITH old AS (
            SELECT id, {key} AS key FROM {table} t
            WHERE date_done <= (now() - {expires!r} * interval '1 second')::timestamp
              AND NOT EXISTS (SELECT FROM {expiry} e WHERE {belongs})
            LIMIT {CLEANUP_BATCH} FOR UPDATE SKIP LOCKED
        ), forgotten AS (
            DELETE FROM {expiry} WHERE id IN (SELECT key FROM old)
        ), deleted AS (
            DELETE FROM {table} WHERE id IN (SELECT id FROM old) RETURNING 1
        )
        SELECT {found_and_removed} FROM deleted"""
