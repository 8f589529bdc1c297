-- Store the lease of a worker that is alive, or remove that of a worker that shuts down. Then remove the dead workers,
-- whose leases have run out.
--   KEYS[1]: a sorted set, worker → milliseconds of the server's clock at which its lease ends; also the channel on
--         which removed workers are published
--   ARGV: worker, "" for none; milliseconds of its lease, 0 if it shuts down; the time that this script returned to the
--         caller the last time, "" to remove no worker. If that time is more than half a lease ago, the script removes
--         no worker either: perhaps the server was away, and no worker could renew its lease
-- Returns the server's clock, in milliseconds.
local TELL = 'PUBLISH' -- in a Redis Cluster 'SPUBLISH', see scripts.py
local leases, worker, lease, last = KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local gone = {}
if worker ~= '' and lease > 0 then redis.call('ZADD', leases, now + lease, worker)
elseif worker ~= '' and redis.call('ZSCORE', leases, worker) then gone[1] = worker end
if last and now - last <= lease / 2 then
    local over = redis.call('ZRANGEBYSCORE', leases, '-inf', now, 'WITHSCORES')
    for at = 1, #over, 2 do
        -- The lease ended more than a lease ago. Perhaps the server was away then, so give the worker half a lease
        -- more.
        if over[at + 1] + lease <= now then redis.call('ZADD', leases, now + lease / 2, over[at])
        elseif over[at] ~= gone[1] then gone[#gone + 1] = over[at] end
    end
end
for _, other in ipairs(gone) do
    local told = redis.pcall(TELL, leases, other)
    if type(told) == 'table' then return redis.error_reply('AIORESULT ' .. told.err) end
    redis.call('ZREM', leases, other)
end
return now
