-- Admits one request to its lane, or says which bound it would break. Sending the same id twice admits it once.
-- ARGV: id, lane, org, key_id, payload, choices, prompt_tokens, fixed_cost_ms, token_cost_ms, expected_tokens, weight, boost_ms,
--       queue_timeout_ms, total_timeout_ms, max_wait_ms, lane_cap, org_cap, drain_cap_ms, pace, priority, stream,
--       image_tokens, affinity (hashes of the prompt's beginnings, the shortest first)
-- Returns {"admitted" | "lane_full" | "org_full" | "drain", ms after which another try would be admitted,
--   and of an admitted one its place, for restore.lua: arrival, start, virtual time, time}
local id, lane, org = ARGV[1], ARGV[2], ARGV[3]
local key, now = 'request:' .. id, now_ms()
local pace = tonumber(ARGV[19])
local work = math.max(0, count('work:' .. lane))
local drain = math.floor(work / pace)
local fair = 'fair:' .. lane
local virtual = tonumber(redis.call('HGET', fair, 'V') or 0)
local known = redis.call('HMGET', key, 'arrival', 'start', 'arrived_ms')
if known[1] then return { 'admitted', 0, known[1], known[2], number(virtual), known[3] } end

local function decided(verdict, arrival, score)
  record(now, 'enqueue', 'id', id, 'lane', lane, 'org', org, 'choices', ARGV[6], 'fixed_ms', ARGV[8], 'token_ms', ARGV[9],
    'tokens', ARGV[10], 'weight', ARGV[11], 'boost_ms', ARGV[12], 'queue_timeout_ms', ARGV[13], 'total_timeout_ms', ARGV[14],
    'max_wait_ms', ARGV[15], 'lane_cap', ARGV[16], 'org_cap', ARGV[17], 'drain_cap_ms', ARGV[18], 'pace', ARGV[19],
    'priority', ARGV[20], 'verdict', verdict, 'drain_ms', drain, 'arrival', arrival, 'score', score)
end

-- Each refused request is told of a place of its own. They are let in as fairly as the queue is: before an organization's
-- k-th come at most k of each other's, so that one which floods delays mostly itself.
local function refuse(verdict, first_ms)
  decided(verdict, 0, 0)
  local places, counts, ahead = 'promises:' .. lane, 'promised:' .. lane, 1
  for _, place in ipairs(redis.call('ZRANGEBYSCORE', places, '-inf', number(now))) do
    redis.call('ZREM', places, place)
    local whose = string.sub(place, 18)
    if redis.call('HINCRBY', counts, whose, -1) <= 0 then redis.call('HDEL', counts, whose) end
  end
  local promised = fields(counts)
  local mine = tonumber(promised[org] or 0)
  for whose, pending in pairs(promised) do
    ahead = ahead + (whose == org and mine or math.min(tonumber(pending), mine + 1))
  end
  local each = work / pace / math.max(1, count('waiting:' .. lane) + count('running:' .. lane))
  local ms = math.floor(math.min(60000, first_ms + each * ahead))
  local place = string.format('%016d:%s', redis.call('INCR', 'refusals'), org)
  redis.call('ZADD', places, number(now + ms), place)
  redis.call('HINCRBY', counts, org, 1)
  return { verdict, ms }
end
local waiting, own = count('waiting:' .. lane), count('org:' .. lane .. ':' .. org)
if waiting >= tonumber(ARGV[16]) then return refuse('lane_full', 0) end
if own >= tonumber(ARGV[17]) then return refuse('org_full', 0) end
if drain >= tonumber(ARGV[18]) then return refuse('drain', drain - tonumber(ARGV[18])) end

local cost = tonumber(ARGV[8]) + tonumber(ARGV[9]) * tonumber(ARGV[10])
local start = math.max(virtual, tonumber(redis.call('HGET', fair, 'F:' .. org) or 0))
local arrival = redis.call('INCR', 'arrivals')
local score = number(start - tonumber(ARGV[12]))
redis.call('HSET', fair, 'F:' .. org, number(start + cost / tonumber(ARGV[11])))
admit(id, {
  lane = lane, org = org, key = ARGV[4], payload = ARGV[5], choices = ARGV[6], prompt_tokens = ARGV[7],
  fixed_cost_ms = ARGV[8], token_cost_ms = ARGV[9], tokens = ARGV[10], cost_ms = number(cost), weight = ARGV[11],
  arrival = arrival, member = string.format('%016d:%s', arrival, id), score = score, start = number(start),
  promote_ms = number(now + tonumber(ARGV[15])), attempt = 0, events = 0, arrived_ms = number(now),
  deadline_ms = number(now + tonumber(ARGV[14])), priority = ARGV[20], stream = ARGV[21],
  image_tokens = ARGV[22], affinity = ARGV[23],
}, number(now + math.min(tonumber(ARGV[13]), tonumber(ARGV[14]))))
decided('admitted', arrival, score)
return { 'admitted', 0, tostring(arrival), number(start), number(virtual), number(now) }
