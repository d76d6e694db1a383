"""Which step of a mode switch comes next: a pure function of the steps that have ended. Nothing here does anything.

The new mode's daemons start beside the old ones, which serve on: only when the new ones are up, without models, are requests
moved and the old ones stopped. A failure before that costs nobody anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Step(StrEnum):
    """What is done to the host. Each may be done twice."""

    START = "start"  # the new mode's daemons, under the new epoch, beside the old
    VERIFY = "verify"  # they are heard over gRPC: the right ones, epoch and mode
    CORDON = "cordon"  # the old ones are given nothing more
    DRAIN = "drain"  # what runs has a moment to end
    HAND_OVER = "hand over"  # the rest leaves with the tokens it has, and waits; the host's mode is the new one
    STOP = "stop"  # the old ones save their sessions and leave
    LOAD = "load"  # what is placed on the new ones
    UNCORDON = "uncordon"
    # The ways back.
    PROBE = "probe"  # do the old ones still serve?
    RETURN = "return"  # they do: the host is theirs again
    SWEEP = "sweep"  # the new ones leave
    RENEW = "renew"  # they do not: the host is in the old mode, under the epoch after the new one's
    RESTART = "restart"  # the old mode's daemons, when nothing else is left
    RECHECK = "recheck"
    RELOAD = "reload"
    REOPEN = "reopen"


FORWARD = (Step.START, Step.VERIFY, Step.CORDON, Step.DRAIN, Step.HAND_OVER, Step.STOP, Step.LOAD, Step.UNCORDON)
LIGHT = (Step.RETURN, Step.SWEEP)
HEAVY = (Step.RENEW, Step.RESTART, Step.RECHECK, Step.RELOAD, Step.REOPEN)
_MATTERS = frozenset({Step.SWEEP, Step.RESTART, Step.RECHECK})  # without them the way back has not arrived


class End(StrEnum):
    SUCCEEDED = "succeeded"
    ROLLED_BACK = "rolled_back"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Done:
    step: Step
    succeeded: bool


def decide(history: Iterable[Done]) -> Step | End:
    """The next step, or how it ended. `history` holds the steps that have ended, each once."""
    outcomes = {done.step: done.succeeded for done in history}
    for step in FORWARD:
        if step not in outcomes:
            return step
        if not outcomes[step]:
            return _back(step, outcomes)
    return End.SUCCEEDED


def _back(failed: Step, outcomes: dict[Step, bool]) -> Step | End:
    """The old daemons are as they were until they are told to stop, and may be so after that when the word was lost."""
    if FORWARD.index(failed) < FORWARD.index(Step.STOP):
        path: tuple[Step, ...] = LIGHT
    elif Step.PROBE not in outcomes:
        return Step.PROBE
    else:
        path = LIGHT if outcomes[Step.PROBE] else HEAVY
    for step in path:
        if step not in outcomes:
            if step in (Step.RECHECK, Step.RELOAD) and not outcomes[Step.RESTART]:
                continue  # nothing to see there yet; the keeper goes on trying
            return step
    return End.FAILED if any(outcomes.get(step) is False for step in _MATTERS) else End.ROLLED_BACK


def reason(history: Iterable[tuple[Step, bool, str]]) -> str:
    """What went wrong first, for people; empty when nothing did."""
    return next((f"{step}: {detail}" for step, succeeded, detail in history if not succeeded), "")
