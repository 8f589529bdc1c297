-- Called by the trigger of {table} for a row whose date_done is not the time by the server's clock: the session that
-- stored it has another time zone, or the client's clock is wrong. It runs with the rights of the role that created it,
-- since a Celery worker has none on our tables.
CREATE OR REPLACE FUNCTION {stored}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $aioresult$
BEGIN
    INSERT INTO {expiry} AS e (id, stored_at, date_done)
    SELECT NEW.{key}, clock_timestamp(), NEW.date_done WHERE octet_length(NEW.{key}) < 2000 -- no id is longer, or null
    ON CONFLICT (id) DO UPDATE SET expires_at = NULL, stored_at = excluded.stored_at, date_done = excluded.date_done
    WHERE e.date_done IS DISTINCT FROM excluded.date_done; -- otherwise the store itself has said when it expires
    RETURN NULL;
END
$aioresult$;
REVOKE ALL ON FUNCTION {stored} FROM PUBLIC
