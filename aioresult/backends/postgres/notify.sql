-- On every store, send the id and the state to one of {channels} channels, but never the value. The channels of a
-- partition are those of its partitioned table.
CREATE OR REPLACE FUNCTION {notify}() RETURNS trigger LANGUAGE plpgsql AS $aioresult$
DECLARE
    -- The message begins with the length of the state, because the state and the id may contain any character.
    news text := char_length(NEW.status) || ' ' || NEW.status || NEW.task_id;
BEGIN
    -- No waiter waits for a row without an id or a state, or for an id that is too long for a notification. The program
    -- that stores such a row must not fail because of it.
    IF octet_length(news) < 8000 THEN
        PERFORM pg_notify({task_channel}, news);
    END IF;
    RETURN NULL;
END
$aioresult$
