"""The nouns that every app shares. Frozen, and importing nothing of the project.

Units are in the names: `_ms` milliseconds, `_tokens` counts. Times are Redis server time in milliseconds since the
epoch unless a name says otherwise, so that no two machines' clocks are ever compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Literal, TypeAlias


class FinishReason(StrEnum):
    """Why one choice ended. The first three are successes and reach the client by these names."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"  # a STOP after which the client is to act
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    FAILED = "failed"


class Outcome(StrEnum):
    """How one request ended. Every accepted request reaches exactly one; `REFUSED` never entered the queue."""

    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    FAILED = "failed"
    REFUSED = "refused"


class Priority(IntEnum):
    """Scheduling class, lowest first; `settings.ENV.classes` has the ClassLimits of each. Batches run as FLEX."""

    FLEX = 0
    DEFAULT = 1
    PRIORITY = 2


@dataclass(frozen=True, slots=True)
class ClassLimits:
    """What a scheduling class is promised, by Redis time."""

    boost_ms: float  # of service: how far ahead of its fair place it stands, which bounds how long lower classes wait
    max_wait_ms: int  # after this long in the queue a request goes to the front whatever its score
    queue_timeout_ms: int  # from enqueue to lease
    total_timeout_ms: int  # from enqueue to the end


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How each choice of a request is drawn. Already validated; `seed` is always set, so a replay draws the same."""

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None  # None: no logprobs; 0: the chosen token's only
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    grammar: str = ""  # Lark that every choice must follow; empty: anything


class Thought(StrEnum):
    """Where a choice's text stands with the model's reasoning, which is between <think> and </think>."""

    NONE = "none"
    EXPECTED = "expected"  # the text may begin with <think>
    BEGUN = "begun"  # the prompt ended with <think>


@dataclass(frozen=True, slots=True)
class OutputForm:
    """How a choice's text is to be read before a client sees it."""

    thought: Thought = Thought.NONE
    tool_calls: bool = False


# --- Work that is no text: counted in units, which are priced, charged and published as tokens are ---

PATCH_PIXELS = 16 * 16
WINDOW_SECONDS, WINDOW_UNITS, WINDOW_TOKENS = 25, 1500, 226  # what a transcriber hears at once at least, and its most units


@dataclass(frozen=True, slots=True)
class SpeechWork:
    """An output unit is a character."""

    text: str
    voice: str
    speed: float = 1.0
    kind: Literal["speech"] = "speech"

    input_units = 1

    @property
    def output_units(self) -> int:
        return len(self.text)


@dataclass(frozen=True, slots=True)
class EmbedWork:
    """The vector of each prompt: an output unit each, an input unit a token."""

    dimensions: int = 0  # 0: all
    kind: Literal["embed"] = "embed"

    input_units = 0  # those of the prompts
    output_units = 1


@dataclass(frozen=True, slots=True)
class TranscribeWork:
    """Of the request's only blob: 16 kHz, mono, s16le. An output unit is a token; how many there will be is a guess."""

    seconds: float
    language: str = "en"
    prompt_ids: tuple[int, ...] = ()
    timestamps: bool = False
    kind: Literal["transcribe"] = "transcribe"

    @property
    def input_units(self) -> int:
        return self.windows * WINDOW_UNITS

    @property
    def output_units(self) -> int:
        return WINDOW_TOKENS * self.windows

    @property
    def windows(self) -> int:
        return max(1, -(-int(self.seconds * 1000) // (WINDOW_SECONDS * 1000)))


@dataclass(frozen=True, slots=True)
class ImageWork:
    """An output unit is a patch in one denoising step, an input unit one that is decoded."""

    prompt: str
    width: int
    height: int
    steps: int
    guidance: float = 0.0
    previews: bool = False
    kind: Literal["image"] = "image"

    @property
    def input_units(self) -> int:
        return self.width * self.height // PATCH_PIXELS

    @property
    def output_units(self) -> int:
        return self.steps * self.input_units


@dataclass(frozen=True, slots=True)
class VideoWork:
    """As an image's, times the latent frames, of which each holds four of the video's."""

    prompt: str
    width: int
    height: int
    frames: int
    steps: int
    guidance: float = 6.0
    fps: int = 8
    kind: Literal["video"] = "video"

    @property
    def input_units(self) -> int:
        return ((self.frames - 1) // 4 + 1) * (self.width * self.height // PATCH_PIXELS)

    @property
    def output_units(self) -> int:
        return self.steps * self.input_units


Work: TypeAlias = SpeechWork | EmbedWork | TranscribeWork | ImageWork | VideoWork


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """One accepted unit of work: `len(prompts) * n` choices that finish, settle and are charged together.

    Choice `i` continues `prompts[i // n]`, or does `work`. `prompts` holds token ids, never text. `sampling.max_tokens` bounds
    a choice's output, in units where it is no text. `blobs` are the keys of what is too large for the queue: pictures of the
    prompt, in the order of their tokens in it, or audio.
    """

    id: str
    org_id: str
    key_id: str
    model: str
    prompts: tuple[tuple[int, ...], ...]
    sampling: SamplingParams
    form: OutputForm = OutputForm()
    n: int = 1
    priority: Priority = Priority.DEFAULT
    weight: float = 1.0  # the organization's fair share, relative to others
    stream: bool = False
    work: Work | None = None  # None: text
    blobs: tuple[str, ...] = ()
    salt: str = ""  # beside the organization: its KV is shared with requests of the same salt only
    picture_pixels: tuple[int, ...] = ()  # what each picture is shrunk to at the most; 0 is the model's own bound
    image_tokens: int = 0  # of the prompt's, those that stand for pictures

    @property
    def num_choices(self) -> int:
        return max(1, len(self.prompts)) * self.n

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt's once; or input units, of work that is no text."""
        return sum(map(len, self.prompts)) + self._work_units

    @property
    def max_total_tokens(self) -> int:
        """The most this request can be charged: what quota reserves."""
        return sum(map(len, self.prompts)) * self.n + self._work_units + self.num_choices * self.sampling.max_tokens

    @property
    def _work_units(self) -> int:
        return self.work.input_units * self.n if self.work else 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens charged. `prompt_tokens` counts each prompt once, as OpenAI does with `n` above 1."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0  # of the completion's
    image_tokens: int = 0  # of the prompt's

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of one token, with its likeliest alternatives as (id, logprob), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


# --- What a daemon says: ids only -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SequenceDelta:
    """What one step added to one choice. `first_index` is the index of `token_ids[0]` among the choice's tokens."""

    request_id: str
    attempt: int
    choice: int
    first_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0  # prompt tokens not recomputed; set with the first delta
    error: str = ""  # a code, set only with finish_reason FAILED
    # Of work that is no text; `first_index` then counts units.
    units: int = 0
    media: bytes = b""
    mime: str = ""
    preview: bool = False


@dataclass(frozen=True, slots=True)
class StepOutput:
    """All that one engine step produced for one caller: one message a step, never one a token."""

    step: int
    deltas: tuple[SequenceDelta, ...]


@dataclass(frozen=True, slots=True)
class ResidentModel:
    """A model in a worker's memory. The `_ms` figures are measured by the worker and feed the cost model.

    `resident_bytes` is what it has of the worker's budget, `kv_bytes` of that for KV; `measured_bytes` is the peak of its
    weights and activations.
    """

    model: str
    state: str  # "loading", "ready", "unloading", "failed"
    progress: float = 1.0  # of the load, 0 to 1
    error: str = ""
    max_model_len: int = 0
    running: int = 0
    waiting: int = 0
    max_running: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    weight_bytes: int = 0
    prefill_ms_per_token: float = 0.0
    decode_ms_per_token: float = 0.0  # one sequence's share of a step at the usual batch
    forward_share: float = 0.0  # of a busy engine's wall time, inside the forward pass
    engine: str = "continuous"  # or "static"
    voices: tuple[str, ...] = ()
    revision: str = ""  # of the model's weights
    stage: str = ""  # of the load: "reading", "building", "warming"
    resident_bytes: int = 0
    kv_bytes: int = 0
    measured_bytes: int = 0
    idle_ms: int = 0  # since a sequence last ran or waited

    @property
    def folder(self) -> str:
        return folder_of(self.model, self.revision)

    @property
    def in_flight(self) -> int:
        return self.running + self.waiting


def folder_of(model: str, revision: str) -> str:
    """What a revision of a model is called on disk, and by a daemon."""
    return f"{model}@{revision}" if revision else model


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What a worker could load: `model` is the folder's name, NAME or NAME@REVISION. `need_bytes` must be free for it."""

    model: str
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    activation_bytes: int = 0
    need_bytes: int = 0
    measured_bytes: int = 0
    in_host_memory: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """A worker's self-reported load, as the router sees it.

    The last two are the controller's: models that would be loaded here if they were asked for, and why others would not.
    """

    worker_id: str
    address: str
    epoch: int
    step: int
    device: str
    mode: str
    draining: bool
    memory_total_bytes: int
    memory_free_bytes: int
    models: tuple[ResidentModel, ...] = ()
    seen_ms: int = 0
    memory_budget_bytes: int = 0
    memory_reserved_bytes: int = 0
    folders: tuple[ModelFolder, ...] = ()
    loadable: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    cordoned: bool = False  # its host changes its mode: it gets nothing, and requests for its models wait

    def resident(self, model: str) -> ResidentModel | None:
        """The first of the model's revisions: the controller puts the one to be used first."""
        return next((m for m in self.models if m.model == model), None)


# --- What a client's stream carries: the entries of a request's event log --------------------------------------------


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of one call. `id` and `name` come once, with its first piece."""

    index: int
    arguments: str = ""
    id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of one choice. `token_ids` may be longer than the text shows: bytes of an unfinished character wait."""

    choice: int
    first_index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class MediaDelta:
    """Work of one choice that is no text: `units` more of its `total` are done, and what came of that."""

    choice: int
    first_index: int
    units: int
    media: str = ""  # base64
    mime: str = ""
    preview: bool = False
    total: int = 0


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    choice: int
    reason: FinishReason
    stop: str = ""  # the stop string that ended it


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """The terminal event: the last of every accepted request, exactly once."""

    outcome: Outcome
    usage: Usage
    error_code: str = ""
    error_message: str = ""
    timing: dict[str, float] = field(default_factory=dict)  # queue_ms, ttft_ms, total_ms
    wait: dict[str, int] = field(default_factory=dict)  # milliseconds by cause; they add up to ttft_ms


Event = TextDelta | MediaDelta | ChoiceFinished | RequestFinished


# --- Who asks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QuotaLimits:
    """An organization's limits; None is no limit. A minute is the last 60 s; days and months are UTC calendar ones."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is asking and what they may do. Carries ids only: never a secret, never a database row."""

    org_id: str
    key_id: str  # "session" for a signed-in console user
    scopes: frozenset[str]
    limits: QuotaLimits
    weight: float = 1.0
    max_priority: Priority = Priority.DEFAULT
    priority: Priority = Priority.DEFAULT  # of requests that ask for no service tier; at most `max_priority`
    allowed_models: frozenset[str] | None = None  # None: all


@dataclass(frozen=True, slots=True)
class RateLimitState:
    """What the `x-ratelimit-*` headers say. `reset` figures are milliseconds until the window is empty again."""

    limit_requests: int | None = None
    remaining_requests: int | None = None
    reset_requests_ms: int = 0
    limit_tokens: int | None = None
    remaining_tokens: int | None = None
    reset_tokens_ms: int = 0
