-- The queue's keys, and the steps that several transitions share. Every transition runs on Redis TIME.
--
--   lanes               set    models that have ever queued
--   lane:{model}        zset   waiting: "{arrival, 16 digits}:{id}" by score; the smallest is next, ties by arrival
--   promote:{model}     zset   the same members by the time after which each goes to the front whatever its score
--   fair:{model}        hash   "V" -> virtual time; "F:{org}" -> finish tag of the organization's last request
--   request:{id}        hash   one request; `state` is waiting, running or finished
--   leases              zset   running ids by lease expiry
--   deadlines           zset   waiting and running ids by the time at which they expire
--   busy                hash   worker -> sequences leased to it
--   depth               hash   "waiting:{model}", "running:{model}", "work:{model}" (predicted ms), "org:{model}:{org}",
--                              "cause:{model}" (a copy of causes:{model}'s "now")
--   arrivals            string counter
--   flow:{model}        hash   "waiting:{class}", "leased:{class}" -> predicted ms that wait, and that were ever leased
--   pace:{model}        hash   "cost_ms", "ms", "n" -> of the latest ends while others waited, what they cost and took; "since"
--   causes:{model}      hash   cause -> ms for which the lane's head waited for it; "now" -> the cause since "since"
--   promises:{model}    zset   "{number, 16 digits}:{org}" of each refused request, by the time it was told to come back at
--   promised:{model}    hash   org -> how many of those are still to come
--   refusals            string counter
--   affinity:{hash}     set    workers that lately took a prompt with this beginning; lapses
--   events:{id}         stream what the client sees; entry n has id n-0; lives `events_ttl_ms` past the end
--   ledger              stream one entry a request that ended or was refused, for apps.metrics
--   log                 stream every transition: its inputs, what was decided, and `at`, the server's time; the latest 100,000
--   log:n               string number of the latest entry, which the entry carries: a hole or a flush shows
--
-- Sums are made here, in doubles, and never by HINCRBYFLOAT, whose width is the machine's: a replay anywhere gets the same bits.
-- Channels: `wake` (a lane has work), `abort` (an id whose engine work is void), `events:{id}` ("n payload").

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function number(value) return string.format('%.17g', value) end

-- Appends one transition to the log. Takes field, value, ... after the name.
local function record(now, op, ...)
  return redis.call('XADD', 'log', 'MAXLEN', '~', 100000, '*', 'n', redis.call('INCR', 'log:n'), 'op', op, 'at', number(now), ...)
end

local function add(key, field, amount)
  redis.call('HSET', key, field, number(tonumber(redis.call('HGET', key, field) or 0) + amount))
end

local function count(field) return tonumber(redis.call('HGET', 'depth', field) or 0) end

local function fields(key)
  local flat, map = redis.call('HGETALL', key), {}
  if flat.map then return flat.map end
  for i = 1, #flat, 2 do map[flat[i]] = flat[i + 1] end
  return map
end

-- Appends one event and tells whoever listens.
local function append_event(id, payload)
  local n = redis.call('HINCRBY', 'request:' .. id, 'events', 1)
  redis.call('XADD', 'events:' .. id, n .. '-0', 'e', payload)
  redis.call('PUBLISH', 'events:' .. id, n .. ' ' .. payload)
end

-- Why a lane's head waits is known to the dispatchers, who say it with explain.lua. Milliseconds by cause up to now.
local CAUSES = { 'dispatch', 'capacity', 'batch_window', 'model_load', 'mode_switch', 'no_worker' }
local function lane_causes(lane, now)
  local stored, spent = fields('causes:' .. lane), {}
  for _, cause in ipairs(CAUSES) do spent[cause] = tonumber(stored[cause] or 0) end
  local current = stored.now or 'dispatch'
  spent[current] = spent[current] + math.max(0, now - tonumber(stored.since or now))
  return spent, current
end

local function set_cause(lane, now, cause)
  local spent, current = lane_causes(lane, now)
  redis.call('HSET', 'causes:' .. lane, current, spent[current], 'now', cause, 'since', number(now))
  redis.call('HSET', 'depth', 'cause:' .. lane, cause)
end

-- Predicted ms that wait and that were leased, in all and of classes above one.
local function lane_flow(lane, priority)
  local flow, f = fields('flow:' .. lane), { waiting = 0, waiting_above = 0, leased = 0, leased_above = 0 }
  for class = 0, 2 do
    local waiting, leased = tonumber(flow['waiting:' .. class] or 0), tonumber(flow['leased:' .. class] or 0)
    f.waiting, f.leased = f.waiting + waiting, f.leased + leased
    if class > priority then f.waiting_above, f.leased_above = f.waiting_above + waiting, f.leased_above + leased end
  end
  return f
end

-- Where the time in the queue went, in whole ms that add up to it. What the lane spent in each cause is measured; the time
-- that every worker was busy is shared out by the work that went ahead: what came before is capacity, what came later and
-- yet went first is priority (a higher class) or fairness (an organization that had had less).
local function waited(r, now)
  local base, spent, flow = cjson.decode(r.base), lane_causes(r.lane, now), lane_flow(r.lane, tonumber(r.priority))
  local wait, unknown = {}, now - tonumber(r.arrived_ms)
  for _, cause in ipairs(CAUSES) do
    local ms = math.max(0, math.min(unknown, spent[cause] - base[cause]))
    if ms > 0 then wait[cause] = ms end
    unknown = unknown - ms
  end
  if unknown > 0 then wait.retry = unknown end -- before a flush, which took the lane's record with it
  local ahead = flow.leased - base.leased
  local overtook = math.max(0, ahead - base.waiting)
  local above = math.min(overtook, math.max(0, flow.leased_above - base.leased_above - base.waiting_above))
  if wait.capacity and overtook > 0 then
    local priority = math.floor(wait.capacity * above / ahead)
    local fairness = math.floor(wait.capacity * (overtook - above) / ahead)
    wait.capacity = wait.capacity - priority - fairness
    if priority > 0 then wait.priority = priority end
    if fairness > 0 then wait.fairness = fairness end
  end
  return wait
end

-- The entry of the lane that is next: whose wait is over its class's bound, else the smallest score.
local function next_member(lane, now)
  return redis.call('ZRANGEBYSCORE', 'promote:' .. lane, '-inf', number(now), 'LIMIT', 0, 1)[1]
    or redis.call('ZRANGE', 'lane:' .. lane, 0, 0)[1]
end

local function leave_lane(r)
  redis.call('ZREM', 'lane:' .. r.lane, r.member)
  redis.call('ZREM', 'promote:' .. r.lane, r.member)
  redis.call('HINCRBY', 'depth', 'waiting:' .. r.lane, -1)
  redis.call('HINCRBY', 'depth', 'org:' .. r.lane .. ':' .. r.org, -1)
  add('flow:' .. r.lane, 'waiting:' .. r.priority, -tonumber(r.cost_ms))
end

local function leave_worker(id, r)
  redis.call('ZREM', 'leases', id)
  redis.call('HINCRBY', 'busy', r.worker, -r.choices)
  redis.call('HINCRBY', 'depth', 'running:' .. r.lane, -1)
end

-- Adds to the lane's work. An empty lane has none: rounding must not pile up over millions of requests.
local function spend(lane, cost)
  if count('waiting:' .. lane) > 0 or count('running:' .. lane) > 0 then
    add('depth', 'work:' .. lane, cost)
  else
    redis.call('HSET', 'depth', 'work:' .. lane, 0)
  end
end

-- Into the lane at the score and arrival it has always had.
local function join_lane(r)
  redis.call('ZADD', 'lane:' .. r.lane, r.score, r.member)
  redis.call('ZADD', 'promote:' .. r.lane, r.promote_ms, r.member)
  redis.call('HINCRBY', 'depth', 'waiting:' .. r.lane, 1)
  redis.call('HINCRBY', 'depth', 'org:' .. r.lane .. ':' .. r.org, 1)
  add('flow:' .. r.lane, 'waiting:' .. r.priority, tonumber(r.cost_ms))
end

-- Puts a new request into the queue; `r` has every field but those made here.
local function admit(id, r, due)
  if count('waiting:' .. r.lane) == 0 then set_cause(r.lane, tonumber(r.arrived_ms), 'dispatch') end
  local base, flow = lane_causes(r.lane, tonumber(r.arrived_ms)), lane_flow(r.lane, tonumber(r.priority))
  for name, value in pairs(flow) do base[name] = value end
  r.state, r.base = 'waiting', cjson.encode(base)
  local flat = {}
  for field, value in pairs(r) do flat[#flat + 1], flat[#flat + 2] = field, value end
  redis.call('HSET', 'request:' .. id, unpack(flat))
  redis.call('ZADD', 'deadlines', due, id)
  redis.call('SADD', 'lanes', r.lane)
  join_lane(r)
  spend(r.lane, tonumber(r.cost_ms))
  redis.call('PUBLISH', 'wake', r.lane)
end
