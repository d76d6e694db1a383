"""Denoises many tasks at once, each at a timestep of its own, so that one may join while others are half done.

What images and videos share: who is how far, which of them go through the network together, what a step tells. A step is one
forward pass over all that denoise or one decode, never both, so that whoever waits for the device waits for one of them.
"""

from __future__ import annotations

import copy
import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from gpu_daemon.engine.task import ImageWork, Progress, Task, VideoWork, Work
from gpu_daemon.runners.diffusion import load_parts
from gpu_daemon.runners.pretrained import weight_bytes
from gpu_daemon.runners.torch_runner import Report, RunnerOptions

WARM_STEPS = 2
_STRESS_PIECES = 2  # of a video's decoding: the second has what the first one left
Picture = TypeVar("Picture", ImageWork, VideoWork)


@dataclass(slots=True, eq=False)
class Denoising(Generic[Picture]):
    """A task on its way from noise to media."""

    task: Task
    work: Picture
    schedule: Any  # a diffusers scheduler of its own, which counts its steps
    latents: Tensor  # float32
    text: Tensor  # [tokens, width]
    told: int  # units, by earlier attempts and by the steps so far
    step: int = 0
    pieces: Iterator[bytes] | None = None  # of a decode that takes several steps

    @property
    def denoised(self) -> bool:
        return self.step == self.work.steps

    @property
    def time(self) -> Tensor:
        time: Tensor = self.schedule.timesteps[self.step]
        return time

    def tell(self) -> int:
        """Units of the last step. What an earlier attempt told is not told again."""
        done = self.task.units * self.step // self.work.steps
        units = max(0, done - self.told)
        self.told += units
        return units


class Denoiser(ABC, Generic[Picture]):
    """One model on one device. A subclass knows its network, its sizes, and what its latents decode to."""

    PARTS: ClassVar[Mapping[str, type]]  # the components it needs, by name, and the only classes they may have
    UPCAST: ClassVar[frozenset[str]] = frozenset()  # those that a GPU runs in float32, not float16
    text_tokens: int
    max_tasks: int
    voices: tuple[str, ...] = ()

    def __init__(self, parts: Mapping[str, Any], device: str) -> None:
        """`parts` are the components of PARTS, on the device."""
        self.device = torch.device(device)
        self._tokenizer, self._text_encoder = parts["tokenizer"], parts["text_encoder"]
        self._vae, self._scheduler = parts["vae"], parts["scheduler"]
        networks = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
        self.weight_bytes = sum(weight_bytes(network) for network in networks)
        self.dtype: torch.dtype = self._text_encoder.dtype
        self._schedules: dict[int, Any] = {}
        self._states: dict[Task, Denoising[Picture]] = {}
        self.input_ms_per_unit = self.output_ms_per_unit = 0.0

    @classmethod
    def load(cls, folder: Path, options: RunnerOptions, report: Report) -> Self:
        """From a model's folder. Raises LoadFailed. `report(stage, progress)` is called as the load goes on."""
        parts = load_parts(folder, cls.PARTS, cls.UPCAST, torch.device(options.device), report)
        report("warming", 0.9)
        return cls(parts, options.device)

    @abstractmethod
    def check(self, work: Work) -> None:
        """Raises InvalidCommand for work this model cannot do."""

    @abstractmethod
    def _shape(self, work: Picture) -> tuple[int, ...]:
        """Of its latents."""

    @abstractmethod
    def _key(self, work: Picture) -> Hashable:
        """Equal for tasks that may go through the network together."""

    @abstractmethod
    def _together(self, work: Picture) -> int:
        """How many like it go through the network at once."""

    @abstractmethod
    def _predict(self, noisy: Tensor, times: Tensor, group: Many[Denoising[Picture]]) -> Tensor:
        """What the network says of a group: `noisy` is [group, latents], `times` [group]."""

    @abstractmethod
    def _decode(self, denoised: Many[Denoising[Picture]]) -> list[Progress]:
        """One piece of the work on those that are denoised."""

    @abstractmethod
    def _sample_work(self) -> Picture:
        """What requests bring, in `WARM_STEPS` steps."""

    @abstractmethod
    def _largest_work(self) -> Picture:
        """What takes the most memory, in one step."""

    def _sketch(self, state: Denoising[Picture], guess: Tensor) -> bytes:
        """A JPEG of what the latents are guessed to become, for those who asked for it."""
        return b""

    @torch.inference_mode()
    def step(self, tasks: Many[Task]) -> list[Progress]:
        """One denoising step of each, or, when some are denoised, a part of their decoding. New tasks are begun."""
        self._begin([task for task in tasks if task not in self._states])
        states = [self._states[task] for task in tasks]
        denoised = [state for state in states if state.denoised]
        progress = self._decode(denoised) if denoised else self._denoise(states)
        for told in progress:
            if told.finished:
                self.drop(told.task)
        if self.device.type == "cuda":  # what is told is done, and an abort has no queue of kernels to wait for
            torch.cuda.synchronize(self.device)
        return progress

    def drop(self, task: Task) -> None:
        """Forgets a task: its tensors are free at once."""
        self._states.pop(task, None)

    def close(self) -> None:
        """Lets the weights go."""
        self._states.clear()
        self._text_encoder = self._vae = None

    def _begin(self, tasks: Many[Task]) -> None:
        texts = self._encode([task.work.prompt for task in tasks])  # type: ignore[union-attr]
        for task in tasks:
            work: Any = task.work
            schedule = self._schedule(work.steps)
            start = noise(self._shape(work), work.seed, task.choice)
            latents = start.to(self.device) * schedule.init_noise_sigma
            self._states[task] = Denoising(task, work, schedule, latents, texts[work.prompt], told=task.done)

    def _encode(self, prompts: Many[str]) -> dict[str, Tensor]:
        """Every different prompt once: the choices of a request have the same."""
        unique = list(dict.fromkeys(prompts))
        if not unique:
            return {}
        tokens = self._tokenizer(
            unique, padding="max_length", max_length=self.text_tokens, truncation=True, return_tensors="pt"
        )
        return dict(zip(unique, self._text_encoder(tokens.input_ids.to(self.device))[0], strict=True))

    def _schedule(self, steps: int) -> Any:
        """Computed once for each number of steps; a copy shares all but the count of steps done."""
        if steps not in self._schedules:
            schedule = copy.deepcopy(self._scheduler)
            schedule.set_timesteps(steps)
            self._schedules[steps] = schedule
        return copy.copy(self._schedules[steps])

    def _denoise(self, states: Many[Denoising[Picture]]) -> list[Progress]:
        groups: dict[Hashable, list[Denoising[Picture]]] = {}
        for state in states:
            groups.setdefault(self._key(state.work), []).append(state)
        told = []
        for group in groups.values():
            most = self._together(group[0].work)
            for first in range(0, len(group), most):
                told += self._denoise_group(group[first : first + most])
        return told

    def _denoise_group(self, group: Many[Denoising[Picture]]) -> list[Progress]:
        noisy = torch.stack([state.schedule.scale_model_input(state.latents, state.time) for state in group])
        times = torch.stack([state.time for state in group]).to(self.device)
        predicted = self._predict(noisy.to(self.dtype), times, group)
        return [self._advance(state, told) for state, told in zip(group, predicted.float(), strict=True)]

    def _advance(self, state: Denoising[Picture], predicted: Tensor) -> Progress:
        state.latents, guess = state.schedule.step(predicted, state.time, state.latents, return_dict=False)
        state.step += 1
        sketch = self._sketch(state, guess)
        return Progress(state.task, state.tell(), sketch, "image/jpeg" if sketch else "", preview=bool(sketch))

    def warm(self) -> None:
        """Runs what requests bring, and measures it: text and decoding an input unit, denoising an output unit."""
        work = self._sample_work()
        shape = self._shape(work)
        patches = shape[-1] * shape[-2] // 4 * (shape[0] if len(shape) == 4 else 1)  # a latent is 8 x 8 pixels
        task = Task(0, "warm", 0, 0, work, units=WARM_STEPS * patches)
        self._times(task)  # the first run is slower than any after it
        began, denoised, *decoding = self._times(task)
        self.output_ms_per_unit = denoised / patches
        self.input_ms_per_unit = (max(0.0, began - denoised) + sum(decoding)) / patches

    def stress(self) -> None:
        """Runs the largest steps there can be, to see what they take: of as many as go through the network at once, and of
        decoding the first of them."""
        work = self._largest_work()
        count = min(self.max_tasks, self._together(work))
        tasks = [Task(0, "stress", 0, choice, work, units=1) for choice in range(count)]
        for _ in range(1 + _STRESS_PIECES):
            finished = {progress.task for progress in self.step(tasks) if progress.finished}
            tasks = [task for task in tasks if task not in finished]
        for task in tasks:
            self.drop(task)

    def _times(self, task: Task) -> list[float]:
        """Milliseconds of each step of a task."""
        times, finished = [], False
        while not finished:
            started = time.perf_counter()
            finished = any(progress.finished for progress in self.step([task]))
            times.append((time.perf_counter() - started) * 1000)
        return times


def noise(shape: tuple[int, ...], seed: int, choice: int) -> Tensor:
    """A function of seed and choice alone, drawn on the CPU: every device starts from the same."""
    digest = hashlib.blake2b(f"{seed}:{choice}".encode(), digest_size=8).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest)))
