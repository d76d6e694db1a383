-- One row a request, accepted or refused. Durations are milliseconds; 0 where a phase was not reached.
-- A batch that is sent again carries the same deduplication token, and ClickHouse drops it.
CREATE TABLE IF NOT EXISTS requests
(
    request_id        String,
    org_id            LowCardinality(String),
    key_id            LowCardinality(String),
    model             LowCardinality(String),
    outcome           LowCardinality(String),
    code              LowCardinality(String),
    priority          UInt8,
    stream            Bool,
    prompt_tokens     UInt32,
    completion_tokens UInt32,
    cached_tokens     UInt32,
    arrived_at        DateTime64(3, 'UTC'),
    finished_at       DateTime64(3, 'UTC'),
    queue_ms          UInt32,
    ttft_ms           UInt32,
    total_ms          UInt32,
    token_ms          Float32,
    attempts          UInt8,
    worker_id         LowCardinality(String)
)
ENGINE = MergeTree
PARTITION BY toYYYYMM(finished_at)
ORDER BY (finished_at, model)
TTL toDateTime(finished_at) + INTERVAL 90 DAY
SETTINGS non_replicated_deduplication_window = 10000
