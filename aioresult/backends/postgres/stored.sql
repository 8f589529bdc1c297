-- A trigger calls this for a row whose date_done is not the time by the server's clock: the session that stored it has
-- another time zone, or the client's clock is wrong. Its arguments are the zone, the table of expiry with its schema,
-- and the column of the id.
-- It runs with the rights of the role that created it, because a Celery worker has none on our tables. So it looks up
-- nothing by a search_path that the caller could choose, and no other role may create a trigger with it.
CREATE OR REPLACE FUNCTION {stored}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $aioresult$
BEGIN
    EXECUTE format(
        'INSERT INTO %1$s AS e (id, stored_at, date_done) '
        'SELECT ($1).%2$I, clock_timestamp(), ($1).date_done WHERE octet_length(($1).%2$I) < 2000 ' -- not null either
        'ON CONFLICT (id) DO UPDATE '
        'SET expires_at = NULL, stored_at = excluded.stored_at, date_done = excluded.date_done, meta = NULL '
        -- otherwise the store itself has set the expiry
        'WHERE e.date_done IS DISTINCT FROM excluded.date_done', TG_ARGV[1], TG_ARGV[2]) USING NEW;
    RETURN NULL;
EXCEPTION WHEN undefined_table OR undefined_column OR invalid_schema_name OR insufficient_privilege
    OR string_data_right_truncation THEN
    -- Our table was moved, removed or changed. The store of the result must succeed all the same.
    RAISE WARNING 'aioresult cannot note when a result was stored, run create_schema: %', SQLERRM;
    RETURN NULL;
END
$aioresult$;
REVOKE ALL ON FUNCTION {stored} FROM PUBLIC
