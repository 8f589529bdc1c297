-- Remove a result in two steps. Without ARGV[3], return the version of the value of KEYS[1], or false if there is no
-- value. With a version in ARGV[3], remove the value if it still has that version. So a repeated call never removes a
-- result that was stored after the first call.
-- The version of a long value is made of its length and both ends, so that the server need not hash megabytes. The end
-- has the moment at which the value was stored.
--   ARGV[1], ARGV[2]: the keys of the task's run, .run and .out, which are removed with the value. They are in the same
--         slot, but not among the KEYS, because a user without rights to them may still remove results.
local key, note, out = KEYS[1], ARGV[1], ARGV[2]
local length = redis.pcall('STRLEN', key)
local version
if length == 0 then -- a running task may have a note and an output, but no result yet
    local kept = redis.pcall('EXISTS', note, out)
    if kept == 0 or type(kept) == 'table' then return false end
    local run, log = redis.pcall('HGET', note, 'run'), redis.pcall('XREVRANGE', out, '+', '-', 'COUNT', 1)
    local epoch = not log.err and log[1] and string.match(log[1][1], '^%d+')
    version = 'run ' .. (type(run) == 'string' and run or '') .. ' ' .. (epoch or '')
elseif type(length) == 'table' then version = 'no string'
elseif length <= 4096 then version = redis.sha1hex(redis.call('GET', key))
else
    local ends = redis.call('GETRANGE', key, 0, 2047) .. redis.call('GETRANGE', key, -2048, -1)
    version = length .. ':' .. redis.sha1hex(ends)
end
if not ARGV[3] then return version end
if version ~= ARGV[3] then return 0 end
redis.pcall('UNLINK', note, out)
return redis.call('UNLINK', key)
