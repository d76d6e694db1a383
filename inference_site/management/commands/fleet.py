"""`manage.py fleet list | add-host | add-worker | remove-worker | export | plan FILE | apply FILE`: machines, daemons, what is
placed on them, and who may use how much, changed while serving.

It is here because the file of `export` spans apps that do not know each other.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction
from rich.console import Console
from rich.table import Table

from apps.accounts.declaration import SECTIONS as ACCOUNTS
from apps.core.declared import Change, DeclarationError, Entry, apply, changes, export, parse
from apps.core.errors import InvalidRequest
from apps.core.redis import connect
from apps.core.types import WorkerSnapshot
from apps.fleet import registry
from apps.fleet.declaration import SECTIONS as FLEET
from apps.fleet.declaration import effect
from apps.fleet.models import Host, Mode, Worker
from apps.fleet.services import host_add, worker_add

SECTIONS = (*FLEET, *ACCOUNTS)


class Command(BaseCommand):
    help = "Show the fleet, and add or remove hosts and workers. The controller acts on it within 2 s."

    def add_arguments(self, parser: CommandParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        actions.add_parser("list", help="hosts, workers and what is placed on them")
        host = actions.add_parser("add-host", help="add a machine, or change its address")
        host.add_argument("name")
        host.add_argument("--address", required=True, help="name or IP address by which the site reaches it")
        host.add_argument("--ssh-host-key", help="have the site manage it, known by this key: 'ssh-ed25519 AAAA...'")
        host.add_argument("--ssh-user", default="inference")
        host.add_argument("--ssh-port", type=int, default=22)
        host.add_argument("--may-switch-itself", action="store_true", help="let unmet demand change its mode")
        worker = actions.add_parser("add-worker", help="add a daemon, or change where it listens")
        worker.add_argument("name", help="as in the daemon's --worker-id")
        worker.add_argument("--host", required=True, help="the host's name")
        worker.add_argument("--port", type=int, required=True)
        worker.add_argument("--mode", choices=Mode.values, default=Mode.INDIVIDUAL, help="in which mode of the host it runs")
        worker.add_argument("--model", action="append", default=[], help="place this model on it; may be repeated")
        actions.add_parser("remove-worker", help="forget a daemon").add_argument("name")
        actions.add_parser("export", help="print all of it, and plans and limits, as a file for plan and apply")
        for name, help_text in (
            ("plan", "say what a file would change, and its effect"),
            ("apply", "make it as the file says"),
        ):
            actions.add_parser(name, help=help_text).add_argument("file", help="as export prints it; - is standard input")

    def handle(self, *args: Any, **options: Any) -> None:
        action = getattr(self, "_" + options["action"].replace("-", "_"))
        action(options)

    def _add_host(self, options: dict[str, Any]) -> None:
        names = ("name", "address", "ssh_host_key", "ssh_user", "ssh_port", "may_switch_itself")
        try:
            host = host_add(**{name: options[name] for name in names})
        except InvalidRequest as error:
            raise CommandError(error.message) from None
        self.stdout.write(f"host {host.name} at {host.address}{', managed over SSH' if host.is_managed else ''}")

    def _add_worker(self, options: dict[str, Any]) -> None:
        host = Host.objects.filter(name=options["host"]).first()
        if host is None:
            raise CommandError(f"no host {options['host']}: add it with `manage.py fleet add-host` first")
        try:
            worker = worker_add(
                name=options["name"], host=host, port=options["port"], models=options["model"], mode=options["mode"]
            )
        except InvalidRequest as error:
            raise CommandError(error.message) from None
        self.stdout.write(f"worker {worker.name} at {worker.address}")

    def _remove_worker(self, options: dict[str, Any]) -> None:
        removed, _ = Worker.objects.filter(name=options["name"]).delete()
        if not removed:
            raise CommandError(f"no worker {options['name']}; `manage.py fleet list` shows them")
        self.stdout.write(f"removed {options['name']}")

    def _list(self, options: dict[str, Any]) -> None:
        table = Table("worker", "host", "mode", "address", "status", "placed")
        for worker in Worker.objects.select_related("host").prefetch_related("placements__model"):
            placed = ", ".join(f"{p.model} ({p.model.engine}, {p.state})" for p in worker.placements.all())
            table.add_row(worker.name, worker.host.name, worker.mode, worker.address, worker.status, placed)
        Console().print(table)

    # --- As code ---

    def _export(self, options: dict[str, Any]) -> None:
        self.stdout.write(export(SECTIONS), ending="")

    def _plan(self, options: dict[str, Any]) -> None:
        wanted, these = self._read(options["file"])
        for line in [*map(str, these), *effect(wanted, asyncio.run(_alive()))] or ["nothing to change"]:
            self.stdout.write(line)

    def _apply(self, options: dict[str, Any]) -> None:
        try:
            with transaction.atomic():
                _, these = self._read(options["file"])
                apply(these)
        except DeclarationError as error:
            raise CommandError(f"nothing was changed: {error.message}") from None
        for change in these:
            self.stdout.write(str(change))
        self.stdout.write(f"{len(these)} changes made; the controller acts on them within 2 s")

    def _read(self, file: str) -> tuple[dict[str, list[Entry]], list[Change]]:
        try:
            text = sys.stdin.read() if file == "-" else Path(file).read_text()
            wanted = parse(text, SECTIONS)
            return wanted, changes(SECTIONS, wanted)
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"{file} cannot be read: {type(error).__name__}") from None
        except DeclarationError as error:
            raise CommandError(error.message) from None


async def _alive() -> list[WorkerSnapshot]:
    redis = connect(settings.ENV.redis_url)
    try:
        return await registry.workers(redis, timeout_ms=settings.ENV.worker_timeout_ms)
    finally:
        await redis.aclose()
