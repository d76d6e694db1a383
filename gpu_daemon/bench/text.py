"""What this device does with the engine of text, at full size and without any weights.

Builds a model from its published numbers with random weights and drives the daemon's own scheduler, cache and runner. Prints
tokens/s by streams, beside the same work through `model.generate`; the time to a first token; one stream's share of what the
memory's bandwidth allows; what bringing KV back from host memory takes against computing it; and the peak of memory.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from gpu_daemon.bench import common
from gpu_daemon.bench.common import say
from gpu_daemon.engine.kv_cache import KvCache
from gpu_daemon.engine.sequence import Sampling, Sequence
from gpu_daemon.engine.step_scheduler import StepScheduler
from gpu_daemon.runners.torch_runner import RunnerOptions, TorchRunner

_SMOLLM2 = {"vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
_LLAMA = (transformers.LlamaConfig, transformers.LlamaForCausalLM)
_QWEN3 = (transformers.Qwen3Config, transformers.Qwen3ForCausalLM)
# The published configurations: (config class, model class), numbers.
MODELS: dict[str, tuple[tuple[Any, Any], dict[str, Any]]] = {
    "smollm2-135m": (_LLAMA, {**_SMOLLM2, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                              "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000.0}),
    "smollm2-360m": (_LLAMA, {**_SMOLLM2, "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
                              "num_attention_heads": 15, "num_key_value_heads": 5, "rope_theta": 100000.0}),
    "smollm2-1.7b": (_LLAMA, {**_SMOLLM2, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
                              "num_attention_heads": 32, "num_key_value_heads": 32, "rope_theta": 130000.0}),
    "qwen3-14b": (_QWEN3, {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40,
                           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
                           "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}),
}  # fmt: skip
_TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16,
}  # fmt: skip
_PROMPT = 64
_COPY_BYTES = 1 << 29


def build(name: str, device: str, tiny: bool) -> transformers.PreTrainedModel:
    """The model in bfloat16, its weights random."""
    (config_class, model_class), numbers = MODELS[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = model_class(config_class(**numbers | (_TINY if tiny else {})))
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


class Bench:
    """One model on one device. Sequences are numbered so that none shares a beginning with another."""

    def __init__(self, runner: TorchRunner, step_tokens: int) -> None:
        self.runner = runner
        self.step_tokens = step_tokens
        self.rng = random.Random(1)

    def run(self, streams: int, prompt: int, tokens: int) -> tuple[float, float]:
        """(seconds until all have a first token, seconds for the rest) of `streams` sequences."""
        runner = self.runner
        scheduler = StepScheduler(KvCache(runner.blocks, runner.block_tokens), self.step_tokens, streams)
        sequences = [self._sequence(prompt, tokens) for _ in range(streams)]
        scheduler.waiting.extend(sequences)
        started, first = time.perf_counter(), 0.0
        while scheduler.running or scheduler.waiting:
            self._step(scheduler)
            if not first and all(sequence.index for sequence in sequences):
                first = time.perf_counter()
        return first - started, time.perf_counter() - first

    def _step(self, scheduler: StepScheduler) -> None:
        chunks = scheduler.plan()
        drawn = iter(self.runner.run(chunks))
        for chunk in chunks:
            scheduler.advance(chunk)
            if chunk.samples:
                chunk.sequence.tokens.append(next(drawn).token_id)
                if chunk.sequence.index >= chunk.sequence.sampling.max_tokens:
                    scheduler.remove(chunk.sequence)

    def _sequence(self, prompt: int, tokens: int) -> Sequence:
        ids = [self.rng.randrange(3, self.runner.vocab_size) for _ in range(prompt)]
        sampling = Sampling(max_tokens=tokens, seed=0, temperature=0, ignore_eos=True)
        return Sequence(0, "bench", 1, 0, ids, prompt, sampling)


def generate(model: Any, device: str, streams: int, tokens: int) -> float:
    """Tokens a second of one `model.generate` call over as many equal prompts, prefill included."""
    ids = torch.randint(3, model.config.vocab_size, (streams, _PROMPT), device=device)
    options = {"attention_mask": torch.ones_like(ids), "min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
    return streams * tokens / _seconds(lambda: model.generate(ids, pad_token_id=0, **options), device)


def bandwidth(device: str) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / min(_seconds(lambda: target.copy_(source), device) for _ in range(5))


def _seconds(work: Callable[[], object], device: str) -> float:
    work()
    _settle(device)
    started = time.perf_counter()
    work()
    _settle(device)
    return time.perf_counter() - started


def _settle(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def report_streams(bench: Bench, generated: dict[int, float], tokens: int) -> float:
    """The table of streams; returns one stream's tokens a second."""
    say("streams", "tokens/s", "with prefill", "generate", "ratio")
    alone = 0.0
    for streams, other in generated.items():
        bench.run(streams, _PROMPT, 4)  # buckets are captured, pages touched
        first, rest = bench.run(streams, _PROMPT, tokens)
        decoding, whole = streams * (tokens - 1) / rest, streams * tokens / (first + rest)
        alone = alone or decoding
        say(streams, f"{decoding:.1f}", f"{whole:.1f}", f"{other:.1f}", f"{whole / other:.2f}" if other else "-")
    return alone


def report_restore(bench: Bench, tokens: int) -> None:
    runner = bench.runner
    blocks = tokens // runner.block_tokens
    saved = [runner.save(block) for block in range(blocks)]

    def restore() -> None:
        for block, data in enumerate(saved):
            runner.restore(block, data)

    restoring = _seconds(restore, str(runner.device))
    computing, _ = bench.run(1, tokens, 1)
    say(
        f"KV of {tokens}",
        f"restore {restoring * 1000:.0f} ms",
        f"compute {computing * 1000:.0f} ms",
        f"{computing / restoring:.1f}x",
    )


def main(arguments: list[str]) -> None:
    parser = common.options(__doc__, MODELS)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024, 8000], help="lengths whose first token is timed")
    parser.add_argument("--tokens", type=int, default=64, help="output tokens a stream")
    parser.add_argument("--step-tokens", type=int, default=2048, help="token budget of one step")
    parser.add_argument("--kv-gib", type=float, default=4.0, help="size of the KV cache")
    parser.add_argument("--no-generate", action="store_true", help="leave out `model.generate`")
    args = parser.parse_args(arguments)
    if args.tiny:
        args.streams, args.prompts, args.tokens, args.kv_gib = [1, 8], [256], 8, 0.2
    device = common.begin(args)
    model = build(args.model, device, args.tiny)
    generated = {n: 0.0 if args.no_generate else generate(model, device, n, args.tokens) for n in args.streams}
    length = max(*args.prompts, 4096) + args.tokens + 8
    options = RunnerOptions(device, length, kv_bytes=int(args.kv_gib * 2**30), threads=args.threads)
    bench = Bench(TorchRunner(model, frozenset(), options), args.step_tokens)
    floor = bandwidth(device) / bench.runner.weight_bytes
    alone = report_streams(bench, generated, args.tokens)
    say("one stream", f"{alone:.1f} tokens/s", f"floor {floor:.1f}", f"{alone / floor:.0%}")
    for prompt in args.prompts:
        first, _ = bench.run(1, prompt, 1)
        say(f"prompt {prompt}", f"first {first * 1000:.0f} ms")
    report_restore(bench, min(4096, bench.runner.max_model_len))
    common.say_peak(device)
    bench.runner.close()
