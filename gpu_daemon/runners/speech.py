"""Runs speech tasks on Kokoro: a step says the next piece of each, all of them in one batch.

Nothing is kept between steps: the characters that are done say where a text goes on, after a crash too, and the same piece has
the same sound alone, in a crowd and again.
"""

from __future__ import annotations

import time
import unicodedata
import zlib
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_daemon.engine.task import Progress, SpeechWork, Task, Work
from gpu_daemon.errors import InvalidCommand, LoadFailed
from gpu_daemon.limits import PHONEMES, SPEECH_TASKS
from gpu_daemon.runners import kokoro_voice
from gpu_daemon.runners.kokoro_voice import SAMPLE_RATE, Utterance
from gpu_daemon.runners.phonemes import LANGUAGES, MISSING, Phonemes
from gpu_daemon.runners.pieces import longest, piece_end
from gpu_daemon.runners.torch_runner import Report, RunnerOptions

MIME = "audio/pcm"  # s16le, mono, 24 kHz
_SILENCE = bytes(2 * SAMPLE_RATE // 4)  # of a piece that has nothing to say
_SHORT, _LONG = "Hello.", "The quick brown fox jumps over the lazy dog, and the dog, who has seen it all before, sleeps on."


@dataclass(frozen=True, slots=True)
class _Piece:
    """What a step says of one task: its text up to `end`."""

    task: Task
    work: SpeechWork
    end: int
    phonemes: str


class SpeechRunner:
    """One model on one device."""

    def __init__(self, model: Any, voices: dict[str, Tensor], device: str) -> None:
        """Raises LoadFailed."""
        self._model = model
        self._voices = voices
        self.voices = tuple(sorted(name for name in voices if name[0] in LANGUAGES))
        if not self.voices:
            raise LoadFailed("none of the voices speaks a language that is installed here")
        self._phonemes = Phonemes({name[0] for name in self.voices})
        self.max_tasks = SPEECH_TASKS[torch.device(device).type]
        self.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.input_ms_per_unit = self.output_ms_per_unit = 0.0

    @classmethod
    def load(cls, folder: Path, options: RunnerOptions, report: Report) -> SpeechRunner:
        """From a model's folder. Raises LoadFailed. `report(stage, progress)` is called as the load goes on."""
        report("reading", 0.1)
        model, voices = kokoro_voice.load(folder, torch.device(options.device))
        report("building", 0.5)
        runner = cls(model, voices, options.device)
        report("warming", 0.9)
        return runner

    def check(self, work: Work) -> None:
        """Raises InvalidCommand for work this model cannot do."""
        if not isinstance(work, SpeechWork):
            raise InvalidCommand("this model speaks, and does nothing else")
        if not 0.25 <= work.speed <= 4:
            raise InvalidCommand("speed must be between 0.25 and 4")
        if not any(map(_is_speakable, work.text)):
            raise InvalidCommand("the text has nothing in it to say")
        for name in work.voice.split(","):
            self._check_voice(name)

    def _check_voice(self, name: str) -> None:
        if name not in self._voices:
            raise InvalidCommand(f"there is no voice {name!r}")
        if name not in self.voices:
            raise InvalidCommand(f"the voice {name} speaks {MISSING.get(name[0], 'a language')} that is not installed here")

    def step(self, tasks: Many[Task]) -> list[Progress]:
        """The next piece of each task; while some have said nothing yet, of those alone, for theirs are short."""
        pieces = [self._next(task) for task in [task for task in tasks if not task.done] or tasks]
        return [
            Progress(p.task, units=p.end - p.task.done, media=media, mime=MIME, finished=p.end == len(p.work.text))
            for p, media in zip(pieces, self._say(pieces), strict=True)
        ]

    def _next(self, task: Task) -> _Piece:
        """The task's next piece, made shorter until its phonemes fit: fewer of them when they are spoken slowly, for it is what
        is heard that takes memory."""
        work = task.work
        assert isinstance(work, SpeechWork), "check() came first"
        limit, most = longest(task.done), int(PHONEMES * min(1, work.speed))
        while True:
            end = piece_end(work.text, task.done, limit)
            phonemes = self._phonemes(work.voice[0], work.text[task.done : end])
            if len(phonemes) <= most or limit == 1:
                return _Piece(task, work, end, phonemes[:PHONEMES])
            limit //= 2

    def _say(self, pieces: list[_Piece]) -> list[bytes]:
        """Each piece's sound."""
        utterances = [self._utterance(piece) for piece in pieces]
        sounds = iter(kokoro_voice.speak(self._model, said) if (said := [u for u in utterances if u is not None]) else [])
        return [_SILENCE if utterance is None else _pcm(next(sounds)) for utterance in utterances]

    def _utterance(self, piece: _Piece) -> Utterance | None:
        """None when there is nothing to say."""
        ids = [id_ for symbol in piece.phonemes if (id_ := self._model.vocab.get(symbol)) is not None]
        if not ids:
            return None
        row = len(piece.phonemes) - 1
        style = torch.stack([self._voices[name][row, 0] for name in piece.work.voice.split(",")]).mean(0)
        seed = zlib.crc32(f"{piece.work.voice} {piece.phonemes}".encode())
        return Utterance([0, *ids, 0], style, piece.work.speed, seed)

    def drop(self, task: Task) -> None:
        """There is nothing to forget."""

    def warm(self) -> None:
        """Measures what a character costs, and what a text does beside its characters."""
        work = [SpeechWork(text, self.voices[0]) for text in (_SHORT, _LONG)]
        self._time(work[0])  # the first is slower than any after it
        short, long = (self._time(w) for w in work)
        self.output_ms_per_unit = long / len(_LONG)
        self.input_ms_per_unit = max(0.0, short - self.output_ms_per_unit * len(_SHORT))

    def stress(self) -> None:
        """Runs the largest step there can be, to see what it takes: a piece as long as any, beside as many as may come
        together. Those are short, which saves time: they are padded to the long one, and each sounds by itself."""
        phonemes = self._phonemes(self.voices[0][0], _LONG)
        long = "".join(islice(cycle(phonemes), PHONEMES))
        work = SpeechWork(_LONG, self.voices[0])
        task = Task(0, "stress", 0, 0, work, len(_LONG))
        self._say([_Piece(task, work, len(_LONG), said) for said in [long, *[phonemes[:1]] * (self.max_tasks - 1)]])

    def _time(self, work: SpeechWork) -> float:
        """Milliseconds, in one piece."""
        started = time.perf_counter()
        phonemes = self._phonemes(work.voice[0], work.text)
        self._say([_Piece(Task(0, "warm", 0, 0, work, len(work.text)), work, len(work.text), phonemes)])
        return (time.perf_counter() - started) * 1000

    def close(self) -> None:
        """Lets the weights go."""
        self._model = None


def _is_speakable(character: str) -> bool:
    """Letters, digits and symbols, an emoji too, have names; a dash or a space has none."""
    return unicodedata.category(character)[0] in "LNS" or character in "%&@#"


def _pcm(sound: Tensor) -> bytes:
    return (sound.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().astype("<i2").tobytes()
