-- Write flushes (aioresult.log.Flush) that open an output, and flushes whose epoch is not that of the log. An epoch is
-- one attempt of the task, or one producer. The flushes are in order of their ids. Returns for each the epoch of the
-- log, or null if another producer has the log. News goes to the channels that begin with prefix. Nearly all flushes
-- belong to an open output, and need no function.
CREATE OR REPLACE FUNCTION {append}(
    prefix text, ids text[], epochs bigint[], lasts bigint[], datas bytea[], states text[], keeps bigint[],
    lifetimes float8[], writers text[], runs text[]
) RETURNS TABLE (epoch bigint) LANGUAGE plpgsql SET enable_seqscan = off AS $aioresult$
#variable_conflict use_column
DECLARE
    flush record;
    log record;
    note record;
    news boolean;
    moment timestamptz;
    top bigint;
    given bigint;
BEGIN
    FOR flush IN
        SELECT f.* FROM unnest(ids, epochs, lasts, datas, states, keeps, lifetimes, writers, runs)
            WITH ORDINALITY AS f(id, epoch, last, data, state, keep, lives, writer, run, place) ORDER BY place
    LOOP
        IF flush.epoch = 0 AND flush.run <> '' THEN
            -- Lock the note until the end of the transaction, so that no other run starts and opens the output
            -- meanwhile.
            SELECT r.run, r.over INTO note FROM {runs} r
            WHERE r.task_id = flush.id AND r.expires_at > clock_timestamp() FOR SHARE;
            IF FOUND AND (note.run <> flush.run OR note.over) THEN
                RETURN QUERY SELECT NULL::bigint;
                CONTINUE;
            END IF;
        END IF;
        FOR attempt IN 1..100 LOOP
            SELECT l.epoch, l.writer, l.expires_at INTO log FROM {logs} l WHERE l.task_id = flush.id FOR UPDATE;
            EXIT WHEN FOUND;
            -- There may be a row all the same; see the same loop in chord_steps.sql.
            INSERT INTO {logs} (task_id) VALUES (flush.id) ON CONFLICT DO NOTHING;
        END LOOP;
        IF log IS NULL THEN
            RAISE EXCEPTION 'the row of the output of task % can be neither made nor seen', flush.id;
        END IF;
        moment := clock_timestamp();
        IF log.expires_at <= moment THEN
            DELETE FROM {output} o WHERE o.task_id = flush.id;
            log.epoch := 0;
            log.writer := '';
            log.expires_at := 'infinity';
        END IF;
        news := flush.data <> '' OR flush.state <> '';
        given := flush.epoch;
        IF given = 0 AND log.epoch <> 0 AND log.writer = flush.writer THEN
            given := log.epoch; -- the producer repeats this flush because its reply was lost
            news := false;
        ELSIF given = 0 AND flush.run <> '' AND EXISTS (
            SELECT FROM {output} o WHERE o.task_id = flush.id AND o.epoch = log.epoch AND o.state = 'SUCCESS'
        ) THEN
            RETURN QUERY SELECT NULL::bigint; -- the output of a run that has succeeded stays
            CONTINUE;
        ELSIF given = 0 THEN
            -- The new epoch is above the last one even if the clock was set back.
            given := greatest((extract(epoch FROM moment) * 1000)::bigint, log.epoch + 1);
            DELETE FROM {output} o WHERE o.task_id = flush.id;
            log.epoch := CASE WHEN news THEN given ELSE 0 END;
            log.writer := flush.writer;
        ELSIF log.epoch > given THEN
            RETURN QUERY SELECT NULL::bigint;
            CONTINUE;
        ELSIF news THEN
            SELECT max(o.seq) INTO top FROM {output} o WHERE o.task_id = flush.id AND o.epoch = given;
            IF flush.last <= top THEN
                news := false;
            ELSE
                DELETE FROM {output} o WHERE o.task_id = flush.id AND (o.epoch < given OR o.seq < flush.keep);
                log.writer := CASE WHEN log.epoch = given THEN log.writer ELSE '' END;
                log.epoch := given;
            END IF;
        END IF;
        IF flush.lives IS NOT NULL THEN
            log.expires_at := {output_expires_at};
        END IF;
        UPDATE {logs} l SET epoch = log.epoch, writer = log.writer, expires_at = log.expires_at
        WHERE l.task_id = flush.id AND (l.epoch, l.writer, l.expires_at) <> (log.epoch, log.writer, log.expires_at);
        IF news THEN
            INSERT INTO {output} (task_id, epoch, seq, data, state)
            VALUES (flush.id, given, flush.last, flush.data, flush.state);
            PERFORM pg_notify({output_channel}, 'output ' || given || '-' || flush.last || ' ' || flush.id);
        END IF;
        RETURN QUERY SELECT given;
    END LOOP;
END
$aioresult$
