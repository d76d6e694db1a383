-- Ends one request, waiting or running. ARGV: id, attempt (-1: whichever holds it), outcome, code, message, events_ttl_ms
-- Returns 1 when this call ended it; 0 when it had ended, is unknown, or the attempt is stale.
local r = fields('request:' .. ARGV[1])
if r.state ~= 'waiting' and r.state ~= 'running' then return 0 end
if ARGV[2] ~= '-1' and (r.state ~= 'running' or r.attempt ~= ARGV[2]) then return 0 end
end_request(ARGV[1], r, ARGV[3], ARGV[4], ARGV[5], ARGV[6], now_ms())
return 1
