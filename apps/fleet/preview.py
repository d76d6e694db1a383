"""Dry runs: what a change of the board would do, said before it is made. Nothing here changes anything.

Each takes the workers that are alive, and raises InvalidRequest for what would be refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from apps.core.errors import InvalidRequest
from apps.core.types import ResidentModel, WorkerSnapshot
from apps.fleet import registry
from apps.fleet.foresight import foresee
from apps.fleet.models import Model, Movement, Placement, Worker
from apps.fleet.planning import Action
from apps.fleet.selectors import policies

RECENT = 5  # loads whose time tells how long the next takes
Alive = Sequence[WorkerSnapshot]


@dataclass(frozen=True, slots=True)
class Preview:
    """`possible` is False where the wish would be kept and not come true. `seconds` is what loads like these took lately;
    None where none are known, or nothing is loaded."""

    possible: bool
    says: tuple[str, ...]
    loads: tuple[str, ...] = ()
    unloads: tuple[str, ...] = ()
    seconds: float | None = None


def put_preview(alive: Alive, *, model: Model, worker: Worker, is_pinned: bool) -> Preview:
    """Placing, pinning and unpinning."""
    if not model.is_enabled:
        raise InvalidRequest(f"{model} is disabled: enable it first.", param="model")
    snapshot = _of(alive, worker)
    if snapshot is None:
        return Preview(False, (f"{worker} is not heard: {model} is loaded when it is back, if it fits then.",))
    placed = {**_placed(worker), model.name: is_pinned}
    foreseen = foresee(snapshot, placed, policies())
    says = [line for action in foreseen.actions for line in _told(snapshot, action)]
    if model.name in foreseen.missing:
        hint = "" if is_pinned else " Pinned, it may evict others."
        says.insert(0, f"{model} does not fit on {worker}: {foreseen.missing[model.name]}.{hint}")
    elif resident := snapshot.resident(model.name):
        says.insert(0, f"{worker} {'has' if resident.state == 'ready' else f'is {resident.state}'} {model} already.")
    says.append(f"It {'is never evicted to make room' if is_pinned else 'may be evicted when a pinned model needs the room'}.")
    loads = tuple(action.load for action in foreseen.actions if action.load)
    unloads = tuple(folder for action in foreseen.actions for folder in action.evict)
    return Preview(model.name not in foreseen.missing, tuple(says), loads, unloads, _seconds(snapshot, loads))


def move_preview(alive: Alive, *, model: Model, source: Worker, target: Worker) -> Preview:
    if source == target:
        raise InvalidRequest(f"{model} is on {source} already.", param="to")
    there = put_preview(alive, model=model, worker=target, is_pinned=_placed(source).get(model.name, False))
    resident = _resident(alive, source, model)
    if resident is None:
        leaves: tuple[str, ...] = (f"{source} does not hold it now: only the wish goes.",)
    else:
        verb = "leaves" if there.possible else "would leave"
        leaves = (f"It {verb} {source} once {target} serves it{_running(resident)}.",)
    return replace(there, says=(*there.says, *leaves))


def unload_preview(alive: Alive, *, model: Model, worker: Worker) -> Preview:
    resident, says = _resident(alive, worker, model), []
    if model.name in _placed(worker):
        says.append(f"{model} is no longer placed on {worker}.")
    if resident is None:
        return Preview(True, (*says, f"{worker} does not hold it now."))
    says.append(f"{resident.folder} leaves {worker}{_running(resident)}.")
    able = [snapshot for snapshot in alive if snapshot.worker_id != worker.name or not worker.is_draining]
    return Preview(True, (*says, _afterwards(model.name, _others(alive, worker), able)), unloads=(resident.folder,))


def drain_preview(alive: Alive, *, worker: Worker, is_draining: bool) -> Preview:
    snapshot = _of(alive, worker)
    if not is_draining:
        return Preview(True, (f"{worker} takes requests again, and loads what is placed on it.",))
    if snapshot is None:
        return Preview(True, (f"{worker} is not heard: it gets nothing when it is back.",))
    running = sum(resident.in_flight for resident in snapshot.models)
    says = [f"{worker} is given nothing more; {_count(running)} it has end there, untouched. Its models stay in memory."]
    others = _others(alive, worker)
    says += [_afterwards(resident.model, others, others) for resident in snapshot.models if resident.state == "ready"]
    return Preview(True, tuple(says))


def _of(alive: Alive, worker: Worker) -> WorkerSnapshot | None:
    found = next((snapshot for snapshot in alive if snapshot.worker_id == worker.name), None)
    return None if found is None else replace(found, draining=worker.is_draining)


def _resident(alive: Alive, worker: Worker, model: Model) -> ResidentModel | None:
    snapshot = _of(alive, worker)
    return None if snapshot is None else snapshot.resident(model.name)


def _placed(worker: Worker) -> dict[str, bool]:
    rows = Placement.objects.filter(worker=worker, model__is_enabled=True)
    return dict(rows.values_list("model__name", "is_pinned"))


def _count(requests: int) -> str:
    return {0: "no sequence", 1: "the one sequence"}.get(requests, f"the {requests} sequences")


def _running(resident: ResidentModel) -> str:
    return f"; {_count(resident.in_flight)} it runs end first, for up to a minute" if resident.in_flight else ""


def _told(snapshot: WorkerSnapshot, action: Action) -> list[str]:
    held = {resident.folder: resident for resident in snapshot.models}
    lines = [
        f"Unloads {folder}: {action.reason if not action.load else f'room for {action.load}'}"
        f"{_running(held[folder]) if folder in held else ''}."
        for folder in action.evict
    ]
    return [*lines, _told_load(snapshot, action.load)] if action.load else lines


def _told_load(snapshot: WorkerSnapshot, name: str) -> str:
    folder = next((folder for folder in snapshot.folders if folder.model == name), None)
    if folder is None:
        return f"Loads {name}, if it fits: the worker has not said yet what it needs."
    free = snapshot.memory_budget_bytes - snapshot.memory_reserved_bytes
    source = "host memory" if folder.in_host_memory else "disk"
    return f"Loads {name} from {source}: needs at least {_size(folder.need_bytes)}, {_size(free)} are free now."


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{max(0, count) / 2**20:.0f} MiB"


def _others(alive: Alive, worker: Worker) -> list[WorkerSnapshot]:
    return [snapshot for snapshot in alive if snapshot.worker_id != worker.name]


def _afterwards(model: str, others: Alive, able: Alive) -> str:
    """What becomes of requests for the model when a worker takes none of them: of the others, and of those that may load it."""
    if registry.state_of(model, others)[0] in ("ready", "loading"):
        return f"Requests for {model} go to the other workers that have it."
    if any(model in snapshot.loadable and not snapshot.draining for snapshot in able):
        return f"No other worker has {model}: requests for it have it loaded again, and wait meanwhile."
    return f"No other worker has {model} or could load it: requests for it will be refused."


def _seconds(snapshot: WorkerSnapshot, loads: Sequence[str]) -> float | None:
    """The sum of what each took lately from where it is; None unless all are known."""
    asleep = {folder.model for folder in snapshot.folders if folder.in_host_memory}
    known = [_load_seconds(folder, folder in asleep) for folder in loads]
    times = [seconds for seconds in known if seconds is not None]
    return round(sum(times), 1) if times and len(times) == len(known) else None


def _load_seconds(folder: str, from_host_memory: bool) -> float | None:
    past = Movement.objects.filter(loaded=folder, error="", from_host_memory=from_host_memory)[:RECENT]
    took = [(row.ended_at - row.started_at).total_seconds() for row in past]
    return sum(took) / len(took) if took else None
