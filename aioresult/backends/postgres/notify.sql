-- Every store notifies one of {channels} channels of the id and the state, never of the value. A partition counts as the
-- table that it belongs to.
CREATE OR REPLACE FUNCTION {notify}() RETURNS trigger LANGUAGE plpgsql AS $aioresult$
DECLARE
    -- The length of the state goes in front, for either may contain any character.
    news text := char_length(NEW.status) || ' ' || NEW.status || NEW.task_id;
BEGIN
    -- Nothing waits for a row without an id or a state, or for an id longer than a notification may be. The program
    -- that stores it must not fail for it.
    IF octet_length(news) < 8000 THEN
        PERFORM pg_notify({task_channel}, news);
    END IF;
    RETURN NULL;
END
$aioresult$
