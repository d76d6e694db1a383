"""Who has how much of the device's memory. A load reserves before it begins, so that no two can promise the same bytes."""

from __future__ import annotations

from gpu_daemon.errors import LoadFailed
from gpu_daemon.sizing import Estimate

MIB = 1 << 20


class Budget:
    """`total` bytes, for weights, activations and KV of every model."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.held: dict[str, int] = {}  # by model

    @property
    def free(self) -> int:
        return self.total - sum(self.held.values())

    def reserve(self, name: str, estimate: Estimate, kv_wanted: int) -> int:
        """Sets aside what the load takes at its peak. Returns the bytes its KV may have. Raises LoadFailed."""
        if estimate.need > self.free:
            raise LoadFailed(
                f"{name} needs {-(-estimate.need // MIB)} MiB, {max(0, self.free) // MIB} of {self.total // MIB} MiB are free"
            )
        kv = min(kv_wanted, self.free - estimate.weights - estimate.activations) if estimate.kv_token else 0
        self.held[name] = max(estimate.peak, estimate.weights + estimate.activations + kv)
        return kv

    def settle(self, name: str, size: int) -> None:
        """What it holds once it is loaded."""
        self.held[name] = size

    def release(self, name: str) -> None:
        self.held.pop(name, None)
