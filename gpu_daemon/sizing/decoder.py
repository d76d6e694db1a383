"""Decoders of the llama family, and the eyes that one may have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gpu_daemon import limits
from gpu_daemon.sizing.figures import Conditions, Estimate
from gpu_daemon.sizing.headers import Tensor, read_json

BLOCK_TOKENS = 16
_TOWER = ("visual.", "model.visual.")


def estimate_decoder(folder: Path, tensors: list[Tensor], config: dict[str, Any], at: Conditions) -> Estimate:
    text = {**config, **(config.get("text_config") or {})}
    layers, heads, hidden = text["num_hidden_layers"], text["num_attention_heads"], text["hidden_size"]
    kv_heads, inner, vocab = text.get("num_key_value_heads") or heads, text["intermediate_size"], text["vocab_size"]
    head_dim = text.get("head_dim") or hidden // heads
    kept = [tensor for tensor in tensors if at.static or not tensor.name.startswith(_TOWER)]
    item = _item(kept, config, at)
    parameters = sum(tensor.count for tensor in kept)
    length = min(at.length, text.get("max_position_embeddings") or at.length)
    packed = not at.cuda and not at.static
    kv_item = 4 if not at.cuda else item
    kv_token = 2 * layers * kv_heads * head_dim * kv_item
    width = (heads + 2 * kv_heads) * head_dim
    rows = min(at.rows, length)
    if packed:
        weights = _packed_weights(kept, hidden, vocab, item, at.int8)
        activations = 4 * rows * (2 * hidden + width + 3 * inner) + 4 * at.threads * 16 * (length + 2 * head_dim)
        # q, k, v and gate, up are fused; the rest is read where it lies in the file, unless its type is another.
        fused = sum(t.count for t in kept if t.name.endswith(_FUSED))
        loading = fused * item + (0 if _stored_as(kept, item) else parameters * item)
    else:
        weights = parameters * (4 if at.static and not at.cuda else item)
        activations = item * rows * (3 * hidden + width + 4 * inner)
        # Keys and values that rows look at are gathered, with a mask over them.
        activations += item * at.samples * length * (2 * kv_heads * head_dim + heads + 2)
        loading = item * hidden * max(width, 2 * inner)
    weights += 4 * length * head_dim  # angles
    activations += at.samples * vocab * 4 * _SAMPLER_COPIES
    if "vision_config" in config and not at.static:
        tower, looking = _eyes(folder, tensors, config["vision_config"], length, at)
        weights += tower
        activations = max(activations, looking)
    blocks = -(-length // BLOCK_TOKENS) + 1
    return Estimate(weights, activations, loading, kv_token, blocks * BLOCK_TOKENS * kv_token)


def _eyes(folder: Path, tensors: list[Tensor], vision: dict[str, Any], length: int, at: Conditions) -> tuple[int, int]:
    """(weights, activations) of the tower, which a CPU has in float32 whatever was stored. A picture has at most as many tokens
    as a sequence, each four patches: their pixels, and beside them the gated inner product or attention's queries and keys."""
    item = 2 if at.cuda else 4
    patch = vision.get("patch_size", 14)
    said = read_json(folder / "preprocessor_config.json")
    pixels = (said.get("size") or {}).get("longest_edge") or said.get("max_pixels") or math.inf
    patches = min(4 * length, pixels // patch**2)
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    turned = 14.5 if at.cuda else 10.5  # in float32, where the rest is not
    each = 3 * 2 * patch**2 + max(3 * inner + 3.5 * hidden, turned * hidden)
    remembered = limits.SEEN_TOKENS * vision["out_hidden_size"]
    tower = sum(tensor.count for tensor in tensors if tensor.name.startswith(_TOWER))
    return tower * item, int(item * (patches * each + remembered))


_FUSED = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
_SAMPLER_COPIES = 14  # of the logits in float32, at the worst: top-p over a flat distribution, which sorts the vocabulary


def _packed_weights(tensors: list[Tensor], hidden: int, vocab: int, item: int, int8: bool) -> int:
    """Products in panels of 16 outputs, vectors in float32, and the embedding as it was stored."""
    products = sum(t.count for t in tensors if t.count > vocab * hidden // 2 or _is_product(t))
    vectors = sum(t.count for t in tensors) - products
    embedding = hidden * vocab
    tied = not any(t.name.startswith("lm_head") for t in tensors)
    packed = products - embedding + (embedding if tied else 0)
    return packed * (1 if int8 else item) + embedding * item + 4 * vectors


def _is_product(tensor: Tensor) -> bool:
    return tensor.name.endswith(("proj.weight", "lm_head.weight", "embed_tokens.weight"))


def _stored_as(tensors: list[Tensor], item: int) -> bool:
    return all(tensor.dtype == ("BF16" if item == 2 else "F32") for tensor in tensors)


def _item(tensors: list[Tensor], config: dict[str, Any], at: Conditions) -> int:
    """Bytes a weight: bfloat16 on a GPU; on a CPU as stored, if that is bfloat16, else float32."""
    named = config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    return 2 if at.cuda or str(named) == "bfloat16" else 4
