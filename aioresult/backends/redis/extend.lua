-- Keep a group for at least ARGV[1] milliseconds, 0 for ever. If the group's members are counted, count the member
-- whose task is over.
--   KEYS[1]: the group
--   ARGV: milliseconds; index of the member, "" for none; whether it failed; three further keys of the group: .ok and
--         .bad, with a bit for each member that has succeeded or failed; .n, the size, also the channel of the counts
-- Returns whether the group is stored. The further keys are absent if members are not counted. They are not among the
-- KEYS because a user may have rights to results and groups alone: then members are not counted either.
local TELL = 'PUBLISH' -- in a Redis Cluster 'SPUBLISH', see scripts.py
local ttl = tonumber(ARGV[1])
local ok, bad, total = ARGV[4], ARGV[5], ARGV[6]
local function extend(key)
    local left = redis.call('PTTL', key) -- PEXPIRE … GT would need Redis 7
    if ttl == 0 then redis.call('PERSIST', key)
    elseif left ~= -1 and left < ttl then redis.call('PEXPIRE', key, ttl) end
    return left ~= -2
end
local there = extend(KEYS[1])
local index = tonumber(ARGV[2])
local size = index and redis.pcall('GET', total)
size = type(size) == 'string' and tonumber(size)
if size and index >= 0 and index < size then
    extend(total)
    -- Set the last bit first, so that the string has its full length at once: a string that grows takes twice the
    -- memory.
    local function set(bits, value)
        if redis.call('EXISTS', bits) == 0 then
            if value == 0 then return 0 end
            redis.call('SETBIT', bits, size - 1, 0)
        end
        return redis.call('SETBIT', bits, index, value)
    end
    local changed
    if ARGV[3] ~= '1' then
        changed = set(ok, 1) == 0
        set(bad, 0)
    else -- a success stays: a failure that comes after it was not stored
        changed = redis.call('GETBIT', ok, index) == 0 and set(bad, 1) == 0
    end
    local left = redis.call('PTTL', total)
    for _, bits in ipairs({ok, bad}) do
        if left > 0 then redis.call('PEXPIRE', bits, left) else redis.call('PERSIST', bits) end
    end
    if changed then redis.call(TELL, total, '') end
end
return there and 1 or 0
