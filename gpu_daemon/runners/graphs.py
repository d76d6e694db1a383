"""CUDA graphs of the decoding step, one for each bucket of batch and context, over tensors that stay where they are."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpu_daemon.runners.batch import Batch

if TYPE_CHECKING:
    from gpu_daemon.runners.torch_decoder import Step, TorchDecoder

_LOG = logging.getLogger(__name__)
_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Graphs:
    """Those of one decoder, by bucket."""

    def __init__(self, owner: TorchDecoder) -> None:
        self._owner = owner
        self._captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Step, Tensor]] = {}
        self._refused = False

    def replay(self, batch: Batch) -> Tensor | None:
        """The step's logits, or None for one that does more than decode, is too large, or cannot be captured."""
        rows = len(batch.tokens)
        decodes = not batch.pictured and all(count == 1 for _, count in batch.runs)
        if self._refused or not decodes or rows > _BUCKETS[-1]:
            return None
        bucket = next(size for size in _BUCKETS if size >= rows)
        context = min(self._owner.length, max(256, 1 << int(batch.positions.max()).bit_length()))
        if (bucket, context) not in self._captured and not self._add(bucket, context):
            return None
        graph, step, logits = self._captured[bucket, context]
        self._fill(step, batch, rows, context)
        graph.replay()
        return logits[torch.from_numpy(batch.sampled).to(logits.device)]

    def _add(self, bucket: int, context: int) -> bool:
        """Whether a step of that size was captured. Sums over ranks may not let themselves be: then steps run uncaptured, which
        ranks need not agree on, since both ways take the same sums in the same order."""
        try:
            self._captured[bucket, context] = self._capture(bucket, context)
        except RuntimeError:
            if self._owner.group.size == 1:
                raise
            self._refused = True
            _LOG.exception("decoding steps of this group cannot be captured")
        return not self._refused

    def _fill(self, step: Step, batch: Batch, rows: int, context: int) -> None:
        """Copies the batch into the graph's own tensors; rows beyond it write to the scratch block."""
        owner = self._owner
        tables, positions = torch.from_numpy(batch.tables)[torch.from_numpy(batch.row_table)], torch.from_numpy(batch.positions)
        seen, hidden = owner.seen(tables, positions, context)
        cos, sin = owner.decoder.angles(torch.from_numpy(batch.angles.copy()).to(step.cos.device))
        places = owner.places(tables, positions[:, None])[:, 0]
        step.places.fill_(owner.scratch_place)
        for target, source in (
            (step.tokens, torch.from_numpy(batch.tokens)),
            (step.places, places),
            (step.seen, seen),
            (step.hidden, hidden),
            (step.cos, cos[:, None]),
            (step.sin, sin[:, None]),
        ):
            target[:rows].copy_(source, non_blocking=True)

    def _capture(self, rows: int, context: int) -> tuple[torch.cuda.CUDAGraph, Step, Tensor]:
        owner = self._owner
        step = owner.blank_step(rows, context)
        for _ in range(2):  # cuBLAS and the allocator settle before the capture
            owner.forward(step)
        graph = torch.cuda.CUDAGraph()
        # Other threads' calls, such as those of NCCL's watchdog, do not end a capture that is this thread's own.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = owner.forward(step)
        return graph, step, logits
