"""The model manager: what each worker is to load and unload next. Pure: the same fleet gives the same plan.

The operator's placements come first, pinned ones before others; then models that requests wait for. A worker does one thing
at a time. Room is made by evicting the least recently used of what is not pinned, not busy and not just loaded; a model whose
requests wait gives way only to one that has starved for a turn. So two of three models that all have requests are served to
the end of their queues before the third comes, unless that takes too long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from apps.core.types import ResidentModel
from apps.fleet.planning import Action, Demand, Plan, Policy, Rules, Site

MIB = 1 << 20


class Planner:
    """One round. `plan` is the whole of it."""

    def __init__(
        self, now_ms: int, sites: Sequence[Site], policies: Mapping[str, Policy], demand: Mapping[str, Demand], rules: Rules
    ) -> None:
        self._now = now_ms
        self._sites = sites
        self._policies = policies
        self._demand = demand
        self._rules = rules
        self._rolling: set[str] = set()  # models whose revision changes somewhere

    def plan(self) -> Plan:
        plan = Plan()
        for site in self._sites:
            plan.loadable[site.name], plan.refused[site.name] = self._verdicts(site)
            action = None if site.moves else self._dismiss(site)
            if action is None and not site.busy:
                action = self._replace(site) or self._wish(site) or self._idle(site)
            if action is not None:
                plan.actions.append(action)
        taken = {action.worker for action in plan.actions}
        for model in self._hungry():
            action = self._feed(model, [site for site in self._sites if not site.busy and site.name not in taken])
            if action is not None:
                plan.actions.append(action)
                taken.add(action.worker)
        return plan

    # --- What a worker could load ---

    def _verdicts(self, site: Site) -> tuple[tuple[str, ...], dict[str, str]]:
        loadable, refused = [], {}
        for policy in self._policies.values():
            if not (self._rules.on_demand or policy.model in site.placed):
                continue
            reason = self._obstacle(site, policy)
            if reason is None:
                loadable.append(policy.model)
            elif reason:
                refused[policy.model] = reason
        return tuple(loadable), refused

    def _obstacle(self, site: Site, policy: Policy) -> str | None:
        """Why the worker could never load the model as things are; "" when it has no such folder, None when it could."""
        name = _folder_to_use(site, policy)
        folder = site.folder(name)
        if name in site.failing:
            return site.failing[name]
        if folder is None:
            return "" if policy.model not in site.placed or site.snapshot.folders else None
        if folder.error:
            return folder.error
        most = site.snapshot.memory_budget_bytes - sum(
            resident.resident_bytes for resident in site.snapshot.models
            if site.is_pinned(resident) and resident.model != policy.model
        )  # fmt: skip
        return None if folder.need_bytes <= most else f"needs {_mib(folder.need_bytes)}, {_mib(most)} can be made free"

    # --- Reasons to act ---

    def _dismiss(self, site: Site) -> Action | None:
        """What an operator wants gone, also from a worker that drains. Requests may have it loaded again."""
        for resident in site.snapshot.models:
            model, to_move = resident.model, site.unwanted.get(resident.model)
            if to_move is None or resident.state != "ready" or model in site.placed:
                continue
            others = (other for other in self._sites if other is not site and not other.snapshot.draining)
            if not to_move or any(other.serves(model) for other in others):
                reason = "moved to another worker" if to_move else "an operator wants it gone"
                return Action(site.name, evict=(resident.folder,), reason=reason)
        return None

    def _replace(self, site: Site) -> Action | None:
        """A model that is here under another engine, or in another revision, goes over; requests it runs finish first."""
        for resident in site.snapshot.models:
            policy = self._policies.get(resident.model)
            if policy is None or resident.state != "ready":
                continue
            if resident.folder == policy.folder:
                if resident.engine != policy.engine:
                    return Action(site.name, policy.folder, policy.engine, (resident.folder,), "goes over to another engine")
            elif site.holds(policy.folder, "ready"):
                return Action(site.name, evict=(resident.folder,), reason=f"replaced by {policy.folder}")
            elif action := self._roll(site, resident, policy):
                return action
        return None

    def _roll(self, site: Site, old: ResidentModel, policy: Policy) -> Action | None:
        """Beside the old one if it fits, else in its place; one worker after another."""
        folder = site.folder(policy.folder)
        if folder is None or folder.error or policy.folder in site.failing:
            return None
        beside = folder.need_bytes <= site.free_bytes
        if not beside and folder.need_bytes > site.free_bytes + old.resident_bytes:
            return None
        if self._rolls_elsewhere(site, policy.model):
            return None
        return Action(site.name, policy.folder, policy.engine, () if beside else (old.folder,), f"replaces {old.folder}")

    def _rolls_elsewhere(self, site: Site, model: str) -> bool:
        """On a worker that moves, or has both, or has been told to begin in this very round."""
        if model in self._rolling:
            return True
        others = [other for other in self._sites if other is not site]
        both = [sum(resident.model == model for resident in other.snapshot.models) > 1 for other in others]
        if any(both) or any(other.moves for other in others):
            return True
        self._rolling.add(model)
        return False

    def _wish(self, site: Site) -> Action | None:
        """What the operator placed here and is not: a pinned one may evict, the others take what is free."""
        for model in sorted(site.placed, key=lambda model: not site.placed[model]):
            policy = self._policies.get(model)
            if policy is None or any(
                resident.model == model and resident.state == "ready" for resident in site.snapshot.models
            ):
                continue
            if self._obstacle(site, policy) is None:
                action = self._load(site, policy, "placed here", may_evict=site.placed[model])
                if action is not None:
                    return action
        return None

    def _idle(self, site: Site) -> Action | None:
        for resident in site.snapshot.models:
            policy = self._policies.get(resident.model)
            if policy is None or resident.model in site.placed or resident.state != "ready" or not policy.idle_seconds:
                continue
            idle = not resident.in_flight and not self._waiting(resident.model)
            if idle and min(resident.idle_ms, self._age(site, resident)) >= policy.idle_seconds * 1000:
                return Action(site.name, evict=(resident.folder,), reason=f"idle for {resident.idle_ms // 1000} s")
        return None

    def _hungry(self) -> list[str]:
        """Models with requests and no worker, the longest starving first."""
        known = [model for model, demand in self._demand.items() if demand.starving_since_ms and model in self._policies]
        return sorted(known, key=lambda model: (self._demand[model].starving_since_ms, model))

    def _feed(self, model: str, sites: Iterable[Site]) -> Action | None:
        """A load on the best worker: without evicting, then from host memory, then where most is free."""
        policy = self._policies[model]
        if any(resident.model == model and resident.state in ("ready", "loading")
               for site in self._sites if not site.snapshot.draining for resident in site.snapshot.models):  # fmt: skip
            return None
        found = []
        for site in sites:
            if (self._rules.on_demand or model in site.placed) and self._obstacle(site, policy) is None:
                action = self._load(site, policy, "requests wait for it", may_evict=True)
                if action is not None:
                    folder = site.folder(action.load)
                    asleep = folder is not None and folder.in_host_memory
                    found.append((len(action.evict), not asleep, -site.free_bytes, site.name, action))
        return min(found, key=lambda entry: entry[:4])[-1] if found else None

    # --- Room ---

    def _load(self, site: Site, policy: Policy, reason: str, *, may_evict: bool) -> Action | None:
        name = _folder_to_use(site, policy)
        folder = site.folder(name)
        missing = folder.need_bytes - site.free_bytes if folder is not None else 0
        evict = self._victims(site, policy.model, missing) if may_evict else () if missing <= 0 else None
        return None if evict is None else Action(site.name, name, policy.engine, evict, reason)

    def _victims(self, site: Site, model: str, missing: int) -> tuple[str, ...] | None:
        """Who makes room for `missing` bytes, least recently used first; None when nobody does now."""
        victims: list[str] = []
        for resident in sorted(site.snapshot.models, key=lambda resident: (resident.in_flight > 0, -resident.idle_ms)):
            if missing <= 0:
                break
            if resident.model != model and self._gives_way(site, resident, model):
                victims.append(resident.folder)
                missing -= resident.resident_bytes
        return tuple(victims) if missing <= 0 else None

    def _gives_way(self, site: Site, resident: ResidentModel, to: str) -> bool:
        if resident.state != "ready" or site.is_pinned(resident) or self._age(site, resident) < self._rules.residency_ms:
            return False
        if not resident.in_flight and not self._waiting(resident.model):
            return True
        if site.placed.get(to):
            return True
        since = self._demand[to].starving_since_ms if to in self._demand else 0
        return bool(since) and self._now - since >= self._rules.turn_ms

    def _waiting(self, model: str) -> int:
        return self._demand[model].waiting if model in self._demand else 0

    def _age(self, site: Site, resident: ResidentModel) -> int:
        return self._now - site.ready_since_ms.get(resident.folder, self._now)


def _folder_to_use(site: Site, policy: Policy) -> str:
    """The wanted revision; while that one fails here, the one that served before, if its weights are still in host memory."""
    if policy.folder in site.failing:
        others = (folder for folder in site.snapshot.folders if folder.in_host_memory and folder.model not in site.failing)
        return next((folder.model for folder in others if folder.model.partition("@")[0] == policy.model), policy.folder)
    return policy.folder


def _mib(size: int) -> str:
    return f"{max(0, size) // MIB} MiB"
