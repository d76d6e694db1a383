"""A tiny Kokoro: the official model with a narrow decoder, and as many voices as the real one has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gpu_daemon.runners.kokoro_model import build, saved_names

_VOICE_SHAPE = (510, 1, 256)
_VOICE_SCALE = 0.1  # about that of the published ones


def make_speech(recipe: dict[str, Any], target: Path) -> int:
    """Writes `target` and returns the number of parameters."""
    config = recipe["config"]
    (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    model = build(config)
    state = model.state_dict()
    save_file({name: state[name].contiguous() for name in saved_names(model)}, target / "model.safetensors")
    save_file({voice: torch.randn(_VOICE_SHAPE) * _VOICE_SCALE for voice in recipe["voices"]}, target / "voices.safetensors")
    return sum(parameter.numel() for parameter in model.parameters())
