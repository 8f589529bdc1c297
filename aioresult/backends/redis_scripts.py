"""The Lua that decides in the server: whether a result may be stored, and what a step does to a chord."""

from __future__ import annotations

import hashlib
from typing import Final

from ..serialization import SUCCESS_HEAD

__all__ = ["CHORD", "EXTEND", "PUT", "REGISTER", "SCRIPTS"]

# Store and publish in one step, unless the task has gone well already. Returns 1 (stored), 0 (left alone), or the
# stored value itself where the script cannot tell: compressed, or of another serializer. The caller then decodes it
# and, if it may be replaced, tries again with the digest of what it saw.
#   KEYS[1]: the key, which is also the channel
#   ARGV: value; milliseconds to live, 0 for ever; and, if at all, "absent" to store only over nothing; digest of a
#         replaceable value
# A value equal to the new one counts as stored: it is this very store, repeated after its reply was lost.
_PUT = f"""
local key, value, ttl, guard, digest = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local new
if ttl == '0' then new = redis.pcall('SET', key, value, 'NX')
else new = redis.pcall('SET', key, value, 'PX', ttl, 'NX') end
if not new or new.err then -- something is stored, or nothing can be, which matters only if something is to be
    local head = redis.call('GETRANGE', key, 0, {len(SUCCESS_HEAD) - 1})
    if head ~= '' then
        if guard == 'absent' then return 0 end
        if head == '{SUCCESS_HEAD.decode()}' then return redis.call('GET', key) == value and 1 or 0 end
        if string.sub(head, 1, 12) ~= '{SUCCESS_HEAD[:12].decode()}' then
            local current = redis.call('GET', key)
            if current == value then return 1 end
            if redis.sha1hex(current) ~= digest then return current end
        end
    end
    if ttl == '0' then redis.call('SET', key, value) else redis.call('SET', key, value, 'PX', ttl) end
end
redis.call('PUBLISH', key, value)
return 1
"""

# Let a key live for at least ARGV[1] milliseconds, 0 for ever. (PEXPIRE … GT would do, from Redis 7 on.)
_EXTEND = """
local ttl = tonumber(ARGV[1])
local left = redis.call('PTTL', KEYS[1])
if left == -2 then return 0 end
if ttl == 0 then redis.call('PERSIST', KEYS[1])
elseif left ~= -1 and left < ttl then redis.call('PEXPIRE', KEYS[1], ttl) end
return 1
"""

# One step of a chord (aioresult.chord.ChordStep), on Celery's keys (celery/backends/redis.py, 5.7) and two of ours.
#   KEYS: group key; .j parts; .s size; .t its difference; .d parts seen; .c the claim's token, then "done";
#         .a a hash of ours: run, body, token of our last claim, the first part of ours that failed;
#         .r the parts of a chord that we finished
#   ARGV: step; group id; channel of the completed ones; token; milliseconds of the lease, and to live; size; body;
#         run; task id; index; part; failed
# Celery's workers run their own script on the same keys: what counts as the same part, and as complete, is as there.
_CHORD = """
local gkey, jkey, skey, tkey, dkey, ckey, akey, rkey = unpack(KEYS)
local op, gid, channel, token, lease, ttl, size, body, run, tid, index, part, failed = unpack(ARGV)
local adding = op == 'create' or op == 'size' or op == 'part'

local claim = redis.call('GET', ckey)
if op == 'create' and claim == 'done' and redis.call('HGET', akey, 'run') ~= run then
    redis.call('DEL', jkey, skey, tkey, dkey, ckey, akey, rkey)
    claim = false
end
local done, news, claimed = claim == 'done', false, false

if adding and not done then
    if size ~= '' then redis.call('SET', skey, size) end
    if body ~= '' then redis.call('HSETNX', akey, 'body', body) end
    if op == 'create' then redis.call('HSET', akey, 'run', run) end
    if op == 'part' and redis.call('SADD', dkey, tid .. ':' .. index) == 1 then
        if redis.call('TYPE', jkey).ok == 'list' then -- Celery with result_chord_ordered=False
            redis.call('RPUSH', jkey, part)
        else
            -- Without an index: after all that have one, in order of arrival.
            local score = index == '+inf' and 1e15 + redis.call('ZCARD', jkey) or index
            -- A member of a sorted set occurs once; a space more is the same JSON.
            while redis.call('ZADD', jkey, 'NX', score, part) == 0 do part = part .. ' ' end
        end
        if failed == '1' and redis.call('HSETNX', akey, 'failure', part) == 1 then news = true end
    end
end

local store = done and rkey or jkey
local list = redis.call('TYPE', store).ok == 'list'
local count = redis.call(list and 'LLEN' or 'ZCARD', store)
local total
if done then
    -- Celery removes the parts, and how many there were.
    total = redis.call('HEXISTS', akey, 'finished') == 1 and count
else
    total = redis.call('GET', skey)
    total = total and tonumber(total) + tonumber(redis.call('GET', tkey) or 0)
end
local complete = total and count >= total
local mine = token ~= '' and redis.call('HGET', akey, 'token') == token

if done then
    claimed = mine and op == 'finish' -- this very step, repeated after its reply was lost
elseif complete and (adding or op == 'claim' or op == 'renew') then
    news = news or adding
    claimed = token ~= '' and (not claim or claim == token)
    if claimed then
        -- Not for longer than the rest, or it would hold up another chord of that id.
        redis.call('SET', ckey, token, 'PX', ttl ~= '0' and math.min(lease, ttl) or lease)
        redis.call('HSET', akey, 'token', token)
    end
elseif complete and mine and (not claim or claim == token) and (op == 'release' or op == 'finish') then
    -- Also when the lease has run out, for nobody has claimed since.
    news = true
    if op == 'release' then
        redis.call('DEL', ckey)
        redis.call('HDEL', akey, 'token')
    else
        claimed = true
        if count > 0 then redis.call('RENAME', jkey, rkey) end
        redis.call('DEL', skey, tkey, dkey)
        redis.call('HDEL', akey, 'body')
        redis.call('HSET', akey, 'finished', '1')
        redis.call('SET', ckey, 'done')
    end
end

local finished = claimed and op == 'finish' and not done
if not done and (adding or claimed) then
    local keys = finished and {rkey, akey, ckey} or {jkey, skey, tkey, dkey, akey}
    for _, key in ipairs(keys) do
        if ttl == '0' then redis.call('PERSIST', key) else redis.call('PEXPIRE', key, ttl) end
    end
    local left = redis.call('PTTL', gkey)
    if ttl == '0' then redis.call('PERSIST', gkey)
    elseif left >= 0 and left < tonumber(ttl) then redis.call('PEXPIRE', gkey, ttl) end
end
if news then
    redis.call('PUBLISH', gkey, '')
    if complete and not finished then redis.call('PUBLISH', channel, gid) end
end
-- The body for who has claimed, the failure for who looks: not with every part.
return {count, total or -1, claimed and 1 or 0, (done or finished) and 1 or 0,
        claimed and op ~= 'renew' and redis.call('HGET', akey, 'body'),
        not adding and redis.call('HGET', akey, 'failure'),
        not (done or finished) and redis.call('PTTL', ckey) or -2, list and 1 or 0}
"""

# Note a chord that may become complete, for those who dispatch: in a set scored by when it expires.
#   KEYS[1]: the set; ARGV: group id; milliseconds until then, 0 for never; "XX" to do so only if it is noted already
_REGISTER = """
local set, gid, ttl, only_known = KEYS[1], ARGV[1], tonumber(ARGV[2]), ARGV[3]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', set, '-inf', now)
local left = redis.call('PTTL', set)
if only_known ~= '' and not redis.call('ZSCORE', set, gid) then return 0 end
redis.call('ZADD', set, ttl == 0 and '+inf' or now + ttl, gid)
if ttl == 0 then redis.call('PERSIST', set)
elseif left == -2 or (left >= 0 and left < ttl) then redis.call('PEXPIRE', set, ttl) end
return 1
"""

#: Digest → script.
SCRIPTS: Final = {hashlib.sha1(text.encode()).hexdigest(): text for text in (_PUT, _EXTEND, _CHORD, _REGISTER)}  # noqa: S324
PUT, EXTEND, CHORD, REGISTER = SCRIPTS
