-- One run at a time, and all of it in one transaction: with psql, pass -1.
SET LOCAL lock_timeout = '10s';
SELECT pg_advisory_xact_lock(hashtext('aioresult schema'));
-- Behind a statement that waits for a lock, every later writer waits too. Better to fail soon, and to be run again.
SET LOCAL lock_timeout = '2s';
{create_schema}
