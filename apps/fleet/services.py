"""Everything that changes the fleet's record."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError
from django.db import transaction

from apps.core.audit import audit
from apps.core.errors import InvalidRequest
from apps.fleet.models import EngineKind, Host, Mode, Model, Placement, UnloadWish, Worker


@transaction.atomic
def host_add(
    *,
    name: str,
    address: str,
    ssh_host_key: str | None = None,
    ssh_user: str = "inference",
    ssh_port: int = 22,
    may_switch_itself: bool = False,
) -> Host:
    """Adds a machine, or changes how it is reached. With its host key it is managed: the site starts and stops its daemons.
    Raises InvalidRequest."""
    host = Host.objects.filter(name=name).first() or Host(name=name)
    host.address = address
    if ssh_host_key is not None:
        host.is_managed, host.ssh_host_key = True, " ".join(ssh_host_key.split()[:2])
        host.ssh_user, host.ssh_port, host.may_switch_itself = ssh_user, ssh_port, may_switch_itself
    _save(host)
    return host


@transaction.atomic
def worker_add(*, name: str, host: Host, port: int, models: list[str], mode: str = Mode.INDIVIDUAL) -> Worker:
    """Adds a daemon, or changes where it listens, and places models on it. Raises InvalidRequest for unknown models."""
    worker = Worker.objects.filter(name=name).first() or Worker(name=name)
    worker.host, worker.address, worker.mode = host, f"{host.address}:{port}", mode
    _save(worker)
    for wanted in models:
        model = Model.objects.filter(name=wanted).first()
        if model is None:
            raise InvalidRequest(_unknown(wanted))
        Placement.objects.get_or_create(model=model, worker=worker)
    return worker


@transaction.atomic
def model_set_engine(*, name: str, engine: str) -> None:
    """Chooses how a model's requests are batched; the controller has its workers go over. Raises InvalidRequest."""
    if engine not in EngineKind.values:
        raise InvalidRequest(f"An engine is one of {', '.join(EngineKind.values)}.")
    if not Model.objects.filter(name=name).update(engine=engine):
        raise InvalidRequest(_unknown(name))


@transaction.atomic
def catalogue_load(rows: list[dict[str, Any]]) -> None:
    """Brings the catalogue's facts up to date. What an operator chose of a model that is there stays."""
    for row in rows:
        Model.objects.update_or_create(name=row["fields"]["name"], defaults=row["fields"])


@transaction.atomic
def model_roll(*, name: str, revision: str) -> None:
    """Has workers go over to the folder NAME@REVISION, one by one; "" is the folder NAME. Raises InvalidRequest."""
    model = Model.objects.filter(name=name).first()
    if model is None:
        raise InvalidRequest(_unknown(name))
    model.revision = revision
    try:
        model.clean_fields(exclude={field.name for field in Model._meta.fields} - {"revision"})
    except ValidationError as error:
        raise InvalidRequest("; ".join(error.messages)) from None
    model.save(update_fields=["revision"])


@transaction.atomic
def placement_put(*, model: Model, worker: Worker, is_pinned: bool, actor: str) -> Placement:
    """Wishes a model onto a worker, pinned or not, and takes back the wish that it leave. Raises InvalidRequest."""
    if not model.is_enabled:
        raise InvalidRequest(f"{model} is disabled: enable it first.", param="model")
    UnloadWish.objects.filter(model=model, worker=worker).delete()
    placement, _ = Placement.objects.update_or_create(model=model, worker=worker, defaults={"is_pinned": is_pinned})
    audit(actor, "model pinned" if is_pinned else "model placed", placement)
    return placement


@transaction.atomic
def placement_move(*, model: Model, source: Worker, target: Worker, actor: str) -> Placement:
    """Wishes a model onto another worker, pinned there if it was here; it leaves once the other one serves it.
    Raises InvalidRequest."""
    if source == target:
        raise InvalidRequest(f"{model} is on {source} already.", param="to")
    there = Placement.objects.filter(model=model, worker=source)
    is_pinned = there.filter(is_pinned=True).exists()
    there.delete()
    placement = placement_put(model=model, worker=target, is_pinned=is_pinned, actor=actor)
    UnloadWish.objects.update_or_create(model=model, worker=source, defaults={"once_elsewhere": True})
    audit(actor, "model moved", f"{model} from {source} to {target}")
    return placement


@transaction.atomic
def model_unload(*, model: Model, worker: Worker, actor: str) -> None:
    """Has a worker let go of a model, placed there or not; what it runs finishes first, for up to a minute."""
    Placement.objects.filter(model=model, worker=worker).delete()
    UnloadWish.objects.update_or_create(model=model, worker=worker, defaults={"once_elsewhere": False})
    audit(actor, "model unloaded", f"{model} from {worker}")


@transaction.atomic
def worker_drain(*, worker: Worker, is_draining: bool, actor: str) -> None:
    """Has a worker be given nothing more, while what it runs ends there; or opens it again."""
    Worker.objects.filter(pk=worker.pk).update(is_draining=is_draining)
    audit(actor, "worker drained" if is_draining else "worker undrained", worker)


def _save(row: Host | Worker) -> None:
    try:
        row.full_clean()
    except ValidationError as error:
        raise InvalidRequest("; ".join(error.messages)) from None
    row.save()


def _unknown(name: str) -> str:
    return f"The catalogue has no model {name}; `manage.py models list` shows what it has."
