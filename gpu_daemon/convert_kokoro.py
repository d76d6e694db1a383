"""Turns Kokoro-82M's ONNX export and raw voices into the folder the daemon loads: the official model's own state.

`python -m gpu_daemon.convert_kokoro SRC_DIR DST_DIR` (see child.py). SRC_DIR holds the parts of the ONNX file, a file a voice
and the config. The export folded weight norms into plain convolutions, stored products transposed and reordered the gates of
LSTMs; what it lost are names, which its nodes still have.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors
from numpy.typing import NDArray

from gpu_daemon import child
from gpu_daemon.child import UnsupportedFile
from gpu_daemon.onnx_file import Graph, Node, read_graph

Array = NDArray[np.float32]
ONNX_SHA256 = "8fbea51ea711f2af382e88c833d9e288c6dc82ce5e98421ea61c058ce21a34cb"
CONFIG_SHA256 = "5abb01e2403b072bf03d04fde160443e209d7a0dad49a423be15196b9b43c17f"
VOICE_SHAPE = (510, 1, 256)
_PART = re.compile(r"kokoro-fp32\.part(\d+)\.bin")
_WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "LSTM")
_CONSTANTS = ".stft."  # of the inverse transform, which the package computes
_OF_PREDICTOR = ("F0", "N", "F0_proj", "N_proj", "shared")  # the export calls these by themselves


def convert(source: Path, target: Path) -> Iterator[tuple[str, float]]:
    """Writes `target`, yielding (stage, progress in that stage). Raises UnsupportedFile, OSError or ValueError."""
    yield "reading", 0.0
    target.mkdir(parents=True, exist_ok=True)
    _require(_sha256((source / "config.json").read_bytes()) == CONFIG_SHA256, "config.json is not Kokoro-82M's")
    data = _joined(source)
    _require(_sha256(data) == ONNX_SHA256, "the parts are not those of Kokoro-82M")
    yield "tensors", 0.0
    state = model_state(read_graph(memoryview(data)))
    yield "writing", 0.0
    _save(state, target / "model.safetensors")
    _save(_voices(source), target / "voices.safetensors")
    shutil.copyfile(source / "config.json", target / "config.json")
    yield "done", 1.0


def model_state(graph: Graph) -> dict[str, Array]:
    """The state dict of `kokoro.KModel`, without the pooler that is never run."""
    state = {_module(name.split(".")): _floats(tensor) for name, tensor in graph.tensors.items() if _is_named(name)}
    nameless = {name: tensor for name, tensor in graph.tensors.items() if not _is_named(name)}
    for node in graph.nodes:
        if node.kind in _WEIGHTED and node.inputs[1] in nameless:
            weight = nameless.pop(node.inputs[1])  # once: layers that share their weights run under other names again
            state.update(_recovered(node, graph, _floats(weight)))
    state = {name: tensor for name, tensor in state.items() if _CONSTANTS not in name}
    return state | _instance_norms(state)


def _is_named(tensor: str) -> bool:
    """Whether the export kept the parameter's own name."""
    return tensor.startswith(("encoder.", "decoder."))


def _module(path: list[str]) -> str:
    """A module's name in KModel from where it is in the export, whose first word says which half of the export it is in."""
    inner = path[1:]
    return ".".join(["predictor", *inner] if inner[0] in _OF_PREDICTOR else inner)


def _module_of(node: Node) -> str:
    """`/encoder/text_encoder/cnn.0/cnn.0.0/Conv` -> `text_encoder.cnn.0.0`: a list's item repeats the list's name."""
    parts = node.name.strip("/").split("/")[:-1]
    kept = [part for part, following in zip(parts, [*parts[1:], ""], strict=True) if not following.startswith(part + ".")]
    return _module(".".join(kept).split("."))


def _recovered(node: Node, graph: Graph, weight: Array) -> Iterator[tuple[str, Array]]:
    """A node's parameters as its module has them."""
    name = _module_of(node)
    if node.kind in ("Conv", "ConvTranspose"):  # a weight norm's direction and length
        yield f"{name}.weight_v", weight
        yield f"{name}.weight_g", np.sqrt(np.square(weight.astype(np.float64)).sum((1, 2), keepdims=True)).astype(np.float32)
    elif node.kind == "MatMul":
        yield f"{name}.weight", weight.T
    elif node.kind == "LSTM":
        hidden, biases = _floats(graph.tensors[node.inputs[2]]), _floats(graph.tensors[node.inputs[3]])
        for direction, suffix in enumerate(("", "_reverse")):
            yield f"{name}.weight_ih_l0{suffix}", _gates(weight[direction])
            yield f"{name}.weight_hh_l0{suffix}", _gates(hidden[direction])
            for kind, bias in zip(("ih", "hh"), np.split(biases[direction], 2), strict=True):
                yield f"{name}.bias_{kind}_l0{suffix}", _gates(bias)


def _gates(rows: Array) -> Array:
    """Input, output, forget, cell as ONNX has them -> input, forget, cell, output."""
    i, o, f, c = np.split(rows, 4)
    return np.concatenate([i, f, c, o])


def _instance_norms(state: Mapping[str, Array]) -> dict[str, Array]:
    """The scale and shift that the package's norms have and no checkpoint of it does: one and zero."""
    norms: dict[str, Array] = {}
    for name, weight in state.items():
        if name.endswith(".fc.weight") and ".lstms." not in name:
            norm, features = name.removesuffix(".fc.weight") + ".norm", weight.shape[0] // 2
            norms[f"{norm}.weight"], norms[f"{norm}.bias"] = np.ones(features, np.float32), np.zeros(features, np.float32)
    return norms


def _joined(source: Path) -> bytearray:
    parts = {int(found[1]): path for path in source.iterdir() if (found := _PART.fullmatch(path.name))}
    data = bytearray()
    for number in sorted(parts):
        data += parts[number].read_bytes()
    return data


def _voices(source: Path) -> dict[str, Array]:
    """Every file of the right size that is no part of the model."""
    voices = {path.stem: path for path in sorted(source.glob("*.bin")) if not _PART.fullmatch(path.name)}
    return {name: np.fromfile(path, "<f4").reshape(VOICE_SHAPE) for name, path in voices.items()}


def _floats(tensor: NDArray[np.generic]) -> Array:
    _require(tensor.dtype == np.dtype("<f4"), "a tensor is not of the type float32")
    return tensor.view(np.float32)


def _save(tensors: Mapping[str, Array], path: Path) -> None:
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}  # alive while they are written
    specs = {
        name: safetensors.TensorSpec(
            dtype="float32", shape=list(tensor.shape), data_ptr=tensor.ctypes.data, data_len=tensor.nbytes
        )
        for name, tensor in whole.items()
    }
    safetensors.serialize_file(specs, str(path), {"format": "pt"})


def _sha256(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def _require(fact: bool, otherwise: str) -> None:
    if not fact:
        raise UnsupportedFile(otherwise)


if __name__ == "__main__":
    sys.exit(child.run(convert, sys.argv[1:]))
