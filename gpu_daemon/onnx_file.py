"""Reads the parts of an ONNX file that weights are in: its initializers, and which nodes use them.

The format is protobuf's: a record is a key (field number and wire type) and a value. Only what is asked for is decoded, so
a file of hundreds of megabytes is mapped, not parsed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_GRAPH, _GRAPH_NODE, _GRAPH_INITIALIZER = 7, 1, 5
_NODE_INPUT, _NODE_NAME, _NODE_KIND = 1, 3, 4
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_TYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<f4"),
    6: np.dtype("<i4"),
    7: np.dtype("<i8"),
    9: np.dtype("?"),
    10: np.dtype("<f2"),
}


@dataclass(frozen=True, slots=True)
class Node:
    """One operation: its kind (`Conv`), its name (the module's path), and the names of what it reads."""

    kind: str
    name: str
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    nodes: tuple[Node, ...]
    tensors: dict[str, NDArray[np.generic]]


def read_graph(data: memoryview) -> Graph:
    """Raises ValueError for what is no ONNX model, or holds its weights in other files."""
    graph = next((value for field, value in _fields(data) if field == _MODEL_GRAPH and isinstance(value, memoryview)), None)
    if graph is None:
        raise ValueError("not an ONNX model")
    nodes, tensors = [], {}
    for field, value in _fields(graph):
        if isinstance(value, memoryview) and field == _GRAPH_NODE:
            nodes.append(_node(value))
        elif isinstance(value, memoryview) and field == _GRAPH_INITIALIZER:
            name, tensor = _tensor(value)
            tensors[name] = tensor
    return Graph(tuple(nodes), tensors)


def _node(data: memoryview) -> Node:
    texts: dict[int, list[str]] = {_NODE_INPUT: [], _NODE_NAME: [""], _NODE_KIND: [""]}
    for field, value in _fields(data):
        if field in texts and isinstance(value, memoryview):
            texts[field].append(str(value, "utf-8"))
    return Node(texts[_NODE_KIND][-1], texts[_NODE_NAME][-1], tuple(texts[_NODE_INPUT]))


def _tensor(data: memoryview) -> tuple[str, NDArray[np.generic]]:
    dims: list[int] = []
    name, raw, kind = "", memoryview(b""), 0
    for field, value in _fields(data):
        if field == _TENSOR_DIMS:
            dims += [value] if isinstance(value, int) else _varints(value)
        elif field == _TENSOR_TYPE and isinstance(value, int):
            kind = value
        elif field == _TENSOR_NAME and isinstance(value, memoryview):
            name = str(value, "utf-8")
        elif field == _TENSOR_RAW and isinstance(value, memoryview):
            raw = value
    if kind not in _TYPES:
        raise ValueError(f"tensor {name} has the unknown type {kind}")
    return name, np.frombuffer(raw, _TYPES[kind]).reshape(dims)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value): an integer, or bytes that may be a text or a record in turn."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield field, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError("not a protobuf record")
        if at + size > len(data):
            raise ValueError("the record is cut short")
        yield field, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """An integer and where the next byte is."""
    value = shift = 0
    while shift < 64:
        if at >= len(data):
            raise ValueError("the record is cut short")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("not a protobuf record")


def _varints(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values
