-- Do one step of a run (aioresult.run.RunStep), by the rules of `aioresult.backends.runs.Note`. A run is one attempt of
-- a task in one process; a note is what the store knows of the last run.
--   KEYS: result, also a channel;
--         .run, the note, a hash: run, worker, over ("1" once the run has ended); if the task must stop, also wish (the
--         record of REVOKED to store then), its ttl and its group, reason;
--         .out, the log of the output (open.lua), also a channel
--   ARGV: step; run; worker; milliseconds for the note to live, 0 for ever, "" to leave its expiry unchanged; record,
--         "" for none, its milliseconds to live, whether its state is of the task's own making, its group; state;
--         reason; whether to skip a task that has succeeded; epoch of the output, "" for none, and number of its end
--         mark; a worker that is dead; prefix of the workers' channels; digest of the stored value, if the caller has
--         decoded it, and its state, "" if it is not final
-- Returns {verdict, run, worker, reason or false, group of a wish that was stored, its milliseconds to live}. If the
-- script cannot read the state of the stored value (see put.lua), it returns that value; the caller decodes it and
-- tries again. The script first reads and decides everything, then publishes, then writes: if the user may not publish,
-- nothing changes.
local TELL = 'PUBLISH' -- in a Redis Cluster 'SPUBLISH', see scripts.py
local key, note, out = unpack(KEYS)
local op, run, worker, lives, record, ttl, custom, group, state, reason, skip_done, epoch, last, gone, prefix, digest,
    known = unpack(ARGV)

-- Read what is stored. "ours" is the run in the note.
local ours, runs_at, over, wish, wish_ttl, wish_group, why =
    unpack(redis.call('HMGET', note, 'run', 'worker', 'over', 'wish', 'ttl', 'group', 'reason'))
ours, runs_at, over, wish_ttl, why = ours or '', runs_at or '', over ~= '0', wish_ttl or '0', why or ''
local before = {ours, runs_at, over, wish, wish_ttl, wish_group, why}
local finals = {
    ['{"status": "SUCCESS"'] = 'SUCCESS', ['{"status": "FAILURE"'] = 'FAILURE', ['{"status": "REVOKED"'] = 'REVOKED'
}
local status = '' -- '' stands for all states that are not final
if op ~= 'renew' and op ~= 'read' then
    local head = redis.call('GETRANGE', key, 0, 19)
    if string.sub(head, 1, 12) == '{"status": "' then
        status = finals[head] or ''
    elseif head ~= '' then
        local current = redis.call('GET', key)
        if redis.sha1hex(current) ~= digest then return current end
        status = known
    end
end
local others = ours ~= '' and ours ~= run
local ended = ours ~= '' and over

-- Decide what changes.
local verdict, store, store_ttl, stored_group, mark, void, tell = 'noted', false, ttl, '', false, false, false
local function finish(which) ours, runs_at, over = which, '', true end
local function same() return redis.call('GET', key) == record and 'stored' or 'kept' end
local function put()
    if record == '' then verdict = 'noted'
    elseif status == 'SUCCESS' or custom == '1' and status ~= '' then verdict = same()
    else verdict, store = 'stored', record end
end
local function revoked()
    verdict, mark = 'revoked', 'REVOKED'
    if status ~= 'SUCCESS' and status ~= 'REVOKED' then
        store, store_ttl, stored_group = wish, wish_ttl, wish_group or ''
    end
end
if op == 'start' then
    if status == 'SUCCESS' and skip_done == '1' then verdict = 'done'
    elseif status == 'REVOKED' or wish then
        finish(ours)
        revoked()
    else
        ours, runs_at, over = run, worker, false
        put()
        verdict = status == 'SUCCESS' and 'again' or 'started'
    end
elseif op == 'store' then
    if others then verdict = 'superseded' elseif ended then verdict = 'kept' else put() end
elseif op == 'finish' then
    if others and state ~= 'SUCCESS' then verdict = 'superseded'
    elseif ended and state ~= 'SUCCESS' then -- the step is repeated, or a revoke has ended the run of a dead worker
        verdict = status == 'REVOKED' and state ~= 'REVOKED' and 'revoked' or same()
    else
        if not others then finish(run) end
        if not others and state == 'RETRY' and wish then revoked()
        else
            if state == 'SUCCESS' or state == 'FAILURE' or state == 'REVOKED' then
                mark = state
                if not others then wish = false end
            end
            put()
            void = others and verdict == 'stored'
        end
    end
elseif op == 'release' then
    if others then verdict = 'superseded'
    else
        finish(run)
        if wish then revoked() end
    end
elseif op == 'revoke' then
    local running = ours ~= '' and not over and runs_at ~= '' and runs_at ~= gone
    if status == 'SUCCESS' or not running and status == 'FAILURE' then verdict = 'done'
    else
        wish, wish_ttl, wish_group, why = record ~= '' and record, ttl, group, reason
        if running then verdict, tell = 'asked', runs_at
        else
            finish(ours)
            revoked()
        end
    end
end
local marks, keeps = false, false
if mark and (epoch ~= '' or void) then
    local entries = redis.pcall('XREVRANGE', out, '+', '-', 'COUNT', 1)
    if not entries.err then -- if the key is not a stream, there is no log; the result is stored all the same
        local top_epoch, top = string.match(entries[1] and entries[1][1] or '0-0', '^(%d+)-(%d+)$')
        if void and (epoch == '' or top_epoch - epoch > 0) then
            -- The mark gets a new epoch. From it the readers and the writer of that output learn that it is void.
            local fields = entries[1] and entries[1][2] or {}
            keeps, marks = true, fields[#fields - 1] ~= 'e'
            epoch, last = string.format('%.0f', top_epoch + 1), '1'
        else
            top_epoch, top = top_epoch - epoch, top - last
            keeps = top_epoch <= 0
            marks = top_epoch < 0 or top_epoch == 0 and top < 0
        end
    end
end
local changed = false
for at, value in ipairs({ours, runs_at, over, wish, wish_ttl, wish_group, why}) do
    changed = changed or value ~= before[at]
end
changed = changed and (ours ~= '' or wish)

-- Try a write that changes nothing. If the server refuses it, for instance because it is full, publish nothing.
if changed or store or marks then
    local room = redis.pcall('SETRANGE', key, 0, '')
    if type(room) == 'table' then return room end
end
-- Publish the state last: only the state has a meaning without the other messages. The channel of the worker may be in
-- another slot of a Redis Cluster, so its message goes to all nodes.
local messages = {}
if marks then table.insert(messages, {TELL, out, epoch .. '-' .. last .. ' '}) end
if tell then table.insert(messages, {'PUBLISH', prefix .. tell, ours}) end
if store then table.insert(messages, {TELL, key, store}) end
for _, message in ipairs(messages) do
    local told = redis.pcall(unpack(message))
    if type(told) == 'table' then return redis.error_reply('AIORESULT ' .. told.err) end
end

local function keep(which, ttl)
    if ttl == '0' then redis.call('PERSIST', which) elseif ttl ~= '' then redis.call('PEXPIRE', which, ttl) end
end
if store then
    if store_ttl == '0' then redis.call('SET', key, store) else redis.call('SET', key, store, 'PX', store_ttl) end
end
if marks then redis.pcall('XADD', out, 'MINID', '=', epoch .. '-0', epoch .. '-' .. last, 'e', mark) end
if keeps and record ~= '' then keep(out, ttl) end
if changed then
    redis.call('HSET', note, 'run', ours, 'worker', runs_at, 'over', over and '1' or '0')
    if wish then redis.call('HSET', note, 'wish', wish, 'ttl', wish_ttl, 'group', wish_group or '', 'reason', why)
    else redis.call('HDEL', note, 'wish', 'ttl', 'group', 'reason') end
end
keep(note, lives)
return {verdict, over and '' or ours, over and '' or runs_at, wish and why, stored_group, store_ttl}
