-- Appends the whole state to the log, so that a replay can begin here. No ARGV. Returns the entry's id.
-- Every number stays the string it is stored as: JSON numbers would lose bits.
local now = now_ms()
local state = { arrivals = redis.call('GET', 'arrivals') or '0', busy = fields('busy'), lanes = {}, requests = {} }
for _, lane in ipairs(redis.call('SMEMBERS', 'lanes')) do
  state.lanes[lane] = { work = redis.call('HGET', 'depth', 'work:' .. lane) or '0', fair = fields('fair:' .. lane) }
end
for _, id in ipairs(redis.call('ZRANGE', 'deadlines', 0, -1)) do
  local r = fields('request:' .. id)
  if r.state == 'waiting' or r.state == 'running' then
    r.payload, r.id, r.due, r.lease = nil, id, redis.call('ZSCORE', 'deadlines', id), redis.call('ZSCORE', 'leases', id)
    state.requests[#state.requests + 1] = r
  end
end
return record(now, 'checkpoint', 'state', cjson.encode(state))
