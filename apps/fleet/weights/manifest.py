"""What a pulled folder consisted of: the SHA-256 of each file, and the check of its structure before anything reads it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from apps.fleet.weights import child
from apps.fleet.weights.errors import Report, WeightsError

MANIFEST = "manifest.json"


def write(folder: Path) -> None:
    """Records the folder as it is."""
    hashes = {name: sha256(folder / name) for name in _files(folder)}
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n")


def verify(folder: Path, report: Report) -> None:
    """Raises WeightsError when a file is missing, changed, added, or one that no model needs."""
    if not folder.is_dir():
        raise WeightsError(f"{folder.name} is not here; fetch it with `manage.py models pull {folder.name}`")
    require_safe(folder)
    hashes = _read(folder)
    found = set(_files(folder))
    if added := sorted(found - hashes.keys()):
        raise WeightsError(f"{folder.name}/{added[0]} was not pulled; remove it, or remove {folder} and pull the model again")
    for number, (name, expected) in enumerate(hashes.items(), 1):
        if name not in found or sha256(folder / name) != expected:
            raise WeightsError(f"{folder.name}/{name} is missing or changed; remove {folder} and pull the model again")
        report("checking", number / len(hashes))


def require_safe(folder: Path) -> None:
    """Raises WeightsError for files that could run code, lead elsewhere, or are not what their headers say."""
    reason = child.run_module("gpu_daemon.check_folder", str(folder))
    if reason is not None:
        raise WeightsError(reason or f"the files of {folder.name} could not be checked")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[str]:
    """All below it but the manifest, as paths from it."""
    paths = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in paths if path != MANIFEST]


def _read(folder: Path) -> dict[str, str]:
    if not (folder / MANIFEST).is_file():
        raise WeightsError(f"{folder.name} was not pulled, so there is nothing to compare its files with")
    try:
        return TypeAdapter(dict[str, str]).validate_json((folder / MANIFEST).read_bytes())
    except ValidationError:
        raise WeightsError(f"{folder / MANIFEST} is damaged; remove {folder} and pull the model again") from None
