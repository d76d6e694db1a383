"""Models of sound, in float32 on any device."""

from __future__ import annotations

import math
from typing import Any

from gpu_daemon import limits
from gpu_daemon.sizing.figures import Conditions, Estimate
from gpu_daemon.sizing.headers import Tensor, floats

_FRAMES_A_PHONEME = 1.8  # as the published voices speak a long piece, at their own speed
_WAVES = 7.7  # tensors of the generator's last width that it holds at once
_COPIES = 1  # that a CPU's convolutions make of one
_DICTIONARIES = 230 << 20  # of what turns text into phonemes, in the host's memory


def estimate_kokoro(tensors: list[Tensor], config: dict[str, Any], at: Conditions) -> Estimate:
    """One piece as long as any at the end of the generator, where a frame has become hundreds of samples."""
    generator = config["istftnet"]
    rates = generator["upsample_rates"]
    width = generator["upsample_initial_channel"] >> len(rates)
    samples = 2 * limits.PHONEMES * _FRAMES_A_PHONEME * math.prod(rates)
    activations = int(samples * width * 4 * (_WAVES if at.cuda else _WAVES + _COPIES))
    return Estimate(floats(tensors) * 4 + (0 if at.cuda else _DICTIONARIES), activations)


def estimate_whisper(tensors: list[Tensor], config: dict[str, Any], at: Conditions) -> Estimate:
    """Keys and values of every window that is being written, and the encoder over those that are heard in one step."""
    hidden, inner, positions = config["d_model"], config["encoder_ffn_dim"], config["max_source_positions"]
    window = 4 * 2 * config["decoder_layers"] * hidden * (positions + config["max_target_positions"])
    hearing = 4 * positions * (2 * inner + 7 * hidden // 2)
    activations = limits.WINDOW_TASKS[at.kind] * window + limits.WINDOWS_HEARD[at.kind] * hearing
    return Estimate(floats(tensors) * 4, activations)
