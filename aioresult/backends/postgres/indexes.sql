-- The indexes that reading and cleanup need. A large table gets no index here, because building one would block every
-- writer: see the end of this file.
DO $aioresult$
DECLARE
    wanted record;
    command text;
BEGIN
    FOR wanted IN
        SELECT relation::regclass AS relation, field, predicate FROM (VALUES {indexes}) AS w(relation, field, predicate)
    LOOP
        IF EXISTS (
            SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
            WHERE i.indrelid = wanted.relation AND i.indisvalid AND a.attname = wanted.field
              AND (i.indpred IS NULL) = (wanted.predicate = '')
        ) THEN
            CONTINUE;
        END IF;
        command := format('ON %s (%I)%s', wanted.relation, wanted.field, wanted.predicate);
        IF (SELECT coalesce(sum(pg_relation_size(relid)), 0) + pg_relation_size(wanted.relation)
            FROM pg_partition_tree(wanted.relation)) > {large_table} THEN
            RAISE WARNING 'aioresult: a large table lacks an index, create it CONCURRENTLY: %', command;
        ELSIF (SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = wanted.relation) THEN
            EXECUTE 'CREATE INDEX ' || command;
        END IF;
    END LOOP;
END
$aioresult$;
-- If a table of Celery is large and has no index on date_done, run this separately, outside any transaction. Without
-- the index everything works, but cleanup reads the whole table. On a partitioned table, do this for each partition.
--   CREATE INDEX CONCURRENTLY ON {tasks} (date_done);
--   CREATE INDEX CONCURRENTLY ON {groups} (date_done);
