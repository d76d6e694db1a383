"""What this device does with SD Turbo and CogVideoX-2B, at full size and without any weights.

Prints images or videos a second, made together and one by one; the longest step, which is what a chat on the same device waits
for; and the peak of memory. With `--tiny`, of networks as small as those that tests run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from gpu_daemon.bench import common
from gpu_daemon.bench.common import say
from gpu_daemon.engine.task import ImageWork, Task, VideoWork
from gpu_daemon.runners.denoiser import Denoiser
from gpu_daemon.runners.image import ImageRunner
from gpu_daemon.runners.tiny.tokenizers import clip_tokenizer, t5_tokenizer
from gpu_daemon.runners.video import VideoRunner

_RECIPES = Path(__file__).parents[2] / "fixtures" / "tiny"
_RUNNERS: dict[str, type[ImageRunner] | type[VideoRunner]] = {"sd-turbo": ImageRunner, "cogvideox-2b": VideoRunner}
# The published configurations, where they differ from the classes' own. Schedulers are in the recipes, as published.
_FULL: dict[str, dict[str, dict[str, Any]]] = {
    "sd-turbo": {
        "unet": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "sample_size": 64,
                 "use_linear_projection": True},
        "vae": {"block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
                "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "sample_size": 768},
        "text_encoder": {"hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
                         "num_hidden_layers": 23},
    },
    "cogvideox-2b": {
        "transformer": {},
        "vae": {},
        "text_encoder": {"d_ff": 10240, "d_model": 4096, "feed_forward_proj": "gated-gelu", "num_heads": 64, "num_layers": 24},
    },
}  # fmt: skip


def build(name: str, device: str, tiny: bool) -> Denoiser[Any]:
    """A runner whose weights are random, in the types that a loaded one has."""
    runner, recipe = _RUNNERS[name], json.loads((_RECIPES / f"{name}.json").read_text())
    half = torch.float16 if device.startswith("cuda") else torch.float32
    parts: dict[str, Any] = {}
    for part, kind in runner.PARTS.items():
        if part == "tokenizer":
            make = clip_tokenizer if runner is ImageRunner else t5_tokenizer
            parts[part] = make(recipe["tokenizer"])
            continue
        published = tiny or part == "scheduler"
        config = recipe["components"][part]["config"] if published else _FULL[name][part]
        parts[part] = _build(kind, config, torch.float32 if part in runner.UPCAST else half, device)
    return runner(parts, device)


def _build(kind: Any, config: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if not issubclass(kind, torch.nn.Module):
            return kind.from_config(config)
        with torch.device(device):
            network = kind(**config) if hasattr(kind, "load_config") else kind(kind.config_class(**config))
    finally:
        torch.set_default_dtype(before)
    return network.eval().requires_grad_(False)


def tasks(name: str, tiny: bool, steps: int, count: int) -> list[Task]:
    """As many as asked for, of the model's own size."""
    made = []
    for seed in range(count):
        if name == "sd-turbo":
            side = 64 if tiny else 512
            work: ImageWork | VideoWork = ImageWork(f"a boat, {seed}", side, side, steps or 1, seed)
            patches = side * side // 256
        else:
            width, height, frames = (64, 64, 9) if tiny else (720, 480, 49)
            work = VideoWork(f"a boat, {seed}", width, height, frames, steps or (4 if tiny else 50), seed)
            patches = ((frames - 1) // 4 + 1) * (width * height // 256)
        made.append(Task(0, "bench", 1, 0, work, units=work.steps * patches))
    return made


def run(runner: Denoiser[Any], going: list[Task]) -> tuple[float, float]:
    """(seconds until all are made, seconds of the longest step)."""
    started, longest = time.perf_counter(), 0.0
    while going:
        began = time.perf_counter()
        finished = {progress.task for progress in runner.step(going) if progress.finished}
        longest = max(longest, time.perf_counter() - began)
        going = [task for task in going if task not in finished]
    return time.perf_counter() - started, longest


def main(arguments: list[str]) -> None:
    parser = common.options(__doc__, _RUNNERS)
    parser.add_argument("--batches", type=int, nargs="+", help="how many are made together; images: 1 8, videos: 1")
    parser.add_argument("--steps", type=int, default=0, help="of denoising, instead of the model's own number")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(arguments)
    device = common.begin(args)
    runner = build(args.model, device, args.tiny)
    run(runner, tasks(args.model, args.tiny, args.steps, 1))  # the first run is slower than any after it
    say("together", "seconds each", "a second", "one by one", "ratio", "longest step", "peak GiB")
    for count in args.batches or ([1, 8] if args.model == "sd-turbo" else [1]):
        report(runner, args, count, device)


def report(runner: Denoiser[Any], args: argparse.Namespace, count: int, device: str) -> None:
    """A row: `count` together, then the same one by one, in turns; medians."""
    together, alone, longest = [], [], 0.0
    for _ in range(args.repeats):
        seconds, longest_step = run(runner, tasks(args.model, args.tiny, args.steps, count))
        together.append(seconds)
        longest = max(longest, longest_step)
        if count > 1:
            alone.append(sum(run(runner, [task])[0] for task in tasks(args.model, args.tiny, args.steps, count)))
    both, each = statistics.median(together), statistics.median(alone or together)
    say(
        count, f"{both / count:.3f}", f"{count / both:.2f}", f"{count / each:.2f}", f"{each / both:.2f}",
        f"{longest:.3f} s", common.peak_gib(device),
    )  # fmt: skip
