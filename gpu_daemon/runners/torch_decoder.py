"""A decoder in plain torch, on any device: the GPU's path, and the reference for the compiled CPU one.

All tokens of a step go through one product each. Attention looks up each sequence's blocks; the decoding ones go together,
prompts one by one. On CUDA a step that only decodes is replayed (graphs.py).
Of a model that is split over ranks each computes its heads and its part of the inner width and of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gpu_daemon.runners.batch import Batch
from gpu_daemon.runners.cache_shapes import RowLayout
from gpu_daemon.runners.graphs import Graphs
from gpu_daemon.runners.parallel import Alone
from gpu_daemon.runners.weights import Decoder, Layer, moved


@dataclass(frozen=True, slots=True)
class Step:
    """A step's tensors. The first `decoding` rows are one token each of a sequence of its own."""

    tokens: Tensor  # [rows]
    cos: Tensor  # [rows, 1, head_dim / 2]
    sin: Tensor
    places: Tensor  # [rows]: where in the cache each token's keys and values go
    seen: Tensor  # [decoding, context]: places each decoding row may look at; what it may not is masked
    hidden: Tensor  # [decoding, 1, 1, context]: minus infinity where it may not look
    decoding: int
    prompts: tuple[tuple[int, int, int, Tensor], ...]  # first row, rows, start, places up to the last row
    sampled: Tensor  # [samples]
    pictured: tuple[tuple[int, Tensor], ...] = ()  # (first row, what stands there in place of the tokens' embeddings)


class TorchDecoder:
    """Keys and values are [places, kv_heads, head_dim] a layer, a place being block * block_tokens + slot."""

    block_tokens = 16

    def __init__(self, decoder: Decoder, *, blocks: int, length: int, group: Alone | None = None) -> None:
        """`blocks` in the cache; sequences of up to `length` tokens; `group` is those the model is split over."""
        self.decoder = decoder
        self.length = length
        self.group = group or Alone()
        self.layout = RowLayout(decoder.dtype)
        self._new_cache(blocks)
        self.block_bytes = self.cache[:, :, : self.block_tokens].numel() * decoder.dtype.itemsize

    def _new_cache(self, blocks: int) -> None:
        d = self.decoder
        # One block more than is handed out: rows that only fill a bucket write there.
        shape = (len(d.layers), 2, (blocks + 1) * self.block_tokens, d.kv_heads, d.head_dim)
        self.cache = _zeros(shape, d)
        self.scratch_place = blocks * self.block_tokens
        self._graphs = Graphs(self) if d.device.type == "cuda" else None

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Tensor:
        """Logits of the sampled rows, [rows, vocabulary], on rank 0; keys and values of every token are stored."""
        logits = self._graphs.replay(batch) if self._graphs is not None else None
        logits = self.forward(self._step(batch)) if logits is None else logits
        if len(batch.sampled) and self.group.size > 1:
            width = -(-self.decoder.vocab // self.group.size)  # the last rank's part may be narrower
            logits = self.group.gather(functional.pad(logits, (0, width - logits.shape[-1])), -1)
        return logits[:, : self.decoder.vocab]

    def forward(self, step: Step) -> Tensor:
        """This rank's part of the logits."""
        d, add = self.decoder, self.group.add
        x = self._embed(step.tokens)
        for first, embedding in step.pictured:
            x[first : first + len(embedding)] = embedding
        for layer, keys_values in zip(d.layers, self.cache, strict=True):
            h = functional.rms_norm(x, x.shape[-1:], layer.input_norm, d.eps)
            x = x + add(functional.linear(self._attend(layer, keys_values, h, step), layer.output))
            h = functional.rms_norm(x, x.shape[-1:], layer.mlp_norm, d.eps)
            gate, up = functional.linear(h, layer.gate_up).chunk(2, -1)
            x = x + add(functional.linear(functional.silu(gate) * up, layer.down))
        x = functional.rms_norm(x[step.sampled], x.shape[-1:], d.norm, d.eps)
        return functional.linear(x, d.head)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Each rank has the rows of its part of the vocabulary, and zeros for the others to fill."""
        if self.group.size == 1:
            return self.decoder.embedding[tokens]
        rows = tokens - self.group.rank * -(-self.decoder.vocab // self.group.size)
        strange = (rows < 0) | (rows >= len(self.decoder.embedding))
        return self.group.add(self.decoder.embedding[rows.masked_fill(strange, 0)].masked_fill(strange[:, None], 0))

    def _attend(self, layer: Layer, keys_values: Tensor, h: Tensor, step: Step) -> Tensor:
        d = self.decoder
        qkv = functional.linear(h, layer.qkv, layer.qkv_bias).view(len(h), -1, d.head_dim)
        q, k, v = torch.split(qkv, [d.heads, d.kv_heads, d.kv_heads], 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = functional.rms_norm(q, q.shape[-1:], layer.q_norm, d.eps)
            k = functional.rms_norm(k, k.shape[-1:], layer.k_norm, d.eps)
        q, k = _rotate(q, step.cos, step.sin), _rotate(k, step.cos, step.sin)
        keys, values = keys_values[0], keys_values[1]
        keys[step.places] = k
        values[step.places] = v
        parts = []
        if step.decoding:
            mask = step.hidden
            parts.append(self._mix(q[: step.decoding, :, None], keys[step.seen], values[step.seen], mask).flatten(1))
        for first, count, start, places in step.prompts:
            rows = q[first : first + count].transpose(0, 1)[None]
            mask = _causal(start, count, len(places), q.device, q.dtype)
            parts.append(self._mix(rows, keys[places][None], values[places][None], mask)[0].transpose(0, 1).flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _mix(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """q [n, heads, rows, dim] over keys and values [n, context, kv_heads, dim]; mask broadcasts over heads."""
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        return functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)

    # --- A step's tensors ---

    def _step(self, batch: Batch) -> Step:
        """Rows sorted so that the decoding ones come first; `sampled` keeps the batch's order."""
        runs = sorted(enumerate(batch.runs), key=lambda run: run[1][1] > 1)
        order = [row for _, (first, count) in runs for row in range(first, first + count)]
        decoding = sum(count == 1 for _, count in batch.runs)
        place_of = {row: i for i, row in enumerate(order)}
        device = self.decoder.device
        rows = torch.tensor(order)
        positions, tables = torch.from_numpy(batch.positions)[rows], torch.from_numpy(batch.tables)
        tables_of = torch.from_numpy(batch.row_table)[rows]
        cos, sin = self.decoder.angles(torch.from_numpy(batch.angles.copy())[:, rows].to(device))
        dtype = self.decoder.dtype
        seen, hidden = self.seen(tables[tables_of[:decoding]], positions[:decoding])
        return Step(
            tokens=torch.from_numpy(batch.tokens)[rows].to(device),
            cos=cos[:, None].to(dtype),
            sin=sin[:, None].to(dtype),
            places=self.places(tables[tables_of], positions[:, None])[:, 0].to(device),
            seen=seen.to(device),
            hidden=hidden.to(device),
            decoding=decoding,
            prompts=self._prompts(batch, runs[decoding:], tables, decoding),
            sampled=torch.tensor([place_of[row] for row in batch.sampled.tolist()], dtype=torch.long, device=device),
            pictured=tuple((place_of[first], embedding) for first, embedding in batch.pictured),
        )

    def blank_step(self, rows: int, context: int) -> Step:
        """A decoding step of nobody's rows, which write to the scratch block, for a graph to keep."""
        d = self.decoder
        zeros = torch.zeros(rows, dtype=torch.long, device=d.device)
        angles = torch.zeros(rows, 1, d.head_dim // 2, dtype=d.dtype, device=d.device)
        return Step(
            tokens=zeros.clone(), cos=angles.clone(), sin=angles.clone(), places=zeros + self.scratch_place,
            seen=torch.full((rows, context), self.scratch_place, device=d.device),
            hidden=torch.zeros(rows, 1, 1, context, dtype=d.dtype, device=d.device),
            decoding=rows, prompts=(), sampled=torch.arange(rows, device=d.device),
        )  # fmt: skip

    def _prompts(self, batch: Batch, runs: Any, tables: Tensor, first: int) -> tuple[tuple[int, int, int, Tensor], ...]:
        prompts = []
        for table, (begin, count) in runs:
            start = int(batch.positions[begin])
            places = self.places(tables[table][None], torch.arange(start + count)[None])[0]
            prompts.append((first, count, start, places.to(self.decoder.device)))
            first += count
        return tuple(prompts)

    def places(self, tables: Tensor, positions: Tensor) -> Tensor:
        """tables [n, blocks], positions [n or 1, m]: the places of those positions, [n, m]."""
        blocks = torch.gather(tables, 1, (positions // self.block_tokens).expand(len(tables), -1))
        return blocks * self.block_tokens + positions % self.block_tokens

    def seen(self, tables: Tensor, positions: Tensor, width: int = 0) -> tuple[Tensor, Tensor]:
        """The places decoding rows look at, [rows, context], and the mask over them."""
        if not len(positions):
            return torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, 1, 1, 0, dtype=self.decoder.dtype)
        width = width or int(positions.max()) + 1
        columns = torch.arange(width)[None]
        beyond = columns > positions[:, None]
        reach = columns.clamp(max=tables.shape[1] * self.block_tokens - 1).expand(len(positions), -1)
        seen = self.places(tables, reach).masked_fill(beyond, self.scratch_place)
        return seen, _minus_infinity(beyond, self.decoder.dtype)[:, None, None]

    # --- The store in host memory ---

    def save(self, block: int) -> Tensor:
        """A copy of one block's keys and values on the host; on rank 0 with the heads of all ranks."""
        return self.group.gather(self._block(block), 3).to("cpu", copy=True)

    def restore(self, block: int, saved: Tensor | None) -> None:
        """Writes a block back; what is `saved` only rank 0 has."""
        self.group.scatter(saved, self._block(block), 3)

    def _block(self, block: int) -> Tensor:
        return self.cache[:, :, block * self.block_tokens : (block + 1) * self.block_tokens]

    # --- Between an unload and the next load ---

    def sleep(self) -> None:
        """Lets the cache go, and takes the weights off a GPU."""
        self._graphs = None
        self.cache = torch.zeros(0)
        if self.decoder.device.type == "cuda":
            self.decoder = moved(self.decoder, lambda weight: weight.to("cpu", copy=True).pin_memory())

    def wake(self, blocks: int) -> None:
        device = self.decoder.device
        if device.type == "cuda":
            self.decoder = moved(self.decoder, lambda weight: weight.to(device, non_blocking=True))
        self._new_cache(blocks)

    def close(self) -> None:
        self._graphs = None


def _zeros(shape: tuple[int, ...], decoder: Decoder) -> Tensor:
    """On a CPU what no sequence has reached costs no memory."""
    if decoder.device.type != "cpu":
        return torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
    pages = np.zeros(math.prod(shape) * decoder.dtype.itemsize, np.uint8)
    return torch.from_numpy(pages).view(decoder.dtype).view(shape)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _causal(start: int, count: int, end: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[count, end]: minus infinity after each row's own position."""
    return _minus_infinity(
        torch.arange(end, device=device)[None] > torch.arange(start, start + count, device=device)[:, None], dtype
    )


def _minus_infinity(where: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(where.shape, dtype=dtype, device=where.device).masked_fill_(where, float("-inf"))
