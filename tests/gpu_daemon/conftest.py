"""Checkpoints to run: a tiny seeded one of each architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as bpe
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gpu_daemon.runners.torch_runner import RunnerOptions, TorchRunner, set_threads

_SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
_IDS = {"eos_token_id": 0, "bos_token_id": 1, "pad_token_id": 0}
_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1],
    "initializer_range": 0.2,
}


def _llama() -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, **_IDS, tie_word_embeddings=True))


def _qwen3() -> transformers.PreTrainedModel:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_SIZES, **_IDS, head_dim=32, tie_word_embeddings=False))


def _qwen2_5_vl() -> transformers.PreTrainedModel:
    """Multimodal rope, biases, and a tower that sees windows and the whole in turn."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {**_SIZES, **_IDS, "rope_parameters": rope}
    ids = {**_IDS, "image_token_id": 299, "video_token_id": 298, "vision_start_token_id": 297}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=_VISION, **ids, tie_word_embeddings=False)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


TINY = {"llama": _llama, "qwen3": _qwen3, "qwen2_5_vl": _qwen2_5_vl}


def make_tiny(folder: Path, kind: str) -> Path:
    """A seeded checkpoint: real classes, few weights."""
    torch.manual_seed(3)
    model = TINY[kind]()
    for parameter in model.parameters():  # vectors too: a bias or a norm left at its start would test nothing
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    if hasattr(model.config, "vision_config"):
        Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=1_003_520).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["architectures"] == [type(model).__name__]
    return folder


def make_tokenizer(folder: Path) -> None:
    """A token a byte."""
    alphabet = ["<eos>", "<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(bpe.BPE(vocab={character: place for place, character in enumerate(alphabet)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<bos>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def make_runner(folder: Path, **options) -> TorchRunner:
    set_threads(1)  # other tests want the other cores, and threads that wait for each other lose more than they gain
    defaults = {"device": "cpu", "max_model_len": 512, "kv_bytes": 2**28, "threads": 1}
    return TorchRunner.load(folder, RunnerOptions(**{**defaults, **options}), lambda *_: None)


@pytest.fixture(scope="session", params=sorted(TINY))
def tiny_folder(request, tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / request.param, request.param)
