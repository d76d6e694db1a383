"""`manage.py prepare`: brings the stores up to date. `manage.py up` runs it; so may a deployment."""

from __future__ import annotations

import json
from typing import Any

from django.conf import settings
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandParser

from apps.fleet.services import catalogue_load


class Command(BaseCommand):
    help = "Migrate Postgres, load the catalogue and create what a new installation starts with. Safe to repeat."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--worker-port", type=int, help="also register a local worker on this port")
        parser.add_argument("--model", nargs="*", default=[], help="models to place on it")

    def handle(self, *args: Any, **options: Any) -> None:
        call_command("migrate", verbosity=0)
        catalogue_load(json.loads((settings.BASE_DIR / "fixtures" / "models.json").read_text()))
        call_command("collectstatic", interactive=False, verbosity=0)
        call_command("bootstrap")
        if options["worker_port"]:
            call_command("fleet", "add-host", "local", address="127.0.0.1")
            call_command("fleet", "add-worker", "local-0", host="local", port=options["worker_port"], model=options["model"])
