-- Do steps of runs (aioresult.run.RunStep), each of another task, in order of their ids. A run is one attempt of a task
-- in one process; a note is what the store knows of the last run. aioresult.backends.runs.Note is the reference. The
-- arguments inserting and updating are statements that store a result, because not every table has the same columns.
-- zone is the time zone of the dates. by_default is the reader's default expiry in seconds, null for never. News goes
-- to the channels that begin with prefix.
CREATE OR REPLACE FUNCTION {run_steps}(
    prefix text, inserting text, updating text, zone text, by_default float8, ids text[], ops text[], runs text[], workers text[],
    lifetimes float8[], given_states text[], reasons text[], skips boolean[], epochs bigint[], lasts bigint[],
    dead text[], stores boolean[], statuses text[], results bytea[], dates bigint[], tracebacks text[],
    childrens bytea[], names text[], argss bytea[], kwargss bytea[], hosts text[], retriess integer[], queues text[],
    stampss bytea[], metas bytea[], lives_by_rule float8[], group_ids text[], ttls float8[]
) RETURNS TABLE (verdict text, run text, worker text, wish text, group_id text, group_seconds float8)
LANGUAGE plpgsql SET enable_seqscan = off AS $aioresult$
#variable_conflict use_column
DECLARE
    step record;
    own jsonb; -- the record of the step, to be kept in the note as the wish: what to store when the task stops
    noted record; -- the note before the step
    note record; -- the note after the step
    known boolean; -- whether the note has a row
    present boolean; -- whether the result has a row, which is locked then
    status text;
    same boolean;
    others boolean;
    running boolean;
    outcome text; -- the verdict
    putting text; -- 'own', 'wish', or null if nothing is to be stored
    mark text;
    told text; -- the worker to notify that the run must stop
    taken record; -- what to store
    top record; -- the end of the output
    done timestamp;
    written integer;
BEGIN
    FOR step IN
        SELECT s.* FROM unnest(
            ids, ops, runs, workers, lifetimes, given_states, reasons, skips, epochs, lasts, dead, stores, statuses,
            results, dates, tracebacks, childrens, names, argss, kwargss, hosts, retriess, queues, stampss,
            metas, lives_by_rule, group_ids, ttls
        ) WITH ORDINALITY AS s(
            id, op, run, worker, lives, state, reason, skip, epoch, last, gone, stores, status, result, date_done,
            traceback, children, name, args, kwargs, host, retries, queue, stamps, meta, seconds, group_id,
            group_seconds, place
        ) ORDER BY place
    LOOP
        IF step.op = 'read' THEN
            SELECT r.* INTO noted FROM {runs} r WHERE r.task_id = step.id;
            known := FOUND;
        ELSE
            FOR attempt IN 1..100 LOOP
                SELECT r.* INTO noted FROM {runs} r WHERE r.task_id = step.id FOR UPDATE;
                known := FOUND;
                EXIT WHEN known OR step.op IN ('store', 'renew');
                -- There may be a row all the same; see the same loop in chord_steps.sql.
                INSERT INTO {runs} (task_id) VALUES (step.id) ON CONFLICT DO NOTHING;
            END LOOP;
        END IF;
        IF NOT known OR noted.expires_at <= clock_timestamp() THEN
            SELECT '' AS run, '' AS worker, true AS over, NULL::jsonb AS wish, '' AS reason,
                'infinity'::timestamptz AS expires_at INTO noted;
        END IF;
        FOR attempt IN 1..100 LOOP
            note := noted;
            taken := step;
            status := NULL;
            same := false;
            present := false;
            IF step.op NOT IN ('read', 'renew') THEN
                PERFORM FROM {tasks} t WHERE t.task_id = step.id FOR UPDATE;
                present := FOUND;
                IF present THEN
                    -- The same rule of expiry as in statements.py.
                    SELECT t.status, (t.status, t.result, t.date_done) IS NOT DISTINCT FROM (step.status, step.result,
                        (timestamptz 'epoch' + step.date_done * interval '1 microsecond') AT TIME ZONE zone)
                    INTO status, same FROM {tasks} t LEFT JOIN LATERAL (
                        SELECT x.* FROM {task_expiry} x
                        WHERE x.id = t.task_id AND x.date_done IS NOT DISTINCT FROM t.date_done LIMIT 1
                    ) e ON true
                    WHERE t.task_id = step.id AND NOT coalesce(CASE
                        WHEN e.expires_at IS NOT NULL AND e.stored_at IS NULL THEN e.expires_at
                        ELSE greatest(e.expires_at, coalesce(
                            coalesce(e.stored_at, t.date_done AT TIME ZONE zone) + by_default * interval '1 second',
                            'infinity'))
                        END <= now(), false);
                    same := coalesce(same, false) AND step.stores;
                END IF;
            END IF;

            others := note.run NOT IN ('', step.run);
            outcome := 'noted';
            putting := NULL;
            mark := '';
            told := NULL;
            CASE step.op
            WHEN 'start' THEN
                IF status = 'SUCCESS' AND step.skip THEN
                    outcome := 'done';
                ELSIF status = 'REVOKED' OR note.wish IS NOT NULL THEN
                    outcome := 'revoked';
                ELSE
                    outcome := CASE WHEN status = 'SUCCESS' THEN 'again' ELSE 'started' END;
                    note.run := step.run;
                    note.worker := step.worker;
                    note.over := false;
                    putting := 'own';
                END IF;
            WHEN 'store' THEN
                IF others THEN
                    outcome := 'superseded';
                ELSIF note.run <> '' AND note.over THEN
                    outcome := 'kept';
                ELSE
                    putting := 'own';
                END IF;
            WHEN 'finish' THEN
                IF step.state <> 'SUCCESS' AND others THEN
                    outcome := 'superseded';
                ELSIF step.state <> 'SUCCESS' AND note.run <> '' AND note.over THEN
                    -- A repetition of this step; or a revoke has ended the run of a dead worker.
                    outcome := CASE WHEN status = 'REVOKED' AND step.state <> 'REVOKED' THEN 'over'
                        WHEN same THEN 'stored' ELSE 'kept' END;
                ELSE
                    IF NOT others THEN
                        note.run := step.run;
                        note.worker := '';
                        note.over := true;
                    END IF;
                    IF NOT others AND step.state = 'RETRY' AND note.wish IS NOT NULL THEN
                        outcome := 'revoked';
                    ELSE
                        putting := 'own';
                        IF step.state IN ({ready_states}) THEN
                            mark := step.state;
                            IF NOT others THEN
                                note.wish := NULL;
                            END IF;
                        END IF;
                    END IF;
                END IF;
            WHEN 'release' THEN
                IF others THEN
                    outcome := 'superseded';
                ELSE
                    note.run := step.run;
                    note.worker := '';
                    note.over := true;
                    IF note.wish IS NOT NULL THEN
                        outcome := 'revoked';
                    END IF;
                END IF;
            WHEN 'revoke' THEN
                running := note.run <> '' AND NOT note.over AND note.worker NOT IN ('', step.gone);
                IF status = 'SUCCESS' OR NOT running AND status = 'FAILURE' THEN
                    outcome := 'done';
                ELSE
                    SELECT CASE WHEN step.stores THEN to_jsonb(w) END INTO own FROM (SELECT
                        step.status, step.result, step.date_done, step.traceback, step.children, step.name, step.args,
                        step.kwargs, step.host, step.retries, step.queue, step.stamps, step.meta, step.seconds,
                        step.group_id, step.group_seconds) AS w;
                    note.wish := own;
                    note.reason := step.reason;
                    IF running THEN
                        outcome := 'asked';
                        told := note.worker;
                    ELSE
                        outcome := 'revoked';
                    END IF;
                END IF;
            ELSE
            END CASE;
            IF outcome = 'revoked' THEN
                note.worker := '';
                note.over := true;
                mark := 'REVOKED';
                IF note.wish IS NOT NULL AND (status IS NULL OR status NOT IN ('SUCCESS', 'REVOKED')) THEN
                    putting := 'wish';
                END IF;
            ELSIF outcome = 'over' THEN
                outcome := 'revoked';
            ELSIF putting = 'own' THEN
                IF NOT step.stores THEN
                    putting := NULL;
                ELSIF status = 'SUCCESS' OR status IN ({ready_states}) AND step.status NOT IN ({all_states}) THEN
                    putting := NULL;
                    outcome := CASE WHEN step.op = 'start' THEN outcome WHEN same THEN 'stored' ELSE 'kept' END;
                ELSIF step.op <> 'start' THEN
                    outcome := 'stored';
                END IF;
            END IF;

            EXIT WHEN putting IS NULL;
            IF putting = 'wish' THEN
                SELECT * INTO taken FROM jsonb_to_record(note.wish) AS w(
                    status text, result bytea, date_done bigint, traceback text, children bytea, name text, args bytea,
                    kwargs bytea, host text, retries integer, queue text, stamps bytea, meta bytea, seconds float8,
                    group_id text, group_seconds float8);
            END IF;
            IF present AND taken.seconds IS NULL THEN
                DELETE FROM {task_expiry} e WHERE e.id = step.id;
            END IF;
            EXECUTE CASE WHEN present THEN updating ELSE inserting END INTO done USING
                step.id, taken.status, taken.result, taken.date_done, taken.traceback, taken.children, taken.name,
                taken.args, taken.kwargs, taken.host, taken.retries, taken.queue, taken.stamps;
            GET DIAGNOSTICS written = ROW_COUNT;
            IF written > 0 AND taken.seconds IS NOT NULL THEN
                INSERT INTO {task_expiry} (id, expires_at, date_done, meta)
                VALUES (step.id, {taken_expires_at}, done, taken.meta)
                ON CONFLICT (id) DO UPDATE SET expires_at = excluded.expires_at, stored_at = NULL,
                    date_done = excluded.date_done, meta = excluded.meta;
            END IF;
            EXIT WHEN written > 0; -- otherwise another program has stored the result meanwhile: decide again
        END LOOP;

        IF step.op <> 'read' THEN
            IF step.lives IS NOT NULL THEN
                note.expires_at := {run_expires_at};
            END IF;
            IF note.run = '' AND note.wish IS NULL THEN
                DELETE FROM {runs} r WHERE r.task_id = step.id;
            ELSIF known THEN
                UPDATE {runs} r SET run = note.run, worker = note.worker, over = note.over, wish = note.wish,
                    reason = note.reason, expires_at = note.expires_at
                WHERE r.task_id = step.id;
            END IF;
        END IF;
        IF mark <> '' AND others AND outcome = 'stored' THEN
            -- The output of another run is void. A new epoch tells that to its readers and its writer.
            SELECT coalesce(max(o.epoch), 0) AS epoch, coalesce(bool_or(o.state <> ''), false) AS ended INTO top
            FROM {output} o JOIN {logs} l USING (task_id, epoch)
            WHERE o.task_id = step.id AND l.expires_at > clock_timestamp();
            IF step.epoch IS NULL OR top.epoch > step.epoch THEN
                step.epoch := CASE WHEN NOT top.ended THEN top.epoch + 1 END;
                step.last := 0;
            END IF;
        END IF;
        IF mark <> '' AND step.epoch IS NOT NULL THEN
            PERFORM FROM {append}(
                prefix, ARRAY[step.id], ARRAY[step.epoch], ARRAY[step.last + 1], ARRAY[''::bytea], ARRAY[mark],
                ARRAY[0::bigint], ARRAY[CASE WHEN step.stores THEN step.group_seconds END], ARRAY[''], ARRAY['']);
        END IF;
        IF told IS NOT NULL THEN
            PERFORM pg_notify({worker_channel}, 'revoke ' || char_length(note.run) || ' ' || note.run || told);
        END IF;
        RETURN QUERY SELECT outcome, CASE WHEN note.over THEN '' ELSE note.run END,
            CASE WHEN note.over THEN '' ELSE note.worker END, CASE WHEN note.wish IS NOT NULL THEN note.reason END,
            CASE WHEN putting IS NOT NULL THEN taken.group_id END,
            CASE WHEN putting IS NOT NULL THEN taken.group_seconds END;
    END LOOP;
END
$aioresult$
