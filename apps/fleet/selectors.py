"""Reads of the fleet's record."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from datetime import time as clock
from pathlib import Path

from django.conf import settings

from apps.core.cache import TtlCache
from apps.core.database import in_database
from apps.fleet.models import Model, ModeSwitch, Worker

CACHE_SECONDS = 4.0
TINY_MARK = "tiny.json"  # in the folder of a seeded checkpoint that has the architecture and not the weights


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
        return (self.folder / "config.json").is_file()

    @property
    def tiny(self) -> bool:
        return (self.folder / TINY_MARK).is_file()


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
    """One placement: the row, the model's name, and the engine it is to run under."""

    id: int
    model: str
    engine: str = "continuous"


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the controller is to do about one enabled worker. A daemon of another epoch than `epoch` is none of ours; None is
    any. A cordoned one is heard and gets nothing: requests for what is placed on it wait."""

    worker_id: int
    name: str
    address: str
    host_id: int
    placements: tuple[PlacedModel, ...]
    epoch: int | None = None
    cordoned: bool = False

    def same_worker(self, other: Assignment) -> bool:
        """Whether only what is placed differs, if anything."""
        return (self.name, self.address, self.host_id) == (other.name, other.address, other.host_id)


def assignments() -> dict[int, Assignment]:
    """The enabled workers by id, each with the enabled models placed on it, pinned ones first.

    Of a managed host, those of its mode; before a switch hands over also those of the new one, which are cordoned.
    """
    workers = Worker.objects.filter(is_enabled=True).select_related("host").prefetch_related("placements__model")
    switches = {switch.host_id: switch for switch in ModeSwitch.objects.filter(ended_at=None)}
    found = {worker.pk: _assignment(worker, switches.get(worker.host_id)) for worker in workers}
    return {pk: assignment for pk, assignment in found.items() if assignment is not None}


def _assignment(worker: Worker, switch: ModeSwitch | None) -> Assignment | None:
    assignment, host = assignment_of(worker), worker.host
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
    placements = tuple(PlacedModel(p.pk, p.model.name, p.model.engine) for p in placed if p.model.is_enabled)
    return Assignment(worker.pk, worker.name, worker.address, worker.host_id, placements)
