"""Turns a llama-architecture GGUF file into the folder the daemon loads: bf16 safetensors, config and tokenizer.

`python -m gpu_daemon.convert_gguf SRC.gguf DST_DIR` (see child.py). Needs the `gguf` package, and neither torch nor
transformers, so that a cold start does not wait for them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from gguf import GGUFReader, TokenType, dequantize
from numpy.typing import NDArray

from gpu_daemon import child
from gpu_daemon.child import UnsupportedFile

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# What llama.cpp calls a pre-tokenizer, as the published tokenizers of those models spell it.
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_PRE_TOKENIZERS = {"smollm": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]}


class _Metadata:
    """The file's key-value fields, asked for by name."""

    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise UnsupportedFile(f"the file has no field {key}")
        return self._fields[key].contents()

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self._fields else default


def convert(source: Path, target: Path) -> Iterator[tuple[str, float]]:
    """Writes `target`, yielding (stage, progress in that stage). Raises UnsupportedFile, OSError or ValueError."""
    yield "reading", 0.0
    reader = GGUFReader(source)
    metadata = _Metadata(reader)
    if metadata["general.architecture"] != "llama":
        raise UnsupportedFile(f"architecture {metadata['general.architecture']} is not supported; llama is")
    config = model_config(metadata, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    target.mkdir(parents=True, exist_ok=True)
    _write_json(target / "config.json", config)
    _write_json(target / "generation_config.json", {key: config[key] for key in _TOKEN_ID_FIELDS.values()})
    _write_tokenizer(target, metadata, config)
    yield "reading", 1.0

    tensors: dict[str, NDArray[np.uint16]] = {}
    for number, tensor in enumerate(reader.tensors, 1):
        name, values = tensor_name(tensor.name), dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = config["num_attention_heads" if "attn_q" in tensor.name else "num_key_value_heads"]
            values = unpermute(values, heads)
        tensors[name] = to_bfloat16(values)
        yield "tensors", number / len(reader.tensors)

    yield "writing", 0.0
    specs = {
        name: safetensors.TensorSpec(
            dtype="bfloat16", shape=list(values.shape), data_ptr=values.ctypes.data, data_len=values.nbytes
        )
        for name, values in tensors.items()
    }
    safetensors.serialize_file(specs, str(target / "model.safetensors"), {"format": "pt"})
    yield "done", 1.0


_TOKEN_ID_FIELDS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


def model_config(metadata: _Metadata, *, tied: bool) -> dict[str, Any]:
    """The `config.json` of a `LlamaForCausalLM`, from the file's `llama.*` fields."""
    heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "rms_norm_eps": _shortest_decimal(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest_decimal(metadata.get("llama.rope.freq_base", 10_000.0)),
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        **{field: metadata[f"tokenizer.ggml.{name}_token_id"] for name, field in _TOKEN_ID_FIELDS.items()},
    }


def _shortest_decimal(value: float) -> float:
    """Undoes the widening of a stored float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def tensor_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    parts = name.split(".")
    try:
        if parts[0] == "blk":
            return f"model.layers.{int(parts[1])}.{_LAYER_TENSORS[parts[2]]}.{parts[3]}"
        return f"{_TOP_TENSORS[parts[0]]}.{parts[1]}"
    except (KeyError, IndexError, ValueError):
        raise UnsupportedFile(f"tensor {name} is not part of a llama model") from None


def unpermute(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rotary halves: GGUF interleaves a head's rows (0, d/2, 1, d/2+1, ...); transformers keeps the halves apart."""
    rows = weights.reshape(heads, weights.shape[0] // heads // 2, 2, weights.shape[1])
    return rows.swapaxes(1, 2).reshape(weights.shape)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of the float32 patterns, rounded to nearest even. Weights are finite, so no NaN can carry."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def tokenizer(metadata: _Metadata) -> dict[str, Any]:
    """`tokenizer.json` as the publisher wrote it, down to the order of the keys."""
    kind = metadata.get("tokenizer.ggml.pre", "default")
    if metadata["tokenizer.ggml.model"] != "gpt2" or kind not in _PRE_TOKENIZERS:
        raise UnsupportedFile(f"tokenizer {metadata['tokenizer.ggml.model']}/{kind} is not supported")
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, **_special(tokens[index])} for index in _special_ids(metadata)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[kind]},
        "post_processor": None,
        "decoder": {**_BYTE_LEVEL, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }


def _special_ids(metadata: _Metadata) -> list[int]:
    return [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == TokenType.CONTROL]


def _special(content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": content, **flags}


def tokenizer_config(metadata: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json`, with the chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): _special_sorted(tokens[index]) for index in _special_ids(metadata)},
        "additional_special_tokens": [tokens[config["bos_token_id"]], tokens[config["eos_token_id"]]],
        "bos_token": tokens[config["bos_token_id"]],
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[config["eos_token_id"]],
        "model_max_length": config["max_position_embeddings"],
        "pad_token": tokens[config["pad_token_id"]],
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": tokens[metadata.get("tokenizer.ggml.unknown_token_id", config["pad_token_id"])],
        "vocab_size": config["vocab_size"],
    }


def _special_sorted(content: str) -> dict[str, Any]:
    return dict(sorted(_special(content).items()))


def _write_tokenizer(target: Path, metadata: _Metadata, config: dict[str, Any]) -> None:
    text = json.dumps(tokenizer(metadata), indent=2, ensure_ascii=False)
    (target / "tokenizer.json").write_text(text, encoding="utf-8")
    _write_json(target / "tokenizer_config.json", tokenizer_config(metadata, config))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(child.run(convert, sys.argv[1:]))
