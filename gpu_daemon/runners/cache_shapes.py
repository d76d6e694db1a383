"""The keys and values of one sequence, between the cache shapes of `transformers` and the blocks that the store keeps.

In the middle stands one tensor, [layers, 2, tokens, kv_heads, head_dim], keys before values, keys already rotated: `kv` here.
`transformers` has had three shapes: tuples of (keys, values) a layer, which models of 4.x up to 4.46 take; DynamicCache with
lists `key_cache` and `value_cache`, up to 4.53; and DynamicCache with `layers`, since 4.54 and in 5.x. All hold
[1, kv_heads, tokens, head_dim] a layer. Nothing here imports `transformers`, so that any release of it can be beside.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

BLOCK_TOKENS = 16
LegacyCache = tuple[tuple[Tensor, Tensor], ...]

# --- Caches of transformers ---


def from_cache(cache: Any) -> Tensor:
    """`kv` of one sequence, out of legacy tuples or a DynamicCache of any release. Raises ValueError for a cache that is
    empty, holds more than one sequence, or does not hold every token of it, as sliding windows and static ones."""
    layers = [(keys, values) for keys, values, *_ in _layers(cache)]
    if not layers or layers[0][0] is None or not layers[0][0].numel():
        raise ValueError("the cache is empty")
    shape = layers[0][0].shape
    tokens = shape[2] if isinstance(cache, tuple) else int(cache.get_seq_length())
    if shape[0] != 1:
        raise ValueError(f"the cache holds {shape[0]} sequences; one at a time can be converted")
    if any(part is None or part.shape != shape or part.shape[2] != tokens for layer in layers for part in layer):
        raise ValueError("every layer must hold the keys and values of every token")
    return torch.stack([torch.cat(layer).transpose(1, 2) for layer in layers])


def _layers(cache: Any) -> Iterable[Any]:
    if isinstance(cache, tuple):
        return cache
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    if hasattr(cache, "key_cache"):
        return zip(cache.key_cache, cache.value_cache, strict=True)
    raise ValueError(f"{type(cache).__name__} is no cache shape that is known")


def to_legacy(kv: Tensor, dtype: torch.dtype) -> LegacyCache:
    """The tuples of 4.x."""
    return tuple((keys[None], values[None]) for keys, values in kv.to(dtype).transpose(2, 3).contiguous())


def fill_cache(cache: Any, kv: Tensor, dtype: torch.dtype) -> Any:
    """Puts `kv` into an empty DynamicCache of any release, and returns it. Raises ValueError for one that is not empty."""
    if int(cache.get_seq_length()):
        raise ValueError("the cache is not empty")
    for index, (keys, values) in enumerate(to_legacy(kv, dtype)):
        cache.update(keys, values, index)
    return cache


# --- Blocks of the store ---


class Layout(Protocol):
    """How a decoder lays out the block that its `save` gives and its `restore` takes."""

    def pack(self, kv: Tensor) -> Tensor:
        """The block of `kv`'s BLOCK_TOKENS tokens."""

    def unpack(self, block: Tensor) -> Tensor:
        """`kv` of a block's tokens."""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """TorchDecoder's: [layers, 2, BLOCK_TOKENS, kv_heads, head_dim] in the model's own type."""

    dtype: torch.dtype

    def pack(self, kv: Tensor) -> Tensor:
        return kv.to(self.dtype).contiguous()

    def unpack(self, block: Tensor) -> Tensor:
        return block


@dataclass(frozen=True, slots=True)
class PanelLayout:
    """CpuDecoder's: flat float32 of [layers][keys, values][kv_heads], keys as a panel [head_dim][tokens], values as
    head_dim / 16 panels [tokens][16]."""

    layers: int
    kv_heads: int
    head_dim: int

    def pack(self, kv: Tensor) -> Tensor:
        keys, values = kv.float().unbind(1)
        values = values.reshape(*values.shape[:-1], -1, BLOCK_TOKENS).permute(0, 2, 3, 1, 4)
        return torch.stack([keys.permute(0, 2, 3, 1).flatten(1), values.flatten(1)], 1).flatten()

    def unpack(self, block: Tensor) -> Tensor:
        keys, values = block.view(self.layers, 2, self.kv_heads, -1).unbind(1)
        keys = keys.reshape(self.layers, self.kv_heads, self.head_dim, BLOCK_TOKENS).permute(0, 3, 1, 2)
        values = values.reshape(self.layers, self.kv_heads, -1, BLOCK_TOKENS, BLOCK_TOKENS).permute(0, 3, 1, 2, 4).flatten(-2)
        return torch.stack([keys, values], 1)


def to_blocks(kv: Tensor, layout: Layout) -> list[Tensor]:
    """The blocks of a sequence; the places after its last token are zeros."""
    missing = -kv.shape[2] % BLOCK_TOKENS
    padded = functional.pad(kv, (0, 0, 0, 0, 0, missing))
    return [layout.pack(part) for part in torch.split(padded, BLOCK_TOKENS, 2)]


def from_blocks(blocks: Many[Tensor], tokens: int, layout: Layout) -> Tensor:
    """`kv` of the first `tokens` tokens. Raises ValueError when the blocks hold fewer."""
    if not 0 < tokens <= len(blocks) * BLOCK_TOKENS:
        raise ValueError(f"{len(blocks)} blocks do not hold {tokens} tokens")
    return torch.cat([layout.unpack(block) for block in blocks], 2)[:, :, :tokens]
