"""What a model's folder will take of a device, from its config files and safetensors headers alone. No tensors.

Every figure is in bytes. An estimate is for one engine on one kind of device, because they keep weights differently: a GPU
and the reference decoder hold them once, the compiled CPU decoder packs its products, so that a head which is tied to the
embedding is there twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_daemon.errors import LoadFailed

MAX_HEADER_BYTES = 100 << 20
BLOCK_TOKENS = 16
VIDEO_FRAMES = 49
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_UNUSED = ("visual.", "model.visual.")  # the vision half, which the language decoder drops


@dataclass(frozen=True, slots=True)
class Conditions:
    """Where and how large: `rows` tokens a step at most, `samples` sequences, `length` tokens each."""

    cuda: bool
    length: int
    rows: int = 512
    samples: int = 32
    threads: int = 1
    int8: bool = False
    static: bool = False


@dataclass(frozen=True, slots=True)
class Estimate:
    """`loading` is held beside the weights while they are read and fused, `activations` while the largest step runs.
    `kv_least` is the KV of one sequence of full length; 0, as `kv_token`, for what keeps none."""

    weights: int
    activations: int
    loading: int = 0
    kv_token: int = 0
    kv_least: int = 0

    @property
    def peak(self) -> int:
        """The most that is held at once, KV apart."""
        return self.weights + max(self.activations, self.loading)

    @property
    def need(self) -> int:
        """What must be free for it to be loaded."""
        return max(self.peak, self.weights + self.activations + self.kv_least)


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    dtype: str
    count: int


def estimate(folder: Path, at: Conditions) -> Estimate:
    """Raises LoadFailed for a folder that is damaged or of no known kind."""
    if (folder / "model_index.json").is_file():
        return _diffusion(folder, at)
    config = read_json(folder / "config.json")
    tensors = list(_tensors(folder))
    architecture = str((config.get("architectures") or [""])[0])
    if "istftnet" in config:
        return _kokoro(tensors, at)
    if architecture.startswith("Whisper"):
        return _whisper(tensors, config, at)
    if architecture.endswith(("ForCausalLM", "ForConditionalGeneration")):
        return _decoder(tensors, config, at)
    return _encoder(tensors, config, at)


# --- Decoders of the llama family ---


def _decoder(tensors: list[Tensor], config: dict[str, Any], at: Conditions) -> Estimate:
    text = {**config, **(config.get("text_config") or {})}
    try:
        layers, heads, hidden = text["num_hidden_layers"], text["num_attention_heads"], text["hidden_size"]
        kv_heads, inner, vocab = text.get("num_key_value_heads") or heads, text["intermediate_size"], text["vocab_size"]
    except KeyError as error:
        raise LoadFailed(f"config.json has no {error.args[0]}") from None
    head_dim = text.get("head_dim") or hidden // heads
    kept = [tensor for tensor in tensors if at.static or not tensor.name.startswith(_UNUSED)]
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
    blocks = -(-length // BLOCK_TOKENS) + 1
    return Estimate(weights, activations, loading, kv_token, blocks * BLOCK_TOKENS * kv_token)


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


# --- Everything else ---


def _diffusion(folder: Path, at: Conditions) -> Estimate:
    """Every component's weights, and the largest of: the denoiser's step, the decoding of its result."""
    index = read_json(folder / "model_index.json")
    parts = [folder / name for name, kind in index.items() if isinstance(kind, list) and (folder / name).is_dir()]
    tensors = [tensor for part in parts for tensor in _tensors(part, required=False)]
    if not tensors:
        raise LoadFailed(f"{folder.name}: no component has weights")
    item = 2 if at.cuda else 4
    weights = sum(tensor.count for tensor in tensors) * item
    vae = read_json(folder / "vae" / "config.json")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    if (folder / "transformer").is_dir():
        activations = _video_step(read_json(folder / "transformer" / "config.json"), vae, item)
    else:
        unet = read_json(folder / "unet" / "config.json")
        activations = _image_step(unet, vae, factor * int(unet["sample_size"]), item)
    return Estimate(weights, activations)


def _image_step(unet: dict[str, Any], vae: dict[str, Any], side: int, item: int) -> int:
    """The VAE's last block at full resolution: the input, its norm and its result in the widths of the last two blocks."""
    widths = [int(width) for width in vae["block_out_channels"]]
    first, second = widths[0], widths[min(1, len(widths) - 1)]
    denoise = 8 * unet["block_out_channels"][0] * int(unet["sample_size"]) ** 2 * item
    return max(int(denoise), side * side * (2 * first + second) * item)


def _video_step(transformer: dict[str, Any], vae: dict[str, Any], item: int) -> int:
    """The transformer over all latent tokens with guidance, or one tile of frames in the VAE's last block."""
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    height, across = transformer["sample_height"], transformer["sample_width"]
    latent_frames = (VIDEO_FRAMES - 1) // transformer["temporal_compression_ratio"] + 1
    tokens = latent_frames * height * across // transformer["patch_size"] ** 2 + transformer["max_text_seq_length"]
    denoise = 2 * tokens * width * 8 * item  # q, k, v, and the four of the inner product
    pixels = height * across * 4 ** (len(vae["block_out_channels"]) - 1)
    decode = 8 * pixels * 3 * int(vae["block_out_channels"][0]) * item
    return max(int(denoise), int(decode))


def _kokoro(tensors: list[Tensor], at: Conditions) -> Estimate:
    """Float32 on any device; the generator works on 600 samples a frame, and 510 phonemes are about 1,100 frames."""
    return Estimate(_floats(tensors) * 4, 1_100 * 600 * 22 * 4 * 4)


def _whisper(tensors: list[Tensor], config: dict[str, Any], at: Conditions) -> Estimate:
    item = 2 if at.cuda else 4
    hidden, inner = config["d_model"], config["encoder_ffn_dim"]
    positions, layers = config["max_source_positions"], config["decoder_layers"]
    kv_token = 2 * layers * hidden * item
    activations = item * (positions * (4 * hidden + inner) + config["encoder_attention_heads"] * positions**2)
    return Estimate(_floats(tensors) * item, activations, 0, kv_token, kv_token * (config["max_target_positions"] + positions))


def _encoder(tensors: list[Tensor], config: dict[str, Any], at: Conditions) -> Estimate:
    """A BERT-like encoder: a batch of `rows` tokens."""
    item = 2 if at.cuda else 4
    hidden, inner = int(config.get("hidden_size", 0)), int(config.get("intermediate_size", 0))
    length = min(at.length, int(config.get("max_position_embeddings", at.length)))
    scores = int(config.get("num_attention_heads", 1)) * length * length
    return Estimate(_floats(tensors) * item, item * (at.rows * (5 * hidden + inner) + scores))


def _floats(tensors: list[Tensor]) -> int:
    return sum(tensor.count for tensor in tensors if tensor.dtype in _FLOATS)


# --- Files ---


def read_json(path: Path) -> dict[str, Any]:
    """Raises LoadFailed."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        raise LoadFailed(f"{path.parent.name}: {path.name} is missing or damaged") from None
    if not isinstance(found, dict):
        raise LoadFailed(f"{path.parent.name}: {path.name} is no object")
    return found


def _tensors(folder: Path, required: bool = True) -> Iterator[Tensor]:
    """Every tensor's name, type and size, from the headers. Raises LoadFailed for a shard that is missing or cut short."""
    files = sorted(folder.glob("*.safetensors"))
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    for index in indexes:
        named = set((read_json(index).get("weight_map") or {}).values())
        if missing := sorted(named - {file.name for file in files}):
            raise LoadFailed(f"{folder.name}: the shard {missing[0]} is missing")
        files = [folder / name for name in sorted(named)]
    if required and not files:
        raise LoadFailed(f"{folder.name}: there are no weights")
    for file in files:
        yield from _header(file)


def _header(file: Path) -> Iterator[Tensor]:
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if not 0 < size <= MAX_HEADER_BYTES:
                raise ValueError
            header = json.loads(stream.read(size))
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        end = max((entry["data_offsets"][1] for _, entry in entries), default=0)
        if file.stat().st_size < 8 + size + end:
            raise LoadFailed(f"{file.parent.name}: {file.name} is cut short")
        for name, entry in entries:
            yield Tensor(name, entry["dtype"], math.prod(entry["shape"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise LoadFailed(f"{file.parent.name}: {file.name} is missing or damaged") from None
