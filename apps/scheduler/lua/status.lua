-- Where a request stands, read only. ARGV: id
-- Returns nothing for an unknown id, else {JSON of its fields, JSON of where its wait went so far,
--   JSON of its lane: position (0 is next), waiting, waiting_ms, running_ms, the cause its head waits for}
local id, now = ARGV[1], now_ms()
local r = fields('request:' .. id)
if not r.state then return {} end
r.payload, r.now_ms = nil, number(now)
local lane, wait = {}, r.wait or '{}'
if r.state == 'waiting' then
  local flow = lane_flow(r.lane, 2)
  local _, cause = lane_causes(r.lane, now)
  lane = {
    position = redis.call('ZRANK', 'lane:' .. r.lane, r.member) or 0, waiting = count('waiting:' .. r.lane),
    waiting_ms = flow.waiting, running_ms = math.max(0, count('work:' .. r.lane) - flow.waiting), cause = cause,
  }
  if not r.wait then wait = cjson.encode(waited(r, now)) end
end
return { cjson.encode(r), wait, cjson.encode(lane) }
