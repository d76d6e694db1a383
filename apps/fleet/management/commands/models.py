"""`manage.py models list | pull NAME | verify NAME | engine NAME KIND | roll NAME --revision R`: the catalogue, and
the weights on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from apps.core.errors import InvalidRequest
from apps.fleet.models import EngineKind, Model
from apps.fleet.services import model_roll, model_set_engine
from apps.fleet.weights import PACKAGES, Report, WeightsError, pull, verify


class Command(BaseCommand):
    help = "List the catalogue; fetch or check the weights of a model; choose how its requests are batched."

    def add_arguments(self, parser: CommandParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        actions.add_parser("list", help="the catalogue, and which weights are here")
        actions.add_parser("pull", help="fetch, check and convert weights").add_argument("name")
        actions.add_parser("verify", help="compare weights with what was pulled").add_argument("name")
        engine = actions.add_parser("engine", help="batch a model's requests continuously, or statically to compare")
        engine.add_argument("name")
        engine.add_argument("kind", choices=EngineKind.values)
        roll = actions.add_parser("roll", help="have the workers go over to another revision's weights, one by one")
        roll.add_argument("name")
        roll.add_argument("--revision", required=True, help='the folder NAME@REVISION on the workers; "" is the folder NAME')

    def handle(self, *args: Any, **options: Any) -> None:
        if options["action"] == "list":
            self._list()
        elif options["action"] == "engine":
            self._set_engine(options["name"], options["kind"])
        elif options["action"] == "roll":
            self._roll(options["name"], options["revision"])
        else:
            self._with_progress(pull if options["action"] == "pull" else verify, options["name"])

    def _list(self) -> None:
        table = Table("model", "modality", "parameters", "weights", "engine", "licence")
        for model in Model.objects.all():
            here = (settings.ENV.models_dir / model.name / "config.json").is_file()
            state = "here" if here else "can be pulled" if model.name in PACKAGES else "bring your own"
            size = f"{model.parameters / 1e6:,.0f} M"
            table.add_row(model.name, model.modality, size, state, model.engine, model.licence)
        Console().print(table)

    def _set_engine(self, name: str, kind: str) -> None:
        try:
            model_set_engine(name=name, engine=kind)
        except InvalidRequest as error:
            raise CommandError(error.message) from None
        self.stdout.write(f"{name}: {kind}; workers that hold it go over within seconds")

    def _roll(self, name: str, revision: str) -> None:
        try:
            model_roll(name=name, revision=revision)
        except InvalidRequest as error:
            raise CommandError(error.message) from None
        self.stdout.write(f"{name}: revision {revision or 'of the folder without one'}; workers go over one by one")

    def _with_progress(self, work: Callable[[str, Any, Report], None], name: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
        )
        console = Console()
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task(name, total=1.0)
            seen: set[str] = set()

            def report(stage: str, progress: float) -> None:
                bar.update(task, description=f"{name}: {stage}", completed=progress)
                if not console.is_terminal and stage not in seen:
                    seen.add(stage)
                    self.stdout.write(f"{name}: {stage}")

            try:
                work(name, settings.ENV.models_dir, report)
            except WeightsError as error:
                raise CommandError(str(error)) from None
            except KeyboardInterrupt:
                raise CommandError("stopped; the same command goes on from what was downloaded whole") from None
