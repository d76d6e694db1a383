"""Rank 0's decoder of a model that is split over ranks."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from gpu_daemon.runners.batch import Batch
from gpu_daemon.runners.parallel import Group, Verb
from gpu_daemon.runners.torch_decoder import TorchDecoder


class LeadDecoder:
    """Has every rank take each of its steps. Blocks are saved whole, as one process has them."""

    def __init__(self, share: TorchDecoder, group: Group, model: int) -> None:
        self._share, self._group, self._model = share, group, model
        self.block_tokens, self.layout = share.block_tokens, share.layout
        self.block_bytes = share.block_bytes * group.size

    def __call__(self, batch: Batch) -> Tensor:
        with self._group.turn(Verb.STEP, self._model, batch.flat()):
            return self._share(batch)

    def save(self, block: int) -> Tensor:
        with self._group.turn(Verb.SAVE, self._model, np.array([block])):
            return self._share.save(block)

    def restore(self, block: int, saved: Tensor) -> None:
        with self._group.turn(Verb.RESTORE, self._model, np.array([block])):
            self._share.restore(block, saved)

    def close(self) -> None:
        with self._group.turn(Verb.FORGET, self._model):
            self._share.close()
