-- Admits one request to its lane, or says which bound it would break. Sending the same id twice admits it once.
-- ARGV: id, lane, org, key_id, payload, choices, prompt_tokens, fixed_cost_ms, token_cost_ms, expected_tokens, weight, boost_ms,
--       queue_timeout_ms, total_timeout_ms, max_wait_ms, lane_cap, org_cap, drain_cap_ms, workers, priority, stream
-- Returns {"admitted" | "lane_full" | "org_full" | "drain", predicted drain in ms}
local id, lane, org = ARGV[1], ARGV[2], ARGV[3]
local key, now = 'request:' .. id, now_ms()
local workers = math.max(1, tonumber(ARGV[19]))
local drain = math.floor(math.max(0, count('work:' .. lane)) / workers)
if redis.call('EXISTS', key) == 1 then return { 'admitted', drain } end

local function decided(verdict, arrival, score)
  record(now, 'enqueue', 'id', id, 'lane', lane, 'org', org, 'choices', ARGV[6], 'fixed_ms', ARGV[8], 'token_ms', ARGV[9],
    'tokens', ARGV[10], 'weight', ARGV[11], 'boost_ms', ARGV[12], 'queue_timeout_ms', ARGV[13], 'total_timeout_ms', ARGV[14],
    'max_wait_ms', ARGV[15], 'lane_cap', ARGV[16], 'org_cap', ARGV[17], 'drain_cap_ms', ARGV[18], 'workers', ARGV[19],
    'priority', ARGV[20], 'verdict', verdict, 'drain_ms', drain, 'arrival', arrival, 'score', score)
  return { verdict, drain }
end
if count('waiting:' .. lane) >= tonumber(ARGV[16]) then return decided('lane_full', 0, 0) end
if count('org:' .. lane .. ':' .. org) >= tonumber(ARGV[17]) then return decided('org_full', 0, 0) end
if drain >= tonumber(ARGV[18]) then return decided('drain', 0, 0) end

local cost = tonumber(ARGV[8]) + tonumber(ARGV[9]) * tonumber(ARGV[10])
local fair = 'fair:' .. lane
local virtual = tonumber(redis.call('HGET', fair, 'V') or 0)
local start = math.max(virtual, tonumber(redis.call('HGET', fair, 'F:' .. org) or 0))
local arrival = redis.call('INCR', 'arrivals')
local r = {
  lane = lane, org = org, member = string.format('%016d:%s', arrival, id),
  score = number(start - tonumber(ARGV[12])), promote_ms = number(now + tonumber(ARGV[15])),
}
redis.call('HSET', fair, 'F:' .. org, number(start + cost / tonumber(ARGV[11])))
redis.call('HSET', key, 'state', 'waiting', 'lane', lane, 'org', org, 'key', ARGV[4], 'payload', ARGV[5],
  'choices', ARGV[6], 'prompt_tokens', ARGV[7], 'fixed_cost_ms', ARGV[8], 'token_cost_ms', ARGV[9], 'tokens', ARGV[10], 'cost_ms', number(cost),
  'weight', ARGV[11], 'member', r.member, 'score', r.score, 'start', number(start), 'promote_ms', r.promote_ms,
  'attempt', 0, 'events', 0, 'arrived_ms', number(now), 'deadline_ms', number(now + tonumber(ARGV[14])),
  'priority', ARGV[20], 'stream', ARGV[21])
redis.call('ZADD', 'deadlines', number(now + math.min(tonumber(ARGV[13]), tonumber(ARGV[14]))), id)
redis.call('SADD', 'lanes', lane)
join_lane(r)
spend(lane, cost)
redis.call('PUBLISH', 'wake', lane)
return decided('admitted', arrival, r.score)
