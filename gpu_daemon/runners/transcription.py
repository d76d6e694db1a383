"""Runs transcription tasks on Whisper: a step hears windows of sound that are due, and writes a few tokens of each heard.

The sound is cut into windows of at most 30 s, where it is quiet. With timestamps, which count from where their window begins,
the tokens of each window but the last end with the timestamp at which the next begins, and an end-of-text token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from gpu_daemon.engine.sequence import Sampling, Sequence
from gpu_daemon.engine.task import Progress, Task, TranscribeWork, Work
from gpu_daemon.errors import InvalidCommand, LoadFailed
from gpu_daemon.limits import WINDOW_TASKS, WINDOWS_HEARD
from gpu_daemon.runners.pretrained import load_pretrained, weight_bytes
from gpu_daemon.runners.sampler import sample
from gpu_daemon.runners.torch_runner import Report, RunnerOptions
from gpu_daemon.runners.whisper_model import SAMPLE_RATE, WINDOW_SECONDS, Heard, WhisperModel
from gpu_daemon.runners.whisper_rules import Rules
from gpu_daemon.runners.windows import cut_windows

_STEP_TOKENS = 8  # of each task
_WINDOW_UNITS = 1500


@dataclass(slots=True)
class _Transcript:
    """How far one task is. `sequence` has what all its windows said; `window` the present one's tokens, of which those before
    `begin` are not its own and those from `ran` on have not been run."""

    work: TranscribeWork
    windows: list[np.ndarray]  # the present one first
    sequence: Sequence
    told: int  # tokens, by an earlier attempt too
    heard: Heard | None = None
    window: list[int] = field(default_factory=list)
    begin: int = 0
    ran: int = 0

    def hear(self, heard: Heard, start: list[int]) -> None:
        self.heard, self.window, self.begin, self.ran = heard, start, len(start), 0

    def tell(self) -> tuple[int, ...]:
        """What is new; nothing while an earlier attempt's tokens are written again."""
        new = tuple(self.sequence.tokens[self.told :])
        self.told += len(new)
        return new


class TranscriptionRunner:
    """One model on one device."""

    voices: tuple[str, ...] = ()

    def __init__(self, model: Any, extractor: Any, device: str) -> None:
        """Raises LoadFailed for a generation config that is none of Whisper's."""
        kind = torch.device(device).type
        self._model = WhisperModel(model, extractor)
        self._rules = Rules(model.generation_config, model.config.vocab_size, model.config.max_target_positions)
        self._transcripts: dict[Task, _Transcript] = {}
        self.max_tasks, self._heard_a_step = WINDOW_TASKS[kind], WINDOWS_HEARD[kind]
        self.weight_bytes = weight_bytes(model)
        self.input_ms_per_unit = self.output_ms_per_unit = 0.0

    @classmethod
    def load(cls, folder: Path, options: RunnerOptions, report: Report) -> TranscriptionRunner:
        """From a model's folder. Raises LoadFailed. `report(stage, progress)` is called as the load goes on."""
        report("reading", 0.1)
        model = load_pretrained(transformers.WhisperForConditionalGeneration, folder, options.device)
        try:
            extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LoadFailed(f"{folder.name}: preprocessor_config.json cannot be read ({type(error).__name__})") from None
        runner = cls(model, extractor, options.device)
        report("warming", 0.9)
        return runner

    def check(self, work: Work) -> None:
        """Raises InvalidCommand for work this model cannot do."""
        if not isinstance(work, TranscribeWork):
            raise InvalidCommand("this model transcribes, and does nothing else")
        if not work.audio or len(work.audio) % 2:
            raise InvalidCommand("the audio is none: 16 bits a sample are wanted, and one sample at least")
        if not 0 <= work.temperature <= 2:
            raise InvalidCommand("temperature must be between 0 and 2")
        self._rules.check(work)

    def step(self, tasks: Many[Task]) -> list[Progress]:
        """Hears what is due, then writes a few tokens of each task."""
        transcripts = [self._transcripts.get(task) or self._begin(task) for task in tasks]
        self._hear([t for t in transcripts if t.heard is None][: self._heard_a_step])
        for _ in range(_STEP_TOKENS):
            self._write([t for t in transcripts if t.heard is not None])
        told = [self._progress(task, transcript) for task, transcript in zip(tasks, transcripts, strict=True)]
        return [progress for progress in told if progress.units or progress.finished]

    def _begin(self, task: Task) -> _Transcript:
        work = task.work
        assert isinstance(work, TranscribeWork), "check() came first"
        sound = np.frombuffer(work.audio, "<i2").astype(np.float32) / 32768
        windows = cut_windows(sound, rate=SAMPLE_RATE, seconds=WINDOW_SECONDS)
        sampling = Sampling(max_tokens=task.units, seed=work.seed, temperature=work.temperature)
        sequence = Sequence(task.caller, task.request_id, task.attempt, task.choice, [], 0, sampling)
        self._transcripts[task] = transcript = _Transcript(work, windows, sequence, told=task.done)
        return transcript

    def _hear(self, due: list[_Transcript]) -> None:
        if not due:
            return
        for transcript, heard in zip(due, self._model.hear([t.windows[0] for t in due]), strict=True):
            transcript.hear(heard, self._rules.start(transcript.work, prompted=not transcript.sequence.tokens))

    def _write(self, going: list[_Transcript]) -> None:
        """One token of each."""
        if not going:
            return
        logits = self._model.run([(t.heard, t.window[t.ran :]) for t in going if t.heard is not None])
        allowed = [self._rules.allow(row, t.window, t.begin, t.work.timestamps) for row, t in zip(logits, going, strict=True)]
        for transcript, drawn in zip(going, sample(torch.stack(allowed), [t.sequence for t in going]), strict=True):
            self._take(transcript, drawn.token_id)

    def _take(self, t: _Transcript, token: int) -> None:
        """Adds a token, or ends a window, or all."""
        t.ran = len(t.window)
        if token != self._rules.end:
            t.window.append(token)
            t.sequence.tokens.append(token)
        if token == self._rules.end or len(t.window) - t.begin >= self._rules.most:
            seconds = len(t.windows.pop(0)) / SAMPLE_RATE
            t.heard = None
            if t.work.timestamps and t.windows:
                t.sequence.tokens += [self._rules.stamp(seconds), self._rules.end]
        if len(t.sequence.tokens) >= t.sequence.sampling.max_tokens:
            t.heard = None
            t.windows.clear()

    def _progress(self, task: Task, transcript: _Transcript) -> Progress:
        new = transcript.tell()
        if not transcript.windows:
            self.drop(task)
        return Progress(task, units=len(new), token_ids=new, finished=not transcript.windows)

    def drop(self, task: Task) -> None:
        """Forgets a task that ended early; others are ignored."""
        self._transcripts.pop(task, None)

    def warm(self) -> None:
        """Measures what a window costs to hear, and what a token does to write."""
        self._time_window()
        hearing, writing = self._time_window()
        self.input_ms_per_unit, self.output_ms_per_unit = hearing / _WINDOW_UNITS, writing / _STEP_TOKENS

    def stress(self) -> None:
        """Runs the largest step there can be, to see what it takes: windows heard while all others are being written."""
        sound = np.zeros(SAMPLE_RATE * WINDOW_SECONDS, np.float32)
        heard: list[Heard] = []
        while len(heard) < self.max_tasks:
            heard += self._model.hear([sound] * min(self._heard_a_step, self.max_tasks - len(heard)))
        for _ in range(2):  # which fills every window
            self._model.run([(window, [0] * self._rules.most) for window in heard])

    def _time_window(self) -> tuple[float, float]:
        """Milliseconds of hearing a window, and of writing a step's tokens."""
        started = time.perf_counter()
        heard = self._model.hear([np.zeros(SAMPLE_RATE, np.float32)])[0]
        between = time.perf_counter()
        for _ in range(_STEP_TOKENS):
            self._model.run([(heard, [0])])
        return (between - started) * 1000, (time.perf_counter() - between) * 1000

    def close(self) -> None:
        """Lets the weights go."""
        self._transcripts.clear()
        del self._model
