"""What an estimate is for, and what it says. Bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Conditions:
    """Where and how large: `rows` tokens a step at most, `samples` sequences, `length` tokens each."""

    cuda: bool
    length: int
    rows: int = 512
    samples: int = 32
    threads: int = 1
    int8: bool = False
    static: bool = False

    @property
    def kind(self) -> str:
        """Of the device, as limits have it."""
        return "cuda" if self.cuda else "cpu"


@dataclass(frozen=True, slots=True)
class Estimate:
    """`loading` is held beside the weights while they are read and fused, `activations` while the largest step runs.
    `kv_least` is the KV of one sequence of full length; 0, as `kv_token`, for what keeps none."""

    weights: int
    activations: int
    loading: int = 0
    kv_token: int = 0
    kv_least: int = 0

    @property
    def peak(self) -> int:
        """The most that is held at once, KV apart."""
        return self.weights + max(self.activations, self.loading)

    @property
    def need(self) -> int:
        """What must be free for it to be loaded."""
        return max(self.peak, self.weights + self.activations + self.kv_least)
