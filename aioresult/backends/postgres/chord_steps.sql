-- Do steps of chords (aioresult.chord.ChordStep); the steps of one chord follow each other. The first step that changes
-- a chord locks its row, and the last step writes the row. The body and the failure may be large: they are written
-- once, and read only for steps that need them. News goes to the channels that begin with prefix.
CREATE OR REPLACE FUNCTION {chord_steps}(
    prefix text, ops text[], gids text[], tokens text[], leases float8[], ttls float8[], runs text[], sizes bigint[],
    bodies bytea[], tids text[], indexes bigint[], parts bytea[], failures boolean[]
) RETURNS TABLE (
    count bigint, size bigint, claimed boolean, done boolean, body bytea, failure bytea, lease_left float8
) LANGUAGE plpgsql SET enable_seqscan = off AS $aioresult$
#variable_conflict use_column
DECLARE
    step record;
    chord record;
    known boolean; -- whether the chord exists and has not expired
    locked boolean;
    fresh boolean; -- whether this call has created the row of the chord
    changed boolean;
    adding boolean;
    complete boolean;
    mine boolean;
    news boolean;
    moment timestamptz;
BEGIN
    FOR step IN
        SELECT s.*, lag(gid) OVER w IS DISTINCT FROM gid AS first, lead(gid) OVER w IS DISTINCT FROM gid AS last
        FROM unnest(ops, gids, tokens, leases, ttls, runs, sizes, bodies, tids, indexes, parts, failures)
            WITH ORDINALITY AS s(op, gid, token, lease, ttl, run, size, body, tid, index, part, failed, place)
        WINDOW w AS (ORDER BY place) ORDER BY place
    LOOP
        adding := step.op IN ('create', 'size', 'part');
        moment := clock_timestamp();
        IF step.first THEN
            known := false;
            locked := false;
            fresh := false;
            changed := false;
        END IF;
        IF NOT known OR NOT locked THEN
            FOR attempt IN 1..100 LOOP
                IF step.op NOT IN ('read', 'parts') THEN
                    PERFORM FROM {chords} c WHERE c.group_id = step.gid FOR UPDATE;
                    locked := FOUND;
                END IF;
                EXIT WHEN locked OR NOT adding;
                -- There may be a row all the same: if cleanup has locked and then deleted it, FOR UPDATE finds nothing.
                -- So repeat this until the row exists and is locked.
                INSERT INTO {chords} (group_id, expires_at) VALUES (step.gid, '-infinity') ON CONFLICT DO NOTHING;
                fresh := FOUND;
            END LOOP;
            IF adding AND NOT locked THEN
                RAISE EXCEPTION 'the row of chord % can be neither made nor seen', step.gid;
            END IF;
            SELECT c.run, c.size, c.count, c.token, c.claimed_until, c.done, c.expires_at,
                c.body IS NOT NULL AS has_body, c.failure IS NOT NULL AS failed
            INTO chord FROM {chords} c WHERE c.group_id = step.gid;
            known := FOUND AND (fresh OR chord.expires_at > moment);
        END IF;
        IF adding AND NOT known OR step.op = 'create' AND chord.done AND chord.run <> step.run THEN
            -- The chord has expired, or is created again.
            DELETE FROM {chord_parts} p WHERE p.group_id = step.gid;
            UPDATE {chords} c SET body = NULL, failure = NULL WHERE c.group_id = step.gid;
            chord.size := NULL;
            chord.count := 0;
            chord.token := '';
            chord.claimed_until := '-infinity';
            chord.done := false;
            chord.has_body := false;
            chord.failed := false;
            chord.expires_at := '-infinity';
            known := true;
        END IF;
        IF NOT known THEN
            RETURN QUERY SELECT 0::bigint, NULL::bigint, false, false, NULL::bytea, NULL::bytea, NULL::float8;
            CONTINUE;
        END IF;

        news := false;
        claimed := false;
        complete := false;
        mine := step.token <> '' AND chord.token = step.token;
        IF chord.done THEN
            claimed := mine AND step.op = 'finish'; -- the caller repeats this step because its reply was lost
        ELSE
            IF adding THEN
                chord.size := coalesce(step.size, chord.size);
                IF step.body IS NOT NULL AND NOT chord.has_body THEN
                    UPDATE {chords} c SET body = step.body WHERE c.group_id = step.gid;
                    chord.has_body := true;
                END IF;
            END IF;
            IF step.op = 'create' THEN
                chord.run := step.run;
            ELSIF step.op = 'part' THEN
                INSERT INTO {chord_parts} (group_id, task_id, index, part)
                VALUES (step.gid, step.tid, step.index, step.part) ON CONFLICT DO NOTHING;
                IF FOUND THEN
                    chord.count := chord.count + 1;
                    IF step.failed AND NOT chord.failed THEN
                        UPDATE {chords} c SET failure = step.part WHERE c.group_id = step.gid;
                        chord.failed := true;
                        news := true;
                    END IF;
                END IF;
            END IF;
            complete := coalesce(chord.count >= chord.size, false);
            IF complete AND (adding OR step.op IN ('claim', 'renew')) THEN
                news := news OR adding;
                claimed := step.token <> '' AND (mine OR chord.claimed_until <= moment);
                IF claimed THEN
                    chord.token := step.token;
                    chord.claimed_until := moment + step.lease * interval '1 second';
                END IF;
            ELSIF complete AND mine AND step.op IN ('release', 'finish') THEN
                -- The lease may have run out: no other process has claimed the chord since.
                changed := true;
                news := true;
                chord.claimed_until := '-infinity';
                IF step.op = 'release' THEN
                    chord.token := '';
                ELSE
                    chord.done := true;
                    chord.size := chord.count;
                    claimed := true;
                END IF;
            END IF;
            IF adding OR claimed THEN
                chord.expires_at := greatest(chord.expires_at, {step_expires_at});
                changed := true;
            END IF;
        END IF;
        IF changed AND step.last THEN
            UPDATE {chords} c SET run = chord.run, size = chord.size, count = chord.count,
                body = CASE WHEN chord.done THEN NULL ELSE c.body END, token = chord.token,
                claimed_until = chord.claimed_until, done = chord.done, expires_at = chord.expires_at
            WHERE c.group_id = step.gid;
        END IF;
        IF news THEN
            PERFORM pg_notify({chord_channel}, 'chord ' || step.gid);
            IF complete AND NOT chord.done THEN
                PERFORM pg_notify(prefix || 'ready', 'ready ' || step.gid);
            END IF;
        END IF;
        RETURN QUERY SELECT chord.count, chord.size, claimed, chord.done,
            CASE WHEN claimed AND chord.has_body AND step.op NOT IN ('renew', 'finish') THEN
                (SELECT c.body FROM {chords} c WHERE c.group_id = step.gid) END,
            CASE WHEN chord.failed AND step.op IN ('read', 'parts') THEN
                (SELECT c.failure FROM {chords} c WHERE c.group_id = step.gid) END,
            CASE WHEN chord.claimed_until > moment THEN
                extract(epoch FROM chord.claimed_until - moment)::float8 END;
    END LOOP;
END
$aioresult$
