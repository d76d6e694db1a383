"""The model manager's nouns: what it is told of the fleet, and what it decides. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from apps.core.types import ModelFolder, ResidentModel, WorkerSnapshot, folder_of


@dataclass(frozen=True, slots=True)
class Policy:
    """What the catalogue says of an enabled model. `idle_seconds` 0 keeps it."""

    model: str
    engine: str = "continuous"
    revision: str = ""
    idle_seconds: int = 0

    @property
    def folder(self) -> str:
        return folder_of(self.model, self.revision)


@dataclass(frozen=True, slots=True)
class Demand:
    """Requests of a model that wait, and since when they have had no worker at all; 0 when they have."""

    waiting: int
    starving_since_ms: int = 0


@dataclass(frozen=True, slots=True)
class Site:
    """One worker as the manager sees it. `placed` are models, True for pinned; `failing` are folders whose load failed and
    is not to be tried yet, with why; `ready_since_ms` is of each resident folder; `unwanted` are models that an operator wants
    gone, True for only once another worker serves them."""

    snapshot: WorkerSnapshot
    placed: Mapping[str, bool] = field(default_factory=dict)
    failing: Mapping[str, str] = field(default_factory=dict)
    ready_since_ms: Mapping[str, int] = field(default_factory=dict)
    acting: bool = False
    unwanted: Mapping[str, bool] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.snapshot.worker_id

    @property
    def moves(self) -> bool:
        """Whether something is on its way in or out."""
        return self.acting or any(resident.state in ("loading", "unloading") for resident in self.snapshot.models)

    @property
    def busy(self) -> bool:
        return self.moves or self.snapshot.draining

    @property
    def free_bytes(self) -> int:
        return self.snapshot.memory_budget_bytes - self.snapshot.memory_reserved_bytes

    def folder(self, name: str) -> ModelFolder | None:
        return next((folder for folder in self.snapshot.folders if folder.model == name), None)

    def holds(self, folder: str, *states: str) -> bool:
        return any(resident.folder == folder and resident.state in states for resident in self.snapshot.models)

    def serves(self, model: str) -> bool:
        return any(resident.model == model and resident.state == "ready" for resident in self.snapshot.models)

    def is_pinned(self, resident: ResidentModel) -> bool:
        return self.placed.get(resident.model, False)


@dataclass(frozen=True, slots=True)
class Action:
    """Unload `evict`, then load `load`; either may be nothing."""

    worker: str
    load: str = ""
    engine: str = "continuous"
    evict: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Rules:
    """`residency_ms` is how long what was loaded stays at least, `turn_ms` how long a model starves before one with requests
    of its own gives way. Without `on_demand` only placed models are loaded."""

    residency_ms: int = 5_000
    turn_ms: int = 20_000
    on_demand: bool = True


@dataclass(slots=True)
class Plan:
    """`loadable` and `refused` say for each worker which models it would load if they were asked for, and why not others."""

    actions: list[Action] = field(default_factory=list)
    loadable: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)
