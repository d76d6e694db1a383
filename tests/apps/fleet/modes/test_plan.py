"""The state machine, with every failure at every step."""

from __future__ import annotations

import itertools

import pytest

from apps.fleet.modes.plan import FORWARD, HEAVY, LIGHT, Done, End, Step, decide, reason

UNTOUCHED = FORWARD[: FORWARD.index(Step.STOP)]
TOUCHED = FORWARD[FORWARD.index(Step.STOP) :]


def walk(*failing: Step) -> tuple[list[Step], End]:
    """The steps taken, and the end, when these fail."""
    history: list[Done] = []
    while not isinstance(step := decide(history), End):
        assert step not in [done.step for done in history], "no step is taken twice"
        history.append(Done(step, step not in failing))
    return [done.step for done in history], step


def test_when_nothing_fails_every_step_is_taken_in_order() -> None:
    assert walk() == (list(FORWARD), End.SUCCEEDED)


@pytest.mark.parametrize("step", UNTOUCHED)
def test_before_the_old_daemons_are_told_to_stop_the_host_returns_to_them(step: Step) -> None:
    taken = [*FORWARD[: FORWARD.index(step) + 1], *LIGHT]
    assert walk(step) == (taken, End.ROLLED_BACK)


@pytest.mark.parametrize("step", TOUCHED)
def test_afterwards_it_depends_on_whether_they_still_serve(step: Step) -> None:
    before = [*FORWARD[: FORWARD.index(step) + 1], Step.PROBE]
    assert walk(step) == ([*before, *LIGHT], End.ROLLED_BACK)
    assert walk(step, Step.PROBE) == ([*before, *HEAVY], End.ROLLED_BACK)


def test_every_pair_and_triple_of_failures_ends_uncordoned_and_says_whether_it_arrived() -> None:
    for failing in itertools.chain.from_iterable(itertools.combinations(Step, count) for count in (1, 2, 3)):
        taken, end = walk(*failing)
        if end is End.SUCCEEDED:
            assert not set(taken) & set(failing)
            continue
        assert {Step.RETURN, Step.REOPEN} & set(taken), failing
        lost = {Step.SWEEP, Step.RESTART, Step.RECHECK} & set(taken) & set(failing)
        assert (end is End.FAILED) == bool(lost), failing


def test_what_could_not_be_restarted_is_neither_heard_nor_loaded() -> None:
    taken, end = walk(Step.STOP, Step.PROBE, Step.RESTART)
    assert taken[-3:] == [Step.RENEW, Step.RESTART, Step.REOPEN]
    assert end is End.FAILED


def test_the_first_failure_is_the_reason() -> None:
    assert reason([]) == ""
    history = [(Step.START, True, "epoch 2"), (Step.VERIFY, False, "w1 is silent"), (Step.SWEEP, False, "cut")]
    assert reason(history) == "verify: w1 is silent"
