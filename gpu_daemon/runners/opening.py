"""Which runner a model's folder wants: told by its config files, which are untrusted and name no code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gpu_daemon.engine.sequence import EngineKind
from gpu_daemon.runners.static_runner import StaticRunner
from gpu_daemon.runners.torch_runner import Report, RunnerOptions, TorchRunner

if TYPE_CHECKING:
    from gpu_daemon.models import AnyRunner


def open_runner(folder: Path, kind: EngineKind, options: RunnerOptions, report: Report) -> AnyRunner:
    """Loads the folder's model. Raises LoadFailed."""
    runner_class = StaticRunner if kind is EngineKind.STATIC else TorchRunner
    return runner_class.load(folder, options, report)
