"""A folder's config files and safetensors headers. Nothing is read of the weights themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_daemon.errors import LoadFailed

MAX_HEADER_BYTES = 100 << 20
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    dtype: str
    count: int


def floats(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.count for tensor in tensors if tensor.dtype in _FLOATS)


def read_json(path: Path) -> dict[str, Any]:
    """Raises LoadFailed."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        raise LoadFailed(f"{path.parent.name}: {path.name} is missing or damaged") from None
    if not isinstance(found, dict):
        raise LoadFailed(f"{path.parent.name}: {path.name} is no object")
    return found


def read_tensors(folder: Path, required: bool = True) -> Iterator[Tensor]:
    """Every tensor's name, type and size, from the headers. Raises LoadFailed for a shard that is missing or cut short."""
    files = sorted(folder.glob("*.safetensors"))
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    for index in indexes:
        named = set((read_json(index).get("weight_map") or {}).values())
        if missing := sorted(named - {file.name for file in files}):
            raise LoadFailed(f"{folder.name}: the shard {missing[0]} is missing")
        files = [folder / name for name in sorted(named)]
    if required and not files:
        raise LoadFailed(f"{folder.name}: there are no weights")
    for file in files:
        yield from _header(file)


def _header(file: Path) -> Iterator[Tensor]:
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if not 0 < size <= MAX_HEADER_BYTES:
                raise ValueError
            header = json.loads(stream.read(size))
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        end = max((entry["data_offsets"][1] for _, entry in entries), default=0)
        if file.stat().st_size < 8 + size + end:
            raise LoadFailed(f"{file.parent.name}: {file.name} is cut short")
        for name, entry in entries:
            yield Tensor(name, entry["dtype"], math.prod(entry["shape"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise LoadFailed(f"{file.parent.name}: {file.name} is missing or damaged") from None
