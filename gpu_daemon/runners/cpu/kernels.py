"""A decoder's forward pass, compiled, for a team of threads that may come late and may be held up.

Every operation is cut into chunks that threads take from a counter, and is complete when as many chunks are done as there
are. So a thread that the kernel has taken off its core holds up one chunk, not the team, and one that wakes late walks
through what is done to where the others are. No thread waits for another to arrive.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, types

from gpu_daemon.runners.cpu.vector import PANEL, fetch_add, float_of_bits, floats_at, load_acquire, make_tile, panel_bytes

KINDS = ("f32", "bf16", "i8")  # of weights; Shape.kind is an index
ROWS = 6  # of one register tile
QUERY_ROWS = 12  # of one unit of attention
_STRIP = 4  # panels of one chunk of a product
_COUNTER = 16  # int64 of one operation's counters: two cache lines
_OPERATIONS = 9  # a layer
_SPINS = 4000
_yield = types.ExternalFunction("sched_yield", types.int32())
_jit = njit(nogil=True, error_model="numpy")
_fast = njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})


class Shape(NamedTuple):
    """What of a decoder does not change between steps. Widths are in floats, padded to whole strips."""

    kind: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    qkv_width: int
    gate_up_width: int
    vocab_width: int
    eps: float
    normed_heads: bool
    block_floats: int  # of the cache: one block of all layers


class Step(NamedTuple):
    """One step's arrays. Rows are the step's tokens; a unit is (first row, rows, table) of attention."""

    x: np.ndarray  # f32 [rows, hidden]: the residual stream
    h: np.ndarray  # f32 [rows, widest input of a product]
    qkv: np.ndarray  # f32 [rows, qkv_width]
    mlp: np.ndarray  # f32 [rows, gate_up_width]
    cos: np.ndarray  # f32 [rows, head_dim / 2]
    sin: np.ndarray  # f32 [rows, head_dim / 2]
    positions: np.ndarray  # i64 [rows]
    row_table: np.ndarray  # i64 [rows]: which block table
    tables: np.ndarray  # i64 [sequences, blocks]
    units: np.ndarray  # i64 [units, 3]
    sampled: np.ndarray  # i64 [samples]
    picked: np.ndarray  # f32 [samples, hidden]
    logits: np.ndarray  # f32 [samples, vocab_width]
    counters: np.ndarray  # i64 [operations, _COUNTER], zeros


class Weights(NamedTuple):
    """Addresses of packed products, [layer, (qkv, output, gate_up, down)], and small tensors."""

    products: np.ndarray  # i64 [layers + 1, 4]; the last row is the head's
    scales: np.ndarray  # i64 [layers + 1, 4]
    norms: np.ndarray  # f32 [layers, 2, hidden]
    head_norms: np.ndarray  # f32 [layers, 2, head_dim]
    qkv_bias: np.ndarray  # f32 [layers, qkv_width]
    final_norm: np.ndarray  # f32 [hidden]


def counters(layers: int) -> np.ndarray:
    return np.zeros((layers * _OPERATIONS + 3, _COUNTER), np.int64)


# --- A team of threads ---


@_jit
def _take(step: Step, operation: int) -> int:
    return fetch_add(step.counters.ctypes.data + operation * _COUNTER * 8, 1)


@_jit
def _done(step: Step, operation: int) -> None:
    fetch_add(step.counters.ctypes.data + (operation * _COUNTER + 8) * 8, 1)


@_jit
def _wait(step: Step, operation: int, chunks: int) -> None:
    address = step.counters.ctypes.data + (operation * _COUNTER + 8) * 8
    spins = 0
    while load_acquire(address) < chunks:
        spins += 1
        if spins > _SPINS:
            _yield()


# --- Elementwise ---


@_fast
def _exp(x: Any) -> Any:
    """e to the x in float32 within 2 units in the last place (Cephes expf); 0 below -87."""
    x = max(np.float32(-87.0), min(np.float32(88.0), x))
    n = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@_fast
def _rms_norm(source: np.ndarray, weight: np.ndarray, eps: float, target: np.ndarray) -> None:
    total = np.float32(0.0)
    for i in range(weight.size):
        total += source[i] * source[i]
    scale = np.float32(1.0) / np.sqrt(total / np.float32(weight.size) + np.float32(eps))
    for i in range(weight.size):
        target[i] = source[i] * scale * weight[i]


@_jit
def _norm_rows(step: Step, operation: int, source: np.ndarray, weight: np.ndarray, eps: float, target: np.ndarray) -> None:
    rows = source.shape[0]
    while True:
        row = _take(step, operation)
        if row >= rows:
            break
        _rms_norm(source[row], weight, eps, target[row])
        _done(step, operation)
    _wait(step, operation, rows)


@_jit
def _pick_rows(step: Step, operation: int, weight: np.ndarray, eps: float) -> None:
    rows = step.sampled.size
    while True:
        i = _take(step, operation)
        if i >= rows:
            break
        _rms_norm(step.x[step.sampled[i]], weight, eps, step.picked[i])
        _done(step, operation)
    _wait(step, operation, rows)


@_fast
def _silu_times(gate: np.ndarray, up: np.ndarray, target: np.ndarray) -> None:
    for i in range(gate.size):
        target[i] = gate[i] / (np.float32(1.0) + _exp(-gate[i])) * up[i]


@_jit
def _activate(step: Step, operation: int, inner: int) -> None:
    rows = step.x.shape[0]
    while True:
        row = _take(step, operation)
        if row >= rows:
            break
        _silu_times(step.mlp[row, :inner], step.mlp[row, inner : 2 * inner], step.h[row, :inner])
        _done(step, operation)
    _wait(step, operation, rows)


# --- Products ---


def _make_matmul(kind: str) -> Any:
    """y = x w for any rows and panels, out of register tiles of up to ROWS rows, and as wide as the registers allow."""
    tile1, tile2, tile3 = make_tile(kind, 1, 4), make_tile(kind, 2, 2), make_tile(kind, 3, 2)
    tile4, tile5, tile6 = make_tile(kind, 4, 1), make_tile(kind, 5, 1), make_tile(kind, 6, 1)
    narrow1, narrow2, narrow3 = make_tile(kind, 1, 1), make_tile(kind, 2, 1), make_tile(kind, 3, 1)

    @_jit
    def rows_by_panels(rows: int, x: int, xs: int, w: int, ws: int, k: int, y: int, ys: int, panels: int, scales: int, add: int) -> None:  # noqa: E501  # fmt: skip
        wide = 4 if rows == 1 else 2 if rows <= 3 else 1
        p = 0
        while p < panels:
            wp, yp, sp = w + p * ws, y + p * 64, scales + p * 64
            if p + wide > panels:
                wide = 1
            if rows == 6:
                tile6(x, xs, wp, ws, k, yp, ys, sp, add)
            elif rows == 5:
                tile5(x, xs, wp, ws, k, yp, ys, sp, add)
            elif rows == 4:
                tile4(x, xs, wp, ws, k, yp, ys, sp, add)
            elif rows == 3:
                if wide == 2:
                    tile3(x, xs, wp, ws, k, yp, ys, sp, add)
                else:
                    narrow3(x, xs, wp, ws, k, yp, ys, sp, add)
            elif rows == 2:
                if wide == 2:
                    tile2(x, xs, wp, ws, k, yp, ys, sp, add)
                else:
                    narrow2(x, xs, wp, ws, k, yp, ys, sp, add)
            elif wide == 4:
                tile1(x, xs, wp, ws, k, yp, ys, sp, add)
            else:
                narrow1(x, xs, wp, ws, k, yp, ys, sp, add)
            p += wide

    @_jit
    def matmul(rows: int, x: int, xs: int, w: int, ws: int, k: int, y: int, ys: int, panels: int, scales: int, add: int) -> None:  # noqa: E501  # fmt: skip
        tiles = (rows + ROWS - 1) // ROWS
        row = 0
        for tile in range(tiles):
            count = (rows - row + tiles - tile - 1) // (tiles - tile)
            rows_by_panels(count, x + row * xs, xs, w, ws, k, y + row * ys, ys, panels, scales, add)
            row += count

    return matmul


_matmul_f32, _matmul_bf16, _matmul_i8 = (_make_matmul(kind) for kind in KINDS)
_INPUT_BYTES = tuple(panel_bytes(kind, 1) for kind in KINDS)


@_jit
def _linear(step: Step, kind: int, operation: int, x: np.ndarray, inputs: int, w: int, scales: int, y: np.ndarray, add: int) -> None:  # noqa: E501  # fmt: skip
    """y (+)= x[:, :inputs] w, a strip of panels a chunk."""
    panels = y.shape[1] // PANEL
    chunks = (panels + _STRIP - 1) // _STRIP
    panel = _INPUT_BYTES[kind] * inputs
    rows, xs, ys = x.shape[0], x.shape[1] * 4, y.shape[1] * 4
    while True:
        chunk = _take(step, operation)
        if chunk >= chunks:
            break
        first = chunk * _STRIP
        count, at, to = min(_STRIP, panels - first), w + first * panel, y.ctypes.data + first * PANEL * 4
        if kind == 0:
            _matmul_f32(rows, x.ctypes.data, xs, at, panel, inputs, to, ys, count, 0, add)
        elif kind == 1:
            _matmul_bf16(rows, x.ctypes.data, xs, at, panel, inputs, to, ys, count, 0, add)
        else:
            _matmul_i8(rows, x.ctypes.data, xs, at, panel, inputs, to, ys, count, scales + first * PANEL * 4, add)
        _done(step, operation)
    _wait(step, operation, chunks)


# --- Attention ---
# A block of the cache holds 16 tokens. Of one layer and key head: keys as one panel, [head_dim][16 tokens]; values as
# head_dim / 16 panels of [16 tokens][16]. So scores and mixtures are the same register tiles as every other product.


@_fast
def _rotate(head: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> None:
    half = cos.size
    for i in range(half):
        a, b = head[i], head[i + half]
        head[i] = a * cos[i] - b * sin[i]
        head[i + half] = b * cos[i] + a * sin[i]


@_jit
def _layer_block(s: Shape, cache_at: int, block: int, layer: int, head: int) -> int:
    """Address of a head's keys; its values follow the keys of all heads."""
    part = s.head_dim * PANEL
    return cache_at + (block * s.block_floats + (layer * 2 * s.kv_heads + head) * part) * 4


@_jit
def _store(s: Shape, cache_at: int, block: int, layer: int, head: int, slot: int, key: np.ndarray, value: np.ndarray) -> None:
    part = s.head_dim * PANEL
    address = _layer_block(s, cache_at, block, layer, head)
    keys = carray(floats_at(address), (s.head_dim, PANEL))
    values = carray(floats_at(address + s.kv_heads * part * 4), (s.head_dim // PANEL, PANEL, PANEL))
    for i in range(s.head_dim):
        keys[i, slot] = key[i]
        values[i // PANEL, slot, i % PANEL] = value[i]


@_jit
def _place_row(s: Shape, w: Weights, step: Step, cache_at: int, layer: int, row: int) -> None:
    """Bias, norms and rotation of one token's heads; its keys and values go into the cache, its queries stay."""
    qkv = step.qkv[row]
    for i in range(w.qkv_bias.shape[1]):
        qkv[i] += w.qkv_bias[layer, i]
    cos, sin = step.cos[row], step.sin[row]
    for head in range(s.heads + s.kv_heads):
        part = qkv[head * s.head_dim : (head + 1) * s.head_dim]
        if s.normed_heads:
            _rms_norm(part, w.head_norms[layer, 0 if head < s.heads else 1], s.eps, part)
        _rotate(part, cos, sin)
    position = step.positions[row]
    block, slot = step.tables[step.row_table[row], position // PANEL], position % PANEL
    for head in range(s.kv_heads):
        k = (s.heads + head) * s.head_dim
        v = k + s.kv_heads * s.head_dim
        _store(s, cache_at, block, layer, head, slot, qkv[k : k + s.head_dim], qkv[v : v + s.head_dim])


@_jit
def _place(s: Shape, w: Weights, step: Step, cache_at: int, layer: int, operation: int) -> None:
    rows = step.x.shape[0]
    while True:
        row = _take(step, operation)
        if row >= rows:
            break
        _place_row(s, w, step, cache_at, layer, row)
        _done(step, operation)
    _wait(step, operation, rows)


@_fast
def _softmax(scores: np.ndarray, known: int) -> None:
    """Over the first `known` scores; the rest become 0."""
    top = scores[0]
    for i in range(known):
        top = max(top, scores[i])
    total = np.float32(0.0)
    for i in range(known):
        scores[i] = _exp(scores[i] - top)
        total += scores[i]
    scale = np.float32(1.0) / total
    for i in range(known):
        scores[i] *= scale
    for i in range(known, scores.size):
        scores[i] = np.float32(0.0)


@_jit
def _attend_unit(s: Shape, step: Step, cache_at: int, layer: int, unit: int, head: int, scratch: np.ndarray) -> None:
    """The queries of a few tokens of one sequence against one key head; the mixture goes to h."""
    first, count, table = step.units[unit, 0], step.units[unit, 1], step.units[unit, 2]
    groups, dim = s.heads // s.kv_heads, s.head_dim
    rows, blocks = count * groups, step.positions[first + count - 1] // PANEL + 1
    q = scratch[: rows * dim].reshape(rows, dim)
    mixed = scratch[rows * dim : 2 * rows * dim].reshape(rows, dim)
    scores = scratch[2 * rows * dim : 2 * rows * dim + rows * blocks * PANEL].reshape(rows, blocks * PANEL)
    scale = np.float32(1.0 / np.sqrt(dim))
    for r in range(rows):
        begin = (head * groups + r % groups) * dim
        for i in range(dim):
            q[r, i] = step.qkv[first + r // groups, begin + i] * scale
    width = blocks * PANEL * 4
    for b in range(blocks):
        keys = _layer_block(s, cache_at, step.tables[table, b], layer, head)
        _matmul_f32(rows, q.ctypes.data, dim * 4, keys, 0, dim, scores.ctypes.data + b * PANEL * 4, width, 1, 0, 0)
    for r in range(rows):
        _softmax(scores[r], step.positions[first + r // groups] + 1)
    for b in range(blocks):
        values = _layer_block(s, cache_at, step.tables[table, b], layer, head) + s.kv_heads * dim * PANEL * 4
        _matmul_f32(rows, scores.ctypes.data + b * PANEL * 4, width, values, PANEL * PANEL * 4, PANEL,
                    mixed.ctypes.data, dim * 4, dim // PANEL, 0, b)  # fmt: skip
    for r in range(rows):
        begin = (head * groups + r % groups) * dim
        for i in range(dim):
            step.h[first + r // groups, begin + i] = mixed[r, i]


@_jit
def _attend(s: Shape, step: Step, cache_at: int, layer: int, operation: int, scratch: np.ndarray) -> None:
    chunks = step.units.shape[0] * s.kv_heads
    while True:
        chunk = _take(step, operation)
        if chunk >= chunks:
            break
        _attend_unit(s, step, cache_at, layer, chunk // s.kv_heads, chunk % s.kv_heads, scratch)
        _done(step, operation)
    _wait(step, operation, chunks)


# --- The whole ---


def _compile_once(function: Any) -> Any:
    """Compiled once a machine, where numba finds a folder to write to; else at each start. The cache lies beside the code and
    looks at this file alone: after a change of vector.py touch this one too."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:
        return _jit(function)


@_compile_once
def forward(s: Shape, w: Weights, step: Step, cache_at: int, scratch: np.ndarray) -> None:
    """One step; every thread of the team calls it, with a scratch of its own. `cache_at` is the cache's address."""
    attended = s.heads * s.head_dim
    for layer in range(s.layers):
        o = layer * _OPERATIONS
        at, scales = w.products[layer], w.scales[layer]
        _norm_rows(step, o, step.x, w.norms[layer, 0], s.eps, step.h)
        _linear(step, s.kind, o + 1, step.h, s.hidden, at[0], scales[0], step.qkv, 0)
        _place(s, w, step, cache_at, layer, o + 2)
        _attend(s, step, cache_at, layer, o + 3, scratch)
        _linear(step, s.kind, o + 4, step.h, attended, at[1], scales[1], step.x, 1)
        _norm_rows(step, o + 5, step.x, w.norms[layer, 1], s.eps, step.h)
        _linear(step, s.kind, o + 6, step.h, s.hidden, at[2], scales[2], step.mlp, 0)
        _activate(step, o + 7, s.inner)
        _linear(step, s.kind, o + 8, step.h, s.inner, at[3], scales[3], step.x, 1)
    if step.sampled.size:
        o = s.layers * _OPERATIONS
        _pick_rows(step, o, w.final_norm, s.eps)
        _linear(step, s.kind, o + 1, step.picked, s.hidden, w.products[s.layers, 0], w.scales[s.layers, 0], step.logits, 0)
