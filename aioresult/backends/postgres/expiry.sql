-- When a result or group expires that does not do so by date_done and the reader's default. The date_done here is that
-- of the result as it was stored: a row of ours means nothing once somebody else has stored over it.
DO $aioresult$
BEGIN
    IF to_regclass({task_expiry_literal}) IS NULL THEN
        CREATE TABLE {task_expiry} (
            id varchar(155) PRIMARY KEY,
            expires_at timestamptz NOT NULL,
            date_done timestamp
        );
        CREATE INDEX ON {task_expiry} (expires_at);
    END IF;
    IF to_regclass({group_expiry_literal}) IS NULL THEN
        CREATE TABLE {group_expiry} (
            id varchar(155) PRIMARY KEY,
            expires_at timestamptz NOT NULL,
            date_done timestamp
        );
        CREATE INDEX ON {group_expiry} (expires_at);
    END IF;
END
$aioresult$;
