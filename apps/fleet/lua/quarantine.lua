-- Takes a damaged entry out of the live picture, unless its owner has written a new one since it was read.
-- KEYS: workers (hash), workers:quarantine (hash), quarantined (the counter of all that was put aside)
-- ARGV: field, the value that was read
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('INCR', KEYS[3])
return 1
