-- One step of a chord (aioresult.chord.ChordStep), on Celery's keys (celery/backends/redis.py, 5.7) and two of ours.
--   KEYS: group key; .j parts; .s size; .t its difference; .d parts seen; .c the claim's token, then "done";
--         .a a hash of ours: run, body, token of our last claim, the first part of ours that failed;
--         .r the parts of a chord that we finished
--   ARGV: step; group id; channel of the completed ones; token; milliseconds of the lease, and to live; size; body;
--         run; task id; index; part; failed
-- Celery's workers run their own script on the same keys: what counts as the same part, and as complete, is as there.
-- First everything is read and decided, then it is published, then written: a user who may not publish changes nothing.
local gkey, jkey, skey, tkey, dkey, ckey, akey, rkey = unpack(KEYS)
local op, gid, channel, token, lease, ttl, size, body, run, tid, index, part, failed = unpack(ARGV)
local adding = op == 'create' or op == 'size' or op == 'part'

-- What there is.
local claim = redis.call('GET', ckey)
local anew = op == 'create' and claim == 'done' and redis.call('HGET', akey, 'run') ~= run
if anew then claim = false end
local done = claim == 'done'
local store = done and rkey or jkey
local list = redis.call('TYPE', store).ok == 'list'
local count = anew and 0 or redis.call(list and 'LLEN' or 'ZCARD', store)
local new_part = op == 'part' and not done and redis.call('SISMEMBER', dkey, tid .. ':' .. index) == 0
local first_failure = new_part and failed == '1' and redis.call('HEXISTS', akey, 'failure') == 0
local mine = token ~= '' and not anew and redis.call('HGET', akey, 'token') == token
if new_part then count = count + 1 end
local total
if done then
    -- Celery removes the parts, and how many there were.
    total = redis.call('HEXISTS', akey, 'finished') == 1 and count
elseif adding and size ~= '' then
    total = tonumber(size) + (anew and 0 or tonumber(redis.call('GET', tkey) or 0))
elseif not anew then
    total = redis.call('GET', skey)
    total = total and tonumber(total) + tonumber(redis.call('GET', tkey) or 0)
end
local complete = total and count >= total

-- What becomes of it.
local news, claimed, released, finished = first_failure, false, false, false
if done then
    claimed = mine and op == 'finish' -- this very step, repeated after its reply was lost
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

if anew then redis.call('DEL', jkey, skey, tkey, dkey, ckey, akey, rkey) end
if adding and not done then
    if size ~= '' then redis.call('SET', skey, size) end
    if body ~= '' then redis.call('HSETNX', akey, 'body', body) end
    if op == 'create' then redis.call('HSET', akey, 'run', run) end
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
elseif claimed and not done then
    -- Not for longer than the rest, or it would hold up another chord of that id.
    redis.call('SET', ckey, token, 'PX', ttl ~= '0' and math.min(lease, ttl) or lease)
    redis.call('HSET', akey, 'token', token)
end
if not done and (adding or claimed) then
    local keys = finished and {rkey, akey, ckey} or {jkey, skey, tkey, dkey, akey}
    for _, key in ipairs(keys) do
        if ttl == '0' then redis.call('PERSIST', key) else redis.call('PEXPIRE', key, ttl) end
    end
    local left = redis.call('PTTL', gkey)
    if ttl == '0' then redis.call('PERSIST', gkey)
    elseif left >= 0 and left < tonumber(ttl) then redis.call('PEXPIRE', gkey, ttl) end
end
-- The body for the claimant, the failure for a reader: not with every part.
return {count, total or -1, claimed and 1 or 0, (done or finished) and 1 or 0,
        claimed and op ~= 'renew' and redis.call('HGET', akey, 'body'),
        not adding and redis.call('HGET', akey, 'failure'),
        not (done or finished) and redis.call('PTTL', ckey) or -2, list and 1 or 0}
