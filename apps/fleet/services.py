"""Everything that changes the fleet's record."""

from __future__ import annotations

from django.core.exceptions import ValidationError
from django.db import transaction

from apps.core.errors import InvalidRequest
from apps.fleet.models import Host, Model, Placement, Worker


@transaction.atomic
def host_add(*, name: str, address: str) -> Host:
    """Adds a machine, or changes its address."""
    return Host.objects.update_or_create(name=name, defaults={"address": address})[0]


@transaction.atomic
def worker_add(*, name: str, host: Host, port: int, models: list[str]) -> Worker:
    """Adds a daemon, or changes where it listens, and places models on it. Raises InvalidRequest for unknown models."""
    worker = Worker.objects.filter(name=name).first() or Worker(name=name)
    worker.host, worker.address = host, f"{host.address}:{port}"
    try:
        worker.full_clean()
    except ValidationError as error:
        raise InvalidRequest("; ".join(error.messages)) from None
    worker.save()
    for wanted in models:
        model = Model.objects.filter(name=wanted).first()
        if model is None:
            raise InvalidRequest(f"The catalogue has no model {wanted}; `manage.py models list` shows what it has.")
        Placement.objects.get_or_create(model=model, worker=worker)
    return worker
