"""What the programs that prepare a model's folder have in common: how they report, and how they fail.

Each runs as `python -m MODULE SOURCE TARGET`, writes one JSON object a line to standard output,
`{"stage": "...", "progress": 0.0-1.0}`, and exits 0; what it cannot use ends it with one line on standard error and exit 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path


class UnsupportedFile(Exception):
    """The source is not what this program knows. The message is one line for people."""


def run(work: Callable[[Path, Path], Iterable[tuple[str, float]]], arguments: list[str]) -> int:
    """Runs `work(source, target)`, which yields (stage, progress in that stage). Returns the exit status."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m MODULE SOURCE TARGET\n")
        return 2
    try:
        for stage, progress in work(Path(arguments[0]), Path(arguments[1])):
            sys.stdout.write(json.dumps({"stage": stage, "progress": round(progress, 4)}) + "\n")
            sys.stdout.flush()
    except (UnsupportedFile, OSError, ValueError) as error:
        sys.stderr.write(f"cannot convert the weights: {error}\n")
        return 1
    return 0
