"""The nouns of work that is no text: speech, embeddings, transcripts, images, videos. No tensors, no sockets.

What a task does is counted in units, which the site prices, charges and publishes as it does tokens:

    speech         one a character of the text; one input unit
    embedding      one; an input unit a token
    transcription  one a token of the transcript; 1,500 input units each 30 s
    image          steps x patches, a patch being 16 x 16 pixels; an input unit a patch
    video          steps x latent frames x patches; an input unit a patch of each latent frame
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class SpeechWork:
    text: str
    voice: str  # a name, or names joined by commas, whose voices are averaged
    speed: float = 1.0


@dataclass(frozen=True, slots=True)
class EmbedWork:
    token_ids: tuple[int, ...]
    dimensions: int = 0  # 0: all; fewer are cut off and normalised again


@dataclass(frozen=True, slots=True)
class TranscribeWork:
    audio: bytes  # 16 kHz, mono, s16le
    language: str = "en"
    prompt_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    timestamps: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ImageWork:
    prompt: str
    width: int
    height: int
    steps: int
    seed: int
    guidance: float = 0.0
    previews: bool = False


@dataclass(frozen=True, slots=True)
class VideoWork:
    prompt: str
    width: int
    height: int
    frames: int
    steps: int
    seed: int
    guidance: float = 6.0
    fps: int = 8


Work: TypeAlias = SpeechWork | EmbedWork | TranscribeWork | ImageWork | VideoWork


@dataclass(slots=True, eq=False)
class Task:
    """One choice of one request. Of its `units` of output, `done` were told, by an earlier attempt too."""

    caller: int
    request_id: str
    attempt: int
    choice: int
    work: Work
    units: int
    done: int = 0
    deadline: float = float("inf")  # on the engine's monotonic clock

    @property
    def index(self) -> int:
        """Of the next unit, as a sequence's of its next token."""
        return self.done


@dataclass(frozen=True, slots=True)
class Progress:
    """What one step did for a task. All shares of a task add up to what was not done when it began."""

    task: Task
    units: int = 0
    media: bytes = b""
    mime: str = ""
    preview: bool = False  # the media is a sketch of what is to come
    token_ids: tuple[int, ...] = ()  # of a transcript
    finished: bool = False


class TaskRunner(Protocol):
    """Advances tasks on a device, all of them each step, from one thread. A task that it is given first, it begins."""

    max_tasks: int  # that may run at once
    weight_bytes: int
    input_ms_per_unit: float  # measured by `warm`
    output_ms_per_unit: float
    voices: tuple[str, ...]  # that speech may ask for; empty for every other model

    def check(self, work: Work) -> None:
        """Raises InvalidCommand for work this model cannot do."""

    def step(self, tasks: Many[Task]) -> list[Progress]:
        """One step of each. A task that did not progress is not in the result."""

    def drop(self, task: Task) -> None:
        """Forgets a task that ended early; others are ignored."""

    def warm(self) -> None:
        """Runs what requests bring, and measures it."""

    def stress(self) -> None:
        """Runs the largest step there can be, to see what it takes."""

    def close(self) -> None:
        """Lets the weights go."""
