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
--   depth               hash   "waiting:{model}", "running:{model}", "work:{model}" (predicted ms), "org:{model}:{org}"
--   arrivals            string counter
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

local function leave_lane(r)
  redis.call('ZREM', 'lane:' .. r.lane, r.member)
  redis.call('ZREM', 'promote:' .. r.lane, r.member)
  redis.call('HINCRBY', 'depth', 'waiting:' .. r.lane, -1)
  redis.call('HINCRBY', 'depth', 'org:' .. r.lane .. ':' .. r.org, -1)
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
end
