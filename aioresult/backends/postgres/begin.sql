-- The lock lets only one session at a time run this file. It must run in one transaction: with psql, pass -1.
SET LOCAL lock_timeout = '10s';
SELECT pg_advisory_xact_lock(hashtext('aioresult schema'));
-- While a statement waits for the lock of a table, every later writer waits, too. So give up soon; the
-- caller can try again.
SET LOCAL lock_timeout = '2s';
{create_schema}
