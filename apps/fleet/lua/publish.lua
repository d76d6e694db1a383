-- Sets ARGV[1] of the hash KEYS[1], the live workers, to the snapshot ARGV[2], seen at ARGV[3] ms, unless a daemon of a later
-- epoch than ARGV[4] spoke under this name within ARGV[5] ms. Returns 1 when it is set.
local row = redis.call('HGET', KEYS[1], ARGV[1])
local known, snapshot = false, nil
if row then known, snapshot = pcall(cjson.decode, row) end
if known and type(snapshot) == 'table' then
  local epoch, seen = tonumber(snapshot.epoch) or 0, tonumber(snapshot.seen_ms) or 0
  if epoch > tonumber(ARGV[4]) and math.abs(tonumber(ARGV[3]) - seen) <= tonumber(ARGV[5]) then return 0 end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
