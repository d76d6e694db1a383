"""Everything that changes the fleet's record."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError
from django.db import transaction

from apps.core.errors import InvalidRequest
from apps.fleet.models import EngineKind, Host, Mode, Model, Placement, Worker


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


def _save(row: Host | Worker) -> None:
    try:
        row.full_clean()
    except ValidationError as error:
        raise InvalidRequest("; ".join(error.messages)) from None
    row.save()


def _unknown(name: str) -> str:
    return f"The catalogue has no model {name}; `manage.py models list` shows what it has."
