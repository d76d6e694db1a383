"""Reads of the fleet's record."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from datetime import time as clock
from pathlib import Path

from django.conf import settings

from apps.core.cache import TtlCache
from apps.core.database import in_database
from apps.core.types import folder_of
from apps.fleet.models import Model, ModeSwitch, Placement, Worker
from apps.fleet.planning import Policy
from apps.fleet.weights import is_here, is_tiny

CACHE_SECONDS = 4.0
MAX_HEADER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A catalogued model as others need to know it. `created` is seconds since the epoch."""

    name: str
    title: str
    modality: str
    owned_by: str
    context_length: int
    parameters: int
    thinking: bool
    created: int

    @property
    def folder(self) -> Path:
        return settings.ENV.models_dir / self.name

    @property
    def has_weights(self) -> bool:
        return is_here(self.folder)

    @property
    def voices(self) -> tuple[str, ...]:
        """By its files; none for a model that does not speak."""
        return voice_names(self.folder / "voices.safetensors")

    @property
    def tiny(self) -> bool:
        return is_tiny(self.folder)


def voice_names(file: Path) -> tuple[str, ...]:
    """The tensors that a safetensors file says it has, read from its header; none when it cannot be read."""
    try:
        with file.open("rb") as data:
            header = json.loads(data.read(min(MAX_HEADER_BYTES, int.from_bytes(data.read(8), "little"))))
    except (OSError, ValueError, RecursionError):
        return ()
    return tuple(sorted(set(header) - {"__metadata__"})) if isinstance(header, dict) else ()


async def model_cards() -> dict[str, ModelCard]:
    """The enabled models by name, read from Postgres at most every 4 s."""
    return await _cache.get(None)


async def _load(_: None) -> dict[str, ModelCard]:
    return await in_database(lambda: {m.name: _card(m) for m in Model.objects.filter(is_enabled=True)})


_cache: TtlCache[None, dict[str, ModelCard]] = TtlCache(_load, seconds=CACHE_SECONDS, entries=1)


def _card(model: Model) -> ModelCard:
    created = datetime.combine(model.published_at, clock(), UTC)
    return ModelCard(
        name=model.name,
        title=model.title,
        modality=model.modality,
        owned_by=model.publisher,
        context_length=model.context_length,
        parameters=model.parameters,
        thinking=model.thinking,
        created=int(created.timestamp()),
    )


@dataclass(frozen=True, slots=True)
class PlacedModel:
    """One placement: the row, the model's name, and the folder and the engine that it is to run from and under."""

    id: int
    model: str
    is_pinned: bool = False
    folder: str = ""
    engine: str = "continuous"


@dataclass(frozen=True, slots=True)
class Unwanted:
    """One UnloadWish: the row, the model's name, and whether it is to be served elsewhere first."""

    id: int
    model: str
    once_elsewhere: bool


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the controller is to do about one enabled worker. A daemon of another epoch than `epoch` is none of ours; None is
    any. A cordoned one is heard and gets nothing: requests for what is placed on it wait. A draining one gets nothing either,
    and others may load what it has."""

    worker_id: int
    name: str
    address: str
    host_id: int
    placements: tuple[PlacedModel, ...]
    epoch: int | None = None
    cordoned: bool = False
    draining: bool = False
    unwanted: tuple[Unwanted, ...] = ()

    def same_worker(self, other: Assignment) -> bool:
        """Whether only what is placed differs, if anything."""
        return (self.name, self.address, self.host_id) == (other.name, other.address, other.host_id)


def assignments() -> dict[int, Assignment]:
    """The enabled workers by id, each with the enabled models placed on it, pinned ones first.

    Of a managed host, those of its mode; before a switch hands over also those of the new one, which are cordoned.
    """
    workers = Worker.objects.filter(is_enabled=True).select_related("host")
    workers = workers.prefetch_related("placements__model", "unload_wishes__model")
    switches = {switch.host_id: switch for switch in ModeSwitch.objects.filter(ended_at=None)}
    found = {worker.pk: _assignment(worker, switches.get(worker.host_id)) for worker in workers}
    return {pk: assignment for pk, assignment in found.items() if assignment is not None}


def policies() -> dict[str, Policy]:
    """How each enabled model is to be held, by name."""
    return {model.name: _policy(model) for model in Model.objects.filter(is_enabled=True)}


def _policy(model: Model) -> Policy:
    own = model.idle_unload_seconds
    return Policy(model.name, model.engine, model.revision, settings.ENV.model_idle_seconds if own is None else own)


def _assignment(worker: Worker, switch: ModeSwitch | None) -> Assignment | None:
    unwanted = tuple(Unwanted(w.pk, w.model.name, w.once_elsewhere) for w in worker.unload_wishes.all())
    assignment = replace(assignment_of(worker), draining=worker.is_draining, unwanted=unwanted)
    host = worker.host
    if not host.is_managed:
        return assignment
    if worker.mode == host.mode:
        return replace(assignment, epoch=host.epoch, cordoned=host.is_cordoned)
    if switch is None or worker.mode != switch.to_mode:
        return None  # also the old ones of a switch that has handed over: they leave routing, and what runs there moves
    return replace(assignment, epoch=switch.epoch, cordoned=True)


def assignment_of(worker: Worker) -> Assignment:
    """The worker and what is placed on it, whatever mode its host is in."""
    placed = sorted(worker.placements.all(), key=lambda placement: (not placement.is_pinned, placement.pk))
    placements = tuple(_placed(p) for p in placed if p.model.is_enabled)
    return Assignment(worker.pk, worker.name, worker.address, worker.host_id, placements)


def _placed(placement: Placement) -> PlacedModel:
    model = placement.model
    return PlacedModel(placement.pk, model.name, placement.is_pinned, folder_of(model.name, model.revision), model.engine)
