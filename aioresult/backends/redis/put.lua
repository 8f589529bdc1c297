-- Store and publish in one step, unless what is stored is to stay. Returns 1 (stored), 0 (left alone), or the stored
-- value itself where the script cannot tell: compressed, or of another serializer. The caller then decodes it and, if it
-- may be replaced, tries again with the digest of what it saw.
--   KEYS[1]: the key, which is also the channel
--   ARGV: value; milliseconds to live, 0 for ever; what may be replaced: "absent" for nothing, "unfinished" for what is
--         not final, otherwise all but a success; digest of a replaceable value
-- A value equal to the new one counts as stored: it is this very store, repeated after its reply was lost.
-- Nothing is stored that may not be published: the store and its message are one step, also where a right is missing.
local key, value, ttl, guard, digest = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local new
if ttl == '0' then new = redis.pcall('SET', key, value, 'NX')
else new = redis.pcall('SET', key, value, 'PX', ttl, 'NX') end
if new and not new.err then
    local told = redis.pcall('PUBLISH', key, value)
    if type(told) == 'table' then
        redis.call('DEL', key)
        return redis.error_reply('AIORESULT ' .. told.err)
    end
    return 1
end
-- Something is stored, or nothing can be, which matters only if something is to be.
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
local told = redis.pcall('PUBLISH', key, value)
if type(told) == 'table' then return redis.error_reply('AIORESULT ' .. told.err) end
if ttl == '0' then redis.call('SET', key, value) else redis.call('SET', key, value, 'PX', ttl) end
return 1
