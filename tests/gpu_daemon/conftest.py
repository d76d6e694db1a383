"""Checkpoints to run: a tiny seeded one of each architecture, and the real SmolLM2-135M."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers

from apps.fleet.weights import pull
from gpu_daemon.runners.torch_runner import TorchRunner, set_threads

TINY = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 32}),
}


def make_tiny(folder: Path, kind: str) -> Path:
    """A seeded checkpoint: real classes, few weights."""
    config_class, model_class, extra = TINY[kind]
    torch.manual_seed(3)
    config = config_class(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=0, bos_token_id=1, pad_token_id=0,
        tie_word_embeddings=kind == "llama", initializer_range=0.2, **extra,
    )  # fmt: skip
    model_class(config).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["architectures"] == [model_class.__name__]
    return folder


def make_runner(folder: Path, **options) -> TorchRunner:
    set_threads(2)
    defaults = {"device": "cpu", "max_sequences": 8, "max_model_len": 512, "kv_bytes": 0, "report": lambda *_: None}
    return TorchRunner(folder, **{**defaults, **options})


@pytest.fixture(scope="session", params=sorted(TINY))
def tiny_folder(request, tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / request.param, request.param)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    models = Path(os.environ["MODELS_DIR"])
    pull("smollm2-135m", models, lambda *_: None)
    return models / "smollm2-135m"
