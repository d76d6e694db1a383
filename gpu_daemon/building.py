"""From a folder to a model that can run, and what that took. Torch comes in at the first call, not before."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from gpu_daemon.config import DaemonConfig
from gpu_daemon.engine.grammar import GrammarCompiler
from gpu_daemon.engine.sequence import EngineKind
from gpu_daemon.sizing import Conditions

if TYPE_CHECKING:
    from gpu_daemon.runners.static_runner import StaticRunner
    from gpu_daemon.runners.torch_runner import TorchRunner

CPU_STRESS_ROWS = 64  # a CPU's activations grow with the rows and nothing else; a full step would take it seconds
_LOG = logging.getLogger(__name__)


def find_device(config: DaemonConfig) -> tuple[str, int]:
    """(device, bytes that models may use of it): what is free of a GPU, half of what is free of a CPU's."""
    from gpu_daemon.runners.torch_runner import device_memory, pick_device

    device = pick_device(config.device)
    _, _, free = device_memory(device)
    return device, free if device.startswith("cuda") else free // 2


def conditions(config: DaemonConfig, device: str, kind: EngineKind = EngineKind.CONTINUOUS) -> Conditions:
    return Conditions(
        cuda=device.startswith("cuda"),
        length=config.max_model_len,
        rows=config.step_tokens,
        samples=config.max_sequences,
        threads=config.threads or psutil.cpu_count(logical=False) or 1,
        int8=config.int8,
        static=kind is EngineKind.STATIC,
    )


def build(
    config: DaemonConfig, device: str, kind: EngineKind, folder: Path, kv_bytes: int, report: Callable[[str, float], None]
) -> tuple[TorchRunner | StaticRunner, int]:
    """The model, ready to run, and the most bytes that it took beside its KV. Raises LoadFailed."""
    from gpu_daemon.runners.memory import PeakMeter
    from gpu_daemon.runners.static_runner import StaticRunner
    from gpu_daemon.runners.torch_runner import RunnerOptions, TorchRunner, set_threads

    set_threads(config.threads)
    options = RunnerOptions(
        device=device,
        max_model_len=config.max_model_len,
        kv_bytes=kv_bytes,
        threads=config.threads,
        int8=config.int8,
        rows=config.step_tokens if device.startswith("cuda") else min(CPU_STRESS_ROWS, config.step_tokens),
        samples=config.max_sequences,
    )
    runner_class = StaticRunner if kind is EngineKind.STATIC else TorchRunner
    with PeakMeter(device) as loading:
        runner = runner_class.load(folder, options, report)
    runner.warm()
    with PeakMeter(device) as step:
        runner.stress()
    return runner, max(loading.peak_bytes, loading.held_bytes + step.peak_bytes) - runner.kv_bytes_held


def grammars_of(folder: Path, runner: TorchRunner | StaticRunner) -> GrammarCompiler | None:
    """Ids in, ids out holds without a tokenizer; only grammars need to know how tokens are spelled."""
    try:
        return GrammarCompiler(folder / "tokenizer.json", runner.vocab_size, runner.eos_ids)
    except (OSError, ValueError) as error:
        _LOG.warning("%s takes no grammars: its tokenizer cannot be read (%s)", folder.name, type(error).__name__)
        return None


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error)
