-- Renews the leases a dispatcher still works on. ARGV: lease_ms, [id, attempt]...   Returns the ids it no longer holds.
local now, lost = now_ms(), {}
for i = 2, #ARGV, 2 do
  local held = redis.call('HMGET', 'request:' .. ARGV[i], 'state', 'attempt')
  if held[1] == 'running' and held[2] == ARGV[i + 1] then
    redis.call('ZADD', 'leases', number(now + tonumber(ARGV[1])), ARGV[i])
  else
    lost[#lost + 1] = ARGV[i]
  end
end
record(now, 'renew', 'lease_ms', ARGV[1], 'held', table.concat(ARGV, ' ', 2), 'lost', table.concat(lost, ' '))
return lost
