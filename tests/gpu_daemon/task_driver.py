"""Runs tasks on a runner without threads, as the engine does."""

from __future__ import annotations

import itertools
from collections import defaultdict

from gpu_daemon.engine.task import Progress, Task, Work

_numbers = itertools.count(1)


def make_task(work: Work, units: int, *, done: int = 0) -> Task:
    return Task(0, f"t{next(_numbers)}", 1, 0, work, units, done)


def run_step(runner, tasks: list[Task]) -> dict[Task, Progress]:
    """One step, each task told at most once."""
    told = {}
    for progress in runner.step(tasks):
        assert progress.task in tasks
        assert progress.task not in told
        progress.task.done += progress.units
        told[progress.task] = progress
    return told


def run_all(runner, tasks: list[Task]) -> list[list[Progress]]:
    """What was told of each, all run together until they are finished."""
    told: defaultdict[Task, list[Progress]] = defaultdict(list)
    going = list(tasks)
    while going:
        for task, progress in run_step(runner, going).items():
            told[task].append(progress)
        going = [task for task in going if not (told[task] and told[task][-1].finished)]
    return [told[task] for task in tasks]
