-- Counts one finished turn into a session's record, unless the session was deleted or begun anew meanwhile.
-- KEYS: session:<org>:<name> (hash: salt, model, worker, turns, tokens, saved, created_ms, used_ms),
--       sessions:<org> (sorted set of names by used_ms)
-- ARGV: name, salt, model, worker, tokens in its context now, tokens it did not have to compute, milliseconds it is kept
-- Returns 1 if it was counted.
local record, index = KEYS[1], KEYS[2]
if redis.call('HGET', record, 'salt') ~= ARGV[2] then return 0 end
local t = redis.call('TIME')
local now = string.format('%d', t[1] * 1000 + math.floor(t[2] / 1000))
redis.call('HSETNX', record, 'created_ms', now)
redis.call('HSET', record, 'model', ARGV[3], 'worker', ARGV[4], 'tokens', ARGV[5], 'used_ms', now)
redis.call('HINCRBY', record, 'turns', 1)
redis.call('HINCRBY', record, 'saved', ARGV[6])
redis.call('PEXPIRE', record, ARGV[7])
redis.call('ZADD', index, now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', index, '-inf', string.format('%d', tonumber(now) - tonumber(ARGV[7])))
redis.call('PEXPIRE', index, ARGV[7])
return 1
