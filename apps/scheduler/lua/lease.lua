-- Leases the next requests of a lane to a worker, as many as its free sequences allow.
-- ARGV: lane, worker, max_sequences (the worker's bound), limit (requests), lease_ms, affinity_ms (how long the worker is
--       remembered by the beginnings of the prompts; 0: not at all), [id, route]...
-- Given ids, only those are leased, in this order, and only while each is the lane's next: the choice of a worker is for
-- the request it was made for. `route` is why it goes there.
-- Returns a list of {id, attempt, payload, ms left of its total timeout}
local lane, worker, bound = ARGV[1], ARGV[2], tonumber(ARGV[3])
local now, leased, pairs_leased = now_ms(), {}, {}
local busy = tonumber(redis.call('HGET', 'busy', worker) or 0)
local chosen, turn, limit, routes = #ARGV > 6, 7, ARGV[4], {}
for _ = 1, tonumber(ARGV[4]) do
  local member = next_member(lane, now)
  if not member then break end
  local id = string.sub(member, 18)
  if chosen and ARGV[turn] ~= id then
    limit = #leased -- another dispatcher was faster; a replay is to stop here too
    break
  end
  local key = 'request:' .. id
  local r = fields(key)
  if r.state ~= 'waiting' or r.member ~= member then
    -- An entry that no request stands behind: written by hand, or left by a flush.
    redis.call('ZREM', 'lane:' .. lane, member)
    redis.call('ZREM', 'promote:' .. lane, member)
    redis.call('INCR', 'quarantined')
  else
    local choices = tonumber(r.choices)
    if busy > 0 and busy + choices > bound then break end
    busy = busy + choices
    leave_lane(r)
    local attempt = redis.call('HINCRBY', key, 'attempt', 1)
    redis.call('HSET', key, 'state', 'running', 'worker', worker)
    redis.call('HSET', key, 'attempt_ms', number(now))
    if not r.leased_ms then redis.call('HSET', key, 'leased_ms', number(now), 'wait', cjson.encode(waited(r, now))) end
    add('flow:' .. lane, 'leased:' .. r.priority, tonumber(r.cost_ms))
    redis.call('ZADD', 'leases', number(now + tonumber(ARGV[5])), id)
    redis.call('ZADD', 'deadlines', r.deadline_ms, id)
    redis.call('HINCRBY', 'busy', worker, choices)
    redis.call('HINCRBY', 'depth', 'running:' .. lane, 1)
    local virtual = tonumber(redis.call('HGET', 'fair:' .. lane, 'V') or 0)
    redis.call('HSET', 'fair:' .. lane, 'V', number(math.max(virtual, tonumber(r.start))))
    if chosen then
      redis.call('HSET', key, 'route', ARGV[turn + 1])
      routes[#routes + 1] = ARGV[turn + 1]
      turn = turn + 2
    end
    if ARGV[6] ~= '0' then
      for hash in string.gmatch(r.affinity or '', '%S+') do
        redis.call('SADD', 'affinity:' .. hash, worker)
        redis.call('PEXPIRE', 'affinity:' .. hash, ARGV[6])
      end
    end
    pairs_leased[#pairs_leased + 1] = id .. ' ' .. attempt
    leased[#leased + 1] = { id, attempt, r.payload, math.max(1, math.floor(tonumber(r.deadline_ms) - now)) }
  end
end
if #leased > 0 then
  record(now, 'lease', 'lane', lane, 'worker', worker, 'max_sequences', bound, 'limit', limit, 'lease_ms', ARGV[5],
    'leased', table.concat(pairs_leased, ' '), 'routes', table.concat(routes, '\n'))
end
return leased
