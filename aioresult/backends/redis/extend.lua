-- Let a key live for at least ARGV[1] milliseconds, 0 for ever. (PEXPIRE … GT would do, from Redis 7 on.)
local ttl = tonumber(ARGV[1])
local left = redis.call('PTTL', KEYS[1])
if left == -2 then return 0 end
if ttl == 0 then redis.call('PERSIST', KEYS[1])
elseif left ~= -1 and left < ttl then redis.call('PEXPIRE', KEYS[1], ttl) end
return 1
