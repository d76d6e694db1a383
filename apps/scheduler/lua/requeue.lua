-- Gives back leases whose worker failed: each request waits again at its old place, or fails when its attempts are spent.
-- ARGV: max_attempts, events_ttl_ms, [id, attempt]...   Returns how many were given back or failed.
local count, now = 0, now_ms()
for i = 3, #ARGV, 2 do
  local id = ARGV[i]
  local r = fields('request:' .. id)
  if r.state == 'running' and r.attempt == ARGV[i + 1] then
    count = count + 1
    if tonumber(r.attempt) >= tonumber(ARGV[1]) then
      end_request(id, r, 'failed', 'worker_lost', 'The worker running this request was lost. Send it again.', ARGV[2], now)
    else
      leave_worker(id, r)
      redis.call('HSET', 'request:' .. id, 'state', 'waiting')
      join_lane(r)
      redis.call('PUBLISH', 'wake', r.lane)
    end
  end
end
return count
