"""A decoder's weights, taken out of raw `transformers` modules: q, k and v fused into one product, gate and up into another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. Products are [outputs, inputs]; what a model does not have is None."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True)
class Decoder:
    """A decoder of the llama family: SmolLM2, Qwen3 dense (norms of q and k), the language half of Qwen2.5-VL.

    `cos` and `sin` are [positions, head_dim / 2]. `sections` says how many of the head_dim / 2 angles follow which of a
    token's positions (time, height, width): multimodal rope. Everyone else has one section and one position a token.

    Of a model that is split over ranks this is one rank's share: its `heads`, `kv_heads` and `inner`, and its part of the
    vocabulary in `embedding` and `head`; `vocab` counts the whole.
    """

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    inner: int
    vocab: int
    eps: float
    dtype: torch.dtype
    device: torch.device
    embedding: Tensor
    norm: Tensor
    head: Tensor
    cos: Tensor
    sin: Tensor
    sections: tuple[int, ...]
    layers: tuple[Layer, ...]

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of tokens at `positions` [len(sections), tokens], each [tokens, head_dim / 2]."""
        if len(self.sections) == 1:
            return self.cos[positions[0]], self.sin[positions[0]]
        cos, sin = (torch.split(table, list(self.sections), -1) for table in (self.cos, self.sin))
        return _select(cos, positions), _select(sin, positions)


def _select(tables: tuple[Tensor, ...], positions: Tensor) -> Tensor:
    """Each section's angles at its own positions, side by side."""
    return torch.cat([table[where] for table, where in zip(tables, positions, strict=True)], -1)


def moved(decoder: Decoder, move: Callable[[Tensor], Tensor]) -> Decoder:
    """Every weight through `move`, one that is shared once; `device` stays the one it runs on."""
    done: dict[int, Tensor] = {}

    def of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in done:
            done[id(value)] = move(value)
        return done[id(value)]

    def each(thing: Any) -> dict[str, Any]:
        return {item.name: of(getattr(thing, item.name)) for item in fields(thing)}

    layers = tuple(Layer(**each(layer)) for layer in decoder.layers)
    return Decoder(**{**each(decoder), "layers": layers})


def take_decoder(model: Any, length: int, ranks: int = 1) -> Decoder:
    """Fuses the products of a `transformers` causal model, and empties its own: a weight is in memory once. Of a model that
    was loaded by its `tp_plan`, split over `ranks`, it takes what is on this rank."""
    body = getattr(model.model, "language_model", model.model)
    config = body.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    weight = model.lm_head.weight
    sections = tuple((getattr(config, "rope_parameters", None) or {}).get("mrope_section") or (head_dim // 2,))
    cos, sin = _angle_tables(body.rotary_emb, length, len(sections), weight.device)
    return Decoder(
        heads=heads // ranks,
        kv_heads=config.num_key_value_heads // ranks,
        head_dim=head_dim,
        hidden=config.hidden_size,
        inner=config.intermediate_size // ranks,
        vocab=weight.shape[0],
        eps=config.rms_norm_eps,
        dtype=weight.dtype,
        device=weight.device,
        embedding=_local(body.embed_tokens.weight),
        norm=body.norm.weight,
        head=_local(weight),
        cos=cos,
        sin=sin,
        sections=sections,
        layers=tuple(_take_layer(layer) for layer in body.layers),
    )


def _local(weight: Any) -> Tensor:
    """What this rank holds of a weight."""
    local: Tensor = weight.to_local() if isinstance(weight, DTensor) else weight
    return local


def _angle_tables(rotary: Any, length: int, sections: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The model's own rotary module, asked once for every position; float32, and the first half of what it repeats."""
    positions = torch.arange(length, device=device)[None]
    if sections > 1:
        positions = positions.expand(sections, 1, length)
    cos, sin = rotary(torch.zeros(1, 1, device=device), positions)
    if cos.dim() == 4:  # some releases mix the sections in the rotary module, some later; equal positions make it one
        cos, sin = cos[0], sin[0]
    half = cos.shape[-1] // 2
    return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()


def _take_layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    biases = [_local(projection.bias) for projection in qkv if projection.bias is not None]
    taken = Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=torch.cat([_local(projection.weight) for projection in qkv]),
        qkv_bias=torch.cat(biases) if biases else None,
        q_norm=getattr(getattr(attention, "q_norm", None), "weight", None),
        k_norm=getattr(getattr(attention, "k_norm", None), "weight", None),
        output=_local(attention.o_proj.weight),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=torch.cat([_local(mlp.gate_proj.weight), _local(mlp.up_proj.weight)]),
        down=_local(mlp.down_proj.weight),
    )
    for projection in (*qkv, mlp.gate_proj, mlp.up_proj, attention.o_proj, mlp.down_proj):
        projection.weight = None
    return taken
