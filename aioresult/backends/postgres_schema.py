"""The tables of the PostgreSQL backend: Celery's own, one trigger on them, and two small tables beside them.

The definitions are those of Celery 5.7 (``celery/backends/database/models.py``), with the columns of
``result_extended``, which Celery leaves alone when it does not use them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..exceptions import ImproperlyConfigured

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
_TRIGGER = "aioresult_notify"
#: Quotes the blocks below; no name may end one.
_DOLLAR = "$aioresult$"


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
        return self._qualified(_TRIGGER)


def schema_sql(
    schema: str | None = None, table: str = "celery_taskmeta", group_table: str = "celery_tasksetmeta"
) -> str:
    """The DDL, for people who run migrations: what `PostgresBackend.create_schema` runs.

    It may be run again, and by several processes at once. Celery's tables are created only where they are missing; an
    existing one gets the trigger and nothing else.
    """
    names = Tables(schema, table, group_table)
    extended = "".join(f",\n            {name} {kind}" for name, kind in EXTENDED_COLUMNS.items())
    create_schema = f"CREATE SCHEMA IF NOT EXISTS {_quote(schema)};\n" if schema is not None else ""
    return f"""-- One at a time, whoever runs this; so run it in one transaction, as psql -1 does.
SELECT pg_advisory_xact_lock(hashtext('aioresult schema'));
{create_schema}
DO {_DOLLAR}
BEGIN
    IF to_regclass({literal_sql(names.tasks)}) IS NULL THEN
        CREATE SEQUENCE IF NOT EXISTS {names.task_sequence};
        CREATE TABLE {names.tasks} (
            id bigint PRIMARY KEY,
            task_id varchar(155) UNIQUE,
            status varchar(50),
            result bytea,
            date_done timestamp,
            traceback text,
            children bytea{extended}
        );
        CREATE INDEX ON {names.tasks} (date_done);
    END IF;
    IF to_regclass({literal_sql(names.groups)}) IS NULL THEN
        CREATE SEQUENCE IF NOT EXISTS {names.group_sequence};
        CREATE TABLE {names.groups} (
            id bigint PRIMARY KEY,
            taskset_id varchar(155) UNIQUE,
            result bytea,
            date_done timestamp
        );
        CREATE INDEX ON {names.groups} (date_done);
    END IF;
END
{_DOLLAR};

-- When a result or group expires that does not do so by date_done and the reader's default. The date_done here is that
-- of the result as it was stored: a row of ours means nothing once somebody else has stored over it.
DO {_DOLLAR}
BEGIN
    IF to_regclass({literal_sql(names.task_expiry)}) IS NULL THEN
        CREATE TABLE {names.task_expiry} (
            id varchar(155) PRIMARY KEY,
            expires_at timestamptz NOT NULL,
            date_done timestamp
        );
        CREATE INDEX ON {names.task_expiry} (expires_at);
    END IF;
    IF to_regclass({literal_sql(names.group_expiry)}) IS NULL THEN
        CREATE TABLE {names.group_expiry} (
            id varchar(155) PRIMARY KEY,
            expires_at timestamptz NOT NULL,
            date_done timestamp
        );
        CREATE INDEX ON {names.group_expiry} (expires_at);
    END IF;
END
{_DOLLAR};

-- Every store notifies one of {16**SHARD_DIGITS} channels of the id and the state, never of the value: whoever stores.
CREATE OR REPLACE FUNCTION {names.notify_function}() RETURNS trigger LANGUAGE plpgsql AS {_DOLLAR}
BEGIN
    -- The length of the state goes in front, for either may contain any character.
    PERFORM pg_notify({_channel("'aioresult_' || TG_RELID || '_'", "NEW.task_id")},
                      char_length(NEW.status) || ' ' || NEW.status || NEW.task_id);
    RETURN NULL;
END
{_DOLLAR};
DO {_DOLLAR}
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_trigger WHERE tgname = '{_TRIGGER}' AND tgrelid = {literal_sql(names.tasks)}::regclass
    ) THEN
        CREATE TRIGGER {_TRIGGER} AFTER INSERT OR UPDATE ON {names.tasks}
            FOR EACH ROW EXECUTE FUNCTION {names.notify_function}();
    END IF;
END
{_DOLLAR};
{_chord_sql(names)}"""


def _chord_sql(names: Tables) -> str:
    """The part of `schema_sql` that counts chords."""
    return f"""
CREATE TABLE IF NOT EXISTS {names.chords} (
    group_id varchar(155) PRIMARY KEY,
    run text NOT NULL DEFAULT '',
    size bigint,
    count bigint NOT NULL DEFAULT 0,
    body bytea,
    failure bytea,
    token text NOT NULL DEFAULT '', -- of the last claim
    claimed_until timestamptz NOT NULL DEFAULT '-infinity',
    done boolean NOT NULL DEFAULT false,
    expires_at timestamptz NOT NULL
) WITH (fillfactor = 50); -- every batch of parts updates its chord's row
CREATE TABLE IF NOT EXISTS {names.chord_parts} (
    group_id varchar(155) NOT NULL,
    task_id varchar(155) NOT NULL,
    index bigint NOT NULL,
    arrived bigint GENERATED ALWAYS AS IDENTITY,
    part bytea NOT NULL,
    PRIMARY KEY (group_id, task_id, index)
);

-- Steps of chords (aioresult.chord.ChordStep), those of one chord in a row. A chord is locked by the first step that
-- changes it, and written after the last; but its body and failure, which may be large, are written once, and read for
-- those who asked. News goes to the channels that begin with prefix.
CREATE OR REPLACE FUNCTION {names.chord_function}(
    prefix text, ops text[], gids text[], tokens text[], leases float8[], ttls float8[], runs text[], sizes bigint[],
    bodies bytea[], tids text[], indexes bigint[], parts bytea[], failures boolean[]
) RETURNS TABLE (
    count bigint, size bigint, claimed boolean, done boolean, body bytea, failure bytea, lease_left float8
) LANGUAGE plpgsql AS {_DOLLAR}
#variable_conflict use_column
DECLARE
    step record;
    chord record;
    known boolean; -- whether the chord is there, and has not expired
    locked boolean;
    changed boolean;
    adding boolean;
    complete boolean;
    mine boolean;
    news boolean;
    moment timestamptz;
BEGIN
    FOR step IN
        SELECT s.*, lag(gid) OVER w IS DISTINCT FROM gid AS first, lead(gid) OVER w IS DISTINCT FROM gid AS last
        FROM unnest(ops, gids, tokens, leases, ttls, runs, sizes, bodies, tids, indexes, parts, failures)
            WITH ORDINALITY AS s(op, gid, token, lease, ttl, run, size, body, tid, index, part, failed, place)
        WINDOW w AS (ORDER BY place) ORDER BY place
    LOOP
        adding := step.op IN ('create', 'size', 'part');
        moment := clock_timestamp();
        IF step.first THEN
            known := false;
            locked := false;
            changed := false;
        END IF;
        IF NOT known OR NOT locked THEN
            IF adding THEN
                INSERT INTO {names.chords} (group_id, expires_at) VALUES (step.gid, 'infinity') ON CONFLICT DO NOTHING;
            END IF;
            IF step.op NOT IN ('read', 'parts') THEN
                PERFORM FROM {names.chords} c WHERE c.group_id = step.gid FOR UPDATE;
                locked := true;
            END IF;
            SELECT c.run, c.size, c.count, c.token, c.claimed_until, c.done, c.expires_at,
                c.body IS NOT NULL AS has_body, c.failure IS NOT NULL AS failed
            INTO chord FROM {names.chords} c WHERE c.group_id = step.gid;
            known := FOUND AND chord.expires_at > moment;
        END IF;
        IF adding AND NOT known OR step.op = 'create' AND chord.done AND chord.run <> step.run THEN
            -- It has expired, or is created again.
            DELETE FROM {names.chord_parts} p WHERE p.group_id = step.gid;
            UPDATE {names.chords} c SET body = NULL, failure = NULL WHERE c.group_id = step.gid;
            chord.size := NULL;
            chord.count := 0;
            chord.token := '';
            chord.claimed_until := '-infinity';
            chord.done := false;
            chord.has_body := false;
            chord.failed := false;
            known := true;
        END IF;
        IF NOT known THEN
            RETURN QUERY SELECT 0::bigint, NULL::bigint, false, false, NULL::bytea, NULL::bytea, NULL::float8;
            CONTINUE;
        END IF;

        news := false;
        claimed := false;
        complete := false;
        mine := step.token <> '' AND chord.token = step.token;
        IF chord.done THEN
            claimed := mine AND step.op = 'finish'; -- this very step, repeated after its reply was lost
        ELSE
            IF adding THEN
                chord.size := coalesce(step.size, chord.size);
                IF step.body IS NOT NULL AND NOT chord.has_body THEN
                    UPDATE {names.chords} c SET body = step.body WHERE c.group_id = step.gid;
                    chord.has_body := true;
                END IF;
            END IF;
            IF step.op = 'create' THEN
                chord.run := step.run;
            ELSIF step.op = 'part' THEN
                INSERT INTO {names.chord_parts} (group_id, task_id, index, part)
                VALUES (step.gid, step.tid, step.index, step.part) ON CONFLICT DO NOTHING;
                IF FOUND THEN
                    chord.count := chord.count + 1;
                    IF step.failed AND NOT chord.failed THEN
                        UPDATE {names.chords} c SET failure = step.part WHERE c.group_id = step.gid;
                        chord.failed := true;
                        news := true;
                    END IF;
                END IF;
            END IF;
            complete := coalesce(chord.count >= chord.size, false);
            IF complete AND (adding OR step.op IN ('claim', 'renew')) THEN
                news := news OR adding;
                claimed := step.token <> '' AND (mine OR chord.claimed_until <= moment);
                IF claimed THEN
                    chord.token := step.token;
                    chord.claimed_until := moment + step.lease * interval '1 second';
                END IF;
            ELSIF complete AND mine AND step.op IN ('release', 'finish') THEN
                -- Also when the lease has run out, for nobody has claimed since.
                changed := true;
                news := true;
                chord.claimed_until := '-infinity';
                IF step.op = 'release' THEN
                    chord.token := '';
                ELSE
                    chord.done := true;
                    chord.size := chord.count;
                    claimed := true;
                END IF;
            END IF;
            IF adding OR claimed THEN
                chord.expires_at := {instant_sql("step.ttl")};
                changed := true;
            END IF;
        END IF;
        IF changed AND step.last THEN
            UPDATE {names.chords} c SET run = chord.run, size = chord.size, count = chord.count,
                body = CASE WHEN chord.done THEN NULL ELSE c.body END, token = chord.token,
                claimed_until = chord.claimed_until, done = chord.done, expires_at = chord.expires_at
            WHERE c.group_id = step.gid;
        END IF;
        IF news THEN
            PERFORM pg_notify({_channel("prefix", "step.gid")}, 'chord ' || step.gid);
            IF complete AND NOT chord.done THEN
                PERFORM pg_notify(prefix || 'ready', 'ready ' || step.gid);
            END IF;
        END IF;
        RETURN QUERY SELECT chord.count, chord.size, claimed, chord.done,
            CASE WHEN claimed AND chord.has_body AND step.op NOT IN ('renew', 'finish') THEN
                (SELECT c.body FROM {names.chords} c WHERE c.group_id = step.gid) END,
            CASE WHEN chord.failed AND step.op IN ('read', 'parts') THEN
                (SELECT c.failure FROM {names.chords} c WHERE c.group_id = step.gid) END,
            CASE WHEN chord.claimed_until > moment THEN
                extract(epoch FROM chord.claimed_until - moment)::float8 END;
    END LOOP;
END
{_DOLLAR};
"""


def instant_sql(seconds: str) -> str:
    """The moment so many seconds from now, for ``seconds`` in SQL; infinity stays that."""
    return f"CASE WHEN {seconds} = 'infinity' THEN 'infinity' ELSE now() + {seconds} * interval '1 second' END"


def _channel(prefix: str, id: str) -> str:
    """In SQL, the channel on which news of an id come: that of `PostgresBackend._channel`."""
    return f"{prefix} || substr(encode(sha256(convert_to({id}, 'UTF8')), 'hex'), 1, {SHARD_DIGITS})"


def literal_sql(text: str) -> str:
    """``text`` as a literal in SQL."""
    return "'" + text.replace("'", "''") + "'"
