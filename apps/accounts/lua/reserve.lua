-- (after window.lua) Reserves one request and its tokens, or says which limit stands against it. One id reserves once.
-- ARGV: org, id, tokens, ttl_ms, then the limits (-1: none) requests/minute, tokens/minute, concurrent, tokens/day,
--       tokens/month, then seed_day, seed_tokens_day, seed_tokens_month (seed_day -1: not known yet)
-- Returns {verdict, requests in window, ms until the window is empty, tokens in window, ms until a retry may succeed, day};
--   verdict: reserved, seed (call again with the day's and month's tokens so far), requests, tokens, concurrent, day, month
local org, id, tokens = ARGV[1], ARGV[2], tonumber(ARGV[3])
local limit = {}
for i, name in ipairs({ 'requests', 'tokens', 'concurrent', 'day', 'month' }) do
  local value = tonumber(ARGV[4 + i])
  if value >= 0 then limit[name] = value end
end
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local day = math.floor(t[1] / 86400)
local month = month_of(day)
forget_old(org, now)
local count, empty_in, sum = window_state(org, now)
local function answer(verdict, retry_ms) return { verdict, count, empty_in, sum, math.floor(retry_ms), day } end

if redis.call('EXISTS', 'reservation:' .. id) == 1 then return answer('reserved', 0) end

local day_key, month_key = quota_key(org, 'day:' .. day), quota_key(org, 'month:' .. month)
if limit.day or limit.month then
  if redis.call('EXISTS', day_key) == 0 or redis.call('EXISTS', month_key) == 0 then
    if tonumber(ARGV[10]) ~= day then return answer('seed', 0) end
    redis.call('SET', day_key, ARGV[11], 'NX', 'EX', 3 * 86400)
    redis.call('SET', month_key, ARGV[12], 'NX', 'EX', 40 * 86400)
  end
end

local function time_of(index)
  local entry = redis.call('ZRANGE', quota_key(org, 'admitted'), index, index)[1]
  return tonumber(redis.call('ZSCORE', quota_key(org, 'admitted'), entry))
end
if limit.requests and count + 1 > limit.requests then
  local retry = limit.requests > 0 and time_of(count - limit.requests) + WINDOW_MS - now or WINDOW_MS
  return answer('requests', retry)
end
if limit.tokens and sum + tokens > limit.tokens then
  local retry, freed = WINDOW_MS, 0
  for _, old in ipairs(redis.call('ZRANGE', quota_key(org, 'admitted'), 0, -1)) do
    freed = freed + tonumber(redis.call('HGET', quota_key(org, 'tokens'), old) or 0)
    if sum - freed + tokens <= limit.tokens then
      retry = tonumber(redis.call('ZSCORE', quota_key(org, 'admitted'), old)) + WINDOW_MS - now
      break
    end
  end
  return answer('tokens', retry)
end
if limit.concurrent and redis.call('ZCARD', quota_key(org, 'running')) + 1 > limit.concurrent then
  return answer('concurrent', 1000)
end
if limit.day and tonumber(redis.call('GET', day_key)) + tokens > limit.day then return answer('day', WINDOW_MS) end
if limit.month and tonumber(redis.call('GET', month_key)) + tokens > limit.month then return answer('month', WINDOW_MS) end

redis.call('ZADD', quota_key(org, 'admitted'), now, id)
redis.call('HSET', quota_key(org, 'tokens'), id, tokens)
redis.call('INCRBY', quota_key(org, 'sum'), tokens)
redis.call('ZADD', quota_key(org, 'running'), now + tonumber(ARGV[4]), id)
for _, key in ipairs({ day_key, month_key }) do
  if redis.call('EXISTS', key) == 1 then redis.call('INCRBY', key, tokens) end
end
redis.call('HSET', 'reservation:' .. id, 'tokens', tokens, 'day', day, 'month', month)
redis.call('PEXPIRE', 'reservation:' .. id, ARGV[4])
redis.call('PEXPIRE', quota_key(org, 'running'), 86400000)
for _, part in ipairs({ 'admitted', 'tokens', 'sum' }) do redis.call('PEXPIRE', quota_key(org, part), 2 * WINDOW_MS) end
count, empty_in, sum = window_state(org, now)
return answer('reserved', 0)
