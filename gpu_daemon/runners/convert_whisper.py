"""Turns OpenAI's Whisper checkpoint and word list into the folder that transformers' Whisper loads.

`python -m gpu_daemon.runners.convert_whisper SRC_DIR DST_DIR` (see child.py). SRC_DIR holds one `*.pt`, of which only tensors
are unpickled, and the `gpt2.tiktoken` that English-only checkpoints speak.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from gpu_daemon import child
from gpu_daemon.child import UnsupportedFile
from gpu_daemon.runners.tiny.tokenizers import byte_symbols

_ENGLISH_VOCABULARY = 51_864
_TIMESTAMPS = 1_501  # 0.00 s to 30.00 s
# The parts of a module's name there, and here; the longer of two that begin alike comes first.
_RENAMED = (
    (r"\bblocks\b", "layers"),
    (r"\bcross_attn_ln\b", "encoder_attn_layer_norm"),
    (r"\bcross_attn\b", "encoder_attn"),
    (r"\battn_ln\b", "self_attn_layer_norm"),
    (r"\battn\b", "self_attn"),
    (r"\bmlp_ln\b", "final_layer_norm"),
    (r"\bmlp\.0\b", "fc1"),
    (r"\bmlp\.2\b", "fc2"),
    (r"\bquery\b", "q_proj"),
    (r"\bkey\b", "k_proj"),
    (r"\bvalue\b", "v_proj"),
    (r"\bout\b", "out_proj"),
    (r"\bln_post\b", "layer_norm"),
    (r"^decoder\.ln\b", "decoder.layer_norm"),
    (r"\btoken_embedding\b", "embed_tokens"),
    (r"\bpositional_embedding$", "embed_positions.weight"),
)
# What is written down about sounds rather than said: never transcribed. Notes are several tokens, of which the first tells.
_UNSPOKEN = (*'"#()*+/:;<=>@[\\]^_`{|}~「」『』', "<<", ">>", "<<<", ">>>", "--", "---", "-(", "-[", "('", '("', "((", "))",
             "(((", ")))", "[[", "]]", "{{", "}}", "♪♪", "♪♪♪")  # fmt: skip
_NOTES = tuple("♩♪♫♬♭♮♯")


def convert(source: Path, target: Path) -> Iterator[tuple[str, float]]:
    """Writes `target`, yielding (stage, progress in that stage). Raises UnsupportedFile, OSError or ValueError."""
    yield "reading", 0.0
    target.mkdir(parents=True, exist_ok=True)
    dims, state = _checkpoint(next(source.glob("*.pt")))
    if dims["n_vocab"] != _ENGLISH_VOCABULARY:
        raise UnsupportedFile("only English-only checkpoints are converted")
    yield "tokenizer", 0.0
    ids = _write_tokenizer((source / "gpt2.tiktoken").read_bytes(), target, dims["n_text_ctx"])
    yield "tensors", 0.0
    model = WhisperForConditionalGeneration(_config(dims, ids))
    found = model.load_state_dict({model_name(name): tensor.float() for name, tensor in state.items()}, strict=False)
    if found.unexpected_keys or found.missing_keys not in ([], ["proj_out.weight"]):  # the latter is the embedding
        raise UnsupportedFile("the tensors are not those of a Whisper model")
    yield "writing", 0.0
    model.tie_weights()
    model.generation_config = _generation(ids, target, dims["n_text_ctx"])
    model.save_pretrained(target)
    WhisperFeatureExtractor(feature_size=dims["n_mels"]).save_pretrained(target)
    yield "done", 1.0


def model_name(name: str) -> str:
    """`decoder.blocks.0.cross_attn.query.weight` -> `model.decoder.layers.0.encoder_attn.q_proj.weight`."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return f"model.{name}"


def _checkpoint(path: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        return loaded["dims"], loaded["model_state_dict"]
    except (RuntimeError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise UnsupportedFile(f"{path.name} is not a Whisper checkpoint ({type(error).__name__})") from None


def _config(dims: dict[str, int], ids: dict[str, int]) -> WhisperConfig:
    return WhisperConfig(
        vocab_size=dims["n_vocab"],
        num_mel_bins=dims["n_mels"],
        d_model=dims["n_audio_state"],
        encoder_layers=dims["n_audio_layer"],
        encoder_attention_heads=dims["n_audio_head"],
        encoder_ffn_dim=4 * dims["n_audio_state"],
        decoder_layers=dims["n_text_layer"],
        decoder_attention_heads=dims["n_text_head"],
        decoder_ffn_dim=4 * dims["n_text_state"],
        max_source_positions=dims["n_audio_ctx"],
        max_target_positions=dims["n_text_ctx"],
        bos_token_id=ids["<|startoftranscript|>"],
        decoder_start_token_id=ids["<|startoftranscript|>"],
        eos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
    )


# --- The tokenizer ---


def _write_tokenizer(words: bytes, target: Path, length: int) -> dict[str, int]:
    """`tokenizer.json` and `tokenizer_config.json`; returns the ids of the special tokens."""
    ranks = {base64.b64decode(word): int(rank) for word, rank in (line.split() for line in words.splitlines())}
    specials = _special_tokens()
    ids = {token: len(ranks) + number for number, token in enumerate(specials)}
    spell = _spelling()
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    start = ["<|startoftranscript|>", "<|notimestamps|>"]
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": ids[token], "content": token, **flags, "special": not _is_timestamp(token)} for token in specials
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {spell(word): rank for word, rank in ranks.items()} | ids,
                  "merges": [[spell(part) for part in pair] for pair in _merges(ranks)]},
    }  # fmt: skip
    (target / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    end = "<|endoftext|>"
    config = {"tokenizer_class": "WhisperTokenizer", "model_max_length": length, "add_prefix_space": False, "errors": "replace",
              "bos_token": end, "eos_token": end, "unk_token": end, "pad_token": end,
              "additional_special_tokens": [end, *start]}  # fmt: skip
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return ids


def _special_tokens() -> list[str]:
    """In the order of their ids, which begin where the words end."""
    languages = [f"<|{code}|>" for code in list(LANGUAGES)[:99]]  # the hundredth came with a later vocabulary
    tasks = [f"<|{name}|>" for name in ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")]
    return ["<|endoftext|>", "<|startoftranscript|>", *languages, *tasks, *(f"<|{n * 0.02:.2f}|>" for n in range(_TIMESTAMPS))]


def _is_timestamp(token: str) -> bool:
    return token[2:3].isdigit()


def _spelling() -> Any:
    """How byte-level vocabularies write bytes: printable ones as themselves, the others from U+0100 on."""
    symbols = byte_symbols()
    printable = [symbol for symbol in symbols if ord(symbol) < 0x100]
    others = iter(symbols[len(printable) :])
    of_byte = {ord(symbol): symbol for symbol in printable}
    table = [of_byte.get(byte) or next(others) for byte in range(256)]
    return lambda word: "".join(table[byte] for byte in word)


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The two parts that each word is made of, in the order in which they merge."""
    for word, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(word) > 1:
            left, right = _parts(ranks, word, rank)
            yield left, right


def _parts(ranks: dict[bytes, int], word: bytes, limit: int) -> list[bytes]:
    """What is left of a word when all merges before `limit` are made."""
    parts = [bytes([byte]) for byte in word]
    while len(parts) > 2:
        merged = [ranks.get(left + right, limit) for left, right in itertools.pairwise(parts)]
        best = min(range(len(merged)), key=merged.__getitem__)
        if merged[best] >= limit:
            raise UnsupportedFile("the word list is damaged")
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


# --- What is generated ---


def _generation(ids: dict[str, int], folder: Path, length: int) -> GenerationConfig:
    start = ids["<|startoftranscript|>"]
    return GenerationConfig(
        bos_token_id=start,
        decoder_start_token_id=start,
        eos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        no_timestamps_token_id=ids["<|notimestamps|>"],
        max_initial_timestamp_index=50,
        max_length=length,
        is_multilingual=False,
        return_timestamps=False,
        suppress_tokens=_suppressed(ids, folder),
        begin_suppress_tokens=[_encode(folder)(" ")[0], ids["<|endoftext|>"]],
    )


def _suppressed(ids: dict[str, int], folder: Path) -> list[int]:
    encode = _encode(folder)
    found = {encode(" -")[0], encode(" '")[0]}  # as a word's beginning only
    for symbol in (*_UNSPOKEN, *_NOTES):
        for tokens in (encode(symbol), encode(f" {symbol}")):
            if len(tokens) == 1 or symbol in _NOTES:
                found.add(tokens[0])
    tasks = ("startoftranscript", "translate", "transcribe", "startoflm", "startofprev", "nospeech")
    return sorted(found | {ids[f"<|{task}|>"] for task in tasks})


def _encode(folder: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


if __name__ == "__main__":
    sys.exit(child.run(convert, sys.argv[1:]))
