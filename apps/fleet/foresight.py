"""What workers would do, foreseen: the manager's own plans, each carried out on paper until there is nothing left to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from apps.core.types import ResidentModel, WorkerSnapshot
from apps.fleet.manager import Planner
from apps.fleet.planning import Action, Policy, Rules, Site

MOST_ROUNDS = 100


@dataclass(frozen=True, slots=True)
class Foreseen:
    """One worker's future: what it does, and which placed models do not come to be there, with why."""

    actions: tuple[Action, ...]
    missing: Mapping[str, str]


def foresee(snapshot: WorkerSnapshot, placed: Mapping[str, bool], policies: Mapping[str, Policy]) -> Foreseen:
    """`placed` are models, True for pinned. Nothing is asked for meanwhile, and all that is here has been for long."""
    site = Site(snapshot, placed, ready_since_ms=_long_ago(snapshot))
    actions: list[Action] = []
    refused: Mapping[str, str] = {}
    for _ in range(MOST_ROUNDS):
        plan = Planner(2**40, [site], policies, {}, Rules()).plan()
        refused = plan.refused[site.name]
        if not plan.actions:
            break
        actions += plan.actions
        site = _done(site, plan.actions[0])
    absent = [model for model in placed if model in policies and not site.serves(model)]
    return Foreseen(tuple(actions), {model: refused.get(model) or _why(site, policies[model]) for model in absent})


def _why(site: Site, policy: Policy) -> str:
    if site.snapshot.draining:
        return "the worker is drained: it loads nothing"
    if site.holds(policy.folder, "loading"):
        return "it is being loaded"
    return "there is no room for it beside the others" if site.folder(policy.folder) else "its weights are not on the worker"


def _long_ago(snapshot: WorkerSnapshot) -> dict[str, int]:
    return {resident.folder: 0 for resident in snapshot.models}


def _done(site: Site, action: Action) -> Site:
    folder = site.folder(action.load)
    need = folder.need_bytes if folder is not None else 0
    model, _, revision = action.load.partition("@")
    gone = {*action.evict, action.load}
    stay: Sequence[ResidentModel] = [resident for resident in site.snapshot.models if resident.folder not in gone]
    loaded = ResidentModel(model, "ready", revision=revision, engine=action.engine, resident_bytes=need)
    models = (*stay, loaded) if action.load else tuple(stay)
    snapshot = replace(site.snapshot, models=models, memory_reserved_bytes=sum(each.resident_bytes for each in models))
    return replace(site, snapshot=snapshot, ready_since_ms=_long_ago(snapshot))
