-- (library, after window.lua) Charges what a request used and gives the rest of its reservation back. Takes effect once.
local function settle_quota(org, id, tokens, now)
  local reservation = redis.call('HMGET', 'reservation:' .. id, 'tokens', 'day', 'month')
  redis.call('DEL', 'reservation:' .. id)
  redis.call('ZREM', 'quota:' .. org .. ':running', id)
  if not reservation[1] then return end
  local correction = tokens - tonumber(reservation[1])
  if redis.call('HEXISTS', 'quota:' .. org .. ':tokens', id) == 1 then
    redis.call('HINCRBY', 'quota:' .. org .. ':tokens', id, correction)
    redis.call('INCRBY', 'quota:' .. org .. ':sum', correction)
  end
  for _, key in ipairs({ 'quota:' .. org .. ':day:' .. reservation[2], 'quota:' .. org .. ':month:' .. reservation[3] }) do
    if redis.call('EXISTS', key) == 1 then redis.call('INCRBY', key, correction) end
  end
end
