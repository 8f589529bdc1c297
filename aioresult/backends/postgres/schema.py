"""The tables of the PostgreSQL backend: Celery's own, one trigger on them, and two small tables beside them.

The definitions stand in the files of SQL beside this one. Celery's tables are those of Celery 5.7
(``celery/backends/database/models.py``), with the columns of ``result_extended``: Celery ignores them when that setting
is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from ...exceptions import ImproperlyConfigured

__all__ = ["EXTENDED_COLUMNS", "SHARD_DIGITS", "Tables", "instant_sql", "literal_sql", "schema_sql"]

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

#: How many hexadecimal digits of the id's SHA-256 name its channel: 2 make 256 channels. See docs/postgres.md for why.
#: The trigger in the database has the number, too: to change it, give the trigger a new name, so that it is missed.
SHARD_DIGITS: Final = 2

#: PostgreSQL cuts longer names short, silently.
_MAX_IDENTIFIER = 63
#: Quotes the blocks in the files of SQL; no name may end one.
_DOLLAR = "$aioresult$"

#: The parts of the schema, in the order in which they are run. What stands in braces is filled in by `schema_sql`.
_FILES = ("tables.sql", "expiry.sql", "notify.sql", "chords.sql")
_TEXTS = [files(__package__).joinpath(name).read_text("utf-8") for name in _FILES]
#: The attributes of `Tables` that the files of SQL name.
_NAMES = (
    "tasks",
    "groups",
    "task_expiry",
    "group_expiry",
    "task_sequence",
    "group_sequence",
    "chords",
    "chord_parts",
    "chord_function",
    "notify_function",
)


def _quote(name: str) -> str:
    if not name or "\x00" in name or len(name.encode()) > _MAX_IDENTIFIER or _DOLLAR in name:
        raise ImproperlyConfigured(
            f"{name!r} cannot name a table or schema: 1 to {_MAX_IDENTIFIER} bytes, without NUL and {_DOLLAR}"
        )
    return '"' + name.replace('"', '""') + '"'


@dataclass(frozen=True, slots=True)
class Tables:
    """The names in use, quoted for SQL. ``schema`` ``None`` leaves them to the ``search_path``."""

    schema: str | None = None
    table: str = "celery_taskmeta"
    group_table: str = "celery_tasksetmeta"

    def _qualified(self, name: str) -> str:
        return _quote(name) if self.schema is None else f"{_quote(self.schema)}.{_quote(name)}"

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
        """Ours: the results that do not expire by ``date_done`` and the default."""
        return self._qualified(f"{self.table}_expiry")

    @property
    def group_expiry(self) -> str:
        """Ours: the same for groups."""
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
        """Ours: a row per chord."""
        return self._qualified(f"{self.group_table}_chord")

    @property
    def chord_parts(self) -> str:
        """Ours: a row per part that has come."""
        return self._qualified(f"{self.group_table}_chord_part")

    @property
    def chord_function(self) -> str:
        """Ours: takes steps of chords."""
        return self._qualified(f"{self.group_table}_chord_steps")

    @property
    def notify_function(self) -> str:
        """Ours: what the trigger calls."""
        return self._qualified("aioresult_notify")


def schema_sql(
    schema: str | None = None, table: str = "celery_taskmeta", group_table: str = "celery_tasksetmeta"
) -> str:
    """The DDL, for people who run migrations: what `PostgresBackend.create_schema` runs.

    It may be run again, and by several processes at once. Celery's tables are created only where they are missing; an
    existing one gets the trigger and nothing else.
    """
    names = Tables(schema, table, group_table)
    words = {name: getattr(names, name) for name in _NAMES}
    words.update({f"{name}_literal": literal_sql(words[name]) for name in _NAMES})
    words.update(
        create_schema=f"CREATE SCHEMA IF NOT EXISTS {_quote(schema)};\n" if schema is not None else "",
        extended="".join(f",\n            {name} {kind}" for name, kind in EXTENDED_COLUMNS.items()),
        channels=str(16**SHARD_DIGITS),
        task_channel=_channel("'aioresult_' || TG_RELID || '_'", "NEW.task_id"),
        chord_channel=_channel("prefix", "step.gid"),
        step_expires_at=instant_sql("step.ttl"),
    )
    return "\n".join(text.format_map(words) for text in _TEXTS)


def instant_sql(seconds: str) -> str:
    """The moment so many seconds from now, for ``seconds`` in SQL; infinity stays that."""
    return f"CASE WHEN {seconds} = 'infinity' THEN 'infinity' ELSE now() + {seconds} * interval '1 second' END"


def _channel(prefix: str, id: str) -> str:
    """In SQL, the channel on which news of an id come: that of `PostgresBackend._channel`."""
    return f"{prefix} || substr(encode(sha256(convert_to({id}, 'UTF8')), 'hex'), 1, {SHARD_DIGITS})"


def literal_sql(text: str) -> str:
    """``text`` as a literal in SQL."""
    return "'" + text.replace("'", "''") + "'"
