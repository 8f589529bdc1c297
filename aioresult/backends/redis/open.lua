-- Open the output of a task: its log gets a new epoch, above all earlier ones, and loses its older entries. An epoch is
-- one attempt of the task, or one writer.
--   KEYS: result; .run, the hash of run.lua; .out, the log, a stream whose ids are <epoch>-<last>, with the fields "d"
--         (chunks, a JSON list), "e" (how the output ended) and "o" (the writer that opened it); also the channel
--   ARGV: writer; number of the last chunk; chunks; state of an end mark; whether the message carries the chunks;
--         milliseconds to live, 0 for ever, "" to leave the expiry unchanged; run that the writer belongs to, "" for
--         none
-- Returns the epoch, or 0 if another run has the output, if the writer's run has ended, or if a run has succeeded.
local TELL = 'PUBLISH' -- in a Redis Cluster 'SPUBLISH', see scripts.py
local key, note, out = unpack(KEYS)
local writer, last, data, state, carried, ttl, run = unpack(ARGV)
if run ~= '' and redis.call('EXISTS', note) == 1 then
    local ours, over = unpack(redis.call('HMGET', note, 'run', 'over'))
    if ours ~= run or over == '1' then return 0 end
end

-- The epoch is the server's clock in milliseconds, or one more than the last epoch if the clock was set back.
local time = redis.call('TIME')
local epoch = time[1] * 1000 + math.floor(time[2] / 1000)
local top = redis.call('XREVRANGE', out, '+', '-', 'COUNT', 1)[1]
if top then
    local fields = top[2]
    local newest = string.match(top[1], '^%d+')
    local first = redis.call('XRANGE', out, newest, '+', 'COUNT', 1)[1][2]
    for at = 1, #first, 2 do -- the writer repeats this flush because its reply was lost
        if first[at] == 'o' and first[at + 1] == writer then return tonumber(newest) end
    end
    -- The output of a run that has succeeded stays.
    if run ~= '' and fields[#fields - 1] == 'e' and fields[#fields] == 'SUCCESS' then return 0 end
    epoch = math.max(epoch, newest + 1)
end

-- Try a write that changes nothing. If the server refuses it, for instance because it is full, publish nothing.
local room = redis.pcall('SETRANGE', key, 0, '')
if type(room) == 'table' then return room end
if data == '' and state == '' then
    redis.call('UNLINK', out)
    return epoch
end
epoch = string.format('%.0f', epoch)
local told = redis.pcall(TELL, out, epoch .. '-' .. last .. ' ' .. (carried == '1' and data or ''))
if type(told) == 'table' then return redis.error_reply('AIORESULT ' .. told.err) end
local fields = {'o', writer}
if data ~= '' then fields[3], fields[4] = 'd', data end
if state ~= '' then fields[#fields + 1], fields[#fields + 2] = 'e', state end
redis.call('XADD', out, 'MINID', '=', epoch .. '-0', epoch .. '-' .. last, unpack(fields))
if ttl == '0' then redis.call('PERSIST', out) elseif ttl ~= '' then redis.call('PEXPIRE', out, ttl) end
return tonumber(epoch)
