"""The models of this daemon: loaded, joined, unloaded. One load at a time; a failure leaves what serves serving.

What does not fit the budget is refused. A model that is unloaded stays in host memory while there is room, and comes back
from there without its files being read again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from gpu_daemon.budget import Budget
from gpu_daemon.building import build, conditions, find_device, grammars_of, out_of_memory
from gpu_daemon.config import DaemonConfig
from gpu_daemon.engine.engine import Engine
from gpu_daemon.engine.kv_cache import KvCache
from gpu_daemon.engine.kv_store import HostMemory, KvStore
from gpu_daemon.engine.sequence import Delta, EngineKind
from gpu_daemon.engine.static_engine import Collector, StaticEngine
from gpu_daemon.engine.step_scheduler import StepScheduler
from gpu_daemon.engine.task_engine import TaskEngine
from gpu_daemon.engine.turns import DeviceTurns
from gpu_daemon.errors import LoadFailed, ModelNotReady
from gpu_daemon.folders import Folder, Folders, require_name
from gpu_daemon.host_weights import HostWeights, Kept
from gpu_daemon.residents import AnyEngine, AnyRunner, Loaded, Resident, TextRunner
from gpu_daemon.sessions import Sessions
from gpu_daemon.sizing import estimate

if TYPE_CHECKING:
    from gpu_daemon.runners.parallel import Group
    from gpu_daemon.runners.torch_runner import TorchRunner

_LOG = logging.getLogger(__name__)
KV_SHARE = 4  # of the budget, a quarter is one model's KV at most, unless it is said otherwise
RESCAN_SECONDS = 2.0


class Models:
    """Owns every Resident. Lives on the event loop; loading runs in a thread."""

    def __init__(self, config: DaemonConfig, deliver: Callable[[int, list[Delta]], None], group: Group | None = None) -> None:
        self._config = config
        self._deliver = deliver
        self.group = group  # the ranks that models are split over, if any
        self._lock = asyncio.Lock()
        self._turns = DeviceTurns()
        free = psutil.virtual_memory().available
        self.residents: dict[str, Resident] = {}
        self.folders: list[Folder] = []
        self.measured: dict[str, int] = {}  # the largest peak of each model so far
        self.news = asyncio.Event()  # set, and replaced, whenever a resident changes
        self.device = "?" if group is None else str(group.device)
        self.budget = Budget(0)
        self.host_memory = HostMemory(config.host_kv_bytes or free // 4)
        self.sessions = Sessions(config.kv_handover, config.token, self.host_memory)
        self.asleep: HostWeights[Loaded] = HostWeights(max(0, config.host_weights_bytes or free // 4))
        self._prepared = asyncio.create_task(self._prepare(), name="prepare")
        self._rescan = asyncio.create_task(self._look_again(), name="folders")

    async def _prepare(self) -> Folders:
        """Learns what the device is, which takes torch, which takes seconds to come in."""
        self.device, total = await asyncio.to_thread(find_device, self._config, self.group)
        self.budget.total = self._config.memory_bytes or total
        return Folders(self._config.models_dir, conditions(self._config, self.device))

    async def _look_again(self) -> None:
        folders = await self._prepared
        while True:
            try:
                self.folders = await asyncio.to_thread(folders.scan)
            except OSError as error:
                _LOG.warning("the models directory cannot be read: %s", error.strerror)
            await asyncio.sleep(RESCAN_SECONDS)

    def ready(self, name: str) -> Resident:
        """Raises ModelNotReady."""
        resident = self.residents.get(name)
        if resident is None or resident.state != "ready":
            raise ModelNotReady(f"{name} is not loaded")
        return resident

    def start_load(self, name: str, kind: EngineKind = EngineKind.CONTINUOUS) -> Resident:
        """Begins to load a model, or joins the load that is under way. Raises InvalidCommand for a name like no folder, and
        LoadFailed for a model that is here under the other engine."""
        require_name(name)
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
        async with self._lock:
            try:
                await self._bring(resident, await self._prepared)
            except LoadFailed as error:
                await self._failed(resident, str(error))
            except Exception as error:
                reason = "out of memory" if out_of_memory(error) else f"loading failed ({type(error).__name__})"
                await self._failed(resident, reason)
                raise
            else:
                await self._change(resident, state="ready", stage="ready", progress=1.0)

    async def _failed(self, resident: Resident, reason: str) -> None:
        self.budget.release(resident.name)
        await self._change(resident, state="failed", error=reason)

    async def _bring(self, resident: Resident, folders: Folders) -> None:
        """From host memory or from disk, within the budget. Raises LoadFailed."""
        folder = folders.path(resident.name)
        size = await asyncio.to_thread(estimate, folder, conditions(self._config, self.device, resident.kind))
        wanted = self._config.kv_bytes or self.budget.total // KV_SHARE
        resident.kv_bytes = self.budget.reserve(resident.name, size, wanted)
        loaded = await self._wake(resident, folder) or await self._read(resident, folders, folder)
        resident.runner, resident.grammars, resident.measured_bytes = loaded.runner, loaded.grammars, loaded.measured_bytes
        self.measured[resident.name] = max(loaded.measured_bytes, self.measured.get(resident.name, 0))
        self.budget.settle(resident.name, size.weights + size.activations + resident.kv_bytes)
        resident.engine = await asyncio.to_thread(self._engine, resident.name, loaded.runner)

    async def _wake(self, resident: Resident, folder: Path) -> Loaded | None:
        """From host memory; None when it is not there."""
        if resident.kind is not EngineKind.CONTINUOUS:
            return None
        from gpu_daemon.runners.torch_runner import TorchRunner

        asleep = self.asleep.take(resident.name, _written(folder))
        if asleep is not None:
            assert isinstance(asleep.runner, TorchRunner)
            await asyncio.to_thread(asleep.runner.wake, resident.kv_bytes)
        return asleep

    async def _read(self, resident: Resident, folders: Folders, folder: Path) -> Loaded:
        """From disk."""
        await asyncio.to_thread(folders.verify, folder)
        loop = asyncio.get_running_loop()

        def report(stage: str, progress: float) -> None:
            asyncio.run_coroutine_threadsafe(self._change(resident, stage=stage, progress=progress), loop)

        read = partial(build, self._config, self.device, self.group, resident.kind, folder, resident.kv_bytes, report)
        runner, measured = await asyncio.to_thread(read)
        grammars = await asyncio.to_thread(grammars_of, folder, runner) if isinstance(runner, TextRunner) else None
        return Loaded(runner, grammars, measured)

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
        await self._change(resident, state="unloading")
        await _until_idle([resident], grace_seconds)
        await asyncio.to_thread(self._put_to_sleep, resident)
        del self.residents[name]
        self.budget.release(name)
        self._tell()

    def _put_to_sleep(self, resident: Resident) -> None:
        """Ends its engine; its weights stay in host memory if there is room for them."""
        from gpu_daemon.runners.torch_runner import TorchRunner

        runner, grammars = resident.runner, resident.grammars
        whole = isinstance(runner, TorchRunner) and self.group is None and runner.eyes is None
        if not isinstance(runner, TorchRunner) or not whole or not self.asleep.has_room_for(runner.weight_bytes):
            resident.stop()
            return
        assert resident.engine is not None
        resident.engine.stop()
        runner.sleep()
        resident.engine = resident.runner = resident.grammars = None
        asleep = Loaded(runner, grammars, resident.measured_bytes)
        stamp = _written(self._config.models_dir / resident.name)
        self.asleep.keep(resident.name, Kept(asleep, runner.weight_bytes, stamp))

    async def drain(self, grace_seconds: float) -> bool:
        """Whether everything finished within the grace."""
        return await _until_idle(list(self.residents.values()), grace_seconds)

    async def close(self) -> None:
        """Stops every engine; what their caches know is left to the next daemon, where the configuration says so."""
        for task in (self._prepared, self._rescan):
            task.cancel()
        await asyncio.gather(self._prepared, self._rescan, return_exceptions=True)
        await asyncio.gather(*(asyncio.to_thread(resident.stop) for resident in self.residents.values()))
        await asyncio.to_thread(self.sessions.leave)

    async def _change(self, resident: Resident, **values: object) -> None:
        async with resident.changed:
            for name, value in values.items():
                setattr(resident, name, value)
            resident.changed.notify_all()
        self._tell()

    def _tell(self) -> None:
        self.news.set()
        self.news = asyncio.Event()


def _written(folder: Path) -> int:
    """When the folder's weights were last written: what other weights computed is of no use to these."""
    return max((path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")), default=0)


async def _until_idle(residents: list[Resident], grace_seconds: float) -> bool:
    """Engines report their load from their own threads, so it is looked at, not waited for."""
    deadline = asyncio.get_running_loop().time() + grace_seconds
    while any(r.engine and (r.engine.load.running or r.engine.load.waiting) for r in residents):
        if asyncio.get_running_loop().time() >= deadline:
            return False
        await asyncio.sleep(0.05)
    return True
