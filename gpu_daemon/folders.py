"""The models directory: which folders there are, what each would take, and whether its files are the right ones."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from gpu_daemon.errors import InvalidCommand, LoadFailed
from gpu_daemon.sizing import Conditions, Estimate, estimate

MANIFEST = "manifest.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}(@[A-Za-z0-9][A-Za-z0-9._-]{0,39})?")


@dataclass(frozen=True, slots=True)
class Folder:
    """One that could be loaded, or why not."""

    name: str
    estimate: Estimate | None
    error: str = ""


def require_name(name: str) -> None:
    """Raises InvalidCommand for a name like no folder."""
    if not _NAME.fullmatch(name):
        raise InvalidCommand("a model's name is small letters, digits, dots, dashes and underscores, or NAME@REVISION")


class Folders:
    """Looks at the disk only where something changed."""

    def __init__(self, directory: Path, conditions: Conditions) -> None:
        self._directory = directory
        self._conditions = conditions
        self._known: dict[str, tuple[int, Folder]] = {}
        self._verified: dict[Path, int] = {}

    def path(self, name: str) -> Path:
        return self._directory / name

    def scan(self) -> list[Folder]:
        """Every folder with a config, by name."""
        found = []
        for path in sorted(self._directory.iterdir()) if self._directory.is_dir() else ():
            config = next((path / name for name in ("config.json", "model_index.json") if (path / name).is_file()), None)
            if config is None or not _NAME.fullmatch(path.name):
                continue
            changed = max(config.stat().st_mtime_ns, path.stat().st_mtime_ns)
            if self._known.get(path.name, (0,))[0] != changed:
                self._known[path.name] = changed, self._look(path)
            found.append(self._known[path.name][1])
        return found

    def _look(self, path: Path) -> Folder:
        try:
            return Folder(path.name, estimate(path, self._conditions))
        except LoadFailed as error:
            return Folder(path.name, None, str(error))

    def verify(self, path: Path) -> None:
        """Compares files with the manifest beside them, if there is one; once, until they change. Raises LoadFailed."""
        try:
            manifest = json.loads((path / MANIFEST).read_text())
        except FileNotFoundError:
            return
        except (OSError, ValueError):
            raise LoadFailed(f"{path.name}: {MANIFEST} is damaged") from None
        for name, expected in manifest.items():
            file = path / name
            if not file.is_file():
                raise LoadFailed(f"{path.name}: {name} is missing")
            written = file.stat().st_mtime_ns
            if self._verified.get(file) == written:
                continue
            with file.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != expected:
                    raise LoadFailed(f"{path.name}: {name} is not what its manifest says (wrong SHA-256)")
            self._verified[file] = written
