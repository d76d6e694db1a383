"""Whether a model's folder is safe to load: looked at as bytes, before any library that could be fooled by it.

`python -m gpu_daemon.check_folder FOLDER` exits 0, or 1 with one line on standard error that says what is wrong.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CODE = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npz", ".h5", ".py", ".pyc", ".so"})
LIBRARIES = ("diffusers", "transformers")
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000
_MAX_JSON_BYTES = 64 << 20
_WORDS = ("tokenizer.json", "vocab.json")  # large, and read by nothing that would run what they name


class UnsafeFolder(Exception):
    """One line for people: which file, and what is wrong with it."""


def check_folder(folder: Path) -> None:
    """Raises UnsafeFolder for files that could run code, lead out of the folder, or are not what their headers say."""
    if not any((folder / name).is_file() for name in ("config.json", "model_index.json")):
        raise UnsafeFolder(f"{folder.name} holds no model: neither a config.json nor a model_index.json is in it")
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        try:
            _check_file(path, name)
        except UnsafeFolder as error:
            raise UnsafeFolder(f"{folder.name}/{name} {error}") from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UnsafeFolder(f"{folder.name}/{name} is damaged") from None


def _files(folder: Path) -> Iterator[Path]:
    """All files below, none of them a link that leads away. A hub's cache keeps a snapshot's files in `blobs` beside it."""
    root = folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    for path in sorted(root.rglob("*")):
        target = path.resolve()
        if not (target.is_relative_to(root) or target.is_relative_to(blobs)):
            raise UnsafeFolder(f"{folder.name}/{path.relative_to(root).as_posix()} is a link that leads out of the folder")
        if path.is_dir():
            if path.is_symlink():
                raise UnsafeFolder(f"{folder.name}/{path.relative_to(root).as_posix()} is a link to a folder")
        elif path.is_file():
            yield folder / path.relative_to(root)
        else:
            raise UnsafeFolder(f"{folder.name}/{path.relative_to(root).as_posix()} is not a file")


def _check_file(path: Path, name: str) -> None:
    if path.suffix.lower() in CODE:
        raise UnsafeFolder("could run code when it is loaded; only safetensors are")
    if path.suffix == ".safetensors":
        _check_safetensors(path)
    elif path.name.endswith(".safetensors.index.json"):
        _check_index(path)
    elif path.suffix == ".json" and path.name not in _WORDS:
        _check_json(_read_json(path), is_pipeline=name == "model_index.json")


def _read_json(path: Path) -> Any:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise UnsafeFolder("is too large")
    return json.loads(path.read_bytes())


def _check_json(value: Any, *, is_pipeline: bool) -> None:
    if _names_code(value):
        raise UnsafeFolder("names code of its own (auto_map), which is never run")
    if is_pipeline:
        if not isinstance(value, dict):
            raise UnsafeFolder("is no pipeline's index")
        for part in value.values():
            if isinstance(part, list) and (len(part) != 2 or part[0] not in (None, *LIBRARIES)):
                raise UnsafeFolder(f"wants a part that is not of {' or '.join(LIBRARIES)}")
        if not isinstance(value.get("_class_name"), str):
            raise UnsafeFolder("names code of its own, which is never run")


def _names_code(value: Any) -> bool:
    if isinstance(value, dict):
        return "auto_map" in value or "custom_pipelines" in value or any(_names_code(item) for item in value.values())
    return isinstance(value, list) and any(_names_code(item) for item in value)


def _check_index(path: Path) -> None:
    """Every shard is a safetensors file beside the index."""
    shards = set(_read_json(path)["weight_map"].values())
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors") or not (path.parent / shard).is_file():
            raise UnsafeFolder("names a shard that is not beside it")


def _check_safetensors(path: Path) -> None:
    """The header describes the rest of the file exactly: tensors of known types, side by side, to the end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise UnsafeFolder("is not a safetensors file")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = 0
    for start, stop in sorted(_extent(tensor) for tensor in header.values()):
        if start != end:
            raise UnsafeFolder("has a header whose tensors overlap or leave holes")
        end = stop
    if end != size - 8 - length:
        raise UnsafeFolder("has a header that does not describe its content")


def _extent(tensor: Any) -> tuple[int, int]:
    """Where a tensor lies in the file's content."""
    start, stop = tensor["data_offsets"]
    shape = tensor["shape"]
    if tensor["dtype"] not in _BITS:
        raise UnsafeFolder(f"has a tensor of an unknown type, {str(tensor['dtype'])[:20]!r}")
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise UnsafeFolder("has a header with impossible numbers")
    if (stop - start) * 8 != math.prod(shape) * _BITS[tensor["dtype"]]:
        raise UnsafeFolder("has a header whose shapes and offsets disagree")
    return start, stop


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m gpu_daemon.check_folder FOLDER\n")
        return 2
    try:
        check_folder(Path(arguments[0]))
    except UnsafeFolder as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
