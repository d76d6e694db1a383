-- Measures how much predicted work a backlogged lane gets done a millisecond: more than one a worker, which batches.
-- Decayed sums over its latest twenty or so ends.
local function keep_pace(lane, cost_ms, now)
  local key = 'pace:' .. lane
  local p = fields(key)
  if count('waiting:' .. lane) == 0 then return redis.call('HDEL', key, 'since') end
  if p.since then
    redis.call('HSET', key, 'cost_ms', number(0.95 * tonumber(p.cost_ms or 0) + cost_ms),
      'ms', number(0.95 * tonumber(p.ms or 0) + now - tonumber(p.since)), 'n', tonumber(p.n or 0) + 1)
  end
  redis.call('HSET', key, 'since', number(now))
end

-- The one way a request ends (needs common.lua and accounts' settle.lua): settles quota, corrects the fair share by the true
-- cost, frees the lane or the worker, writes the terminal event and the ledger entry. Takes effect once.
local function end_request(id, r, outcome, code, message, events_ttl_ms, now)
  local key, generated = 'request:' .. id, 0
  for field, value in pairs(r) do
    if string.sub(field, 1, 5) == 'next:' then generated = generated + tonumber(value) end
  end
  local attempts = tonumber(r.attempt) % 1000
  local started = attempts > 0 or generated > 0
  local prompt = started and tonumber(r.prompt_tokens) or 0
  local usage = {
    prompt_tokens = prompt, completion_tokens = generated, cached_tokens = tonumber(r.cached_tokens or 0),
    reasoning_tokens = tonumber(r.reasoning_tokens or 0), image_tokens = started and tonumber(r.image_tokens or 0) or 0,
  }
  local wait = r.wait and cjson.decode(r.wait) or waited(r, now)
  if r.state == 'waiting' then
    leave_lane(r)
  else
    leave_worker(id, r)
    redis.call('PUBLISH', 'abort', id .. ' ' .. r.attempt)
  end
  redis.call('ZREM', 'deadlines', id)
  spend(r.lane, -tonumber(r.cost_ms))
  if outcome == 'succeeded' then keep_pace(r.lane, tonumber(r.cost_ms), now) end
  local true_cost = started and (tonumber(r.fixed_cost_ms) + tonumber(r.token_cost_ms) * generated) or 0
  if redis.call('HEXISTS', 'fair:' .. r.lane, 'F:' .. r.org) == 1 then
    local correction = (true_cost - tonumber(r.cost_ms)) / tonumber(r.weight)
    add('fair:' .. r.lane, 'F:' .. r.org, correction)
  end
  settle_quota(r.org, id, usage.prompt_tokens + usage.completion_tokens, now)

  local arrived = tonumber(r.arrived_ms)
  local timing = { queue_ms = tonumber(r.leased_ms or now) - arrived, total_ms = now - arrived }
  if r.first_token_ms then
    timing.ttft_ms = tonumber(r.first_token_ms) - arrived
    wait.prefill = tonumber(r.first_token_ms) - tonumber(r.prefill_from_ms)
    local again = timing.ttft_ms - timing.queue_ms - wait.prefill
    if again > 0 then wait.retry = (wait.retry or 0) + again end
  end
  append_event(id, 'f' .. cjson.encode({
    outcome = outcome, usage = usage, error_code = code, error_message = message, timing = timing, wait = wait,
  }))
  redis.call('XADD', 'ledger', 'MAXLEN', '~', 1000000, '*', 'entry', cjson.encode({
    request_id = id, org_id = r.org, key_id = r.key, model = r.lane, outcome = outcome, code = code,
    priority = tonumber(r.priority), stream = r.stream == '1', prompt_tokens = usage.prompt_tokens,
    completion_tokens = usage.completion_tokens, cached_tokens = usage.cached_tokens, arrived_ms = arrived,
    finished_ms = now, queue_ms = timing.queue_ms, ttft_ms = timing.ttft_ms or 0, total_ms = timing.total_ms,
    attempts = attempts, worker_id = r.worker or '', wait = wait,
  }))
  record(now, 'end', 'id', id, 'attempt', r.attempt, 'outcome', outcome, 'code', code, 'generated', generated,
    'tag', redis.call('HGET', 'fair:' .. r.lane, 'F:' .. r.org) or '')
  redis.call('HSET', key, 'state', 'finished', 'outcome', outcome, 'code', code, 'finished_ms', number(now),
    'wait', cjson.encode(wait), 'generated', generated)
  redis.call('HDEL', key, 'payload')
  redis.call('PEXPIRE', key, events_ttl_ms)
  redis.call('PEXPIRE', 'events:' .. id, events_ttl_ms)
end
