-- An organization's quota keys, and the steps its three scripts share. Redis TIME is the only clock.
--
--   quota:{org}:admitted   zset   request id -> time admitted, for the last 60 s
--   quota:{org}:tokens     hash   the same ids -> tokens reserved, or used once settled
--   quota:{org}:sum        string sum of the hash
--   quota:{org}:running    zset   request id -> time at which it no longer counts as concurrent
--   quota:{org}:day:{n}    string tokens of UTC day n (days since 1970); lives 3 days
--   quota:{org}:month:{m}  string tokens of UTC month m (year * 12 + month); lives 40 days
--   reservation:{id}       hash   tokens, day, month of a request that is not settled; lives as long as the request may

local WINDOW_MS = 60000

local function quota_key(org, part) return 'quota:' .. org .. ':' .. part end

-- The calendar month of a day number (H. Hinnant, "chrono-compatible low-level date algorithms").
local function month_of(day)
  local z = day + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local month = mp < 10 and mp + 3 or mp - 9
  return (yoe + era * 400 + (month <= 2 and 1 or 0)) * 12 + month
end

local function forget_old(org, now)
  local admitted = quota_key(org, 'admitted')
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', admitted, '-inf', now - WINDOW_MS)) do
    local tokens = redis.call('HGET', quota_key(org, 'tokens'), id)
    redis.call('HDEL', quota_key(org, 'tokens'), id)
    if tokens then redis.call('DECRBY', quota_key(org, 'sum'), tokens) end
    redis.call('ZREM', admitted, id)
  end
  redis.call('ZREMRANGEBYSCORE', quota_key(org, 'running'), '-inf', now)
  for _, part in ipairs({ 'admitted', 'tokens', 'sum' }) do redis.call('PEXPIRE', quota_key(org, part), 2 * WINDOW_MS) end
end

-- requests in the window, ms until it is empty, tokens in the window
local function window_state(org, now)
  local admitted = quota_key(org, 'admitted')
  local count = redis.call('ZCARD', admitted)
  local newest = redis.call('ZREVRANGE', admitted, 0, 0)[1]
  local empty_in = newest and math.max(0, tonumber(redis.call('ZSCORE', admitted, newest)) + WINDOW_MS - now) or 0
  return count, empty_in, tonumber(redis.call('GET', quota_key(org, 'sum')) or 0)
end
