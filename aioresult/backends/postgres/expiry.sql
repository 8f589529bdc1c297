-- The table of expiry of {table}. It has a row for each result or group that does not expire by date_done and the
-- reader's default, or that has metadata. A row counts only while its date_done is that of the result. If the two
-- differ, another program has stored the result since.
DO $aioresult$
DECLARE
    expiry text; -- the table below, with its schema: the trigger's function has no search_path
    zone text; -- the time zone in which the table keeps its dates from now on
BEGIN
    IF to_regclass({expiry_literal}) IS NULL THEN
        CREATE TABLE {expiry} (
            id text PRIMARY KEY,
            -- Without stored_at, this is when the row expires. With stored_at, the row stays at least until then.
            expires_at timestamptz,
            -- When the row was stored, by the server's clock. The row expires after the reader's default from then on.
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
        -- Use the zone of the database: the client or the role may have set another one for this session.
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
        -- Compare dates, because PostgreSQL cannot subtract from an infinite date. Name no other column here: a column
        -- that the definition of a trigger names cannot be altered.
        EXECUTE format('CREATE TRIGGER aioresult_stored AFTER INSERT OR UPDATE OF date_done ON %s FOR EACH ROW '
            'WHEN (NEW.date_done AT TIME ZONE %L NOT BETWEEN '
            'clock_timestamp() - interval ''1 second'' AND clock_timestamp() + interval ''1 second'') '
            'EXECUTE FUNCTION %s(%L, %L, %L)', {table_literal}, zone, {stored_literal}, zone, expiry, {key_literal});
    END IF;
END
$aioresult$;
