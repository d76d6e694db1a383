"""Raw `transformers` models of a folder that are not decoders of text: safetensors only, no code, nothing left to chance."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from gpu_daemon.errors import LoadFailed


def load_pretrained(kind: Any, folder: Path, device: str, **options: Any) -> Any:
    """A model of the class `kind` in float32. Raises LoadFailed, for a weight that is missing too."""
    try:
        model, info = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise LoadFailed(f"{folder.name}: the weights cannot be read ({type(error).__name__})") from None
    if info["missing_keys"] or info["mismatched_keys"]:
        raise LoadFailed(f"{folder.name}: the weights are not those of its config.json")
    return settle(model, device)


def settle(model: Any, device: str | torch.device) -> Any:
    """On its device, and there to be run only. A CPU's weights are copied out of the file, which may be replaced."""
    if torch.device(device).type == "cpu":
        for tensor in chain(model.parameters(), model.buffers()):
            tensor.data = tensor.data.clone()
    return model.to(device).eval().requires_grad_(False)


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
