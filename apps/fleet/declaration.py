"""The fleet as code: hosts, models' settings, workers, placements; and what a change of them would make the workers do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import models as django_models
from pydantic import Field

from apps.core.declared import Entry, Section, Wanted
from apps.core.errors import InvalidRequest
from apps.core.types import WorkerSnapshot
from apps.fleet.foresight import foresee
from apps.fleet.models import Host, Mode, Model, Placement, Worker
from apps.fleet.planning import Policy


class HostEntry(Entry):
    """How the host is reached, and whether the site runs its daemons. Its mode of the moment is the mode switch's."""

    name: str
    address: str
    managed: bool = False
    ssh_user: str = "inference"
    ssh_port: int = Field(22, ge=1, le=65535)
    ssh_host_key: str = ""
    may_switch_itself: bool = False


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
    mode: Literal["individual", "tensor_parallel"] = "individual"
    enabled: bool = True
    draining: bool = False


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
    host.address, host.is_managed, host.may_switch_itself = entry.address, entry.managed, entry.may_switch_itself
    host.ssh_user, host.ssh_port, host.ssh_host_key = entry.ssh_user, entry.ssh_port, entry.ssh_host_key
    if entry.managed and not entry.ssh_host_key:
        raise InvalidRequest("ssh_host_key: a managed host is known by its key")
    _save(host)


def _write_model(entry: ModelEntry) -> None:
    model = _named(Model, entry.name)
    model.is_enabled, model.engine, model.revision = entry.enabled, entry.engine, entry.revision
    model.idle_unload_seconds = entry.idle_unload_seconds
    _save(model, "is_enabled", "engine", "revision", "idle_unload_seconds")


def _write_worker(entry: WorkerEntry) -> None:
    worker = Worker.objects.filter(name=entry.name).first() or Worker(name=entry.name)
    worker.host, worker.address, worker.mode = _named(Host, entry.host), entry.address, Mode(entry.mode)
    worker.is_enabled, worker.is_draining = entry.enabled, entry.draining
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


def _read_hosts() -> list[HostEntry]:
    return [
        HostEntry(name=h.name, address=h.address, managed=h.is_managed, ssh_user=h.ssh_user, ssh_port=h.ssh_port,
                  ssh_host_key=h.ssh_host_key, may_switch_itself=h.may_switch_itself)
        for h in Host.objects.order_by("name")
    ]  # fmt: skip


def _read_workers() -> list[WorkerEntry]:
    return [
        WorkerEntry.model_validate({"name": w.name, "host": w.host.name, "address": w.address, "mode": str(w.mode),
                                    "enabled": w.is_enabled, "draining": w.is_draining})
        for w in Worker.objects.select_related("host").order_by("name")
    ]  # fmt: skip


SECTIONS = (
    Section("hosts", HostEntry, _read_hosts, _write_host, lambda name: _delete(Host, name)),
    Section(
        "models", ModelEntry,
        lambda: [ModelEntry(name=m.name, enabled=m.is_enabled, engine=m.engine, revision=m.revision,
                            idle_unload_seconds=m.idle_unload_seconds) for m in Model.objects.order_by("name")],
        _write_model, may_add=False,
    ),
    Section("workers", WorkerEntry, _read_workers, _write_worker, lambda name: _delete(Worker, name)),
    Section("placements", PlacementEntry, _read_placements, _write_placement, _remove_placement),
)  # fmt: skip


def _delete(kind: type[Any], name: str) -> None:
    kind.objects.filter(name=name).delete()


# --- The effect ---


def effect(wanted: Wanted, alive: Iterable[WorkerSnapshot]) -> list[str]:
    """What the workers that are alive would load and unload, in the manager's own words, and what would not fit."""
    policies = {entry.name: _policy(entry) for entry in _typed(wanted["models"], ModelEntry) if entry.enabled}
    placements = _typed(wanted["placements"], PlacementEntry)
    workers = {entry.name: entry for entry in _typed(wanted["workers"], WorkerEntry) if entry.enabled}
    lines = []
    for snapshot in alive:
        if snapshot.worker_id in workers:
            placed = {entry.model: entry.pinned for entry in placements if entry.worker == snapshot.worker_id}
            lines += _lines(replace(snapshot, draining=workers[snapshot.worker_id].draining), placed, policies)
    unheard = workers.keys() - {snapshot.worker_id for snapshot in alive}
    return [*lines, *(f"{name}: not heard; what it will do is unknown" for name in sorted(unheard))]


def _typed(entries: Sequence[Entry], kind: type[Any]) -> list[Any]:
    return [entry for entry in entries if isinstance(entry, kind)]


def _policy(entry: ModelEntry) -> Policy:
    own = entry.idle_unload_seconds
    return Policy(entry.name, entry.engine, entry.revision, settings.ENV.model_idle_seconds if own is None else own)


def _lines(snapshot: WorkerSnapshot, placed: Mapping[str, bool], policies: Mapping[str, Policy]) -> list[str]:
    name, foreseen = snapshot.worker_id, foresee(snapshot, placed, policies)
    lines: list[str] = []
    for action in foreseen.actions:
        lines += [f"{name}: unloads {folder} ({action.reason})" for folder in action.evict]
        lines += [f"{name}: loads {action.load} ({action.reason})"] * bool(action.load)
    return [*lines, *(f"{name}: {model} does not fit: {why}" for model, why in foreseen.missing.items())]
