-- Store a value and publish it in one step, unless the stored value must stay. Returns 1 (the value was stored), 0 (the
-- stored value stays), or the stored value itself if the script cannot read its state, because it is compressed or of
-- another serializer. Then the caller decodes it and, if it may be replaced, tries again with its digest.
--   KEYS[1]: the key, which is also the channel
--   ARGV: value; milliseconds to live, 0 for ever; which stored value may be replaced: "absent" for none, "unfinished"
--         for a value that is not final, otherwise for any but a success; digest of a stored value that may be replaced
-- A stored value that is equal to the new one counts as stored: the caller repeats the store because its reply was
-- lost. If the user has no right to publish, nothing is stored: a store never happens without its message.
local TELL = 'PUBLISH' -- in a Redis Cluster 'SPUBLISH', see scripts.py
local key, value, ttl, guard, digest = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local new
if ttl == '0' then new = redis.pcall('SET', key, value, 'NX')
else new = redis.pcall('SET', key, value, 'PX', ttl, 'NX') end
if new and not new.err then
    local told = redis.pcall(TELL, key, value)
    if type(told) == 'table' then
        redis.call('DEL', key)
        return redis.error_reply('AIORESULT ' .. told.err)
    end
    return 1
end
-- Either there is a stored value, or SET has failed. The error matters only if the new value must be stored.
local head = redis.call('GETRANGE', key, 0, 19)
if head ~= '' then
    if guard == 'absent' then return 0 end
    if head == '{"status": "SUCCESS"' then return redis.call('GET', key) == value and 1 or 0 end
    if string.sub(head, 1, 12) ~= '{"status": "' then
        local current = redis.call('GET', key)
        if current == value then return 1 end
        if redis.sha1hex(current) ~= digest then return current end
    elseif guard == 'unfinished' and (head == '{"status": "FAILURE"' or head == '{"status": "REVOKED"') then
        return 0
    end
end
if new then return new end
local told = redis.pcall(TELL, key, value)
if type(told) == 'table' then return redis.error_reply('AIORESULT ' .. told.err) end
if ttl == '0' then redis.call('SET', key, value) else redis.call('SET', key, value, 'PX', ttl) end
return 1
