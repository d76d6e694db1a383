"""A decoder on the CPU: its weights packed for the compiled kernels, its paged cache, its team of threads."""

from __future__ import annotations

import math
import mmap
import threading
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_daemon.runners.batch import Batch
from gpu_daemon.runners.cache_shapes import PanelLayout
from gpu_daemon.runners.cpu import kernels
from gpu_daemon.runners.cpu.vector import PANEL, panel_bytes
from gpu_daemon.runners.weights import Decoder


class CpuDecoder:
    """Weights stay as they were stored (bfloat16 or float32) or become int8; activations and the cache are float32."""

    block_tokens = PANEL

    def __init__(self, decoder: Decoder, *, blocks: int, length: int, threads: int, int8: bool = False) -> None:
        """`blocks` of 16 tokens in the cache; sequences of up to `length` tokens."""
        # Only what is not packed is kept, and none of it in the file, which may be replaced: a product is in memory once.
        embedding = decoder.embedding.clone()
        self.decoder = replace(decoder, embedding=embedding, head=embedding, layers=())
        kind = "i8" if int8 else {torch.bfloat16: "bf16", torch.float32: "f32"}[decoder.dtype]
        self._packed: list[np.ndarray] = []  # what the kernels know by address
        self._shape = _shape(decoder, kind)
        self._weights = self._pack(decoder, kind)
        self.block_bytes = self._shape.block_floats * 4
        self.layout = PanelLayout(len(decoder.layers), decoder.kv_heads, decoder.head_dim)
        self._threads, self._length = threads, length
        self._cache: np.ndarray
        self._team: _Team
        self.wake(blocks)

    def _pack(self, decoder: Decoder, kind: str) -> kernels.Weights:
        products = [[layer.qkv, layer.output, layer.gate_up, layer.down] for layer in decoder.layers]
        pairs = [[self._address(_pack(product, kind)) for product in row] for row in products]
        pairs.append([self._address(_pack(decoder.head, kind))] * 4)
        norms = torch.stack([torch.stack([layer.input_norm, layer.mlp_norm]) for layer in decoder.layers])
        heads = [torch.stack([layer.q_norm, layer.k_norm]) for layer in decoder.layers if layer.q_norm is not None and layer.k_norm is not None]  # noqa: E501  # fmt: skip
        biases = [layer.qkv_bias for layer in decoder.layers if layer.qkv_bias is not None]
        return kernels.Weights(
            products=np.array([[product for product, _ in row] for row in pairs], np.int64),
            scales=np.array([[scale for _, scale in row] for row in pairs], np.int64),
            norms=_floats(norms),
            head_norms=_floats(torch.stack(heads)) if heads else np.zeros((len(decoder.layers), 2, 0), np.float32),
            qkv_bias=_floats(torch.stack(biases)) if biases else np.zeros((len(decoder.layers), 0), np.float32),
            final_norm=_floats(decoder.norm),
        )

    def _address(self, packed: tuple[np.ndarray, np.ndarray]) -> tuple[int, int]:
        self._packed += packed
        return packed[0].ctypes.data, packed[1].ctypes.data

    def __call__(self, batch: Batch) -> Tensor:
        """Logits of the sampled rows, [rows, vocabulary] in float32; keys and values of every token are stored."""
        step = self._step(batch)
        self._team.run(self._shape, self._weights, step, self._cache.ctypes.data)
        return torch.from_numpy(step.logits)[:, : self.decoder.vocab]

    def _step(self, batch: Batch) -> kernels.Step:
        s, rows, samples = self._shape, len(batch.tokens), len(batch.sampled)
        cos, sin = self.decoder.angles(torch.from_numpy(batch.angles.copy()))
        x = np.zeros((rows, _padded(s.hidden)), np.float32)
        x[:, : s.hidden] = _floats(self.decoder.embedding[torch.from_numpy(batch.tokens)])
        for first, embedding in batch.pictured:
            x[first : first + len(embedding), : s.hidden] = _floats(embedding)
        return kernels.Step(
            x=x,
            h=np.empty((rows, max(s.hidden, s.heads * s.head_dim, s.inner)), np.float32),
            qkv=np.empty((rows, s.qkv_width), np.float32),
            mlp=np.empty((rows, s.gate_up_width), np.float32),
            cos=cos.numpy(),
            sin=sin.numpy(),
            positions=batch.positions,
            row_table=batch.row_table,
            tables=batch.tables,
            units=_units(batch, max(1, kernels.QUERY_ROWS // (s.heads // s.kv_heads))),
            sampled=batch.sampled,
            picked=np.empty((samples, s.hidden), np.float32),
            logits=np.empty((samples, s.vocab_width), np.float32),
            counters=kernels.counters(s.layers),
        )

    def save(self, block: int) -> Tensor:
        """A copy of one block's keys and values."""
        return torch.from_numpy(self._cache[block].copy())

    def restore(self, block: int, saved: Tensor) -> None:
        self._cache[block] = saved.numpy()

    def sleep(self) -> None:
        """Lets the cache and the threads go; the weights are in host memory anyway."""
        self._team.close()
        self._cache = np.zeros((0, 0), np.float32)

    def wake(self, blocks: int) -> None:
        self._cache = _lazy_zeros(blocks * self._shape.block_floats).reshape(blocks, -1)
        self._team = _Team(self._threads, _scratch_floats(self._shape, self._length))

    def close(self) -> None:
        self._team.close()


class _Team:
    """The calling thread and `threads - 1` helpers that run the same compiled function over the same step."""

    def __init__(self, threads: int, scratch: int) -> None:
        self._scratch = np.empty(scratch, np.float32)
        self._inboxes: list[SimpleQueue[tuple[Any, ...] | None]] = [SimpleQueue() for _ in range(threads - 1)]
        for inbox in self._inboxes:
            threading.Thread(target=self._help, args=(inbox, np.empty(scratch, np.float32)), daemon=True).start()

    def run(self, *arguments: Any) -> None:
        """Returns when the step is complete, whether or not a helper has come by then."""
        for inbox in self._inboxes:
            inbox.put(arguments)
        kernels.forward(*arguments, self._scratch)

    def _help(self, inbox: SimpleQueue[tuple[Any, ...] | None], scratch: np.ndarray) -> None:
        while (arguments := inbox.get()) is not None:
            kernels.forward(*arguments, scratch)

    def close(self) -> None:
        for inbox in self._inboxes:
            inbox.put(None)


def _padded(width: int) -> int:
    return math.ceil(width / PANEL) * PANEL


def _shape(decoder: Decoder, kind: str) -> kernels.Shape:
    first = decoder.layers[0]
    return kernels.Shape(
        kind=kernels.KINDS.index(kind),
        layers=len(decoder.layers),
        hidden=decoder.hidden,
        heads=decoder.heads,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        inner=decoder.inner,
        qkv_width=_padded(first.qkv.shape[0]),
        gate_up_width=_padded(first.gate_up.shape[0]),
        vocab_width=_padded(decoder.vocab),
        eps=decoder.eps,
        normed_heads=first.q_norm is not None,
        block_floats=len(decoder.layers) * 2 * decoder.kv_heads * decoder.head_dim * PANEL,
    )


def _scratch_floats(s: kernels.Shape, length: int) -> int:
    """One unit of attention: queries, mixtures and scores of its rows."""
    rows = max(kernels.QUERY_ROWS, s.heads // s.kv_heads)
    return rows * (2 * s.head_dim + _padded(length + 1))


def _units(batch: Batch, tokens: int) -> np.ndarray:
    """Runs of at most `tokens` rows of one chunk each."""
    units = [
        (row, min(tokens, first + count - row), table)
        for table, (first, count) in enumerate(batch.runs)
        for row in range(first, first + count, tokens)
    ]
    return np.array(units, np.int64)


def _floats(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().contiguous().numpy()


def _pack(product: Tensor, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(panels, scales) of a product [outputs, inputs], as `cpu.vector` describes them."""
    outputs, inputs = product.shape
    scales = np.zeros(0, np.float32)
    if kind == "i8":
        product, scales = _quantize(product)
    if missing := _padded(outputs) - outputs:
        product = torch.nn.functional.pad(product, (0, 0, 0, missing))
    panels = product.detach().view(-1, PANEL, inputs)
    if kind == "bf16":  # pairs of which the first eight outputs are the low halves
        pairs = panels.view(torch.int16).view(-1, 2, PANEL // 2, inputs).permute(0, 3, 2, 1).contiguous()
        panels_array = pairs.numpy().view(np.uint32)[..., 0]
    else:
        panels_array = panels.transpose(1, 2).contiguous().numpy()
    assert panels_array.nbytes == len(panels) * panel_bytes(kind, inputs)
    return panels_array, scales


def _quantize(product: Tensor) -> tuple[Tensor, np.ndarray]:
    """Symmetric int8 with one scale an output."""
    floats = product.float()
    scales = floats.abs().amax(1).clamp(min=1e-12) / 127
    padded = torch.nn.functional.pad(scales, (0, _padded(len(scales)) - len(scales)))
    return torch.round(floats / scales[:, None]).to(torch.int8), padded.numpy()


def _lazy_zeros(count: int) -> np.ndarray:
    """Zero pages of the kernel's own, small ones: what no sequence has reached costs no memory, and a first touch does not
    clear two megabytes."""
    pages = mmap.mmap(-1, count * 4)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, np.float32)
