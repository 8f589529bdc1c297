-- Beside {table}: the rows that do not expire by their date_done and the reader's default, and those with metadata. A
-- row here means nothing once date_done differs from that of the result: another program has stored since.
DO $aioresult$
DECLARE
    expiry text; -- the table below, with its schema: the trigger's function has no search_path
    zone text; -- in which the dates of the table are kept from now on
BEGIN
    IF to_regclass({expiry_literal}) IS NULL THEN
        CREATE TABLE {expiry} (
            id text PRIMARY KEY,
            -- Alone, expires_at says when the row expires. With stored_at it says until when the row stays at least.
            expires_at timestamptz,
            -- The row expires after the reader's default, counted from here; by the server's clock.
            stored_at timestamptz,
            date_done timestamp,
            -- A caller's own metadata of the result, as its serializer wrote it.
            meta bytea
        );
    ELSIF 2 > (
        SELECT count(*) FROM pg_attribute
        WHERE attrelid = {expiry_literal}::regclass AND attname IN ('stored_at', 'meta')
    ) THEN
        ALTER TABLE {expiry} ALTER COLUMN id TYPE text, ALTER COLUMN expires_at DROP NOT NULL,
            ADD COLUMN IF NOT EXISTS stored_at timestamptz, ADD COLUMN IF NOT EXISTS meta bytea;
    END IF;
    IF NOT EXISTS (
        SELECT FROM pg_trigger WHERE tgname = 'aioresult_stored' AND tgrelid = {table_literal}::regclass
    ) THEN
        -- The database's own zone: that of this session may be set by its client or its role.
        SELECT substr(setting, length('timezone=') + 1) INTO zone
        FROM pg_db_role_setting, unnest(setconfig) AS setting
        WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database()) AND setrole = 0
          AND setting ILIKE 'timezone=%';
        IF zone IS NULL THEN
            SELECT setting INTO zone FROM pg_settings
            WHERE name = 'TimeZone' AND source NOT IN ('client', 'database user', 'session', 'user');
        END IF;
        zone := coalesce(zone, 'UTC');
        SELECT format('%I.%I', nspname, relname) INTO expiry
        FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE c.oid = {expiry_literal}::regclass;
        -- A comparison, because PostgreSQL cannot subtract from a date that is infinite. No other column is named here:
        -- one that a trigger's definition names cannot be altered.
        EXECUTE format('CREATE TRIGGER aioresult_stored AFTER INSERT OR UPDATE OF date_done ON %s FOR EACH ROW '
            'WHEN (NEW.date_done AT TIME ZONE %L NOT BETWEEN '
            'clock_timestamp() - interval ''1 second'' AND clock_timestamp() + interval ''1 second'') '
            'EXECUTE FUNCTION %s(%L, %L, %L)', {table_literal}, zone, {stored_literal}, zone, expiry, {key_literal});
    END IF;
END
$aioresult$;
