"""Whether unmet demand should change a host's mode: a pure function. apps/fleet/modes/demand.py collects what it looks at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

STALE_MS = 15_000  # demand that nobody has voiced for so long is none any more


@dataclass(frozen=True, slots=True)
class Demand:
    """Requests found no worker for the model: when first, and when last, without a pause of STALE_MS between."""

    model: str
    first_ms: int
    last_ms: int


@dataclass(frozen=True, slots=True)
class SwitchableHost:
    """A host that may switch itself, and what is placed in its two modes. `since_ms` is when it took its present one."""

    id: int
    mode: str
    since_ms: int
    here: frozenset[str]
    there: frozenset[str]
    other: str  # the mode that `there` is of


@dataclass(frozen=True, slots=True)
class Wish:
    host_id: int
    mode: str
    model: str


def choose(
    demands: Iterable[Demand], hosts: Iterable[SwitchableHost], *, now_ms: int, demand_ms: int, dwell_ms: int
) -> Wish | None:
    """The switch that the longest unmet demand asks for, if a host may make it now.

    A host is asked only for a model that is placed in its other mode and not in this one, and only after its dwell time.
    Of those that could, the one that gives up least: the fewest models that only its present mode has.
    """
    lasting = [d for d in demands if now_ms - d.last_ms <= STALE_MS and d.last_ms - d.first_ms >= demand_ms]
    rested = [host for host in hosts if now_ms - host.since_ms >= dwell_ms]
    for demand in sorted(lasting, key=lambda d: (d.first_ms, d.model)):
        able = [host for host in rested if demand.model in host.there - host.here]
        if able:
            best = min(able, key=lambda host: (len(host.here - host.there), host.id))
            return Wish(best.id, best.other, demand.model)
    return None
