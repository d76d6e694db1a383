-- (after window.lua) An organization's use now. ARGV: org
-- Returns {requests in window, ms until it is empty, tokens in window, concurrent, tokens today, tokens this month (-1: unknown)}
local org = ARGV[1]
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local day = math.floor(t[1] / 86400)
forget_old(org, now)
local count, empty_in, sum = window_state(org, now)
return {
  count, empty_in, sum, redis.call('ZCARD', quota_key(org, 'running')),
  tonumber(redis.call('GET', quota_key(org, 'day:' .. day)) or -1),
  tonumber(redis.call('GET', quota_key(org, 'month:' .. month_of(day))) or -1),
}
