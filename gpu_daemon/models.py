"""The models of this daemon: loaded, joined, unloaded. One load at a time; a failure leaves what serves serving."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from gpu_daemon.config import DaemonConfig
from gpu_daemon.engine.engine import Engine, EngineThread
from gpu_daemon.engine.grammar import GrammarCompiler
from gpu_daemon.engine.kv_cache import KvCache
from gpu_daemon.engine.kv_store import HostMemory, KvStore
from gpu_daemon.engine.sequence import Delta, EngineKind
from gpu_daemon.engine.static_engine import Collector, StaticEngine
from gpu_daemon.engine.step_scheduler import StepScheduler
from gpu_daemon.errors import InvalidCommand, LoadFailed, ModelNotReady

if TYPE_CHECKING:
    from gpu_daemon.runners.static_runner import StaticRunner
    from gpu_daemon.runners.torch_runner import TorchRunner

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


@dataclass(slots=True)
class Resident:
    """One model in memory, or on its way there or out."""

    name: str
    kind: EngineKind = EngineKind.CONTINUOUS
    state: str = "loading"  # loading, ready, unloading, failed
    stage: str = "reading"
    progress: float = 0.0
    error: str = ""
    runner: TorchRunner | StaticRunner | None = None
    engine: EngineThread | None = None
    grammars: GrammarCompiler | None = None  # None: the model's folder has no tokenizer
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)


class Models:
    """Owns every Resident. Lives on the event loop; loading runs in a thread."""

    def __init__(self, config: DaemonConfig, deliver: Callable[[int, list[Delta]], None]) -> None:
        self._config = config
        self._deliver = deliver
        self._lock = asyncio.Lock()
        self.residents: dict[str, Resident] = {}
        self.device = "?"
        self.host_memory = HostMemory(config.host_kv_bytes or psutil.virtual_memory().available // 4)

    async def warm(self) -> None:
        """Imports what loading needs, and finds the device, so that the first load is only a load."""
        await asyncio.to_thread(self._find_device)

    def _find_device(self) -> None:
        from gpu_daemon.runners.static_runner import StaticRunner  # noqa: F401
        from gpu_daemon.runners.torch_runner import pick_device

        self.device = pick_device(self._config.device)

    def ready(self, name: str) -> Resident:
        """Raises ModelNotReady."""
        resident = self.residents.get(name)
        if resident is None or resident.state != "ready":
            raise ModelNotReady(f"{name} is not loaded")
        return resident

    def start_load(self, name: str, kind: EngineKind = EngineKind.CONTINUOUS) -> Resident:
        """Begins to load a model, or joins the load that is under way. Raises InvalidCommand for a name like no folder, and
        LoadFailed for a model that is here under the other engine."""
        if not _NAME.fullmatch(name):
            raise InvalidCommand("a model's name is small letters, digits, dots, dashes and underscores")
        resident = self.residents.get(name)
        if resident is None or resident.state == "failed":
            resident = self.residents[name] = Resident(name, kind)
            resident_task = asyncio.create_task(self._load(resident), name=f"load {name}")
            resident_task.add_done_callback(lambda task: task.cancelled() or task.exception())
        if resident.kind is not kind:
            raise LoadFailed(f"{name} is {resident.state} under the {resident.kind.value} engine: unload it first")
        return resident

    async def _load(self, resident: Resident) -> None:
        loop = asyncio.get_running_loop()

        def report(stage: str, progress: float) -> None:
            asyncio.run_coroutine_threadsafe(_change(resident, stage=stage, progress=progress), loop)

        async with self._lock:
            try:
                folder = self._config.models_dir / resident.name
                runner = await asyncio.to_thread(self._build, resident.kind, folder, report)
                resident.grammars = await asyncio.to_thread(_grammars, folder, runner)
            except LoadFailed as error:
                await _change(resident, state="failed", error=str(error))
                return
            except Exception as error:
                await _change(resident, state="failed", error=f"loading failed ({type(error).__name__})")
                raise
            resident.runner = runner
            resident.engine = self._engine(resident.name, runner)
            await _change(resident, state="ready", stage="ready", progress=1.0)

    def _build(self, kind: EngineKind, folder: Path, report: Callable[[str, float], None]) -> TorchRunner | StaticRunner:
        # Imported here, so that the daemon answers its health check while torch is still on its way in.
        from gpu_daemon.runners.static_runner import StaticRunner
        from gpu_daemon.runners.torch_runner import RunnerOptions, TorchRunner, pick_device, set_threads

        config = self._config
        set_threads(config.threads)
        self.device = pick_device(config.device)
        options = RunnerOptions(
            device=self.device,
            max_model_len=config.max_model_len,
            kv_bytes=config.kv_bytes,
            threads=config.threads,
            int8=config.int8,
        )
        runner_class = StaticRunner if kind is EngineKind.STATIC else TorchRunner
        runner = runner_class.load(folder, options, report)
        runner.warm()
        return runner

    def _engine(self, name: str, runner: TorchRunner | StaticRunner) -> EngineThread:
        from gpu_daemon.runners.torch_runner import TorchRunner

        if isinstance(runner, TorchRunner):
            return Engine(name, runner, self._scheduler(name, runner), self._deliver)
        window = self._config.static_window_ms / 1000
        return StaticEngine(name, runner, Collector(window, self._config.max_sequences, runner.max_tokens), self._deliver)

    def _scheduler(self, name: str, runner: TorchRunner) -> StepScheduler:
        """The bookkeeping of one model: its blocks, and what the host's memory keeps of them."""
        weights = f"{name}@{_written(self._config.models_dir / name)}"
        store = KvStore(self.host_memory, weights, runner.block_bytes, runner.block_costs(), runner.save, runner.restore)
        cache = KvCache(runner.blocks, runner.block_tokens, store)
        return StepScheduler(cache, self._config.step_tokens, self._config.max_sequences)

    async def unload(self, name: str, grace_seconds: float) -> None:
        """Removes a model once its sequences are done, or the grace is over. Raises ModelNotReady."""
        resident = self.ready(name)
        await _change(resident, state="unloading")
        await _until_idle([resident], grace_seconds)
        del self.residents[name]
        await asyncio.to_thread(_stop, resident)

    async def drain(self, grace_seconds: float) -> bool:
        """Whether everything finished within the grace."""
        return await _until_idle(list(self.residents.values()), grace_seconds)

    async def close(self) -> None:
        await asyncio.gather(*(asyncio.to_thread(_stop, resident) for resident in self.residents.values()))


def _grammars(folder: Path, runner: TorchRunner | StaticRunner) -> GrammarCompiler | None:
    """Ids in, ids out holds without a tokenizer; only grammars need to know how tokens are spelled."""
    try:
        return GrammarCompiler(folder / "tokenizer.json", runner.vocab_size, runner.eos_ids)
    except (OSError, ValueError) as error:
        _LOG.warning("%s takes no grammars: its tokenizer cannot be read (%s)", folder.name, type(error).__name__)
        return None


def _written(folder: Path) -> int:
    """When the folder's weights were last written: what other weights computed is of no use to these."""
    return max(path.stat().st_mtime_ns for path in folder.glob("*.safetensors"))


def _stop(resident: Resident) -> None:
    if resident.engine is not None and resident.runner is not None:
        resident.engine.stop()
        resident.runner.close()
    resident.engine = resident.runner = resident.grammars = None


async def _until_idle(residents: list[Resident], grace_seconds: float) -> bool:
    """Engines report their load from their own threads, so it is looked at, not waited for."""
    deadline = asyncio.get_running_loop().time() + grace_seconds
    while any(r.engine and (r.engine.load.running or r.engine.load.waiting) for r in residents):
        if asyncio.get_running_loop().time() >= deadline:
            return False
        await asyncio.sleep(0.05)
    return True


async def _change(resident: Resident, **values: object) -> None:
    async with resident.changed:
        for name, value in values.items():
            setattr(resident, name, value)
        resident.changed.notify_all()
