"""`manage.py replay LOG`: the recorded decisions made again, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from apps.scheduler import log
from apps.scheduler.replay import BrokenLog, Replay

SHOWN = 20


class Command(BaseCommand):
    help = "Replay an event log through the pure policy; fails when any decision differs."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("log", type=Path, help="a file written by `run_dispatcher --log FILE`")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            report = Replay().run(log.read(options["log"]))
        except (OSError, BrokenLog) as error:
            raise CommandError(str(error)) from None
        for difference in report.differences[:SHOWN]:
            self.stdout.write(f"entry {difference.number}, {difference.op}:")
            self.stdout.write(f"  recorded {difference.recorded}\n  replayed {difference.replayed}")
        if report.differences:
            raise CommandError(f"{len(report.differences)} of {report.entries} decisions differ")
        self.stdout.write(f"{report.entries} decisions identical; {report.digest}")
