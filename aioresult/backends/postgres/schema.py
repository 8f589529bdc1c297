"""The tables of the PostgreSQL backend: Celery's own, two triggers on them, and small tables of aioresult.

The SQL files in this directory have the definitions. Celery's tables are those of Celery 5.7
(``celery/backends/database/models.py``), with the columns of ``result_extended``. Celery ignores these columns when
that setting is off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import NoneType
from typing import Final

from ...exceptions import ImproperlyConfigured
from ...options import checked_option
from ...states import ALL_STATES, READY_STATES

__all__ = [
    "EXTENDED_COLUMNS",
    "SHARD_DIGITS",
    "Tables",
    "digest",
    "functions",
    "id_channel_sql",
    "instant_sql",
    "literal_sql",
    "prefix_sql",
    "run_functions",
    "schema_sql",
    "trigger_sql",
]

#: The columns of ``result_extended`` and their types.
EXTENDED_COLUMNS: Final = {
    "name": "varchar(155)",
    "args": "bytea",
    "kwargs": "bytea",
    "worker": "varchar(155)",
    "retries": "integer",
    "queue": "varchar(155)",
    "stamps": "bytea",
}

#: How many hexadecimal digits of the SHA-256 of an id name the id's channel. 2 digits make 256 channels; see
#: docs/postgres.md. The trigger in the database uses the number, too. So if you change it, give the trigger a new name:
#: then a database with the old trigger counts as one that lacks the trigger.
SHARD_DIGITS: Final = 2

#: The longest name in bytes. PostgreSQL silently cuts longer names.
_MAX_IDENTIFIER = 63
#: The quotes around blocks in the SQL files, and around a function in `_unless_current`. No name may contain one.
_DOLLARS = ("$aioresult$", "$aioresult_unless$", "$aioresult_function$")
#: Above this many bytes an existing table gets no index: building one would keep its writers waiting.
_LARGE_TABLE = 64 * 2**20


@cache
def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _quoted(name: str) -> str:
    """Return ``name`` as an identifier in SQL. Raises `ImproperlyConfigured` if PostgreSQL cannot have that name."""
    if not name or "\x00" in name or len(name.encode()) > _MAX_IDENTIFIER or any(each in name for each in _DOLLARS):
        raise ImproperlyConfigured(
            f"{name!r} cannot name a table or schema: choose 1 to {_MAX_IDENTIFIER} bytes without NUL and {_DOLLARS[0]}"
        )
    return '"' + name.replace('"', '""') + '"'


def literal_sql(text: str) -> str:
    """Return ``text`` as a literal in SQL."""
    return "'" + text.replace("'", "''") + "'"


@dataclass(frozen=True, slots=True)
class Tables:
    """The names of the tables and functions, quoted for SQL. Without ``schema`` the ``search_path`` finds them.

    "Celery's" tables are those that Celery uses, too; "our" tables and functions are those of aioresult alone.

    Raises `ImproperlyConfigured` if PostgreSQL cannot have one of the names.
    """

    schema: str | None = None
    table: str = "celery_taskmeta"
    group_table: str = "celery_tasksetmeta"

    def __post_init__(self) -> None:
        for option in ("schema", "table", "group_table"):
            checked_option(option, getattr(self, option), (str, NoneType), "a str or None")
        for name in _NAMES:
            getattr(self, name)

    def _qualified(self, name: str) -> str:
        return _quoted(name) if self.schema is None else f"{_quoted(self.schema)}.{_quoted(name)}"

    @property
    def tasks(self) -> str:
        """Celery's table of results."""
        return self._qualified(self.table)

    @property
    def groups(self) -> str:
        """Celery's table of groups."""
        return self._qualified(self.group_table)

    @property
    def task_expiry(self) -> str:
        """Our table of the results that do not expire by ``date_done`` and the default."""
        return self._qualified(f"{self.table}_expiry")

    @property
    def group_expiry(self) -> str:
        """Our table of the groups that do not expire by ``date_done`` and the default."""
        return self._qualified(f"{self.group_table}_expiry")

    @property
    def task_sequence(self) -> str:
        """Celery's sequence of ids of results."""
        return self._qualified("task_id_sequence")

    @property
    def group_sequence(self) -> str:
        """Celery's sequence of ids of groups."""
        return self._qualified("taskset_id_sequence")

    @property
    def chords(self) -> str:
        """Our table of chords: a row per chord."""
        return self._qualified(f"{self.group_table}_chord")

    @property
    def chord_parts(self) -> str:
        """Our table of parts, the outcomes of the tasks in a chord's header: a row per part that has come."""
        return self._qualified(f"{self.group_table}_chord_part")

    @property
    def chord_steps(self) -> str:
        """Our function that does steps of chords."""
        return self._qualified(f"{self.group_table}_chord_steps")

    @property
    def output(self) -> str:
        """Our table of output: a row per entry of the output of a running task."""
        return self._qualified(f"{self.table}_output")

    @property
    def logs(self) -> str:
        """Our table of logs: a row per output."""
        return self._qualified(f"{self.table}_log")

    @property
    def runs(self) -> str:
        """Our table of notes: a row per task, about its last run."""
        return self._qualified(f"{self.table}_run")

    @property
    def workers(self) -> str:
        """Our table of leases: a row per worker that is alive."""
        return self._qualified(f"{self.table}_worker")

    @property
    def append(self) -> str:
        """Our function that opens outputs."""
        return self._qualified(f"{self.table}_append")

    @property
    def run_steps(self) -> str:
        """Our function that does steps of runs."""
        return self._qualified(f"{self.table}_steps")

    @property
    def notify(self) -> str:
        """Our function that notifies waiters of every store; a trigger calls it."""
        return self._qualified("aioresult_notify")

    @property
    def stored(self) -> str:
        """Our function that notes when a row was stored if ``date_done`` is wrong; triggers call it."""
        return self._qualified("aioresult_stored")


#: The attributes of `Tables` that the SQL files use.
_NAMES = tuple(name for name, member in vars(Tables).items() if isinstance(member, property))


def schema_sql(
    schema: str | None = None, table: str = "celery_taskmeta", group_table: str = "celery_tasksetmeta"
) -> str:
    """Return the SQL that `PostgresBackend.create_schema` runs. Use it in a migration of your own.

    Run it in one transaction (``psql -1``). It is safe to run it again, and in several processes at once: it neither
    changes nor locks what exists already. It creates Celery's tables only if they are missing. An existing table gets
    two triggers, and the index on ``date_done`` if it has none and is small.

    :raises ImproperlyConfigured: PostgreSQL cannot have one of the names.
    """
    names = Tables(schema, table, group_table)
    words = _words(names)
    of_tasks = {**words, **_of(names.tasks, "task_id", names.task_expiry)}
    of_groups = {**words, **_of(names.groups, "taskset_id", names.group_expiry)}
    every = {**functions(names), **run_functions(names)}
    return "\n".join(
        [
            *(_text(name).format_map(words) for name in ("begin.sql", "tables.sql")),
            *(_unless_current(name, file, words) for name, file in every.items()),
            _text("expiry.sql").format_map(of_tasks),
            _text("expiry.sql").format_map(of_groups),
            _text("trigger.sql").format_map(words),
            *(_text(name).format_map(words) for name in ("chords.sql", "runs.sql")),
            _text("indexes.sql").format_map(words),
        ]
    )


def trigger_sql(names: Tables) -> str:
    """Return the part of `schema_sql` for tables that aioresult only reads: the trigger that wakes waiters."""
    words = {**_words(names), "create_schema": ""}
    return "\n".join(
        [
            _text("begin.sql").format_map(words),
            _unless_current(names.notify, functions(names)[names.notify], words),
            _text("trigger.sql").format_map(words),
        ]
    )


def functions(names: Tables) -> dict[str, str]:
    """Return the SQL file of each function in the database, by name; but not of the functions of running tasks."""
    return {names.notify: "notify.sql", names.stored: "stored.sql", names.chord_steps: "chord_steps.sql"}


def run_functions(names: Tables) -> dict[str, str]:
    """Return the SQL file of each function of running tasks, by name."""
    return {names.append: "append.sql", names.run_steps: "run_steps.sql"}


def digest(file: str) -> str:
    """Return the comment on a function in the database: a hash of the SQL file, without the names of tables."""
    return f"aioresult {hashlib.sha256(_text(file).encode()).hexdigest()[:16]}"


def _unless_current(name: str, file: str, words: Mapping[str, str]) -> str:
    """SQL that creates the function unless this version of it exists: only its owner has the right to replace it."""
    comment = literal_sql(digest(file))
    return f"""DO $aioresult_unless$
DECLARE
    before oid := to_regproc({literal_sql(name)});
BEGIN
    IF obj_description(to_regproc({literal_sql(name)}), 'pg_proc') IS DISTINCT FROM {comment} THEN
        EXECUTE $aioresult_function$
{_text(file).format_map(words)}
        $aioresult_function$;
        IF to_regproc({literal_sql(name)}) IS NULL THEN -- an older one has other arguments: the name means both
            EXECUTE format('DROP FUNCTION %s', before::regprocedure);
        END IF;
        COMMENT ON FUNCTION {name} IS {comment};
    END IF;
END
$aioresult_unless$;"""


def _words(names: Tables) -> dict[str, str]:
    """Return the values of the names in braces in the SQL files."""
    words: dict[str, str] = {name: getattr(names, name) for name in _NAMES}
    words.update({f"{name}_literal": literal_sql(words[name]) for name in _NAMES})
    indexes = (
        (names.tasks, "date_done", ""),
        (names.groups, "date_done", ""),
        *((expiry, "expires_at", "") for expiry in (names.task_expiry, names.group_expiry)),
        *((expiry, "stored_at", " WHERE stored_at IS NOT NULL") for expiry in (names.task_expiry, names.group_expiry)),
        *((table, "expires_at", "") for table in (names.chords, names.logs, names.runs)),
        (names.chords, "expires_at", " WHERE NOT done AND count >= size"),
    )
    words.update(
        create_schema="" if names.schema is None else _create_schema(names.schema),
        extended="".join(f",\n            {name} {kind}" for name, kind in EXTENDED_COLUMNS.items()),
        channels=str(16**SHARD_DIGITS),
        task_channel=id_channel_sql(
            "'aioresult_' || coalesce(pg_partition_root(TG_RELID), TG_RELID)::oid || '_'", "NEW.task_id"
        ),
        chord_channel=id_channel_sql("prefix", "step.gid"),
        output_channel=id_channel_sql("prefix", "flush.id"),
        worker_channel=id_channel_sql("prefix", "told"),
        output_expires_at=instant_sql("flush.lives"),
        run_expires_at=instant_sql("step.lives"),
        taken_expires_at=instant_sql("taken.seconds"),
        ready_states=", ".join(map(literal_sql, sorted(READY_STATES))),
        all_states=", ".join(map(literal_sql, sorted(ALL_STATES))),
        step_expires_at=instant_sql("step.ttl"),
        large_table=str(_LARGE_TABLE),
        indexes=", ".join(f"({', '.join(map(literal_sql, index))})" for index in indexes),
    )
    return words


def _of(table: str, key: str, expiry: str) -> Mapping[str, str]:
    """Return the values of the names in braces in expiry.sql, which runs once for each of Celery's two tables."""
    words = {"table": table, "key": key, "expiry": expiry}
    return {**words, **{f"{name}_literal": literal_sql(value) for name, value in words.items()}}


def _create_schema(schema: str) -> str:
    # Do not use IF NOT EXISTS, because it demands the right to create schemas even if the schema exists.
    return f"""DO $aioresult$
BEGIN
    IF to_regnamespace({literal_sql(_quoted(schema))}) IS NULL THEN
        CREATE SCHEMA {_quoted(schema)};
    END IF;
END
$aioresult$;"""


def instant_sql(seconds: str) -> str:
    """Return SQL for the moment ``seconds``, an expression in SQL, from now. Infinity stays infinity."""
    return f"CASE WHEN {seconds} = 'infinity' THEN 'infinity' ELSE now() + {seconds} * interval '1 second' END"


def prefix_sql(names: Tables) -> str:
    """SQL for the prefix of all channels. The server computes it, because a reconnect may lead to another server."""
    return f"'aioresult_' || {literal_sql(names.tasks)}::regclass::oid || '_'"


def id_channel_sql(prefix: str, id: str) -> str:
    """SQL for the channel that carries the news of an id; the same as `PostgresBackend._channel` computes."""
    return f"{prefix} || substr(encode(sha256(convert_to({id}, 'UTF8')), 'hex'), 1, {SHARD_DIGITS})"
