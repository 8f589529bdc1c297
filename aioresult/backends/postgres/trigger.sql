DO $aioresult$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_trigger WHERE tgname = 'aioresult_notify' AND tgrelid = {tasks_literal}::regclass
    ) THEN
        CREATE TRIGGER aioresult_notify AFTER INSERT OR UPDATE ON {tasks}
            FOR EACH ROW EXECUTE FUNCTION {notify}();
    END IF;
END
$aioresult$;
