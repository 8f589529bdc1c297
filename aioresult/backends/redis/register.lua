-- Add a chord that may become complete to the set from which dispatchers learn of chords. Its score is when it expires.
--   KEYS[1]: the set; ARGV: group id; milliseconds until the chord expires, 0 for never; "XX" to change only an entry
--         that is in the set already
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
