"""How fast this device speaks with Kokoro, at full size and without any weights.

Prints the real-time factor (seconds of work a second of sound) of a text of 500 characters and of the piece that is spoken
first, how much sooner that is heard, what a batch of four takes against one by one, and the peak of memory.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from gpu_daemon.bench import common
from gpu_daemon.bench.common import say
from gpu_daemon.runners.kokoro_model import build
from gpu_daemon.runners.kokoro_voice import SAMPLE_RATE, Utterance, fuse, speak

CONFIG: dict[str, Any] = {
    "istftnet": {
        "upsample_kernel_sizes": [20, 12], "upsample_rates": [10, 6], "gen_istft_hop_size": 5, "gen_istft_n_fft": 20,
        "resblock_dilation_sizes": [[1, 3, 5]] * 3, "resblock_kernel_sizes": [3, 7, 11], "upsample_initial_channel": 512,
    },
    "dim_in": 64, "dropout": 0.2, "hidden_dim": 512, "max_dur": 50, "n_layer": 3, "n_mels": 80, "n_token": 178,
    "style_dim": 128, "text_encoder_kernel_size": 5,
    "plbert": {
        "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 2048, "max_position_embeddings": 512,
        "num_hidden_layers": 12, "dropout": 0.1,
    },
    "vocab": {},
}  # fmt: skip
_TINY = Path(__file__).parents[2] / "fixtures" / "tiny" / "kokoro-82m.json"
_SPEED = 9.0  # random weights speak slowly; with this a phoneme is about as long as a real one
_WHOLE, _FIRST, _PIECE = 490, 60, 150  # phonemes


def utterance(phonemes: int, seed: int) -> Utterance:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 178, (phonemes,), generator=random).tolist()
    return Utterance([0, *ids, 0], torch.randn(256, generator=random) * 0.1, _SPEED, seed)


def timed(model: Any, batches: list[list[Utterance]], repeats: int) -> tuple[float, float]:
    """(seconds, the best of some runs, seconds of sound) of all batches, one after the other."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        sounds = [sound for batch in batches for sound in speak(model, batch)]  # on the CPU: the device is done with them
        best = min(best, time.perf_counter() - started)
    return best, sum(map(len, sounds)) / SAMPLE_RATE


def main(arguments: list[str]) -> None:
    parser = common.options(__doc__, ["kokoro-82m"])
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the best counts")
    args = parser.parse_args(arguments)
    device = common.begin(args)
    model = fuse(build(_recipe() if args.tiny else CONFIG)).to(device)
    timed(model, [[utterance(_FIRST, 0)]], 1)
    first, first_sound = timed(model, [[utterance(_FIRST, 0)]], args.repeats)
    whole, sound = timed(model, [[utterance(_WHOLE, 0)]], args.repeats)
    say("first piece", f"{first:.3f} s", f"{first_sound:.1f} s of sound", f"factor {first / first_sound:.3f}")
    say("whole text", f"{whole:.3f} s", f"{sound:.1f} s of sound", f"factor {whole / sound:.3f}", f"{whole / first:.1f}x later")
    four = [utterance(_PIECE + 10 * i, i) for i in range(4)]
    together, sound = timed(model, [four], args.repeats)
    alone, _ = timed(model, [[one] for one in four], args.repeats)
    say(
        "four at once",
        f"{together:.3f} s",
        f"one by one {alone:.3f} s",
        f"{alone / together:.2f}x",
        f"{sound / together:.1f}x realtime",
    )
    common.say_peak(device)


def _recipe() -> dict[str, Any]:
    config: dict[str, Any] = json.loads(_TINY.read_text())["config"]
    return config
