-- The next requests of a lane in the order they will be leased, read only. ARGV: lane, count
-- Returns a list of {id, choices, prompt tokens, expected tokens, JSON of worker -> how many of the prompt's beginnings it took}
local lane, count, now = ARGV[1], tonumber(ARGV[2]), now_ms()
local members, seen, found = redis.call('ZRANGEBYSCORE', 'promote:' .. lane, '-inf', number(now), 'LIMIT', 0, count), {}, {}
for _, member in ipairs(members) do seen[member] = true end
for _, member in ipairs(redis.call('ZRANGE', 'lane:' .. lane, 0, count - 1)) do
  if not seen[member] then members[#members + 1] = member end
end
for place = 1, math.min(count, #members) do
  local id = string.sub(members[place], 18)
  local r = redis.call('HMGET', 'request:' .. id, 'choices', 'prompt_tokens', 'tokens', 'affinity')
  if not r[1] then break end -- an entry that no request stands behind: a lease will put it aside
  local taken, depth = {}, 0
  for hash in string.gmatch(r[4] or '', '%S+') do
    depth = depth + 1
    local workers = redis.call('SMEMBERS', 'affinity:' .. hash)
    if #workers == 0 then break end
    for _, worker in ipairs(workers) do taken[worker] = depth end
  end
  found[#found + 1] = { id, r[1], r[2], r[3], depth > 0 and cjson.encode(taken) or '{}' }
end
return found
