"""Inspects a database: whether it has everything that the backend needs, and how its tables are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from ...exceptions import ImproperlyConfigured
from .django import TABLE
from .schema import Tables, digest, functions, run_functions

__all__ = ["Found", "inspect_tables"]

_INSPECT: Final = """
    SELECT ARRAY(SELECT to_regclass(name)::oid::int8 FROM unnest($1::text[]) WITH ORDINALITY AS r(name, place)
                 ORDER BY place) AS relations,
           ARRAY(SELECT obj_description(to_regproc(name), 'pg_proc')
                 FROM unnest($2::text[]) WITH ORDINALITY AS f(name, place) ORDER BY place) AS functions,
           ARRAY(SELECT to_regproc(name) IS NOT NULL
                 FROM unnest($2::text[]) WITH ORDINALITY AS f(name, place) ORDER BY place) AS callable,
           ARRAY(SELECT attname::text FROM pg_attribute
                 WHERE attrelid = to_regclass($1[1]) AND attnum > 0 AND NOT attisdropped) AS columns,
           (SELECT count(*)::int8 FROM pg_attribute
            WHERE attrelid IN (to_regclass($1[3]), to_regclass($1[4])) AND attname IN ('stored_at', 'meta')) AS noted,
           EXISTS(SELECT FROM pg_trigger WHERE tgrelid = to_regclass($1[1]) AND tgname = 'aioresult_notify'
                  AND tgenabled <> 'D') AS notifies,
           (SELECT tgargs FROM pg_trigger WHERE tgrelid = to_regclass($1[1]) AND tgname = 'aioresult_stored'
            AND tgenabled <> 'D') AS zone,
           (SELECT tgargs FROM pg_trigger WHERE tgrelid = to_regclass($1[2]) AND tgname = 'aioresult_stored'
            AND tgenabled <> 'D') AS group_zone,
           current_setting('server_encoding') AS encoding,
           1.5::float8 AS a_float8, true AS a_bool, '\\x61'::bytea AS a_bytea,
           1::int8 AS an_int8, 'a'::text AS a_text"""

#: What asyncpg returns for the constants in the query above if the connection has no custom codecs for these types.
_AS_USUAL: Final = {"a_float8": 1.5, "a_bool": True, "a_bytea": b"a", "an_int8": 1, "a_text": "a"}


@dataclass(frozen=True, slots=True)
class Found:
    """What `inspect_tables` has found in the database: which tables and functions with these names exist."""

    names: Tables
    #: The OID of the table of results, ``None`` if there is no such table.
    tasks: int | None
    #: The OID of the table of groups, ``None`` if there is no such table.
    groups: int | None
    #: The columns of the table of results.
    columns: frozenset[str]
    #: True if a trigger notifies waiters of every store.
    notifies: bool
    #: True if these are the tables of django-celery-results, and hold results.
    in_use: bool
    #: True if all tables, functions and triggers exist that storing needs.
    complete: bool
    #: True if the tables and functions of running tasks exist.
    runs: bool
    #: True if the existing functions are those of this version.
    current: bool
    #: The time zones in which the results and the groups keep their dates.
    zones: tuple[str, str]
    #: The encoding of the database, as PostgreSQL calls it.
    encoding: str

    @property
    def only_read(self) -> bool:
        """True if aioresult only reads these tables. Then it needs only the trigger."""
        return self.names.table == TABLE

    @property
    def usable(self) -> bool:
        """True if everything exists that the backend needs."""
        tables = self.tasks is not None and self.groups is not None if self.only_read else self.complete
        return tables and self.notifies

    @property
    def up_to_date(self) -> bool:
        """True if everything exists that this version creates, in the form of this version."""
        return self.usable and (self.only_read or (self.current and self.runs))

    @property
    def outdated(self) -> bool:
        """True if the backend can be used, but with functions of another version."""
        return self.usable and not self.only_read and not self.current


async def inspect_tables(connection: Any, names: Tables, where: str) -> Found:
    """Inspect the tables with these ``names``. ``where`` names the database in the error.

    Raises `ImproperlyConfigured` if the connection has a custom codec for a basic type.
    """
    needed = (names.tasks, names.groups, names.task_expiry, names.group_expiry, names.chords, names.chord_parts)
    relations = (*needed, names.output, names.logs, names.runs, names.workers)
    called = len(functions(names))
    wanted = {**functions(names), **run_functions(names)}
    row = await connection.fetchrow(_INSPECT, relations, list(wanted))
    for name, value in _AS_USUAL.items():
        if row[name] != value or type(row[name]) is not type(value):
            raise ImproperlyConfigured(
                f"a connection to {where} has a custom codec for the type {name.partition('_')[2]}: it returns "
                f"{row[name]!r} for {value!r}; give aioresult connections without it"
            )
    tasks, groups, *_ = row["relations"]
    zones = tuple((row[name] or b"UTC\x00").partition(b"\x00")[0].decode() for name in ("zone", "group_zone"))
    has_zones = row["zone"] is not None and row["group_zone"] is not None
    return Found(
        names,
        tasks,
        groups,
        frozenset(row["columns"]),
        row["notifies"],
        names.table == TABLE
        and tasks is not None
        and await connection.fetchval(f"SELECT EXISTS (SELECT FROM {names.tasks})"),
        None not in row["relations"][: len(needed)]
        and all(row["callable"][:called])
        and row["noted"] == 4
        and has_zones,
        None not in row["relations"][len(needed) :] and all(row["callable"][called:]),
        all(
            comment == digest(file)
            for comment, file, there in zip(row["functions"], wanted.values(), row["callable"], strict=True)
            if there
        ),
        (zones[0], zones[1]),
        row["encoding"],
    )
