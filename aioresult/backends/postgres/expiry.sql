-- Beside {table}: the rows that do not expire by their date_done and the reader's default. A row here means nothing
-- once date_done differs from that of the result: another program has stored since.
DO $aioresult$
DECLARE
    zone text := current_setting('TimeZone'); -- in which the dates of this table are kept from now on
BEGIN
    IF to_regclass({expiry_literal}) IS NULL THEN
        CREATE TABLE {expiry} (
            id text PRIMARY KEY,
            expires_at timestamptz, -- null: after the reader's default, counted from stored_at
            stored_at timestamptz, -- by the server's clock, where date_done says something else
            date_done timestamp
        );
    ELSIF NOT EXISTS (
        SELECT FROM pg_attribute WHERE attrelid = {expiry_literal}::regclass AND attname = 'stored_at'
    ) THEN
        ALTER TABLE {expiry} ALTER COLUMN expires_at DROP NOT NULL, ADD COLUMN stored_at timestamptz;
    END IF;
    IF NOT EXISTS (
        SELECT FROM pg_trigger WHERE tgname = 'aioresult_stored' AND tgrelid = {table_literal}::regclass
    ) THEN
        -- A comparison, because PostgreSQL cannot subtract from a date that is infinite. No other column is named here:
        -- one that a trigger's definition names cannot be altered.
        EXECUTE format('CREATE TRIGGER aioresult_stored AFTER INSERT OR UPDATE OF date_done ON %s FOR EACH ROW '
            'WHEN (NEW.date_done AT TIME ZONE %L NOT BETWEEN '
            'clock_timestamp() - interval ''1 second'' AND clock_timestamp() + interval ''1 second'') '
            'EXECUTE FUNCTION %s(%L)', {table_literal}, zone, {stored_literal}, zone);
    END IF;
END
$aioresult$;
