-- Append a flush to the log of a task's output and publish it, for a client without transactions: a flush after the
-- first, which is open.lua's.
--   KEYS[1]: the log, also the channel
--   ARGV: message; milliseconds to live, 0 for ever, "" to leave the expiry unchanged; the arguments of XADD
-- Returns 1, or the error of XADD if the entry is a repetition, or if the log has a newer epoch.
local TELL = 'PUBLISH' -- in a Redis Cluster 'SPUBLISH', see scripts.py
local out, message, ttl = KEYS[1], ARGV[1], ARGV[2]
local entry = redis.pcall('XADD', out, unpack(ARGV, 3))
if type(entry) == 'table' then return entry end
if ttl == '0' then redis.call('PERSIST', out) elseif ttl ~= '' then redis.call('PEXPIRE', out, ttl) end
redis.call(TELL, out, message)
return 1
