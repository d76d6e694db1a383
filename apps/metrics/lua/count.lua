-- Adds the increments of ledger entries to the counters, each entry once.
-- KEYS: counters (hash), position (string "ms-seq" of the last entry counted). ARGV: JSON [[ledger id, {field: increment}], ...]
local function split(id)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(seq)
end
local last_ms, last_seq = split(redis.call('GET', KEYS[2]) or '0-0')
for _, row in ipairs(cjson.decode(ARGV[1])) do
  local ms, seq = split(row[1])
  if ms > last_ms or (ms == last_ms and seq > last_seq) then
    for field, increment in pairs(row[2]) do redis.call('HINCRBY', KEYS[1], field, increment) end
    last_ms, last_seq = ms, seq
  end
end
redis.call('SET', KEYS[2], string.format('%d-%d', last_ms, last_seq))
return 1
