-- Every store notifies one of {channels} channels of the id and the state, never of the value: whoever stores.
CREATE OR REPLACE FUNCTION {notify_function}() RETURNS trigger LANGUAGE plpgsql AS $aioresult$
BEGIN
    -- The length of the state goes in front, for either may contain any character.
    PERFORM pg_notify({task_channel},
                      char_length(NEW.status) || ' ' || NEW.status || NEW.task_id);
    RETURN NULL;
END
$aioresult$;
DO $aioresult$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_trigger WHERE tgname = 'aioresult_notify' AND tgrelid = {tasks_literal}::regclass
    ) THEN
        CREATE TRIGGER aioresult_notify AFTER INSERT OR UPDATE ON {tasks}
            FOR EACH ROW EXECUTE FUNCTION {notify_function}();
    END IF;
END
$aioresult$;
