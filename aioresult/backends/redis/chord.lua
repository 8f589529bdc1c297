-- Do one step of a chord (aioresult.chord.ChordStep), on Celery's keys (celery/backends/redis.py, 5.7) and on two keys
-- of aioresult. A part is the outcome of one task of the chord's header. The body is the chord's callback.
--   KEYS: the group's key; .j the parts; .s the size; .t a difference to add to the size; .d the parts that were
--         counted;
--         .c the token of the claim, later "done";
--         .a aioresult's hash: the run, the body, the id of the body's result, the token of aioresult's last claim, the
--         first part stored by aioresult that failed, the size when aioresult last saw it, and "finished" if aioresult
--         has finished the chord;
--         .r the parts of a chord that aioresult has finished
--   ARGV: step; group id; channel of the completed chords; token; milliseconds of the lease, for the chord to live, and
--         for the group to live; size; body; id of its result; run; task id; index; part; failed; whether the parts are
--         in a sorted set
-- Celery's workers run their own script on the same keys. So this script uses the same rules for which parts are equal,
-- and for when a chord is complete.
-- The script first reads and decides everything, then publishes, then writes: if the user may not publish, nothing
-- changes.
local TELL = 'PUBLISH' -- in a Redis Cluster 'SPUBLISH', see scripts.py
local gkey, jkey, skey, tkey, dkey, ckey, akey, rkey = unpack(KEYS)
local op, gid, channel, token, lease, ttl, group_ttl, size, body, body_id, run, tid, index, part, failed, ordered =
    unpack(ARGV)
local adding = op == 'create' or op == 'size' or op == 'part'
lease, ttl, group_ttl = tonumber(lease), tonumber(ttl), tonumber(group_ttl)

-- Read what is stored.
local claim = redis.call('GET', ckey)
local ours, our_token, closed, noted = unpack(redis.call('HMGET', akey, 'run', 'token', 'finished', 'size'))
local anew = op == 'create' and claim == 'done' and ours ~= run
if anew then claim = false end
local done = claim == 'done'
local store = done and rkey or jkey
local kind = redis.call('TYPE', store).ok
local list = kind == 'list' or kind == 'none' and ordered == '0'
local count = anew and 0 or redis.call(list and 'LLEN' or 'ZCARD', store)
-- When Celery creates a chord again, it removes .c and sets .s. Then .a still describes the old chord, and is void.
local void = not done and (closed
    or not ours and count == 0 and redis.call('EXISTS', skey) == 1 and redis.call('HEXISTS', akey, 'failure') == 1)
if void then ours, our_token, closed, noted = false, false, false, false end
local new_part = op == 'part' and not done and redis.call('SISMEMBER', dkey, tid .. ':' .. index) == 0
local first_failure = new_part and failed == '1' and (void or redis.call('HEXISTS', akey, 'failure') == 0)
local mine = token ~= '' and not anew and our_token == token
if new_part then count = count + 1 end
local total
if done then
    total = closed and count or noted
elseif adding and size ~= '' then
    total = tonumber(size) + (anew and 0 or tonumber(redis.call('GET', tkey) or 0))
elseif not anew then
    total = redis.call('GET', skey)
    total = total and tonumber(total) + tonumber(redis.call('GET', tkey) or 0)
end
-- When Celery ends a chord with failed parts, it removes .s; when it ends any other chord, it also removes the parts.
-- The mark that Celery leaves in .c stays for some seconds or minutes. .a may still have the size.
noted = tonumber(noted or nil)
local over = not (done or total or adding or ours)
    and (noted and (count == 0 or count >= noted) or count > 0 and claim and claim ~= our_token)
local gone = done and not closed or over and count == 0
if over then total = count > 0 and count or noted end
total = total and tonumber(total)
if gone then count = total or 0 end
over = over or done
local complete = total and count >= total

-- Decide what changes.
local news, claimed, released, finished = first_failure, false, false, false
if over then
    claimed = mine and op == 'finish' and closed -- the caller repeats this step because its reply was lost
elseif complete and (adding or op == 'claim' or op == 'renew') then
    news = news or adding
    claimed = token ~= '' and (not claim or claim == token)
elseif complete and mine and (not claim or claim == token) and (op == 'release' or op == 'finish') then
    -- The lease may have run out. That does no harm: no other process has claimed the chord since.
    news = true
    released = op == 'release'
    finished = op == 'finish'
    claimed = finished
end
if news then
    local told = redis.pcall(TELL, gkey, '')
    -- The channel of the completed chords may be in another slot of a Redis Cluster, so its message goes to all nodes.
    if type(told) ~= 'table' and complete and not finished then told = redis.pcall('PUBLISH', channel, gid) end
    if type(told) == 'table' then return redis.error_reply('AIORESULT ' .. told.err) end
end

local keeping = not over and (adding or claimed)
if anew then redis.call('DEL', jkey, skey, tkey, dkey, ckey, akey, rkey) end
if void and keeping then redis.call('DEL', akey, rkey) end
-- The life of a key is never shortened: Celery may be configured to keep the same keys for longer.
local lives = {}
if keeping then
    for _, key in ipairs({jkey, skey, tkey, dkey, akey}) do lives[key] = redis.call('PTTL', key) end
end
local function keep(key, left, ttl)
    if ttl == 0 then
        if ours or op == 'create' then redis.call('PERSIST', key) end
    elseif left ~= -1 and left <= ttl then
        redis.call('PEXPIRE', key, ttl)
    end
end

if adding and not done then
    if size ~= '' then redis.call('SET', skey, size, 'KEEPTTL') end
    if body ~= '' then redis.call('HSETNX', akey, 'body', body) end
    if body_id ~= '' then redis.call('HSETNX', akey, 'body_id', body_id) end
    if op == 'create' then redis.call('HSET', akey, 'run', run)
    elseif total and not ours and noted ~= total then redis.call('HSET', akey, 'size', total) end
    if new_part then
        redis.call('SADD', dkey, tid .. ':' .. index)
        if list then -- Celery with result_chord_ordered=False
            redis.call('RPUSH', jkey, part)
        else
            -- A part without an index comes after all parts with an index, in order of arrival.
            local score = index == '+inf' and 1e15 + redis.call('ZCARD', jkey) or index
            -- A sorted set has no two equal members. Another space makes an equal part distinct; its JSON is the same.
            while redis.call('ZADD', jkey, 'NX', score, part) == 0 do part = part .. ' ' end
        end
        if first_failure then redis.call('HSET', akey, 'failure', part) end
    end
end
if released then
    redis.call('DEL', ckey)
    redis.call('HDEL', akey, 'token')
elseif finished then
    if count > 0 then redis.call('RENAME', jkey, rkey) end
    redis.call('DEL', skey, tkey, dkey)
    redis.call('HDEL', akey, 'body')
    redis.call('HSET', akey, 'finished', '1')
    redis.call('SET', ckey, 'done')
elseif claimed and not over then
    -- The claim must not live longer than the other keys: otherwise it would block the next chord of the same id.
    redis.call('SET', ckey, token, 'PX', ttl ~= 0 and math.min(lease, ttl) or lease)
    redis.call('HSET', akey, 'token', token)
end
if keeping then
    keep(gkey, redis.call('PTTL', gkey), group_ttl)
    if finished then
        keep(rkey, lives[jkey], ttl)
        keep(akey, lives[akey], ttl)
        -- .c must live as long as .a: without .c, .a would count as void.
        local left = redis.call('PTTL', akey)
        if left > 0 then redis.call('PEXPIRE', ckey, left) end
    else
        for key, left in pairs(lives) do keep(key, left, ttl) end
    end
end
-- Only a claim returns the body, and only a read returns the failure: both may be large.
return {count, total or -1, claimed and 1 or 0, (over or finished) and 1 or 0,
        claimed and op ~= 'renew' and redis.call('HGET', akey, 'body'),
        not adding and not void and redis.call('HGET', akey, 'failure'),
        not (over or finished) and redis.call('PTTL', ckey) or -2,
        list and 1 or 0, gone and '' or (done or finished) and '.r' or '.j', ours and 1 or 0,
        op == 'read' and not ours and redis.call('HGET', akey, 'body_id')}
