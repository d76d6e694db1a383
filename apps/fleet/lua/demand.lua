-- Notes in the hash KEYS[1] that a request found no worker for model ARGV[1]: "first last" in ms, of demand without a pause of
-- ARGV[2] ms.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local first, last = string.match(redis.call('HGET', KEYS[1], ARGV[1]) or '', '^(%d+) (%d+)$')
if not first or now - tonumber(last) > tonumber(ARGV[2]) then first = string.format('%d', now) end
redis.call('HSET', KEYS[1], ARGV[1], first .. ' ' .. string.format('%d', now))
