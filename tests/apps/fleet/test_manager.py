"""The manager's plans: what is loaded, who makes room, who is spared, how a revision replaces another."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from apps.core.types import ModelFolder, ResidentModel, WorkerSnapshot
from apps.fleet.manager import Planner
from apps.fleet.planning import Action, Demand, Policy, Rules, Site

NOW = 100_000
SIZE = 10
POLICIES = {name: Policy(name, idle_seconds=600) for name in "abcd"}


def resident(
    name: str, *, idle_ms: int = 0, running: int = 0, state: str = "ready", engine: str = "continuous"
) -> ResidentModel:
    model, _, revision = name.partition("@")
    return ResidentModel(model, state, running=running, idle_ms=idle_ms, resident_bytes=SIZE, revision=revision, engine=engine)


def site(*residents: ResidentModel, name: str = "w", budget: int = 2 * SIZE, folders: str = "a b c d", asleep: str = "",
         since: int = 0, **fields: Any) -> Site:  # fmt: skip
    on_disk = tuple(ModelFolder(each, need_bytes=SIZE, in_host_memory=each in asleep.split()) for each in folders.split())
    snapshot = WorkerSnapshot(
        name, "a:1", 1, 0, "cpu", "individual", False, budget, budget, residents,
        memory_budget_bytes=budget, memory_reserved_bytes=sum(r.resident_bytes for r in residents), folders=on_disk,
    )  # fmt: skip
    return Site(snapshot, ready_since_ms={r.folder: since for r in residents}, **fields)


def starving(**since: int) -> dict[str, Demand]:
    return {model: Demand(1, NOW - ms) for model, ms in since.items()}


def plan(*sites: Site, demand: dict[str, Demand] | None = None, policies=POLICIES, rules=Rules()) -> list[Action]:  # noqa: B008
    return Planner(NOW, sites, policies, demand or {}, rules).plan().actions


def short(actions: list[Action]) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(action.worker, action.load, action.evict) for action in actions]


def test_what_is_placed_is_loaded_pinned_first_and_one_at_a_time() -> None:
    assert short(plan(site(placed={"a": False, "b": True}))) == [("w", "b", ())]
    assert plan(site(resident("b", state="loading"), placed={"a": False, "b": True})) == []


def test_requests_that_wait_have_their_model_loaded_where_there_is_room() -> None:
    full = site(resident("a", idle_ms=50), resident("b", idle_ms=40), name="full")
    assert short(plan(full, site(resident("a"), name="free"), demand=starving(c=10))) == [("free", "c", ())]
    assert short(plan(full, demand=starving(c=10))) == [("full", "c", ("a",))], "least recently used first"
    assert short(plan(site(name="x"), site(name="y", asleep="c"), demand=starving(c=10))) == [("y", "c", ())]


def test_a_load_under_way_is_joined() -> None:
    assert plan(site(resident("c", state="loading")), site(name="other"), demand=starving(c=10)) == []


@pytest.mark.parametrize(
    ("spared", "why"),
    [
        ({"placed": {"a": True, "b": True}}, "pinned"),
        ({"since": NOW - 1000}, "just loaded"),
        ({"acting": True}, "at work"),
    ],
)
def test_nobody_is_evicted_who_is_spared(spared: dict[str, Any], why: str) -> None:
    both = (resident("a", idle_ms=50), resident("b", idle_ms=40))
    assert plan(site(*both, **spared), demand=starving(c=10)) == [], why


def test_a_busy_model_gives_way_only_to_one_that_starved_for_a_turn() -> None:
    both = site(resident("a", running=3), resident("b", running=1))
    busy = {"a": Demand(5), "b": Demand(5)}
    assert plan(both, demand={**busy, **starving(c=19_999)}) == []
    assert len(plan(both, demand={**busy, **starving(c=20_000)})) == 1


def test_a_pinned_wish_makes_room_and_another_takes_what_is_free() -> None:
    both = resident("a", running=1), resident("b", idle_ms=5)
    assert short(plan(site(*both, placed={"c": True}))) == [("w", "c", ("b",))]
    assert plan(site(*both, placed={"c": False})) == []


def test_what_is_idle_is_unloaded_unless_placed() -> None:
    idle = resident("a", idle_ms=600_000)
    policies = {"a": Policy("a", idle_seconds=60)}
    assert short(plan(site(idle), policies=policies)) == [("w", "", ("a",))]
    assert plan(site(idle, placed={"a": False}), policies=policies) == []
    assert plan(site(idle), policies={"a": Policy("a", idle_seconds=0)}) == []
    assert plan(site(idle), policies=policies, demand={"a": Demand(1)}) == []


def test_another_engine_takes_over() -> None:
    policies = {"a": Policy("a", "static")}
    assert short(plan(site(resident("a")), policies=policies)) == [("w", "a", ("a",))]
    assert plan(site(resident("a", engine="static")), policies=policies) == []


def test_verdicts_tell_what_could_be_loaded_and_why_not() -> None:
    found = site(resident("a"), placed={"a": True}, failing={"b": "wrong SHA-256"}, folders="a b c")
    policies = {**POLICIES, "huge": Policy("huge")}
    large = Site(
        WorkerSnapshot("x", "a:1", 1, 0, "cpu", "individual", False, 5, 5, memory_budget_bytes=5,
                       folders=(ModelFolder("huge", need_bytes=9 << 20), ModelFolder("a", error="a: cut short"))),
    )  # fmt: skip
    verdicts = Planner(NOW, [found, large], policies, {}, Rules()).plan()
    assert verdicts.loadable == {"w": ("a", "c"), "x": ()}
    assert verdicts.refused["w"] == {"b": "wrong SHA-256"}
    assert verdicts.refused["x"] == {"huge": "needs 9 MiB, 0 MiB can be made free", "a": "a: cut short"}


# --- Revisions ---

ROLL = {"a": Policy("a", revision="r2")}


def test_a_new_revision_is_loaded_beside_the_old_one_which_then_leaves() -> None:
    folders = "a a@r2"
    assert short(plan(site(resident("a"), folders=folders), policies=ROLL)) == [("w", "a@r2", ())]
    both = site(resident("a", running=2), resident("a@r2"), folders=folders)
    assert short(plan(both, policies=ROLL)) == [("w", "", ("a",))]


def test_where_both_do_not_fit_the_old_one_leaves_first() -> None:
    assert short(plan(site(resident("a"), budget=SIZE, folders="a a@r2"), policies=ROLL)) == [("w", "a@r2", ("a",))]


def test_workers_go_over_one_after_another() -> None:
    folders = "a a@r2"
    first, second = site(resident("a"), name="x", folders=folders), site(resident("a"), name="y", folders=folders)
    assert len(plan(first, second, policies=ROLL)) == 1
    going = site(resident("a"), resident("a@r2", state="loading"), name="x", folders=folders)
    assert plan(going, second, policies=ROLL) == []
    done = site(resident("a@r2"), name="x", folders=folders)
    assert short(plan(done, second, policies=ROLL)) == [("y", "a@r2", ())]


def test_a_revision_that_cannot_be_loaded_leaves_the_old_one() -> None:
    assert plan(site(resident("a"), folders="a"), policies=ROLL) == [], "its folder is not here"
    assert plan(site(resident("a"), folders="a a@r2", failing={"a@r2": "no"}), policies=ROLL) == []
    fallen_back = site(folders="a a@r2", failing={"a@r2": "no"}, asleep="a")
    assert short(plan(fallen_back, policies=ROLL, demand=starving(a=5))) == [("w", "a", ())]


def test_what_an_operator_wants_gone_goes_also_from_a_worker_that_drains() -> None:
    assert short(plan(site(resident("a"), unwanted={"a": False}))) == [("w", "", ("a",))]
    assert plan(site(resident("a"), unwanted={"a": False}, placed={"a": False})) == [], "it was placed again"
    draining = site(resident("a"), unwanted={"a": False})
    draining = dataclasses.replace(draining, snapshot=dataclasses.replace(draining.snapshot, draining=True))
    assert short(plan(draining)) == [("w", "", ("a",))]


def test_what_moves_leaves_once_the_other_worker_serves_it() -> None:
    source = site(resident("a"), name="source", unwanted={"a": True})
    target = site(name="target", placed={"a": False})
    assert short(plan(source, target)) == [("target", "a", ())]
    assert plan(source, site(resident("a", state="loading"), name="target", placed={"a": False})) == []
    assert short(plan(source, site(resident("a"), name="target", placed={"a": False}))) == [("source", "", ("a",))]


def test_what_a_draining_worker_has_is_loaded_elsewhere_for_requests() -> None:
    held = site(resident("a"), name="held")
    assert plan(held, site(name="other"), demand=starving(a=10)) == []
    drains = dataclasses.replace(held, snapshot=dataclasses.replace(held.snapshot, draining=True))
    assert short(plan(drains, site(name="other"), demand=starving(a=10))) == [("other", "a", ())]
