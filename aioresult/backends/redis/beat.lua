-- Note that a worker lives, or that it ends, and remove those whose lease is over.
--   KEYS[1]: a sorted set, worker → milliseconds of the server's clock at which its lease ends; also the channel on which
--         those are published that are removed
--   ARGV: worker, "" for none; milliseconds of its lease, 0 if it ends; what the beat before has returned, "" to remove
--         nobody; if that is more than half a lease ago, nobody is removed either: perhaps nobody could beat
-- Returns the server's clock, in milliseconds.
local leases, worker, lease, last = KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local gone = {}
if worker ~= '' and lease > 0 then redis.call('ZADD', leases, now + lease, worker)
elseif worker ~= '' and redis.call('ZSCORE', leases, worker) then gone[1] = worker end
if last and now - last <= lease / 2 then
    local over = redis.call('ZRANGEBYSCORE', leases, '-inf', now, 'WITHSCORES')
    for at = 1, #over, 2 do
        -- For longer than a lease: perhaps nobody was there to let it beat.
        if over[at + 1] + lease <= now then redis.call('ZADD', leases, now + lease / 2, over[at])
        elseif over[at] ~= gone[1] then gone[#gone + 1] = over[at] end
    end
end
for _, other in ipairs(gone) do
    local told = redis.pcall('PUBLISH', leases, other)
    if type(told) == 'table' then return redis.error_reply('AIORESULT ' .. told.err) end
    redis.call('ZREM', leases, other)
end
return now
