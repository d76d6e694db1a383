"""The models of this daemon: loaded, joined, unloaded. One load at a time; a failure leaves what serves serving."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

import psutil

from gpu_daemon.check_folder import UnsafeFolder, check_folder
from gpu_daemon.config import DaemonConfig
from gpu_daemon.engine.engine import Engine
from gpu_daemon.engine.grammar import GrammarCompiler
from gpu_daemon.engine.kv_cache import KvCache
from gpu_daemon.engine.kv_store import HostMemory, KvStore
from gpu_daemon.engine.picture import Eyes
from gpu_daemon.engine.sequence import Delta, EngineKind, Sequence
from gpu_daemon.engine.static_engine import Collector, StaticEngine
from gpu_daemon.engine.step_scheduler import StepScheduler
from gpu_daemon.engine.task import Task, TaskRunner
from gpu_daemon.engine.task_engine import TaskEngine
from gpu_daemon.engine.turns import DeviceTurns
from gpu_daemon.errors import InvalidCommand, LoadFailed, ModelNotReady
from gpu_daemon.sessions import Sessions

if TYPE_CHECKING:
    from gpu_daemon.runners.parallel import Group
    from gpu_daemon.runners.static_runner import StaticRunner
    from gpu_daemon.runners.torch_runner import TorchRunner

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


@runtime_checkable
class TextRunner(Protocol):
    """What both engines of text ask of their runners, beside running."""

    max_model_len: int
    vocab_size: int
    eos_ids: frozenset[int]
    weight_bytes: int
    prefill_ms_per_token: float
    decode_ms_per_token: float

    @property
    def eyes(self) -> Eyes | None:
        """None: the model does not see."""

    def close(self) -> None: ...


AnyRunner: TypeAlias = "TorchRunner | StaticRunner | TaskRunner"
AnyEngine: TypeAlias = Engine | StaticEngine | TaskEngine


@dataclass(slots=True)
class Resident:
    """One model in memory, or on its way there or out."""

    name: str
    kind: EngineKind = EngineKind.CONTINUOUS
    state: str = "loading"  # loading, ready, unloading, failed
    stage: str = "reading"
    progress: float = 0.0
    error: str = ""
    runner: AnyRunner | None = None
    engine: AnyEngine | None = None
    grammars: GrammarCompiler | None = None  # None: the model's folder has no tokenizer
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def text_runner(self) -> TextRunner:
        """Raises InvalidCommand for a model that is not one of text."""
        if not isinstance(self.runner, TextRunner):
            raise InvalidCommand(f"{self.name} does not continue text")
        return self.runner

    @property
    def task_runner(self) -> TaskRunner:
        """Raises InvalidCommand for a model of text."""
        if self.runner is None or isinstance(self.runner, TextRunner):
            raise InvalidCommand(f"{self.name} only continues text")
        return self.runner

    def start(self, sequences: list[Sequence]) -> None:
        assert isinstance(self.engine, Engine | StaticEngine)
        self.engine.submit(sequences)

    def start_tasks(self, tasks: list[Task]) -> None:
        assert isinstance(self.engine, TaskEngine)
        self.engine.submit(tasks)


class Models:
    """Owns every Resident. Lives on the event loop; loading runs in a thread."""

    def __init__(self, config: DaemonConfig, deliver: Callable[[int, list[Delta]], None], group: Group | None = None) -> None:
        self._config = config
        self._deliver = deliver
        self.group = group  # the ranks that models are split over, if any
        self._lock = asyncio.Lock()
        self._turns = DeviceTurns()
        self.residents: dict[str, Resident] = {}
        self.device = "?" if group is None else str(group.device)
        self.host_memory = HostMemory(config.host_kv_bytes or psutil.virtual_memory().available // 4)
        self.sessions = Sessions(config.kv_handover, config.token, self.host_memory)

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
        if self.group is not None and kind is EngineKind.STATIC:
            raise LoadFailed(f"{name}: the static engine runs on one device, not on a tensor-parallel group")
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
                if isinstance(runner, TextRunner):
                    resident.grammars = await asyncio.to_thread(_grammars, folder, runner)
                engine = await asyncio.to_thread(self._engine, resident.name, runner)
            except LoadFailed as error:
                await _change(resident, state="failed", error=str(error))
                return
            except Exception as error:
                await _change(resident, state="failed", error=f"loading failed ({type(error).__name__})")
                raise
            resident.runner, resident.engine = runner, engine
            await _change(resident, state="ready", stage="ready", progress=1.0)

    def _build(self, kind: EngineKind, folder: Path, report: Callable[[str, float], None]) -> AnyRunner:
        try:
            check_folder(folder)
        except UnsafeFolder as error:
            raise LoadFailed(str(error)) from None
        # Imported here, so that the daemon answers its health check while torch is still on its way in.
        from gpu_daemon.runners.opening import loader_of
        from gpu_daemon.runners.parallel import Alone
        from gpu_daemon.runners.torch_runner import pick_device, runner_options, set_threads

        config, group = self._config, self.group or Alone()
        set_threads(config.threads, group.local_size)
        self.device = pick_device(config.device, config.place.local_rank)
        load = loader_of(folder, kind, split=self.group is not None)  # before the other ranks are told
        options = runner_options(config, self.device, group, group.announce(folder.name))
        runner = load(folder, options, report)
        runner.warm()
        return runner

    def _engine(self, name: str, runner: AnyRunner) -> AnyEngine:
        from gpu_daemon.runners.static_runner import StaticRunner
        from gpu_daemon.runners.torch_runner import TorchRunner

        turn = partial(self._turns.turn, name)
        if isinstance(runner, TorchRunner):
            return Engine(name, runner, self._scheduler(name, runner), self._deliver, turn)
        if isinstance(runner, StaticRunner):
            window = self._config.static_window_ms / 1000
            collector = Collector(window, self._config.max_sequences, runner.max_tokens)
            return StaticEngine(name, runner, collector, self._deliver, turn)
        return TaskEngine(name, runner, self._deliver, turn)

    def _scheduler(self, name: str, runner: TorchRunner) -> StepScheduler:
        """The bookkeeping of one model: its blocks, and what the host's memory keeps of them."""
        weights = f"{name}@{_written(self._config.models_dir / name)}{'+int8' if self._config.int8 else ''}"
        store = KvStore(self.host_memory, weights, runner.block_bytes, runner.block_costs(), runner.save, runner.restore)
        self.sessions.welcome(weights, runner, store)
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
        """Stops every engine; what their caches know is left to the next daemon, where the configuration says so."""
        await asyncio.gather(*(asyncio.to_thread(_stop, resident) for resident in self.residents.values()))
        await asyncio.to_thread(self.sessions.leave)


def _grammars(folder: Path, runner: TextRunner) -> GrammarCompiler | None:
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
