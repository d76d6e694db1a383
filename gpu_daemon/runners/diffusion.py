"""Reads a diffusers folder part by part. Its files are untrusted: safetensors only, no code, classes from a list."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch

from gpu_daemon.errors import LoadFailed
from gpu_daemon.runners.pretrained import settle
from gpu_daemon.runners.torch_runner import Report

INDEX = "model_index.json"
diffusers.utils.logging.disable_progress_bar()


def load_parts(
    folder: Path, parts: Mapping[str, type], upcast: frozenset[str], device: torch.device, report: Report
) -> dict[str, Any]:
    """`parts` by name and class: on a GPU in float16, but for those in `upcast`; on a CPU in float32. Raises LoadFailed."""
    _check_classes(folder, parts)
    half = torch.float16 if device.type == "cuda" else torch.float32
    loaded = {}
    for done, (name, kind) in enumerate(parts.items()):
        report(f"reading {name}", 0.1 + 0.8 * done / len(parts))
        loaded[name] = _load_part(folder / name, kind, torch.float32 if name in upcast else half, device)
    return loaded


def _check_classes(folder: Path, parts: Mapping[str, type]) -> None:
    try:
        index = dict(json.loads((folder / INDEX).read_text()))
    except (OSError, ValueError, TypeError):
        raise LoadFailed(f"{folder.name}: {INDEX} is missing or damaged") from None
    for name, expected in parts.items():
        match index.get(name):
            case [_, str(found)] if found == expected.__name__:
                continue
            case found:
                shown = json.dumps(found)[:100]
                raise LoadFailed(f"{folder.name}: its {name} is {shown}, where only {expected.__name__} runs here")


def _load_part(folder: Path, kind: Any, dtype: torch.dtype, device: torch.device) -> Any:
    where = f"{folder.parent.name}: its {folder.name}"
    if not folder.is_dir():
        raise LoadFailed(f"{where} is missing")
    try:
        if not issubclass(kind, torch.nn.Module):
            return kind.from_pretrained(folder, local_files_only=True)
        options = {"use_safetensors": True, "variant": _variant(folder), "output_loading_info": True}
        network, info = kind.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, **options)
    except Exception as error:  # noqa: BLE001  The files decide what is raised: any kind of damage is one failure.
        raise LoadFailed(f"{where} cannot be read ({type(error).__name__})") from None
    if info["missing_keys"] or info["mismatched_keys"]:
        raise LoadFailed(f"{where} has not the weights that its config.json tells of")
    return settle(network, device)


def _variant(folder: Path) -> str | None:
    """`fp16` where a publisher's half-size files are the only ones."""
    names = [path.name for path in folder.glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None
