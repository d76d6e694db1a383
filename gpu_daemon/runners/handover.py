"""KV blocks from one daemon to the next, whatever their modes: files in a folder that is this user's alone, best on tmpfs.

A file is safetensors: `keys` [blocks, 16] bytes, `depths` [blocks], `kv` [blocks, layers, 2, tokens, kv_heads, head_dim] in
the type it was kept in; its metadata say which weights computed it, and carry a digest keyed by the daemons' secret. The most
worth comes first, so what there is no time or room for is the least.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_LOG = logging.getLogger(__name__)
_FILE_BYTES = 64 << 20
_STALE_SECONDS = 3600.0
_SUFFIXES = (".safetensors", ".part", ".taken")  # complete, being written, being read


class Block(NamedTuple):
    """`depth` counts the blocks before it."""

    key: bytes
    depth: int
    kv: Tensor  # [layers, 2, tokens, kv_heads, head_dim]


class Handover:
    """The folder. Daemons of one host may share it: a file has one taker."""

    def __init__(self, folder: Path, secret: str) -> None:
        self._folder = folder
        self._secret = secret.encode()[:64]

    def write(self, weights: str, blocks: Iterable[Block], deadline: float) -> int:
        """Leaves blocks for the next daemon, until `deadline` on the monotonic clock; how many. Raises OSError when the folder
        is full or gone."""
        written, batch, size = 0, [], 0
        for block in blocks:
            batch.append(block)
            size += block.kv.nbytes
            if size >= _FILE_BYTES:
                written += self._write(weights, batch)
                batch, size = [], 0
                if time.monotonic() >= deadline:
                    return written
        return written + (self._write(weights, batch) if batch else 0)

    def _write(self, weights: str, batch: list[Block]) -> int:
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(block.key for block in batch)), dtype=torch.uint8).view(len(batch), -1),
            "depths": torch.tensor([block.depth for block in batch]),
            "kv": torch.stack([block.kv for block in batch]),
        }
        data = save(tensors, {"weights": weights, "digest": self._digest(weights, tensors)})
        path = self._folder / f"{secrets.token_hex(8)}.safetensors"
        part = path.with_suffix(".part")
        try:
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
                file.write(data)
            part.rename(path)
        finally:
            part.unlink(missing_ok=True)
        return len(batch)

    def take(self, weights: str, shape: tuple[int, ...]) -> Iterator[Block]:
        """The blocks that these weights left, the most worth of a file first; `shape` is what their `kv` must have. What is
        damaged, foreign, or of other weights of the same name, is removed; other models' files stay for their takers."""
        self._tidy()
        for path in sorted(self._folder.glob("*.safetensors"), key=_written):
            if self._of_model(path, weights):
                yield from self._take(path, weights, shape)

    def _tidy(self) -> None:
        """Nothing stays for good, if its taker never comes or died over it."""
        for suffix in _SUFFIXES:
            for path in self._folder.glob(f"*{suffix}"):
                if time.time() - _written(path) > _STALE_SECONDS:
                    _remove(path, "nobody came for it")

    def _of_model(self, path: Path, weights: str) -> bool:
        """Whether it is for us to take or to remove."""
        try:
            if path.is_symlink() or not path.is_file():
                raise ValueError("it is no file of ours")
            with safe_open(path, "pt") as file:
                left_by = file.metadata()["weights"]
        except FileNotFoundError:
            return False
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            _remove(path, f"it cannot be read ({type(error).__name__})")
            return False
        return str(left_by).split("@")[0] == weights.split("@")[0]

    def _take(self, path: Path, weights: str, shape: tuple[int, ...]) -> list[Block]:
        mine = path.with_suffix(".taken")
        try:
            path.rename(mine)
            return self._read(mine, weights, shape)
        except FileNotFoundError:  # another daemon was faster
            return []
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            _LOG.warning("kv handover: %s is of no use here: %s", path.name, error)
            return []
        finally:
            mine.unlink(missing_ok=True)

    def _read(self, path: Path, weights: str, shape: tuple[int, ...]) -> list[Block]:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in ("keys", "depths", "kv")}
        if metadata["weights"] != weights:
            raise ValueError("other weights left it")
        keys, depths, kv = tensors.values()
        if kv.shape[1:] != shape or keys.shape != (len(kv), 16) or depths.shape != (len(kv),):
            raise ValueError("its shapes are not this model's")
        if not secrets.compare_digest(metadata["digest"], self._digest(weights, tensors)):
            raise ValueError("it is damaged, or somebody else's")
        names = [bytes(key.tolist()) for key in keys]
        return [Block(*entry) for entry in zip(names, depths.tolist(), (part.clone() for part in kv), strict=True)]

    def _digest(self, weights: str, tensors: dict[str, Tensor]) -> str:
        digest = hashlib.blake2b(weights.encode(), key=self._secret)
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _written(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return time.time()


def _remove(path: Path, why: str) -> None:
    _LOG.warning("kv handover: removing %s: %s", path.name, why)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _LOG.warning("kv handover: %s stays (%s)", path.name, type(error).__name__)
