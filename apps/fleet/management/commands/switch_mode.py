"""`manage.py switch_mode HOST individual|tensor_parallel`: changes what a managed host's devices do, while it serves."""

from __future__ import annotations

import time
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from apps.core.errors import ServiceError
from apps.fleet.models import Host, Mode, ModeSwitch, SwitchState
from apps.fleet.modes.services import SwitchPlan, switch_plan, switch_request

POLL_SECONDS = 0.2


class Command(BaseCommand):
    help = "Have the fleet controller change a managed host's mode. Requests that run there move or wait; none fails."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("host", help="as in `manage.py fleet list`")
        parser.add_argument("mode", choices=Mode.values)
        parser.add_argument("--dry-run", action="store_true", help="only say what would happen")
        parser.add_argument("--wait", action="store_true", help="follow the switch until it has ended; fails when it did")

    def handle(self, *args: Any, **options: Any) -> None:
        host = Host.objects.filter(name=options["host"]).first()
        if host is None:
            raise CommandError(f"no host {options['host']}; `manage.py fleet list` shows them")
        try:
            self._tell(switch_plan(host=host, mode=options["mode"]))
            if not options["dry_run"]:
                switch = switch_request(host=host, mode=options["mode"], actor="manage.py")
        except ServiceError as error:
            raise CommandError(error.message) from None
        if not options["dry_run"] and options["wait"]:
            self._follow(switch)

    def _tell(self, plan: SwitchPlan) -> None:
        took = "never done before" if plan.seconds is None else f"about {plan.seconds} s"
        self.stdout.write(f"{plan.host}: {plan.from_mode} to {plan.to_mode}, {took}")
        for what, names in (("stops", plan.stops), ("starts", plan.starts), ("unloads", plan.unloads), ("loads", plan.loads)):
            self.stdout.write(f"  {what}: {', '.join(names) or 'nothing'}")

    def _follow(self, switch: ModeSwitch) -> None:
        """A line a step, when it has ended. Interrupted, the switch goes on."""
        told = 0
        while True:
            ended = ModeSwitch.objects.get(pk=switch.pk)  # read before the steps, so that none is missed
            for step in switch.steps.filter(pk__gt=told).exclude(ended_at=None):
                how = {True: "done", False: "failed", None: "interrupted"}[step.succeeded]
                took = (step.ended_at - step.started_at).total_seconds() if step.ended_at else 0.0
                self.stdout.write(f"  {step.step}: {how} in {took:.1f} s{': ' if step.detail else ''}{step.detail}")
                told = step.pk
            if ended.ended_at is not None:
                break
            time.sleep(POLL_SECONDS)
        if ended.state != SwitchState.SUCCEEDED:
            raise CommandError(f"{ended.get_state_display()}: {ended.reason}")
        self.stdout.write(f"{ended.host} is in {ended.to_mode} mode, epoch {ended.epoch}")
