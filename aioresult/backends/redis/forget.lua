-- Without ARGV[1]: what tells the value of KEYS[1] from any later one, or false if there is none. With it: remove the
-- value if it still is of that version, so that one that was stored after the first attempt stays when this is repeated.
-- Of a long value only the length and both ends are looked at, to keep the server from hashing megabytes: towards its end
-- stands the moment at which it was stored.
local key = KEYS[1]
local length = redis.pcall('STRLEN', key)
local version
if length == 0 then return false
elseif type(length) == 'table' then version = 'no string'
elseif length <= 4096 then version = redis.sha1hex(redis.call('GET', key))
else
    local ends = redis.call('GETRANGE', key, 0, 2047) .. redis.call('GETRANGE', key, -2048, -1)
    version = length .. ':' .. redis.sha1hex(ends)
end
if not ARGV[1] then return version end
return version == ARGV[1] and redis.call('UNLINK', key) or 0
