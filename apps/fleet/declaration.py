"""The fleet as code: hosts, models' settings, workers, placements; and what a change of them would make the workers do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import models as django_models
from pydantic import Field

from apps.core.declared import Entry, Section, Wanted
from apps.core.errors import InvalidRequest
from apps.core.types import ResidentModel, WorkerSnapshot
from apps.fleet.manager import Planner, Policy, Rules, Site
from apps.fleet.models import Host, Model, Placement, Worker

MOST_ROUNDS = 100


class HostEntry(Entry):
    name: str
    address: str


class ModelEntry(Entry):
    name: str
    enabled: bool = True
    engine: str = "continuous"
    revision: str = ""
    idle_unload_seconds: int | None = Field(None, ge=0, le=2**31 - 1)


class WorkerEntry(Entry):
    name: str
    host: str
    address: str
    enabled: bool = True


class PlacementEntry(Entry):
    worker: str
    model: str
    pinned: bool = False

    @property
    def key(self) -> str:
        return f"{self.model} on {self.worker}"


def _save(row: django_models.Model, *only: str) -> None:
    """Raises InvalidRequest with what is wrong with which field; with `only`, of those fields."""
    others = {field.name for field in row._meta.fields} - set(only) if only else set()
    try:
        row.full_clean(exclude=others)
    except ValidationError as error:
        text = "; ".join(f"{name}: {' '.join(messages)}" for name, messages in error.message_dict.items())
        raise InvalidRequest(text) from None
    row.save()


def _named(kind: type[Any], name: str) -> Any:
    found = kind.objects.filter(name=name).first()
    if found is None:
        raise InvalidRequest(f"there is no {kind.__name__.lower()} {name[:100]}")
    return found


def _write_host(entry: HostEntry) -> None:
    host = Host.objects.filter(name=entry.name).first() or Host(name=entry.name)
    host.address = entry.address
    _save(host)


def _write_model(entry: ModelEntry) -> None:
    model = _named(Model, entry.name)
    model.is_enabled, model.engine, model.revision = entry.enabled, entry.engine, entry.revision
    model.idle_unload_seconds = entry.idle_unload_seconds
    _save(model, "is_enabled", "engine", "revision", "idle_unload_seconds")


def _write_worker(entry: WorkerEntry) -> None:
    worker = Worker.objects.filter(name=entry.name).first() or Worker(name=entry.name)
    worker.host, worker.address, worker.is_enabled = _named(Host, entry.host), entry.address, entry.enabled
    _save(worker)


def _write_placement(entry: PlacementEntry) -> None:
    model, worker = _named(Model, entry.model), _named(Worker, entry.worker)
    Placement.objects.update_or_create(model=model, worker=worker, defaults={"is_pinned": entry.pinned})


def _remove_placement(key: str) -> None:
    model, _, worker = key.partition(" on ")
    Placement.objects.filter(model__name=model, worker__name=worker).delete()


def _read_placements() -> list[PlacementEntry]:
    rows = Placement.objects.select_related("model", "worker").order_by("worker__name", "model__name")
    return [PlacementEntry(worker=p.worker.name, model=p.model.name, pinned=p.is_pinned) for p in rows]


SECTIONS = (
    Section(
        "hosts", HostEntry, lambda: [HostEntry(name=h.name, address=h.address) for h in Host.objects.order_by("name")],
        _write_host, lambda name: _delete(Host, name),
    ),
    Section(
        "models", ModelEntry,
        lambda: [ModelEntry(name=m.name, enabled=m.is_enabled, engine=m.engine, revision=m.revision,
                            idle_unload_seconds=m.idle_unload_seconds) for m in Model.objects.order_by("name")],
        _write_model, may_add=False,
    ),
    Section(
        "workers", WorkerEntry,
        lambda: [WorkerEntry(name=w.name, host=w.host.name, address=w.address, enabled=w.is_enabled)
                 for w in Worker.objects.select_related("host").order_by("name")],
        _write_worker, lambda name: _delete(Worker, name),
    ),
    Section("placements", PlacementEntry, _read_placements, _write_placement, _remove_placement),
)  # fmt: skip


def _delete(kind: type[Any], name: str) -> None:
    kind.objects.filter(name=name).delete()


# --- The effect ---


def effect(wanted: Wanted, alive: Iterable[WorkerSnapshot]) -> list[str]:
    """What the workers that are alive would load and unload, in the manager's own words, and what would not fit."""
    policies = {entry.name: _policy(entry) for entry in _typed(wanted["models"], ModelEntry) if entry.enabled}
    placements = _typed(wanted["placements"], PlacementEntry)
    enabled = {entry.name for entry in _typed(wanted["workers"], WorkerEntry) if entry.enabled}
    lines = []
    for snapshot in alive:
        if snapshot.worker_id in enabled:
            placed = {entry.model: entry.pinned for entry in placements if entry.worker == snapshot.worker_id}
            lines += _steps(Site(snapshot, placed, ready_since_ms=_long_ago(snapshot)), policies)
    unheard = enabled - {snapshot.worker_id for snapshot in alive}
    return [*lines, *(f"{name}: not heard; what it will do is unknown" for name in sorted(unheard))]


def _typed(entries: Sequence[Entry], kind: type[Any]) -> list[Any]:
    return [entry for entry in entries if isinstance(entry, kind)]


def _policy(entry: ModelEntry) -> Policy:
    own = entry.idle_unload_seconds
    return Policy(entry.name, entry.engine, entry.revision, settings.ENV.model_idle_seconds if own is None else own)


def _long_ago(snapshot: WorkerSnapshot) -> dict[str, int]:
    return {resident.folder: 0 for resident in snapshot.models}


def _steps(site: Site, policies: Mapping[str, Policy]) -> list[str]:
    """The manager's plans, each carried out on paper, until there is nothing left to do."""
    lines: list[str] = []
    for _ in range(MOST_ROUNDS):
        plan = Planner(2**40, [site], policies, {}, Rules()).plan()
        if not plan.actions:
            break
        action = plan.actions[0]
        lines += [f"{site.name}: unloads {folder} ({action.reason})" for folder in action.evict]
        lines += [f"{site.name}: loads {action.load} ({action.reason})"] * bool(action.load)
        site = _done(site, action.load, action.engine, action.evict)
    for model in site.placed:
        if model in policies and not site.serves(model):
            why = plan.refused[site.name].get(model) or "there is no room for it beside the others"
            lines.append(f"{site.name}: {model} does not fit: {why}")
    return lines


def _done(site: Site, load: str, engine: str, evict: Sequence[str]) -> Site:
    folder = site.folder(load)
    need = folder.need_bytes if folder is not None else 0
    model, _, revision = load.partition("@")
    stay = [resident for resident in site.snapshot.models if resident.folder not in evict and resident.folder != load]
    loaded = [ResidentModel(model, "ready", revision=revision, engine=engine, resident_bytes=need)] if load else []
    models = (*stay, *loaded)
    reserved = sum(resident.resident_bytes for resident in models)
    snapshot = replace(site.snapshot, models=models, memory_reserved_bytes=reserved)
    return replace(site, snapshot=snapshot, ready_since_ms=_long_ago(snapshot))
