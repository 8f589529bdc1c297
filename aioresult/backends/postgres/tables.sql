-- One at a time, whoever runs this; so run it in one transaction, as psql -1 does.
SELECT pg_advisory_xact_lock(hashtext('aioresult schema'));
{create_schema}
DO $aioresult$
BEGIN
    IF to_regclass({tasks_literal}) IS NULL THEN
        CREATE SEQUENCE IF NOT EXISTS {task_sequence};
        CREATE TABLE {tasks} (
            id bigint PRIMARY KEY,
            task_id varchar(155) UNIQUE,
            status varchar(50),
            result bytea,
            date_done timestamp,
            traceback text,
            children bytea{extended}
        );
        CREATE INDEX ON {tasks} (date_done);
    END IF;
    IF to_regclass({groups_literal}) IS NULL THEN
        CREATE SEQUENCE IF NOT EXISTS {group_sequence};
        CREATE TABLE {groups} (
            id bigint PRIMARY KEY,
            taskset_id varchar(155) UNIQUE,
            result bytea,
            date_done timestamp
        );
        CREATE INDEX ON {groups} (date_done);
    END IF;
END
$aioresult$;
