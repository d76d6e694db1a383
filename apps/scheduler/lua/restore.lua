-- Puts a request that Redis has lost back at its old place, with what its client has seen of it. Does nothing when it is there.
-- ARGV: those of enqueue.lua, then arrival, start, virtual time, time of arrival, generation, JSON list of event payloads,
--       JSON object of choice -> tokens seen
-- Attempts go on at generation * 1000: one of before the loss can write nothing. Returns 1 when this call restored it.
local id, lane, org = ARGV[1], ARGV[2], ARGV[3]
if redis.call('EXISTS', 'request:' .. id) == 1 then return 0 end
local now, fair, arrived = now_ms(), 'fair:' .. lane, tonumber(ARGV[27])
local cost = tonumber(ARGV[8]) + tonumber(ARGV[9]) * tonumber(ARGV[10])
local start, weight = tonumber(ARGV[25]), tonumber(ARGV[11])
local function at_least(key, field, value)
  redis.call('HSET', key, field, number(math.max(value, tonumber(redis.call('HGET', key, field) or 0))))
end
at_least(fair, 'V', tonumber(ARGV[26]))
at_least(fair, 'F:' .. org, start + cost / weight)
redis.call('SET', 'arrivals', number(math.max(tonumber(ARGV[24]), tonumber(redis.call('GET', 'arrivals') or 0))))
local payloads, seen = cjson.decode(ARGV[29]), cjson.decode(ARGV[30])
local due = tonumber(ARGV[14])
if #payloads == 0 then due = math.min(due, tonumber(ARGV[13])) end
local r = {
  lane = lane, org = org, key = ARGV[4], payload = ARGV[5], choices = ARGV[6], prompt_tokens = ARGV[7],
  fixed_cost_ms = ARGV[8], token_cost_ms = ARGV[9], tokens = ARGV[10], cost_ms = number(cost), weight = ARGV[11],
  arrival = ARGV[24], member = string.format('%016d:%s', tonumber(ARGV[24]), id), score = number(start - tonumber(ARGV[12])),
  start = ARGV[25], promote_ms = number(arrived + tonumber(ARGV[15])), attempt = tonumber(ARGV[28]) * 1000,
  events = #payloads, arrived_ms = ARGV[27], deadline_ms = number(arrived + tonumber(ARGV[14])), priority = ARGV[20],
  stream = ARGV[21], image_tokens = ARGV[22], affinity = ARGV[23],
}
for n, payload in ipairs(payloads) do redis.call('XADD', 'events:' .. id, n .. '-0', 'e', payload) end
for choice, tokens in pairs(seen) do r['next:' .. choice] = tokens end
record(now, 'restore', 'id', id, 'lane', lane, 'org', org, 'choices', ARGV[6], 'fixed_ms', ARGV[8], 'token_ms', ARGV[9],
  'tokens', ARGV[10], 'weight', ARGV[11], 'boost_ms', ARGV[12], 'queue_timeout_ms', ARGV[13], 'total_timeout_ms', ARGV[14],
  'max_wait_ms', ARGV[15], 'priority', ARGV[20], 'arrival', ARGV[24], 'start', ARGV[25], 'virtual', ARGV[26],
  'arrived_ms', ARGV[27], 'attempt', r.attempt, 'seen', #payloads, 'score', r.score)
admit(id, r, number(arrived + due))
return 1
