"""A mode switch in the database. Every write of a running one is fenced: only the controller that took it over last may."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from django.db import transaction
from django.utils import timezone

from apps.core.audit import audit
from apps.fleet.models import Host, ModeSwitch, ModeSwitchStep, Worker
from apps.fleet.modes.plan import Done, End, Step, reason
from apps.fleet.modes.ssh import SshTarget
from apps.fleet.selectors import Assignment, assignment_of


class Superseded(Exception):
    """Another controller has taken the switch over, or it has ended."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a runner needs to know of a switch. `old` and `new` are the enabled workers of the two modes."""

    id: int
    host_id: int
    host: str
    target: SshTarget
    from_mode: str
    to_mode: str
    from_epoch: int
    epoch: int
    old: tuple[Assignment, ...]
    new: tuple[Assignment, ...]


def target_of(host: Host) -> SshTarget:
    """Raises InvalidRequest for a host whose record cannot be connected to."""
    return SshTarget(host.address, host.ssh_port, host.ssh_user, host.ssh_host_key)


def workers_of(host: Host, mode: str) -> tuple[Assignment, ...]:
    workers = Worker.objects.filter(host=host, mode=mode, is_enabled=True).prefetch_related("placements__model")
    return tuple(assignment_of(worker) for worker in workers)


@transaction.atomic
def take_over(switch_id: int, runner: str) -> Job:
    """Makes `runner` the one at work. A step that its predecessor left open is closed, unjudged, to be done again.
    Raises Superseded when the switch has ended."""
    switch = ModeSwitch.objects.select_for_update().select_related("host").filter(pk=switch_id, ended_at=None).first()
    if switch is None:
        raise Superseded
    switch.runner = runner
    switch.save(update_fields=["runner"])
    switch.steps.filter(ended_at=None).update(ended_at=timezone.now(), detail="its controller was lost; done again")
    return Job(
        switch.pk, switch.host_id, switch.host.name, target_of(switch.host), switch.from_mode, switch.to_mode,
        switch.from_epoch, switch.epoch, workers_of(switch.host, switch.from_mode), workers_of(switch.host, switch.to_mode),
    )  # fmt: skip


def history(switch_id: int) -> list[Done]:
    """The steps that have been judged, oldest first."""
    rows = ModeSwitchStep.objects.filter(switch=switch_id).exclude(succeeded=None)
    return [Done(Step(row.step), bool(row.succeeded)) for row in rows]


@contextmanager
def _fenced(switch_id: int, runner: str) -> Iterator[ModeSwitch]:
    with transaction.atomic():
        found = ModeSwitch.objects.select_for_update().filter(pk=switch_id, runner=runner, ended_at=None).first()
        if found is None:
            raise Superseded
        yield found


def begin(switch_id: int, runner: str, step: Step) -> int:
    """Raises Superseded, as all below."""
    with _fenced(switch_id, runner) as switch:
        return int(ModeSwitchStep.objects.create(switch=switch, step=step).pk)


def end(switch_id: int, runner: str, row: int, *, succeeded: bool, detail: str) -> None:
    with _fenced(switch_id, runner):
        ModeSwitchStep.objects.filter(pk=row).update(ended_at=timezone.now(), succeeded=succeeded, detail=detail[:300])


def host_set(switch_id: int, runner: str, **values: Any) -> None:
    """Changes the host's mode, epoch or cordon."""
    with _fenced(switch_id, runner) as switch:
        Host.objects.filter(pk=switch.host_id).update(**values)


def finish(switch_id: int, runner: str, outcome: End) -> None:
    """Ends the switch, with why it went the way it did and an audit row."""
    with _fenced(switch_id, runner) as switch:
        rows = switch.steps.exclude(succeeded=None)
        switch.reason = reason((Step(row.step), bool(row.succeeded), row.detail) for row in rows)[:300]
        switch.state, switch.ended_at = outcome, timezone.now()
        switch.save(update_fields=["reason", "state", "ended_at"])
        audit(switch.requested_by, f"mode switch {outcome.replace('_', ' ')}", f"{switch}")
