"""The forward pass of the llama family (SmolLM2; Qwen3 dense with its q/k norms) over a batch of unlike chunks.

The weights are those of raw `transformers` modules; q, k and v are fused into one product, gate and up into another. All
tokens of a step go through one product each; only attention looks at sequences one by one, and decoding ones together.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gpu_daemon.engine.sequence import Chunk


@dataclass(slots=True)
class Layer:
    """One decoder layer's weights. Norms that a model does not have are None."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    keys: Tensor  # [slots, kv heads, length, head]
    values: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's tokens, flat: the decoding sequences first, then the chunks of prompts."""

    tokens: Tensor  # [tokens]
    slots: Tensor  # [tokens]
    positions: Tensor  # [tokens]
    decoding: int
    prompts: tuple[tuple[int, int, int], ...]  # slot, start, count
    sampled: Tensor  # rows whose logits are wanted
    last: int  # highest position of a decoding sequence
    top_slot: int  # highest slot of a decoding sequence


def batch(chunks: Many[Chunk], device: torch.device) -> tuple[Batch, list[int]]:
    """The chunks as one batch, and the order in which its sampled rows belong to them (indices into `chunks`)."""
    order = sorted(range(len(chunks)), key=lambda i: chunks[i].count > 1)
    tokens: list[int] = []
    slots: list[int] = []
    positions: list[int] = []
    sampled: list[int] = []
    owners: list[int] = []
    for i in order:
        chunk = chunks[i]
        tokens += chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]
        slots += [chunk.sequence.slot] * chunk.count
        positions += range(chunk.start, chunk.start + chunk.count)
        if chunk.samples:
            sampled.append(len(tokens) - 1)
            owners.append(i)
    decoding = [chunk for chunk in chunks if chunk.count == 1]
    prompts = tuple((c.sequence.slot, c.start, c.count) for i in order if (c := chunks[i]).count > 1)
    made = Batch(
        tokens=torch.tensor(tokens, device=device),
        slots=torch.tensor(slots, device=device),
        positions=torch.tensor(positions, device=device),
        decoding=len(decoding),
        prompts=prompts,
        sampled=torch.tensor(sampled, dtype=torch.long, device=device),
        last=max((c.start for c in decoding), default=0),
        top_slot=max((c.sequence.slot for c in decoding), default=0),
    )
    return made, owners


class LlamaForward:
    """A decoder and its KV cache of `slots` sequences of up to `length` tokens."""

    def __init__(self, model: Any, slots: int, length: int) -> None:
        config = model.config
        self.device: torch.device = model.lm_head.weight.device
        self.dtype: torch.dtype = model.lm_head.weight.dtype
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.groups = self.heads // self.kv_heads
        self.scale = self.head_dim**-0.5
        self.eps: float = config.rms_norm_eps
        self.embedding: Tensor = model.model.embed_tokens.weight
        self.norm: Tensor = model.model.norm.weight
        self.head: Tensor = model.lm_head.weight
        self.cos, self.sin = self._rotary(model.model.rotary_emb, length)
        self.layers = [self._layer(layer, slots, length) for layer in model.model.layers]

    def _rotary(self, rotary: Any, length: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(length, device=self.device)[None]
        cos, sin = rotary(torch.zeros(1, 1, dtype=self.dtype, device=self.device), positions)
        return cos[0, :, None], sin[0, :, None]

    def _layer(self, layer: Any, slots: int, length: int) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        biases = [projection.bias for projection in qkv if projection.bias is not None]
        shape = (slots, self.kv_heads, length, self.head_dim)
        fused = Layer(
            input_norm=layer.input_layernorm.weight,
            qkv=torch.cat([projection.weight for projection in qkv]),
            qkv_bias=torch.cat(biases) if biases else None,
            q_norm=getattr(getattr(attention, "q_norm", None), "weight", None),
            k_norm=getattr(getattr(attention, "k_norm", None), "weight", None),
            output=attention.o_proj.weight,
            mlp_norm=layer.post_attention_layernorm.weight,
            gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            down=mlp.down_proj.weight,
            keys=self._zeros(shape),
            values=self._zeros(shape),
        )
        for projection in (*qkv, mlp.gate_proj, mlp.up_proj):
            projection.weight = None  # the fused copy replaces it
        return fused

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Zeros, since what is masked is still multiplied. On a CPU the kernel's own zero pages, small ones: what no
        sequence has reached costs no memory, and a first touch does not clear two megabytes."""
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        pages = mmap.mmap(-1, math.prod(shape) * self.dtype.itemsize)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            pages.madvise(mmap.MADV_NOHUGEPAGE)
        return torch.frombuffer(pages, dtype=self.dtype).view(shape)

    @torch.inference_mode()
    def __call__(self, b: Batch) -> Tensor:
        """Logits of the sampled rows, [rows, vocabulary]; keys and values of every token are stored."""
        x = self.embedding[b.tokens]
        cos, sin = self.cos[b.positions], self.sin[b.positions]
        visible = self._visible(b)
        for layer in self.layers:
            h = functional.rms_norm(x, x.shape[-1:], layer.input_norm, self.eps)
            x = x + functional.linear(self._attend(layer, h, cos, sin, b, visible), layer.output)
            h = functional.rms_norm(x, x.shape[-1:], layer.mlp_norm, self.eps)
            gate, up = functional.linear(h, layer.gate_up).chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * up, layer.down)
        x = functional.rms_norm(x[b.sampled], x.shape[-1:], self.norm, self.eps)
        return functional.linear(x, self.head)

    def _attend(self, layer: Layer, h: Tensor, cos: Tensor, sin: Tensor, b: Batch, visible: Tensor) -> Tensor:
        qkv = functional.linear(h, layer.qkv, layer.qkv_bias).view(len(h), -1, self.head_dim)
        q, k, v = torch.split(qkv, [self.heads, self.kv_heads, self.kv_heads], 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = functional.rms_norm(q, q.shape[-1:], layer.q_norm, self.eps)
            k = functional.rms_norm(k, k.shape[-1:], layer.k_norm, self.eps)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        layer.keys[b.slots, :, b.positions] = k
        layer.values[b.slots, :, b.positions] = v
        parts = [self._decode(layer, q[: b.decoding], b, visible)] if b.decoding else []
        begin = b.decoding
        for slot, start, count in b.prompts:
            parts.append(self._prefill(layer, q[begin : begin + count], slot, start))
            begin += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _visible(self, b: Batch) -> Tensor:
        """[slots, 1, 1, length]: 0 where a decoding slot may look, minus infinity where it may not."""
        limits = torch.zeros(b.top_slot + 1, dtype=torch.long, device=self.device)
        limits[b.slots[: b.decoding]] = b.positions[: b.decoding]
        hidden = torch.arange(b.last + 1, device=self.device)[None] > limits[:, None]
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, float("-inf"))
        return mask[:, None, None]

    def _decode(self, layer: Layer, q: Tensor, b: Batch, visible: Tensor) -> Tensor:
        """All decoding sequences at once. The heads that share a key head ride on the query axis, so nothing is repeated.

        Slots are looked at where they lie; unused ones between are computed and dropped, which beats copying the cache.
        """
        slots = b.slots[: b.decoding]
        single = b.decoding == 1
        where = slice(b.top_slot, b.top_slot + 1) if single else slice(0, b.top_slot + 1)
        keys, values = layer.keys[where, :, : b.last + 1], layer.values[where, :, : b.last + 1]
        grouped = q.view(b.decoding, self.kv_heads, self.groups, self.head_dim)
        if not single:
            spread = grouped.new_zeros(b.top_slot + 1, *grouped.shape[1:])
            spread[slots] = grouped
            grouped = spread
        scores = torch.matmul(grouped * self.scale, keys.transpose(-1, -2))
        if not single:
            scores += visible
        mixed = torch.matmul(scores.softmax(-1), values)
        return (mixed if single else mixed[slots]).reshape(b.decoding, -1)

    def _prefill(self, layer: Layer, q: Tensor, slot: int, start: int) -> Tensor:
        """One prompt's chunk: causal over itself, open over what was computed before."""
        count, end = len(q), start + len(q)
        keys, values = layer.keys[slot, :, :end], layer.values[slot, :, :end]
        mask = None
        if start:
            mask = torch.arange(end, device=self.device)[None] <= torch.arange(start, end, device=self.device)[:, None]
        mixed = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return mixed[0].transpose(0, 1).reshape(count, -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos + turned * sin
