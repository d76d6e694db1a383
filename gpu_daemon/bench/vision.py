"""How soon this device answers a picture with Qwen2.5-VL-3B, at full size and without any weights.

Prints what decoding a picture of 1024 x 1024 takes, beside the engine; the time from there to a first token, alone and with the
picture seen lately; what each of eight streams waits for a token while it comes; and the peak of memory.
"""

from __future__ import annotations

import random
import time
from io import BytesIO
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gpu_daemon.bench import common
from gpu_daemon.bench.common import say
from gpu_daemon.engine.kv_cache import KvCache
from gpu_daemon.engine.sequence import Sampling, Sequence
from gpu_daemon.engine.step_scheduler import StepScheduler
from gpu_daemon.runners.torch_runner import RunnerOptions, TorchRunner
from gpu_daemon.runners.vision import Vision
from gpu_daemon.wire import place

_IDS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653}
_ROPE = {"rope_type": "default", "rope_theta": 1e6}
# (text, vision), numbers: as published, and tiny.
_FULL: tuple[dict[str, Any], dict[str, Any]] = (
    {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
     "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 128000,
     "rope_parameters": {**_ROPE, "mrope_section": [16, 24, 24]}},
    {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
     "fullatt_block_indexes": [7, 15, 23, 31]},
)  # fmt: skip
_TINY: tuple[dict[str, Any], dict[str, Any]] = (
    {"vocab_size": 151936, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
     "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
     "rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
    {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
     "fullatt_block_indexes": [1]},
)  # fmt: skip
_WORDS, _STREAMS = 32, 8


def build(device: str, tiny: bool) -> transformers.PreTrainedModel:
    """The model in bfloat16, its weights random."""
    text, vision = _TINY if tiny else _FULL
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **_IDS)
    with torch.device(device):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def photo(side: int, seed: int) -> bytes:
    """A PNG of smooth noise, which is about as large as one of a photo."""
    noise = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


class Bench:
    """One model on one device."""

    def __init__(self, runner: TorchRunner, eyes: Vision, step_tokens: int) -> None:
        self.runner = runner
        self.eyes = eyes
        self.scheduler = StepScheduler(KvCache(runner.blocks, runner.block_tokens), step_tokens, _STREAMS + 1)
        self.rng = random.Random(1)

    def sequence(self, data: bytes | None, tokens: int) -> Sequence:
        """A few words, after a picture if there is one."""
        words = [self.rng.randrange(100_000) for _ in range(_WORDS)]
        seen = [self.eyes.read(data, 0)] if data else []
        ids = [self.eyes.pad_id] * sum(picture.tokens for picture in seen) + words
        made = Sequence(0, "bench", 1, 0, ids, len(ids), Sampling(max_tokens=tokens, seed=0, temperature=0, ignore_eos=True))
        place([made], seen, self.eyes.pad_id)
        return made

    def first_token(self, sequence: Sequence) -> tuple[float, float]:
        """(seconds until the sequence has a first token, those of the longest step on the way)."""
        self.scheduler.waiting.append(sequence)
        started = last = time.perf_counter()
        longest = 0.0
        while not sequence.index:
            self.step()
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
        self.scheduler.remove(sequence)
        return last - started, longest

    def step(self) -> None:
        chunks = self.scheduler.plan()
        drawn = iter(self.runner.run(chunks))
        for chunk in chunks:
            self.scheduler.advance(chunk)
            if chunk.samples:
                chunk.sequence.tokens.append(next(drawn).token_id)


def report(bench: Bench, side: int) -> None:
    bench.first_token(bench.sequence(photo(side, 1), 1))  # pages touched, kernels chosen
    data = photo(side, 2)
    started = time.perf_counter()
    sequence = bench.sequence(data, 1)
    say(f"{side} x {side}", f"{sequence.pictures[0].tokens} tokens", f"decoded in {_ms(time.perf_counter() - started)}")
    say("first token", _ms(bench.first_token(sequence)[0]))
    say("seen lately", _ms(bench.first_token(bench.sequence(data, 1))[0]))
    streams = [bench.sequence(None, 10_000) for _ in range(_STREAMS)]
    for stream in streams:
        bench.first_token(stream)
    bench.scheduler.waiting.extend(streams)
    for _ in range(20):
        bench.step()
    first, longest = bench.first_token(bench.sequence(photo(side, 3), 1))
    say(f"beside {_STREAMS} streams", f"first {_ms(first)}", f"longest step {_ms(longest)}")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def main(arguments: list[str]) -> None:
    parser = common.options(__doc__, ["qwen2.5-vl-3b"])
    parser.add_argument("--side", type=int, default=1024, help="of the square picture, in pixels")
    parser.add_argument("--step-tokens", type=int, default=2048, help="token budget of one step")
    parser.add_argument("--kv-gib", type=float, default=2.0, help="size of the KV cache")
    args = parser.parse_args(arguments)
    device = common.begin(args)
    if args.tiny:
        args.side, args.kv_gib = 112, 0.2
    model = build(device, args.tiny)
    eyes = Vision(model, Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=12_845_056))
    options = RunnerOptions(device, 8192, kv_bytes=int(args.kv_gib * 2**30), threads=args.threads)
    runner = TorchRunner(model, frozenset(), options, eyes)
    with torch.inference_mode():
        report(Bench(runner, eyes, args.step_tokens), args.side)
    common.say_peak(device)
    runner.close()
