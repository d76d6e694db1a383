"""Runs a static batch: one left-padded `model.generate()` call on a raw `transformers` model.

What generate() draws from is decided by our own sampler, so seeds, penalties, grammars and logprobs mean what they mean in
the continuous engine; generate() does the rest: the padding, the positions, the cache, the forward passes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from gpu_daemon.engine.sequence import Sampled, Sampling, Sequence
from gpu_daemon.engine.static_engine import AfterStep
from gpu_daemon.errors import LoadFailed
from gpu_daemon.runners.sampler import sample
from gpu_daemon.runners.torch_runner import Report, RunnerOptions, _eos_ids, _load, _read_config

_PAD = 0  # masked, so any token would do
_WARM_TOKENS = 64
_WARM_STEPS = 5


class StaticRunner:
    """One model on one device. On a CPU it computes in float32, as the continuous engine does, so greedy answers agree."""

    eyes = None  # pictures are for the continuous engine

    def __init__(self, model: transformers.PreTrainedModel, eos_ids: frozenset[int], options: RunnerOptions) -> None:
        """Raises LoadFailed when the cache of one sequence has no room."""
        text = model.config.get_text_config()
        self.device = torch.device(options.device)
        self._model: Any = model.float() if self.device.type == "cpu" else model
        # The publisher's file must not add a temperature, or an end that the request ignores.
        self._model.generation_config = transformers.GenerationConfig(pad_token_id=_PAD)
        self.max_model_len = min(options.max_model_len, int(text.max_position_embeddings))
        self.vocab_size = int(text.vocab_size)
        self.eos_ids = eos_ids
        self._largest = max(1, options.rows // options.samples), options.samples
        self.weight_bytes = sum(p.numel() * p.element_size() for p in self._model.parameters())
        self.max_tokens = self._tokens_that_fit(options.kv_bytes)
        self.prefill_ms_per_token = self.decode_ms_per_token = 0.0

    @classmethod
    def load(cls, folder: Path, options: RunnerOptions, report: Report) -> StaticRunner:
        """From a model's folder. Raises LoadFailed. `report(stage, progress)` is called as the load goes on."""
        config = _read_config(folder)
        report("reading", 0.1)
        model = _load(folder, config, torch.device(options.device))
        report("building", 0.5)
        runner = cls(model, _eos_ids(folder, config), options)
        report("warming", 0.9)
        return runner

    def _tokens_that_fit(self, kv_bytes: int) -> int:
        """Tokens of a padded batch."""
        text = self._model.config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * self._model.dtype.itemsize
        cuda = self.device.type == "cuda"
        free = torch.cuda.mem_get_info(self.device)[0] // 2 if cuda else psutil.virtual_memory().available // 4
        tokens = int((kv_bytes or free) // per_token)
        if tokens < self.max_model_len:
            raise LoadFailed(
                f"the KV cache needs {per_token * self.max_model_len} bytes for one sequence of {self.max_model_len} tokens; "
                "give it more (--kv-bytes) or lower --max-model-len"
            )
        return tokens

    def generate(self, batch: Many[Sequence], after_step: AfterStep) -> None:
        """One call for the whole batch. It ends when `after_step` lets no sequence go on."""
        draw = _Draw(batch, after_step)
        longest = max(len(sequence.tokens) for sequence in batch)
        ids = torch.full((len(batch), longest), _PAD)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(batch):
            ids[row, longest - len(sequence.tokens) :] = torch.tensor(sequence.tokens)
            mask[row, longest - len(sequence.tokens) :] = 1
        self._model.generate(
            ids.to(self.device),
            attention_mask=mask.to(self.device),
            do_sample=False,  # _Draw leaves one token to choose
            max_new_tokens=max(sequence.sampling.max_tokens - sequence.index for sequence in batch),
            logits_processor=transformers.LogitsProcessorList([draw]),
            stopping_criteria=transformers.StoppingCriteriaList([draw.ended]),
        )

    def warm(self) -> None:
        """Measures what tokens cost, so that the first requests can be priced."""
        prompt = Sequence(0, "warm", 0, 0, [1] * _WARM_TOKENS, _WARM_TOKENS, Sampling(_WARM_STEPS, seed=0, temperature=0))
        times = []

        def note(going: list[Sequence], sampled: list[Sampled]) -> list[Sequence]:
            times.append(time.perf_counter())
            return going

        for _ in range(2):  # the first is slower than any after it
            times = [time.perf_counter()]
            self.generate([prompt], note)
        self.prefill_ms_per_token = (times[1] - times[0]) * 1000 / _WARM_TOKENS
        self.decode_ms_per_token = (times[-1] - times[1]) * 1000 / (_WARM_STEPS - 1)

    @property
    def kv_bytes_held(self) -> int:
        """None between batches."""
        return 0

    def stress(self) -> None:
        """Runs a batch as large as may be, for its first token."""
        rows, samples = self._largest
        length = max(1, min(rows, self.max_tokens // samples - 1))
        drawn = Sampling(1, seed=0, temperature=1.0, top_p=0.9)
        batch = [Sequence(0, "stress", row, 0, [1] * length, length, drawn) for row in range(samples)]
        self.generate(batch, lambda going, sampled: [])

    def wake(self, kv_bytes: int) -> None:
        """It never sleeps: `generate` has its cache for a batch alone."""

    def close(self) -> None:
        """Lets the weights go."""
        self._model = None


class _Draw:
    """Draws the tokens of the rows that still go, and leaves generate() nothing else to choose: a logits processor, whose
    `ended` is the stopping criterion."""

    def __init__(self, batch: Many[Sequence], after_step: AfterStep) -> None:
        self._rows = {sequence: row for row, sequence in enumerate(batch)}
        self._after_step = after_step
        self._going = list(batch)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.full((len(scores), 1), _PAD)
        if self._going:
            rows = [self._rows[sequence] for sequence in self._going]
            sampled = sample(scores[rows], self._going)
            chosen[rows, 0] = torch.tensor([token.token_id for token in sampled])
            self._going = self._after_step(self._going, sampled)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen.to(scores.device), 0.0)

    def ended(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """[rows]: whose sequence is done."""
        going = set(self._going)
        return torch.tensor([sequence not in going for sequence in self._rows], device=input_ids.device)
