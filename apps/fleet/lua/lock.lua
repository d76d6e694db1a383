-- Takes or keeps the lock KEYS[1] for ARGV[1] during ARGV[2] ms. Returns 1 when it is held.
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
