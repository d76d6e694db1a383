"""The engine's nouns. No tensors, no sockets."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from gpu_daemon.engine.picture import Picture

if TYPE_CHECKING:
    from gpu_daemon.engine.grammar import Grammar


class EngineKind(Enum):
    """How a model's sequences are batched."""

    CONTINUOUS = "continuous"
    STATIC = "static"


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a sequence's tokens are drawn. `top_logprobs` is None for no logprobs."""

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None
    ignore_eos: bool = False

    @property
    def plain_greedy(self) -> bool:
        """Nothing but the likeliest token is asked for."""
        return self.temperature == 0 and not (
            self.logit_bias or self.presence_penalty or self.frequency_penalty or self.top_logprobs is not None
        )


@dataclass(frozen=True, slots=True)
class Logprob:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request. `computed` of its tokens are in the KV cache; it must catch up with `len(tokens)`."""

    caller: int
    request_id: str
    attempt: int
    choice: int
    tokens: list[int]
    prompt_length: int
    sampling: Sampling
    salt: bytes = b""
    deadline: float = float("inf")  # on the engine's monotonic clock
    computed: int = 0
    cached: int = 0  # prompt tokens found in the cache when it was let in
    reported: bool = False  # whether a delta has told of `cached`
    # The KV cache's own: its blocks, the hashes of its full ones, and how many of those it has made known.
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    learned: int = 0
    grammar: Grammar | None = None  # None: anything may come next
    pictures: tuple[Picture, ...] = ()  # of the prompt, in order; those of one request's choices are the same

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def index(self) -> int:
        """The index of the next token among the generated ones."""
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of a sequence, from `computed` on, to run in one step. The last chunk of what is known samples."""

    sequence: Sequence
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def samples(self) -> bool:
        return self.end == len(self.sequence.tokens)

    @property
    def pictures(self) -> list[Picture]:
        """Those of which it has tokens."""
        return [picture for picture in self.sequence.pictures if picture.overlaps(self.start, self.end)]


@dataclass(frozen=True, slots=True)
class Sampled:
    token_id: int
    logprob: Logprob | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one choice."""

    caller: int
    request_id: str
    attempt: int
    choice: int
    first_index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    error: str = ""
    # Of a task: the units that the step did, and what came of them.
    units: int = 0
    media: bytes = b""
    mime: str = ""
    preview: bool = False


@dataclass(slots=True)
class Load:
    """What a model's engine is doing; the status stream reports it."""

    running: int = 0
    waiting: int = 0
    tokens_total: int = 0
    tokens_free: int = 0
    prefill_ms_per_token: float = 0.0
    decode_ms_per_token: float = 0.0
    forward_share: float = 0.0  # of the wall time between busy steps, inside the model's forward pass
    step: int = 0
    used_at: float = 0.0  # on the engine's monotonic clock, when a sequence last ran or waited
