-- One step of a chord (aioresult.chord.ChordStep), on Celery's keys (celery/backends/redis.py, 5.7) and two of ours.
--   KEYS: group key; .j parts; .s size; .t its difference; .d parts seen; .c the claim's token, then "done";
--         .a a hash of ours: run, body, id of the body's result, token of our last claim, the first part of ours that
--         failed, the size when we last saw it, whether we finished the chord;
--         .r the parts of a chord that we finished
--   ARGV: step; group id; channel of the completed ones; token; milliseconds of the lease, to live, and for the group to
--         live; size; body; id of its result; run; task id; index; part; failed; whether the parts are a sorted set
-- Celery's workers run their own script on the same keys: what counts as the same part, and as complete, is as there.
-- First everything is read and decided, then it is published, then written: a user who may not publish changes nothing.
local gkey, jkey, skey, tkey, dkey, ckey, akey, rkey = unpack(KEYS)
local op, gid, channel, token, lease, ttl, group_ttl, size, body, body_id, run, tid, index, part, failed, ordered =
    unpack(ARGV)
local adding = op == 'create' or op == 'size' or op == 'part'
lease, ttl, group_ttl = tonumber(lease), tonumber(ttl), tonumber(group_ttl)

-- What there is.
local claim = redis.call('GET', ckey)
local ours, our_token, closed, noted = unpack(redis.call('HMGET', akey, 'run', 'token', 'finished', 'size'))
local anew = op == 'create' and claim == 'done' and ours ~= run
if anew then claim = false end
local done = claim == 'done'
local store = done and rkey or jkey
local kind = redis.call('TYPE', store).ok
local list = kind == 'list' or kind == 'none' and ordered == '0'
local count = anew and 0 or redis.call(list and 'LLEN' or 'ZCARD', store)
-- Celery begins another run of a chord by removing .c and setting .s: what we kept of the one before is void.
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
-- Celery ends a chord with failed parts by removing .s, and any other by removing the parts, too. Its mark in .c stays
-- for some seconds or minutes; that there was a size, we may have noted.
noted = tonumber(noted or nil)
local over = not (done or total or adding or ours)
    and (noted and (count == 0 or count >= noted) or count > 0 and claim and claim ~= our_token)
local gone = done and not closed or over and count == 0
if over then total = count > 0 and count or noted end
total = total and tonumber(total)
if gone then count = total or 0 end
over = over or done
local complete = total and count >= total

-- What becomes of it.
local news, claimed, released, finished = first_failure, false, false, false
if over then
    claimed = mine and op == 'finish' and closed -- this very step, repeated after its reply was lost
elseif complete and (adding or op == 'claim' or op == 'renew') then
    news = news or adding
    claimed = token ~= '' and (not claim or claim == token)
elseif complete and mine and (not claim or claim == token) and (op == 'release' or op == 'finish') then
    -- Also when the lease has run out, for nobody has claimed since.
    news = true
    released = op == 'release'
    finished = op == 'finish'
    claimed = finished
end
if news then
    local told = redis.pcall('PUBLISH', gkey, '')
    if type(told) ~= 'table' and complete and not finished then told = redis.pcall('PUBLISH', channel, gid) end
    if type(told) == 'table' then return redis.error_reply('AIORESULT ' .. told.err) end
end

local keeping = not over and (adding or claimed)
if anew then redis.call('DEL', jkey, skey, tkey, dkey, ckey, akey, rkey) end
if void and keeping then redis.call('DEL', akey, rkey) end
-- A key lives at least for as long as we are told, and as long as it would have lived: Celery may be told otherwise.
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
            -- Without an index: after all that have one, in order of arrival.
            local score = index == '+inf' and 1e15 + redis.call('ZCARD', jkey) or index
            -- A member of a sorted set occurs once; a space more is the same JSON.
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
    -- Not for longer than the rest, or it would hold up another chord of that id.
    redis.call('SET', ckey, token, 'PX', ttl ~= 0 and math.min(lease, ttl) or lease)
    redis.call('HSET', akey, 'token', token)
end
if keeping then
    keep(gkey, redis.call('PTTL', gkey), group_ttl)
    if finished then
        keep(rkey, lives[jkey], ttl)
        keep(akey, lives[akey], ttl)
        -- Without .c, .a would be void.
        local left = redis.call('PTTL', akey)
        if left > 0 then redis.call('PEXPIRE', ckey, left) end
    else
        for key, left in pairs(lives) do keep(key, left, ttl) end
    end
end
-- The body for the claimant, the failure for a reader: not with every part.
return {count, total or -1, claimed and 1 or 0, (over or finished) and 1 or 0,
        claimed and op ~= 'renew' and redis.call('HGET', akey, 'body'),
        not adding and not void and redis.call('HGET', akey, 'failure'),
        not (over or finished) and redis.call('PTTL', ckey) or -2,
        list and 1 or 0, gone and '' or (done or finished) and '.r' or '.j', ours and 1 or 0,
        op == 'read' and not ours and redis.call('HGET', akey, 'body_id')}
