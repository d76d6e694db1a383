"""Weights that an operator has in a folder of their own, such as a hub's cache on this machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from apps.fleet.weights import manifest
from apps.fleet.weights.errors import Report, WeightsError
from apps.fleet.weights.folder import Filling, is_here

_NOT_THE_MODEL = (".cache", ".git", manifest.MANIFEST)


def from_folder(source: Path) -> Filling:
    """Raises WeightsError for a folder that holds no model, or one that is not safe to load."""
    if not is_here(source):
        raise WeightsError(f"{source} holds no model: neither a config.json nor a model_index.json is in it")
    manifest.require_safe(source)
    paths = [path for path in sorted(source.rglob("*")) if path.is_file() and not _is_aside(path.relative_to(source))]

    def fill(partial: Path, report: Report) -> None:
        shutil.rmtree(partial)
        for number, path in enumerate(paths, 1):
            report("copying", number / len(paths))
            _take(path.resolve(), partial / path.relative_to(source))

    return Filling(sum(path.stat().st_size for path in paths), fill)


def _is_aside(path: Path) -> bool:
    return path.parts[0] in _NOT_THE_MODEL


def _take(path: Path, target: Path) -> None:
    """The same file under another name where the disk is the same, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)
