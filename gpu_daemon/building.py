"""From a folder to a model that can run, and what that took. Torch comes in at the first call, not before."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from gpu_daemon.check_folder import UnsafeFolder, check_folder
from gpu_daemon.config import DaemonConfig
from gpu_daemon.engine.grammar import GrammarCompiler
from gpu_daemon.engine.sequence import EngineKind
from gpu_daemon.errors import LoadFailed
from gpu_daemon.sizing import Conditions

if TYPE_CHECKING:
    from gpu_daemon.residents import AnyRunner, TextRunner
    from gpu_daemon.runners.parallel import Group

_LOG = logging.getLogger(__name__)


def find_device(config: DaemonConfig, group: Group | None) -> tuple[str, int]:
    """(device, bytes that models may use of it): what is free of a GPU, half of what is free of a CPU's. Of a group, of all its
    GPUs, or of the CPU that its ranks share."""
    from gpu_daemon.runners.torch_runner import device_memory, pick_device

    gc.collect()
    gc.freeze()  # what torch brought in stays: looking through it again takes 0.3 s, at each load and now and then
    device = pick_device(config.device, config.place.local_rank) if group is None else str(group.device)
    _, _, free = device_memory(device)
    return device, free * (group.size if group else 1) if device.startswith("cuda") else free // 2


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
    config: DaemonConfig,
    device: str,
    group: Group | None,
    kind: EngineKind,
    folder: Path,
    kv_bytes: int,
    report: Callable[[str, float], None],
) -> tuple[AnyRunner, int]:
    """The model, ready to run, and the most bytes that it took beside its KV. Raises LoadFailed."""
    try:
        check_folder(folder)
    except UnsafeFolder as error:
        raise LoadFailed(str(error)) from None
    from gpu_daemon.runners.memory import PeakMeter
    from gpu_daemon.runners.opening import loader_of
    from gpu_daemon.runners.parallel import Alone
    from gpu_daemon.runners.static_runner import StaticRunner
    from gpu_daemon.runners.torch_runner import TorchRunner, runner_options, set_threads

    ranks = group or Alone()
    set_threads(config.threads, ranks.local_size)
    load = loader_of(folder, kind, split=group is not None)  # before the other ranks are told
    options = runner_options(config, device, ranks, ranks.announce(folder.name), kv_bytes // ranks.size)
    with PeakMeter(device) as loading:
        runner = load(folder, options, report)
    if not isinstance(runner, TorchRunner | StaticRunner):
        with PeakMeter(device) as step:
            runner.warm()
            if device.startswith("cuda"):  # a CPU would be minutes over the largest work
                runner.stress()
        return runner, max(loading.peak_bytes, loading.held_bytes + step.peak_bytes)
    runner.warm()
    with PeakMeter(device) as step:
        runner.stress()
    return runner, max(loading.peak_bytes, loading.held_bytes + step.peak_bytes) - runner.kv_bytes_held


def grammars_of(folder: Path, runner: TextRunner) -> GrammarCompiler | None:
    """Ids in, ids out holds without a tokenizer; only grammars need to know how tokens are spelled."""
    try:
        return GrammarCompiler(folder / "tokenizer.json", runner.vocab_size, runner.eos_ids)
    except (OSError, ValueError) as error:
        _LOG.warning("%s takes no grammars: its tokenizer cannot be read (%s)", folder.name, type(error).__name__)
        return None


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error)
