"""A model's folder is filled beside its place and moved there whole, by one process at a time."""

from __future__ import annotations

import fcntl
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from apps.fleet.weights import manifest
from apps.fleet.weights.errors import Report, WeightsError

TINY_MARK = "tiny.json"  # in the folder of a seeded checkpoint that has the architecture and not the weights
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Filling:
    """What a source does to an empty folder, or one that an earlier try left. `disk_bytes` is what that needs in all."""

    disk_bytes: int
    fill: Callable[[Path, Report], None]


def model_folder(model: str, models_dir: Path) -> Path:
    """Raises WeightsError for what is no model's name: a name is not a path."""
    if not _NAME.fullmatch(model):
        raise WeightsError(f"{model[:100]!r} is no model's name; `manage.py models list` shows them")
    return models_dir / model


def is_here(folder: Path) -> bool:
    """Whether a model's files are there: a single model's config, or a pipeline's index."""
    return (folder / "config.json").is_file() or (folder / "model_index.json").is_file()


def is_tiny(folder: Path) -> bool:
    return (folder / TINY_MARK).is_file()


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def install(folder: Path, filling: Filling, report: Report, keep: Callable[[], bool]) -> None:
    """Fills `folder` unless what is there is to be kept. Raises WeightsError, and then it is as it was."""
    models_dir = folder.parent
    try:
        with _locked(folder, report):
            if not keep():
                _require_space(models_dir, filling.disk_bytes)
                partial = models_dir / f"{folder.name}.partial"
                partial.mkdir(exist_ok=True)
                filling.fill(partial, report)
                manifest.require_safe(partial)
                manifest.write(partial)
                if is_tiny(folder):
                    shutil.rmtree(folder)
                partial.rename(folder)
    except OSError as error:
        raise WeightsError(f"cannot write the weights of {folder.name} into {models_dir}: {error.strerror}") from None
    report("ready", 1.0)


def keep_only(folder: Path, kept: Path) -> None:
    """Removes what an earlier try left in `folder`, but for the one thing in it that is worth keeping."""
    for leftover in folder.iterdir():
        if leftover != kept:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WeightsError(f"the disk is too full: {needed >> 20} MiB are needed for weights, {free >> 20} MiB are free")


@contextmanager
def _locked(folder: Path, report: Report) -> Iterator[None]:
    """Two pulls of one model wait for each other, in whatever processes they are."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another pull", 0.0)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
