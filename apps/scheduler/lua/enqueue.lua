-- Admits one request to its lane, or says which bound it would break. Sending the same id twice admits it once.
-- ARGV: id, lane, org, key_id, payload, choices, prompt_tokens, fixed_cost_ms, token_cost_ms, expected_tokens, weight, boost_ms,
--       queue_timeout_ms, total_timeout_ms, max_wait_ms, lane_cap, org_cap, drain_cap_ms, workers, priority, stream
-- Returns {"admitted" | "lane_full" | "org_full" | "drain", predicted drain in ms}
local id, lane, org = ARGV[1], ARGV[2], ARGV[3]
local key = 'request:' .. id
local workers = math.max(1, tonumber(ARGV[19]))
local work = tonumber(redis.call('HGET', 'depth', 'work:' .. lane) or 0)
local drain = math.floor(math.max(0, work) / workers)
if redis.call('EXISTS', key) == 1 then return { 'admitted', drain } end
if tonumber(redis.call('HGET', 'depth', 'waiting:' .. lane) or 0) >= tonumber(ARGV[16]) then return { 'lane_full', drain } end
if tonumber(redis.call('HGET', 'depth', 'org:' .. lane .. ':' .. org) or 0) >= tonumber(ARGV[17]) then return { 'org_full', drain } end
if drain >= tonumber(ARGV[18]) then return { 'drain', drain } end

local now = now_ms()
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
  'choices', ARGV[6], 'prompt_tokens', ARGV[7], 'fixed_cost_ms', ARGV[8], 'token_cost_ms', ARGV[9], 'cost_ms', number(cost),
  'weight', ARGV[11], 'member', r.member, 'score', r.score, 'start', number(start), 'promote_ms', r.promote_ms,
  'attempt', 0, 'events', 0, 'arrived_ms', number(now), 'deadline_ms', number(now + tonumber(ARGV[14])),
  'priority', ARGV[20], 'stream', ARGV[21])
redis.call('ZADD', 'deadlines', number(now + math.min(tonumber(ARGV[13]), tonumber(ARGV[14]))), id)
redis.call('SADD', 'lanes', lane)
redis.call('HINCRBYFLOAT', 'depth', 'work:' .. lane, number(cost))
join_lane(r)
redis.call('PUBLISH', 'wake', lane)
return { 'admitted', drain }
