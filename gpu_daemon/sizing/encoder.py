"""BERT-like encoders, in float32 on any device."""

from __future__ import annotations

from typing import Any

from gpu_daemon import limits
from gpu_daemon.sizing.figures import Estimate
from gpu_daemon.sizing.headers import Tensor, floats


def estimate_encoder(tensors: list[Tensor], config: dict[str, Any]) -> Estimate:
    """The largest batch in the inner product, before and after its activation, or in attention."""
    hidden, inner = int(config.get("hidden_size", 0)), int(config.get("intermediate_size", 0))
    kept = [tensor for tensor in tensors if not tensor.name.startswith(("pooler.", "bert.pooler."))]
    return Estimate(floats(kept) * 4, limits.EMBED_TOKENS * max(2 * inner + 3 * hidden, 6 * hidden) * 4)
