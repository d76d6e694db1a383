-- Publishes what one engine step produced for many requests, and renews their leases.
-- A delta is taken only from the attempt that holds the lease and only at the next index of its choice, so no token is
-- lost, doubled or written by a worker that lost the request.
-- ARGV: lease_ms, JSON [[id, attempt, cached_tokens, [[choice, first_index, count, payload], ...],
--   reasoning_tokens], ...]
-- Returns the ids that were refused: their engine work is void.
local now, refused, renewed, taken = now_ms(), {}, {}, {}
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
    renewed[#renewed + 1] = id .. ' ' .. item[2]
    for _, delta in ipairs(item[4]) do
      if delta[3] > 0 then
        if redis.call('HSETNX', key, 'first_token_ms', number(now)) == 1 then
          redis.call('HSET', key, 'prefill_from_ms', redis.call('HGET', key, 'attempt_ms'))
        end
        redis.call('HINCRBY', key, 'next:' .. delta[1], delta[3])
        taken[#taken + 1] = string.format('%s %d %d %d %d', id, item[2], delta[1], delta[2], delta[3])
      end
      append_event(id, delta[4])
    end
    if item[3] > 0 then redis.call('HSET', key, 'cached_tokens', item[3]) end
    if item[5] > 0 then redis.call('HINCRBY', key, 'reasoning_tokens', item[5]) end
  end
end
record(now, 'emit', 'lease_ms', ARGV[1], 'renewed', table.concat(renewed, ' '), 'tokens', table.concat(taken, ' '),
  'refused', table.concat(refused, ' '))
return refused
