-- Learns what one finished request cost. Older ones count less by a hundredth each time: the last few hundred decide.
-- KEYS: none declared; writes `cost:{model}|{worker class}`, a hash of decayed sums, and `costs`, the set of those names.
-- ARGV: model|class, prompt tokens computed, tokens generated, GPU-ms, GPU-ms predicted by the model of before (0: none)
local key, x, z, y, predicted = 'cost:' .. ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local s = fields(key)
local function learn(name, value) s[name] = number(tonumber(s[name] or 0) * 0.99 + value) end
-- Weighted by 1/y: a long request must not drown the short ones.
local w = 1 / math.max(1, y)
learn('n', 1)
learn('xx', w * x * x)
learn('xz', w * x * z)
learn('zz', w * z * z)
learn('xy', w * x * y)
learn('zy', w * z * y)
if predicted > 0 then
  learn('predictions', 1)
  learn('error', math.abs(predicted - y) / math.max(1, y))
  local ratio = math.log(math.max(1, y) / predicted)
  learn('spread', ratio * ratio)
end
redis.call('HSET', key, 'n', s.n, 'xx', s.xx, 'xz', s.xz, 'zz', s.zz, 'xy', s.xy, 'zy', s.zy,
  'predictions', s.predictions or 0, 'error', s.error or 0, 'spread', s.spread or 0)
redis.call('SADD', 'costs', ARGV[1])
return 1
