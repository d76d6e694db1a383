-- Gives back leases: each request waits again at its old place, or ends when workers failed under it too often.
-- ARGV: max_attempts, events_ttl_ms, blame (1: the worker failed; 0: it only stops), [id, attempt]...   Returns how many were given back or failed.
local count, now = 0, now_ms()
for i = 4, #ARGV, 2 do
  local id = ARGV[i]
  local r = fields('request:' .. id)
  if r.state == 'running' and r.attempt == ARGV[i + 1] then
    count = count + 1
    local crashes = redis.call('HINCRBY', 'request:' .. id, 'crashes', ARGV[3])
    local ends = crashes >= tonumber(ARGV[1])
    record(now, 'requeue', 'id', id, 'attempt', r.attempt, 'blame', ARGV[3], 'max_attempts', ARGV[1],
      'became', ends and 'ended' or 'waiting')
    if ends then
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
