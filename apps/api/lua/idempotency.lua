-- Moves one Idempotency-Key from state to state. Whoever runs the request holds it under a token, and a lease.
-- KEYS: idempotency:<digest of organization, path and key> (hash: body, state, token, answer)
-- ARGV: 'begin', digest of the body, token, lease_ms
--       'renew', token, lease_ms | 'end', token, state ('answered' or 'streamed'), kept_ms, answer | 'release', token
-- Returns for begin: {'begun'}, {'mismatch'}, {'running', ms left of the lease}, {'streamed'} or {'answered', answer};
--         for the others: {'done'}, or {'lost'} when another holds the key by now.
local key, verb = KEYS[1], ARGV[1]
if verb == 'begin' then
  if redis.call('EXISTS', key) == 1 then
    if redis.call('HGET', key, 'body') ~= ARGV[2] then return { 'mismatch' } end
    local state = redis.call('HGET', key, 'state')
    if state == 'running' then return { state, redis.call('PTTL', key) } end
    return { state, redis.call('HGET', key, 'answer') }
  end
  redis.call('HSET', key, 'body', ARGV[2], 'state', 'running', 'token', ARGV[3])
  redis.call('PEXPIRE', key, ARGV[4])
  return { 'begun' }
end
if redis.call('HGET', key, 'token') ~= ARGV[2] then return { 'lost' } end
if verb == 'renew' then
  redis.call('PEXPIRE', key, ARGV[3])
elseif verb == 'end' then
  redis.call('HSET', key, 'state', ARGV[3], 'answer', ARGV[5])
  redis.call('HDEL', key, 'token')
  redis.call('PEXPIRE', key, ARGV[4])
else
  redis.call('DEL', key)
end
return { 'done' }
