"""What the ledger says of one request, checked before anyone counts it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

Count = Annotated[int, Field(ge=0, le=2**32 - 1)]


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One request that ended or was refused; times are Redis server time in ms."""

    request_id: str
    org_id: str
    key_id: str
    model: str
    outcome: str
    code: str
    priority: Annotated[int, Field(ge=0, le=255)]
    stream: bool
    prompt_tokens: Count
    completion_tokens: Count
    cached_tokens: Count
    arrived_ms: Annotated[int, Field(ge=0)]
    finished_ms: Annotated[int, Field(ge=0)]
    queue_ms: Count
    ttft_ms: Count
    total_ms: Count
    attempts: Annotated[int, Field(ge=0, le=255)]
    worker_id: str

    @property
    def token_ms(self) -> float:
        """Mean time of an output token after the first (TPOT)."""
        if self.completion_tokens < 2 or not self.ttft_ms:
            return 0.0
        return (self.total_ms - self.ttft_ms) / (self.completion_tokens - 1)

    def row(self) -> list[Any]:
        """In the order of COLUMNS."""
        values = {name: getattr(self, name) for name in COLUMNS if hasattr(self, name)}
        values["arrived_at"] = datetime.fromtimestamp(self.arrived_ms / 1000, UTC)
        values["finished_at"] = datetime.fromtimestamp(self.finished_ms / 1000, UTC)
        return [values[name] for name in COLUMNS]


COLUMNS = (
    "request_id", "org_id", "key_id", "model", "outcome", "code", "priority", "stream", "prompt_tokens",
    "completion_tokens", "cached_tokens", "arrived_at", "finished_at", "queue_ms", "ttft_ms", "total_ms",
    "token_ms", "attempts", "worker_id",
)  # fmt: skip
_ENTRY = TypeAdapter(LedgerEntry)


def parse_entry(payload: str) -> LedgerEntry:
    """Raises ValueError for anything but an entry."""
    try:
        return _ENTRY.validate_json(payload)
    except ValidationError:
        raise ValueError("not a ledger entry") from None
