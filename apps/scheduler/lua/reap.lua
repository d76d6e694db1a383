-- Ends what is past its deadline and gives back what is past its lease. Any dispatcher may call it at any time.
-- ARGV: events_ttl_ms, limit
-- Returns {ended by deadline, leases lapsed as [id, attempt]...}: the second list goes through requeue.lua.
local now, ended, lapsed = now_ms(), 0, {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', 'deadlines', '-inf', number(now), 'LIMIT', 0, ARGV[2])) do
  local r = fields('request:' .. id)
  if r.state == 'waiting' then
    end_request(id, r, 'expired', 'queue_timeout', 'No worker became free in time. Try again later.', ARGV[1], now)
    ended = ended + 1
  elseif r.state == 'running' then
    end_request(id, r, 'expired', 'deadline_exceeded', 'The request did not finish within its total timeout.', ARGV[1], now)
    ended = ended + 1
  else
    redis.call('ZREM', 'deadlines', id)
  end
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', 'leases', '-inf', number(now), 'LIMIT', 0, ARGV[2])) do
  local attempt = redis.call('HGET', 'request:' .. id, 'attempt')
  if attempt then
    lapsed[#lapsed + 1] = id
    lapsed[#lapsed + 1] = attempt
  else
    redis.call('ZREM', 'leases', id)
  end
end
return { ended, lapsed }
