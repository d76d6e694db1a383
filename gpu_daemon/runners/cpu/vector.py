"""What the compiled kernels need and plain Python has not: a register tile of a matrix product, and atomics.

Everything here is emitted as LLVM IR and inlined by numba. Addresses are int64, strides are in bytes.

The tile multiplies a few rows of float32 activations by a few panels of weights. A panel is 16 outputs wide and holds their
weights input by input, so the inner loop reads memory in order: `f32` as 16 floats; `bf16` as 8 words, output j in the low
half and output j + 8 in the high half of word j, since a bf16 is the upper half of a float32; `i8` as 16 signed bytes, with
one float32 scale an output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

PANEL = 16
_FLOAT, _BYTE, _WORD, _LONG = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(_FLOAT, 8), ir.VectorType(_WORD, 8)
_ZEROS = ir.Constant(_FLOATS, [0.0] * 8)


def _floats(b: ir.IRBuilder, address: Any) -> Any:
    return b.load(b.inttoptr(address, _FLOATS.as_pointer()), align=4)


def _load_f32(b: ir.IRBuilder, address: Any) -> tuple[Any, Any]:
    return _floats(b, address), _floats(b, b.add(address, _LONG(32)))


def _load_bf16(b: ir.IRBuilder, address: Any) -> tuple[Any, Any]:
    words = b.load(b.inttoptr(address, _WORDS.as_pointer()), align=4)
    low = b.shl(words, ir.Constant(_WORDS, [16] * 8))
    high = b.and_(words, ir.Constant(_WORDS, [0xFFFF0000] * 8))
    return b.bitcast(low, _FLOATS), b.bitcast(high, _FLOATS)


def _load_i8(b: ir.IRBuilder, address: Any) -> tuple[Any, Any]:
    def eight(at: Any) -> Any:
        values = b.load(b.inttoptr(at, ir.VectorType(_BYTE, 8).as_pointer()), align=1)
        return b.sitofp(b.sext(values, _WORDS), _FLOATS)

    return eight(address), eight(b.add(address, _LONG(8)))


_LOADERS: dict[str, tuple[Callable[..., tuple[Any, Any]], int]] = {
    "f32": (_load_f32, 64),
    "bf16": (_load_bf16, 32),
    "i8": (_load_i8, 16),
}


def panel_bytes(kind: str, inputs: int) -> int:
    """Bytes of one panel of weights."""
    return _LOADERS[kind][1] * inputs


def make_tile(kind: str, rows: int, panels: int) -> Any:
    """y[r, n] = (y[r, n] if add else 0) + scale[n] * sum over i of x[r, i] * w[i, n], for `rows` rows and `panels` panels.

    The sums stay in registers: 2 * rows * panels of them, of AVX2's 16. `scales` is an address for `i8` and ignored otherwise.
    """

    @intrinsic
    def tile(context: Any, x: Any, x_stride: Any, w: Any, w_stride: Any, inputs: Any, y: Any, y_stride: Any, scales: Any, add: Any) -> Any:  # noqa: E501  # fmt: skip
        def generate(context: Any, b: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            _emit_tile(b, kind, rows, panels, *arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return tile


def _emit_tile(b: ir.IRBuilder, kind: str, rows: int, panels: int, x: Any, x_stride: Any, w: Any, w_stride: Any, inputs: Any,
               y: Any, y_stride: Any, scales: Any, add: Any) -> None:  # fmt: skip
    x_rows = [b.add(x, b.mul(x_stride, _LONG(r))) for r in range(rows)]
    w_panels = [b.add(w, b.mul(w_stride, _LONG(p))) for p in range(panels)]
    sums = _emit_loop(b, kind, x_rows, w_panels, inputs)
    keep = b.icmp_signed("!=", add, _LONG(0))
    for r in range(rows):
        for j in range(2 * panels):
            at = b.add(y, b.add(b.mul(y_stride, _LONG(r)), _LONG(32 * j)))
            value = sums[r * 2 * panels + j]
            if kind == "i8":
                value = b.fmul(value, _floats(b, b.add(scales, _LONG(32 * j))))
            old = b.select(keep, _floats(b, at), _ZEROS)
            b.store(b.fadd(value, old), b.inttoptr(at, _FLOATS.as_pointer()), align=4)


def _emit_loop(b: ir.IRBuilder, kind: str, x_rows: list[Any], w_panels: list[Any], inputs: Any) -> list[Any]:
    """The loop over the inputs; returns the sums, row by row."""
    load, step = _LOADERS[kind]
    fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), "llvm.fma.v8f32")
    before, loop, after = b.block, b.append_basic_block("inputs"), b.append_basic_block("sums")
    b.branch(loop)
    b.position_at_end(loop)
    i = b.phi(_LONG)
    i.add_incoming(_LONG(0), before)
    width = 2 * len(w_panels)
    sums = [b.phi(_FLOATS) for _ in range(len(x_rows) * width)]
    weights = [half for base in w_panels for half in load(b, b.add(base, b.mul(i, _LONG(step))))]
    following = []
    for r, base in enumerate(x_rows):
        value = _splat(b, b.load(b.inttoptr(b.add(base, b.mul(i, _LONG(4))), _FLOAT.as_pointer())))
        following += [b.call(fma, [weights[j], value, sums[r * width + j]]) for j in range(width)]
    upcoming = b.add(i, _LONG(1))
    i.add_incoming(upcoming, loop)
    for now, then in zip(sums, following, strict=True):
        now.add_incoming(_ZEROS, before)
        now.add_incoming(then, loop)
    b.cbranch(b.icmp_signed("<", upcoming, inputs), loop, after)
    b.position_at_end(after)
    return following


def _splat(b: ir.IRBuilder, value: Any) -> Any:
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    return b.shuffle_vector(b.insert_element(undefined, value, _WORD(0)), undefined, ir.Constant(_WORDS, [0] * 8))


@intrinsic
def fetch_add(context: Any, address: Any, amount: Any) -> Any:
    """Adds to the int64 at an address, atomically; returns what it was."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(arguments[0], _LONG.as_pointer()), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def load_acquire(context: Any, address: Any) -> Any:
    """The int64 at an address; what its writer wrote before is seen."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return b.load_atomic(b.inttoptr(arguments[0], _LONG.as_pointer()), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def float_of_bits(context: Any, bits: Any) -> Any:
    """The float32 that an int32's bits spell."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return b.bitcast(arguments[0], _FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def floats_at(context: Any, address: Any) -> Any:
    """An address as a pointer that numba.carray takes."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return b.inttoptr(arguments[0], _FLOAT.as_pointer())

    return types.CPointer(types.float32)(types.int64), generate
