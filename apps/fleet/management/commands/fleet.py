"""`manage.py fleet list | add-host | add-worker | remove-worker`: machines and daemons, added while serving."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from rich.console import Console
from rich.table import Table

from apps.core.errors import InvalidRequest
from apps.fleet.models import Host, Mode, Worker
from apps.fleet.services import host_add, worker_add


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
