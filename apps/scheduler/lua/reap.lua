-- Ends what is past its deadline and finds what is past its lease. Any dispatcher may call it at any time.
-- ARGV: events_ttl_ms, limit
-- Returns {number ended, leases lapsed as [id, attempt]...}: the second list goes through requeue.lua.
local now, overdue, lapsed = now_ms(), {}, {}
local function due(key, found, suffix)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', key, '-inf', number(now), 'LIMIT', 0, ARGV[2])) do
    local held = redis.call('HMGET', 'request:' .. id, 'state', 'attempt')
    if held[1] == 'waiting' or held[1] == 'running' then
      found[#found + 1] = id
      if suffix then found[#found + 1] = held[2] end
    else
      redis.call('ZREM', key, id)
    end
  end
end
due('deadlines', overdue, false)
due('leases', lapsed, true)
if #overdue + #lapsed == 0 then return { 0, {} } end
record(now, 'reap', 'overdue', table.concat(overdue, ' '), 'lapsed', table.concat(lapsed, ' '))
for _, id in ipairs(overdue) do
  local r = fields('request:' .. id)
  if r.state == 'waiting' then
    end_request(id, r, 'expired', 'queue_timeout', 'No worker became free in time. Try again later.', ARGV[1], now)
  else
    end_request(id, r, 'expired', 'deadline_exceeded', 'The request did not finish within its total timeout.', ARGV[1], now)
  end
end
return { #overdue, lapsed }
