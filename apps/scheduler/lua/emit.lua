-- Publishes what one engine step produced for many requests, and renews their leases.
-- A delta is taken only from the attempt that holds the lease and only at the next index of its choice, so no token is
-- lost, doubled or written by a worker that lost the request.
-- ARGV: lease_ms, JSON [[id, attempt, cached_tokens, [[choice, first_index, count, payload], ...],
--   reasoning_tokens], ...]
-- Returns the ids that were refused: their engine work is void.
local now, refused = now_ms(), {}
for _, item in ipairs(cjson.decode(ARGV[2])) do
  local id, key = item[1], 'request:' .. item[1]
  local held = redis.call('HMGET', key, 'state', 'attempt')
  local valid = held[1] == 'running' and tonumber(held[2]) == item[2]
  local expected = {}
  if valid then
    for _, delta in ipairs(item[4]) do
      local choice = delta[1]
      local index = expected[choice] or tonumber(redis.call('HGET', key, 'next:' .. choice) or 0)
      valid = valid and index == delta[2]
      expected[choice] = index + delta[3]
    end
  end
  if not valid then
    refused[#refused + 1] = id
  else
    redis.call('ZADD', 'leases', number(now + tonumber(ARGV[1])), id)
    for _, delta in ipairs(item[4]) do
      if delta[3] > 0 then
        redis.call('HSETNX', key, 'first_token_ms', number(now))
        redis.call('HINCRBY', key, 'next:' .. delta[1], delta[3])
      end
      append_event(id, delta[4])
    end
    if item[3] > 0 then redis.call('HSET', key, 'cached_tokens', item[3]) end
    if item[5] > 0 then redis.call('HINCRBY', key, 'reasoning_tokens', item[5]) end
  end
end
return refused
