-- Without ARGV[3]: what tells the value of KEYS[1] from any later one, or false if there is none. With it: remove the
-- value if it still is of that version, so that one that was stored after the first attempt stays when this is repeated.
-- Of a long value only the length and both ends are looked at, to keep the server from hashing megabytes: towards its end
-- stands the moment at which it was stored.
--   ARGV[1], ARGV[2]: what belongs to a run of the task and goes with the value: .run and .out. They are in the same slot,
--         and not among the keys, because a user without rights to them may forget results all the same.
local key, note, out = KEYS[1], ARGV[1], ARGV[2]
local length = redis.pcall('STRLEN', key)
local version
if length == 0 then -- a task that runs may have stored nothing yet
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
