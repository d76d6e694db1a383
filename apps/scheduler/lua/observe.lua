-- Learns what one finished request cost. Older ones count less by a hundredth each time: the last few hundred decide.
-- KEYS: none declared; writes `cost:{model}|{worker class}`, a hash of decayed sums, and `costs`, the set of those names.
-- ARGV: model|class, prompt tokens computed, tokens generated, GPU-ms, GPU-ms predicted by the model of before (0: none)
local key, x, z, y, predicted = 'cost:' .. ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local s = fields(key)
local function learn(name, value) s[name] = number(tonumber(s[name] or 0) * 0.99 + value) end
-- Weighted by 1/y^2: what counts is how far off a prediction is in proportion.
local w = 1 / math.max(1, y) ^ 2
local q = x * z
learn('n', 1)
learn('xx', w * x * x)
learn('xz', w * x * z)
learn('zz', w * z * z)
learn('1x', w * x)
learn('1z', w * z)
learn('11', w)
learn('qx', w * q * x)
learn('qz', w * q * z)
learn('1q', w * q)
learn('qq', w * q * q)
learn('xy', w * x * y)
learn('zy', w * z * y)
learn('1y', w * y)
learn('qy', w * q * y)
if predicted > 0 then
  learn('predictions', 1)
  learn('error', math.abs(predicted - y) / math.max(1, y))
  local ratio = math.log(math.max(1, y) / predicted)
  learn('spread', ratio * ratio)
end
local flat = {}
for name, value in pairs(s) do flat[#flat + 1], flat[#flat + 2] = name, value end
redis.call('HSET', key, unpack(flat))
redis.call('SADD', 'costs', ARGV[1])
return 1
