"""KV that outlives its daemon: what others left goes to the models that are here, what is kept here goes to the next.

The daemon before may still run when this one has loaded its models, so files are looked for as long as it serves.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gpu_daemon.engine.kv_store import HostMemory, KvStore

if TYPE_CHECKING:
    from gpu_daemon.runners.cache_shapes import Layout
    from gpu_daemon.runners.torch_runner import TorchRunner

_LOG = logging.getLogger(__name__)
_WRITING_SECONDS = 10.0  # who stops a daemon waits for its drain and this; what is not written by then is lost
_LOOK_SECONDS = 1.0


class _Kept(NamedTuple):
    store: KvStore
    layout: Layout
    shape: tuple[int, ...]


class Sessions:
    """Owns the folder's end of `memory`. Without a folder it does nothing."""

    def __init__(self, folder: Path | None, secret: str, memory: HostMemory) -> None:
        self._folder = folder
        self._secret = secret
        self._memory = memory
        self._kept: dict[str, _Kept] = {}  # by weights
        self._lock = threading.Lock()

    def welcome(self, weights: str, runner: TorchRunner, store: KvStore) -> None:
        """A model is here: from now on it takes over what was left of these weights."""
        if self._folder is not None:
            self._kept[weights] = _Kept(store, runner.layout, runner.kv_shape)
            self._take_over()

    async def look(self) -> None:
        """Until cancelled."""
        while self._folder is not None:
            await asyncio.sleep(_LOOK_SECONDS)
            if self._kept:
                await asyncio.to_thread(self._take_over)

    def _take_over(self) -> None:
        from gpu_daemon.runners.handover import Handover

        assert self._folder is not None
        with self._lock:
            for weights, (store, layout, shape) in list(self._kept.items()):
                blocks = Handover(self._folder, self._secret).take(weights, shape)
                if adopted := [store.adopt(block.key, block.depth, layout.pack(block.kv)) for block in blocks]:
                    _LOG.info("%s: took over %d of %d blocks of KV", weights, sum(adopted), len(adopted))

    def leave(self) -> None:
        """Writes what host memory keeps. What cannot be written is lost, and no more."""
        if self._folder is None or not self._kept:
            return
        with self._lock:  # who looks now finds no model to take this back for
            kept, self._kept = self._kept, {}
            self._write(self._folder, kept)

    def _write(self, folder: Path, kept: dict[str, _Kept]) -> None:
        from gpu_daemon.runners.handover import Block, Handover

        handover, deadline = Handover(folder, self._secret), time.monotonic() + _WRITING_SECONDS
        for weights, (_, layout, _) in kept.items():
            blocks = (Block(key, depth, layout.unpack(data)) for key, depth, data in self._memory.take(weights))
            try:
                _LOG.info("%s: left %d blocks of KV", weights, handover.write(weights, blocks, deadline))
            except OSError as error:
                _LOG.warning("kv handover: %s", error)
                return
