"""Which runner a model's folder wants: told by its config files, which are untrusted and name no code."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from gpu_daemon.engine.sequence import EngineKind
from gpu_daemon.errors import LoadFailed
from gpu_daemon.runners.torch_runner import Report, RunnerOptions

if TYPE_CHECKING:
    from gpu_daemon.residents import AnyRunner

Loader: TypeAlias = "Callable[[Path, RunnerOptions, Report], AnyRunner]"

# What a folder's files call the model: the module that runs it, imported when it is wanted, and its class.
_RUNNERS = {
    "LlamaForCausalLM": ("torch_runner", "TorchRunner"),
    "Qwen3ForCausalLM": ("torch_runner", "TorchRunner"),
    "Qwen2_5_VLForConditionalGeneration": ("torch_runner", "TorchRunner"),
    "BertModel": ("embedding", "EmbeddingRunner"),
    "WhisperForConditionalGeneration": ("transcription", "TranscriptionRunner"),
    "Kokoro": ("speech", "SpeechRunner"),
    "StableDiffusionPipeline": ("image", "ImageRunner"),
    "CogVideoXPipeline": ("video", "VideoRunner"),
}


def loader_of(folder: Path, kind: EngineKind, *, split: bool = False) -> Loader:
    """What loads the folder; `split` is over the ranks of a group. Raises LoadFailed."""
    name = _architecture(folder)
    if name not in _RUNNERS:
        raise LoadFailed(f"{folder.name}: the architecture {name[:100]} is not one of {', '.join(_RUNNERS)}")
    module, runner_class = _RUNNERS[name]
    if module != "torch_runner" and (split or kind is EngineKind.STATIC):
        raise LoadFailed(f"{folder.name}: only models of text are split over ranks, or batched statically")
    if kind is EngineKind.STATIC:
        module, runner_class = "static_runner", "StaticRunner"
    load: Loader = getattr(import_module(f"gpu_daemon.runners.{module}"), runner_class).load
    return load


def _architecture(folder: Path) -> str:
    """Diffusers' folders have an index; Kokoro's config names nothing, but only it has a vocoder of that kind."""
    if (folder / "model_index.json").is_file():
        return str(_read(folder / "model_index.json").get("_class_name"))
    config = _read(folder / "config.json")
    if "istftnet" in config:
        return "Kokoro"
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise LoadFailed(f"{folder.name}: config.json is missing or damaged")
    return str(architectures[0])


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise LoadFailed(f"{path.parent.name}: {path.name} is missing or damaged")
    return found
