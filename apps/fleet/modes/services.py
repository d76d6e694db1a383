"""Asking for a mode switch, and saying beforehand what it would do."""

from __future__ import annotations

from dataclasses import dataclass

from django.db import IntegrityError, transaction
from django.db.models import Max

from apps.core.audit import audit
from apps.core.errors import Conflict, InvalidRequest
from apps.fleet.models import Host, Mode, ModeSwitch, SwitchState
from apps.fleet.modes.record import target_of, workers_of

RECENT = 10  # switches whose time tells how long the next takes


@dataclass(frozen=True, slots=True)
class SwitchPlan:
    """What a switch would do. `seconds` is what the last ones to this mode took on the host; None when there were none."""

    host: str
    from_mode: str
    to_mode: str
    stops: tuple[str, ...]  # workers, whose running requests move
    starts: tuple[str, ...]
    unloads: tuple[str, ...]  # models that no worker of the new mode will hold
    loads: tuple[str, ...]
    seconds: float | None


def switch_plan(*, host: Host, mode: str) -> SwitchPlan:
    """Raises InvalidRequest for a switch that cannot be: it would be refused."""
    _require_possible(host, mode)
    old, new = workers_of(host, host.mode), workers_of(host, mode)
    before = {placed.model for worker in old for placed in worker.placements}
    after = {placed.model for worker in new for placed in worker.placements}
    past = ModeSwitch.objects.filter(host=host, to_mode=mode, state=SwitchState.SUCCEEDED).values_list("created_at", "ended_at")
    took = [(ended - created).total_seconds() for created, ended in past[:RECENT] if ended is not None]
    return SwitchPlan(
        host.name, host.mode, mode, tuple(w.name for w in old), tuple(w.name for w in new),
        tuple(sorted(before - after)), tuple(sorted(after)), round(sum(took) / len(took), 1) if took else None,
    )  # fmt: skip


@transaction.atomic
def switch_request(*, host: Host, mode: str, actor: str) -> ModeSwitch:
    """Has the fleet controller change the host's mode; it begins within 2 s. Raises InvalidRequest, and Conflict while another
    switch of the host is under way."""
    host = Host.objects.select_for_update().get(pk=host.pk)
    _require_possible(host, mode)
    used = ModeSwitch.objects.filter(host=host).aggregate(highest=Max("epoch"))["highest"] or 0
    epoch = max(host.epoch, used + 1) + 1  # the one after a switch's own was kept for its way back
    try:
        with transaction.atomic():
            switch = ModeSwitch.objects.create(
                host=host, from_mode=host.mode, to_mode=mode, from_epoch=host.epoch, epoch=epoch, requested_by=actor
            )
    except IntegrityError:
        raise Conflict(f"Host {host} is changing its mode already.") from None
    audit(actor, "mode switch requested", f"{switch}")
    return switch


def _require_possible(host: Host, mode: str) -> None:
    if mode not in Mode.values:
        raise InvalidRequest(f"A mode is one of {', '.join(Mode.values)}.", param="mode")
    if not host.is_managed:
        raise InvalidRequest(f"Host {host} is not managed: the site has no way to start and stop its daemons.")
    if mode == host.mode:
        raise InvalidRequest(f"Host {host} is in {mode} mode already.", param="mode")
    if not workers_of(host, mode):
        raise InvalidRequest(f"Host {host} has no enabled worker for {mode} mode: add one.", param="mode")
    target_of(host)
