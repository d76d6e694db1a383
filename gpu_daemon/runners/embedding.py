"""Runs embedding tasks on a sentence encoder: one padded batch for texts of about a length, each done in one step."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from gpu_daemon.engine.task import EmbedWork, Progress, Task, Work
from gpu_daemon.errors import InvalidCommand, LoadFailed
from gpu_daemon.limits import EMBED_TOKENS
from gpu_daemon.runners.pretrained import load_pretrained, weight_bytes
from gpu_daemon.runners.torch_runner import Report, RunnerOptions

MIME = "application/octet-stream"  # float32, little-endian
_LONGER = 1.25  # the longest text of a batch than its shortest: padding is computed like tokens
_MAX_TASKS = {"cpu": 32, "cuda": 256}
_WARM_TOKENS = (8, 128)


class EmbeddingRunner:
    """One BertModel on one device, whose vectors are the mean of a text's tokens, of length 1."""

    voices: tuple[str, ...] = ()

    def __init__(self, model: Any, max_tokens: int, device: str) -> None:
        self._model = model
        self.max_tokens = max_tokens
        self.max_tasks = _MAX_TASKS[torch.device(device).type]
        self.weight_bytes = weight_bytes(model)
        self.input_ms_per_unit = self.output_ms_per_unit = 0.0

    @classmethod
    def load(cls, folder: Path, options: RunnerOptions, report: Report) -> EmbeddingRunner:
        """From a model's folder. Raises LoadFailed. `report(stage, progress)` is called as the load goes on."""
        report("reading", 0.1)
        model = load_pretrained(transformers.BertModel, folder, options.device, add_pooling_layer=False)
        runner = cls(model, _max_tokens(folder, model.config), options.device)
        report("warming", 0.9)
        return runner

    def check(self, work: Work) -> None:
        """Raises InvalidCommand for work this model cannot do."""
        if not isinstance(work, EmbedWork):
            raise InvalidCommand("this model embeds, and does nothing else")
        if not 1 <= len(work.token_ids) <= self.max_tokens:
            raise InvalidCommand(f"a text to embed has 1 to {self.max_tokens} tokens, not {len(work.token_ids)}")
        if not all(0 <= token < self._model.config.vocab_size for token in work.token_ids):
            raise InvalidCommand(f"a token is at least 0 and below {self._model.config.vocab_size}")
        if not 0 <= work.dimensions <= self._model.config.hidden_size:
            raise InvalidCommand(f"this model's vectors have {self._model.config.hidden_size} dimensions")

    def step(self, tasks: Many[Task]) -> list[Progress]:
        """All of them, each finished."""
        return [progress for batch in _batches(tasks) for progress in self._embed(batch)]

    @torch.inference_mode()
    def _embed(self, batch: list[Task]) -> list[Progress]:
        ids = [torch.tensor(_work(task).token_ids) for task in batch]
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(self._model.device)
        states = self._model(pad_sequence(ids, batch_first=True).to(self._model.device), attention_mask=mask).last_hidden_state
        means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        vectors = normalize(means, dim=-1).cpu()
        return [
            Progress(task, units=1, media=_bytes(vector, _work(task).dimensions), mime=MIME, finished=True)
            for task, vector in zip(batch, vectors, strict=True)
        ]

    def drop(self, task: Task) -> None:
        """There is nothing to forget."""

    def warm(self) -> None:
        """Measures what a token costs, and what a text does beside its tokens."""
        few, many = _WARM_TOKENS
        self._time(many)  # the first is slower than any after it
        short, long = self._time(few), self._time(many)
        self.input_ms_per_unit = long / many
        self.output_ms_per_unit = max(0.0, short - self.input_ms_per_unit * few)

    def stress(self) -> None:
        """Runs the largest step there can be, to see what it takes: as many of the longest texts as may come together."""
        self.step([Task(0, "stress", 0, i, EmbedWork((1,) * self.max_tokens), 1) for i in range(self.max_tasks)])

    def _time(self, tokens: int) -> float:
        """Milliseconds."""
        started = time.perf_counter()
        self._embed([Task(0, "warm", 0, 0, EmbedWork((1,) * tokens), 1)])
        return (time.perf_counter() - started) * 1000

    def close(self) -> None:
        """Lets the weights go."""
        self._model = None


def _max_tokens(folder: Path, config: Any) -> int:
    """Of a text: what the encoder was trained on where the folder says so, at most what it has positions for."""
    positions = int(config.max_position_embeddings)
    trained = folder / "sentence_bert_config.json"
    if not trained.is_file():
        return positions
    try:
        return min(positions, int(json.loads(trained.read_text())["max_seq_length"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise LoadFailed(f"{folder.name}: {trained.name} is damaged") from None


def _batches(tasks: Many[Task]) -> Iterator[list[Task]]:
    """Texts of about a length together, so that little is padding."""
    batch: list[Task] = []
    for task in sorted(tasks, key=lambda task: len(_work(task).token_ids)):
        length = len(_work(task).token_ids)
        if batch and ((len(batch) + 1) * length > EMBED_TOKENS or length > _LONGER * len(_work(batch[0]).token_ids)):
            yield batch
            batch = []
        batch.append(task)
    if batch:
        yield batch


def _work(task: Task) -> EmbedWork:
    assert isinstance(task.work, EmbedWork), "check() came first"
    return task.work


def _bytes(vector: Tensor, dimensions: int) -> bytes:
    """The first `dimensions`, all for 0, of length 1."""
    if dimensions:
        vector = normalize(vector[:dimensions], dim=-1)
    return vector.numpy().astype("<f4").tobytes()
