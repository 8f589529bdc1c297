DO $aioresult$
BEGIN
    IF to_regclass({output_literal}) IS NULL THEN
        CREATE TABLE {output} (
            task_id varchar(155) NOT NULL,
            epoch bigint NOT NULL,
            seq bigint NOT NULL, -- the number of the last chunk in data
            data bytea NOT NULL,
            state varchar(50) NOT NULL,
            PRIMARY KEY (task_id, epoch, seq)
        );
    END IF;
    IF to_regclass({logs_literal}) IS NULL THEN
        CREATE TABLE {logs} (
            task_id varchar(155) PRIMARY KEY,
            epoch bigint NOT NULL DEFAULT 0, -- the epoch of its entries; 0 if it has none
            writer text NOT NULL DEFAULT '',
            expires_at timestamptz NOT NULL DEFAULT 'infinity'
        ) WITH (fillfactor = 50);
    END IF;
    IF to_regclass({runs_literal}) IS NULL THEN
        CREATE TABLE {runs} (
            task_id varchar(155) PRIMARY KEY,
            run text NOT NULL DEFAULT '',
            worker text NOT NULL DEFAULT '',
            over boolean NOT NULL DEFAULT true,
            wish jsonb, -- the record to store when the task stops; null unless it must stop
            reason text NOT NULL DEFAULT '',
            expires_at timestamptz NOT NULL DEFAULT 'infinity'
        ) WITH (fillfactor = 50);
    END IF;
    IF to_regclass({workers_literal}) IS NULL THEN
        -- The table has no further index, so that renewing a lease changes no index.
        CREATE TABLE {workers} (id text PRIMARY KEY, expires_at timestamptz NOT NULL) WITH (fillfactor = 50);
    END IF;
END
$aioresult$;
