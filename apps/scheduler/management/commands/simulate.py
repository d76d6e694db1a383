"""`manage.py simulate TRACE --policy weight.acme=3`: what a changed policy would have done to each organization."""

from __future__ import annotations

import random
from io import StringIO
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from rich.console import Console
from rich.table import Table

from apps.core.types import Priority
from apps.scheduler import log
from apps.scheduler.cost import Cost
from apps.scheduler.policy import Bounds
from apps.scheduler.replay import BrokenLog
from apps.scheduler.simulate import Arrival, OrgResult, Policy, Simulation, arrivals_of, policy_of

BAR = 40
Results = dict[str, OrgResult]


class Command(BaseCommand):
    help = "Serve a trace twice, as it is and with a changed policy, and print the difference per organization."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("trace", help="an event log, a file of JSON lines, or made-up:REQUESTS[:SEED]")
        parser.add_argument(
            "--policy", action="append", default=[], metavar="NAME=VALUE",
            help="weight.ORG, workers, slots, lane_cap, org_cap, drain_cap_ms, or CLASS.LIMIT; may be repeated",
        )  # fmt: skip
        parser.add_argument("--base", action="append", default=[], metavar="NAME=VALUE", help="the same, for both runs")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            trace, base = _load(options["trace"])
            for setting in options["base"]:
                base = base.changed(setting)
            changed = base
            for setting in options["policy"]:
                changed = changed.changed(setting)
        except (OSError, ValueError, BrokenLog) as error:
            raise CommandError(str(error)) from None
        before = Simulation(base).run(trace)
        after = Simulation(changed).run(trace) if options["policy"] else before
        text = StringIO()
        console = Console(file=text, width=128)
        console.print(_table(before, after))
        console.print(_chart(before, after))
        self.stdout.write(text.getvalue())


def _load(trace: str) -> tuple[list[Arrival], Policy]:
    env = settings.ENV
    bounds = Bounds(env.queue_max_requests, env.queue_max_requests_per_org, env.queue_max_drain_ms)
    policy = Policy(env.classes, bounds)
    if trace.startswith("made-up:"):
        count, _, seed = trace.removeprefix("made-up:").partition(":")
        return made_up(int(count), int(seed or 1)), policy
    entries = list(log.read(Path(trace)))
    return arrivals_of(entries), policy_of(entries, policy)


def made_up(count: int, seed: int) -> list[Arrival]:
    """Poisson arrivals at 95% of one worker: ten organizations, the first of which sends half of everything."""
    rng, at = random.Random(seed), 0.0
    trace = []
    for _ in range(count):
        at += rng.expovariate(0.95 / 100)
        org = "org-0" if rng.random() < 0.5 else f"org-{rng.randrange(1, 10)}"
        priority = rng.choices(list(Priority), (2, 7, 1))[0]
        trace.append(Arrival(int(at), "model", org, priority, Cost(rng.uniform(5, 35), 1.0, 80), rng.randrange(1, 160)))
    return trace


def _table(before: Results, after: Results) -> Table:
    table = Table(title="before → after")
    for column in ("organization", "served", "refused", "expired", "wait p50", "wait p99", "GPU-s"):
        table.add_column(column, justify="left" if column == "organization" else "right")
    for org in sorted({*before, *after}):
        a, b = before.get(org, OrgResult()), after.get(org, OrgResult())
        table.add_row(
            org,
            _pair(len(a.waits_ms), len(b.waits_ms)),
            _pair(a.refused, b.refused),
            _pair(a.expired, b.expired),
            _pair(a.wait_ms(0.5), b.wait_ms(0.5), " ms"),
            _pair(a.wait_ms(0.99), b.wait_ms(0.99), " ms"),
            _pair(round(a.served_ms / 1000), round(b.served_ms / 1000)),
        )
    return table


def _pair(before: int, after: int, unit: str = "") -> str:
    return f"{before}{unit}" if before == after else f"{before} → {after}{unit} ({after - before:+})"


def _chart(before: Results, after: Results) -> str:
    """p99 waits as bars, the one above the other."""
    longest = max([1, *(result.wait_ms(0.99) for results in (before, after) for result in results.values())])
    lines = ["wait p99: ░ before, █ after"]
    for org in sorted({*before, *after}):
        for results, mark in ((before, "░"), (after, "█")):
            wait = results.get(org, OrgResult()).wait_ms(0.99)
            lines.append(f"{org if mark == '░' else '':>20} {mark * round(BAR * wait / longest)} {wait} ms")
    return "\n".join(lines)
