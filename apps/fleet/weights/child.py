"""Programs that do the work on weights, as children: the site never loads what weights need."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from apps.fleet.weights.errors import Report

_POLL_SECONDS = 0.2
_REASON_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class _Progress:
    """What the daemon's programs print, one JSON object a line."""

    stage: str
    progress: float


_PROGRESS = TypeAdapter(_Progress)


def run_module(module: str, *arguments: str, verb: str = "", report: Report | None = None) -> str | None:
    """Runs one of the daemon's programs, which report what they do. None when it succeeded, else its reason."""

    def follow(child: subprocess.Popen[str]) -> None:
        for line in child.stdout or ():
            step = _progress(line)
            if step is not None and report is not None:
                report(f"{verb} ({step.stage})", step.progress)

    return run([sys.executable, "-m", module, *arguments], follow, stdout=subprocess.PIPE)


def _progress(line: str) -> _Progress | None:
    """A line of the program's; None for what a library of its printed between."""
    try:
        return _PROGRESS.validate_json(line)
    except ValidationError:
        return None


def run_growing(command: list[str], scratch: Path, environment: dict[str, str], report: Callable[[int], None]) -> str | None:
    """Runs a child that fills `scratch`, and reports how many bytes are in it. None when it succeeded, else its reason."""

    def follow(child: subprocess.Popen[str]) -> None:
        while _runs(child):
            report(_size(scratch))

    return run(command, follow, stdout=subprocess.DEVNULL, environment=environment)


def run(
    command: list[str],
    follow: Callable[[subprocess.Popen[str]], None],
    *,
    stdout: int,
    environment: dict[str, str] | None = None,
) -> str | None:
    """Runs a child that does not outlive this call. None when it succeeded, else the last line it complained with."""
    with tempfile.TemporaryFile("w+") as errors:  # a file, because a pipe that nobody reads would stop the child
        whole = os.environ | (environment or {})
        with subprocess.Popen(command, env=whole, stdout=stdout, stderr=errors, text=True) as child:
            try:
                follow(child)
            except BaseException:
                child.terminate()
                raise
        if child.returncode == 0:
            return None
        errors.seek(0)
        return (errors.read().strip().splitlines() or [""])[-1][:_REASON_CHARACTERS]


def _runs(child: subprocess.Popen[str]) -> bool:
    """Whether it still does, after a moment's wait."""
    try:
        child.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _size(folder: Path) -> int:
    """Bytes in all files below, some of which may vanish meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
