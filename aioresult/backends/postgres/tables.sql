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
    END IF;
    IF to_regclass({groups_literal}) IS NULL THEN
        CREATE SEQUENCE IF NOT EXISTS {group_sequence};
        CREATE TABLE {groups} (
            id bigint PRIMARY KEY,
            taskset_id varchar(155) UNIQUE,
            result bytea,
            date_done timestamp
        );
    END IF;
END
$aioresult$;
