DO $aioresult$
BEGIN
    IF to_regclass({chords_literal}) IS NULL THEN
        CREATE TABLE {chords} (
            group_id varchar(155) PRIMARY KEY,
            run text NOT NULL DEFAULT '',
            size bigint,
            count bigint NOT NULL DEFAULT 0,
            body bytea,
            failure bytea,
            token text NOT NULL DEFAULT '', -- names the holder of the last claim
            claimed_until timestamptz NOT NULL DEFAULT '-infinity',
            done boolean NOT NULL DEFAULT false,
            expires_at timestamptz NOT NULL
        ) WITH (fillfactor = 50); -- every batch of parts updates its chord's row
    END IF;
    IF to_regclass({chord_parts_literal}) IS NULL THEN
        CREATE TABLE {chord_parts} (
            group_id varchar(155) NOT NULL,
            task_id varchar(155) NOT NULL,
            index bigint NOT NULL,
            arrived bigint GENERATED ALWAYS AS IDENTITY,
            part bytea NOT NULL,
            PRIMARY KEY (group_id, task_id, index)
        );
    END IF;
END
$aioresult$;
