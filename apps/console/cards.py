"""A worker's memory and its models, as the placement board shows them: pure but for the marker of tiny weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from django.conf import settings

from apps.core.types import ResidentModel, WorkerSnapshot
from apps.fleet.models import Placement, Worker
from apps.fleet.weights import is_tiny


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a device, in bytes. `weights`, `kv` and `other` are the models'; `elsewhere` is used by whoever else is on it."""

    total: int = 0
    budget: int = 0
    weights: int = 0
    kv: int = 0
    other: int = 0
    elsewhere: int = 0


@dataclass(frozen=True, slots=True)
class Chip:
    """A model on a worker. `state` is ready, loading, unloading, failed, wanted (placed, and not here yet) or asleep (in host
    memory only); `note` says more for people. `leaves` is how it is to go: "", "now" or "once elsewhere"."""

    model: str
    state: str
    revision: str = ""
    note: str = ""
    stage: str = ""
    progress: float = 1.0
    is_placed: bool = False
    is_pinned: bool = False
    leaves: str = ""
    engine: str = ""
    running: int = 0
    waiting: int = 0
    max_running: int = 0
    tokens_per_second: float | None = None
    weights: int = 0
    kv: int = 0
    bytes: int = 0
    tiny: bool = False


def memory(snapshot: WorkerSnapshot | None) -> Memory:
    if snapshot is None:
        return Memory()
    weights = sum(min(resident.weight_bytes, resident.resident_bytes) for resident in snapshot.models)
    kv = sum(resident.kv_bytes for resident in snapshot.models)
    reserved = snapshot.memory_reserved_bytes
    used = snapshot.memory_total_bytes - snapshot.memory_free_bytes
    return Memory(
        snapshot.memory_total_bytes, snapshot.memory_budget_bytes, weights, kv, max(0, reserved - weights - kv),
        max(0, used - reserved),
    )  # fmt: skip


def chips(worker: Worker, snapshot: WorkerSnapshot | None, rates: Mapping[tuple[str, str], float]) -> list[Chip]:
    """Those in memory, those that should be, those that could come back quickly."""
    placed = {placement.model.name: placement for placement in worker.placements.all()}
    leaving = {wish.model.name: "once elsewhere" if wish.once_elsewhere else "now" for wish in worker.unload_wishes.all()}
    found: list[Chip] = []
    if snapshot is not None:
        found += [_resident(resident, rates.get((worker.name, resident.model))) for resident in snapshot.models]
    here = {chip.model for chip in found}
    found += [_wanted(placement, snapshot) for name, placement in placed.items() if name not in here]
    found += [chip for chip in _asleep(snapshot) if chip.model not in here and chip.model not in placed]
    return [_decided(chip, placed.get(chip.model), leaving.get(chip.model, "")) for chip in found]


def _resident(resident: ResidentModel, rate: float | None) -> Chip:
    return Chip(
        resident.model, resident.state, resident.revision, resident.error, resident.stage, resident.progress,
        engine=resident.engine, running=resident.running, waiting=resident.waiting, max_running=resident.max_running,
        tokens_per_second=None if rate is None else round(rate, 1), weights=resident.weight_bytes, kv=resident.kv_bytes,
        bytes=resident.resident_bytes,
    )  # fmt: skip


def _wanted(placement: Placement, snapshot: WorkerSnapshot | None) -> Chip:
    refused = snapshot.refused.get(placement.model.name, "") if snapshot else ""
    note = refused or ("waiting for the worker" if snapshot is None else placement.state)
    return Chip(placement.model.name, "failed" if refused else "wanted", placement.model.revision, note)


def _asleep(snapshot: WorkerSnapshot | None) -> list[Chip]:
    """Folders whose weights are in host memory and not on the device."""
    folders = [folder for folder in snapshot.folders if folder.in_host_memory] if snapshot else []
    names = [(folder, *folder.model.partition("@")[::2]) for folder in folders]
    return [Chip(model, "asleep", revision, "in host memory", bytes=folder.need_bytes) for folder, model, revision in names]


def _decided(chip: Chip, placement: Placement | None, leaves: str) -> Chip:
    return replace(
        chip, is_placed=placement is not None, is_pinned=placement is not None and placement.is_pinned, leaves=leaves,
        tiny=is_tiny(settings.ENV.models_dir / chip.model),
    )  # fmt: skip
