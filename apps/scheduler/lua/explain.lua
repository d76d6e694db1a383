-- Says why a lane's head waits from now on. ARGV: lane, cause (one of common.lua's CAUSES)
set_cause(ARGV[1], now_ms(), ARGV[2])
return 1
