"""Loads a diffusers folder, component by component. Its files are untrusted: safetensors only, no code, classes from a list."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch

from gpu_daemon.errors import LoadFailed
from gpu_daemon.runners.denoiser import Denoiser
from gpu_daemon.runners.image import ImageRunner
from gpu_daemon.runners.torch_runner import Report, RunnerOptions
from gpu_daemon.runners.video import VideoRunner

INDEX = "model_index.json"
PIPELINES: dict[str, type[ImageRunner] | type[VideoRunner]] = {
    "StableDiffusionPipeline": ImageRunner,
    "CogVideoXPipeline": VideoRunner,
}
diffusers.utils.logging.disable_progress_bar()


def load(folder: Path, options: RunnerOptions, report: Report) -> Denoiser[Any]:
    """From a model's folder. Raises LoadFailed. `report(stage, progress)` is called as the load goes on."""
    index = _read_index(folder)
    runner = PIPELINES[index["_class_name"]]
    _check_classes(folder, index, runner.PARTS)
    device = torch.device(options.device)
    half = torch.float16 if device.type == "cuda" else torch.float32
    parts = {}
    for done, name in enumerate(runner.PARTS):
        report(f"reading {name}", 0.1 + 0.8 * done / len(runner.PARTS))
        parts[name] = _load_part(folder / name, runner.PARTS[name], torch.float32 if name in runner.UPCAST else half, device)
    report("warming", 0.9)
    return runner(parts, options.device)


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text())
        pipeline = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise LoadFailed(f"{folder.name}: {INDEX} is missing or damaged") from None
    if pipeline not in PIPELINES:
        raise LoadFailed(f"{folder.name}: the pipeline {pipeline} is not one of {', '.join(PIPELINES)}")
    return index


def _check_classes(folder: Path, index: Mapping[str, Any], parts: Mapping[str, type]) -> None:
    for name, expected in parts.items():
        match index.get(name):
            case [_, str(found)] if found == expected.__name__:
                continue
            case found:
                raise LoadFailed(f"{folder.name}: its {name} is {json.dumps(found)}, where only {expected.__name__} runs here")


def _load_part(folder: Path, kind: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A network is on the device, in `dtype`; tokenizers and schedulers have neither."""
    where = f"{folder.parent.name}: its {folder.name}"
    if not folder.is_dir():
        raise LoadFailed(f"{where} is missing")
    network = issubclass(kind, torch.nn.Module)
    options = {"torch_dtype": dtype, "use_safetensors": True, "variant": _variant(folder)} if network else {}
    try:
        part = kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # noqa: BLE001  The files decide what is raised: any kind of damage is one failure.
        raise LoadFailed(f"{where} cannot be read ({type(error).__name__})") from None
    return part.to(device).eval().requires_grad_(False) if network else part


def _variant(folder: Path) -> str | None:
    """`fp16` where a publisher's half-size files are the only ones."""
    names = [path.name for path in folder.glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None
