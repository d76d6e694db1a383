-- (after settle.lua) Takes a reservation back as if the request had never come. ARGV: org, id
local org, id = ARGV[1], ARGV[2]
settle_quota(org, id, 0, 0)
local tokens = redis.call('HGET', 'quota:' .. org .. ':tokens', id)
if tokens then
  redis.call('DECRBY', 'quota:' .. org .. ':sum', tokens)
  redis.call('HDEL', 'quota:' .. org .. ':tokens', id)
end
redis.call('ZREM', 'quota:' .. org .. ':admitted', id)
return 1
