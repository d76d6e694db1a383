"""Tiny language and vision-language models, with byte-level tokenizers that know the real special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from gpu_daemon.runners.tiny.tokenizers import write_byte_tokenizer


def make_language(recipe: dict[str, Any], target: Path) -> int:
    """Writes `target` and returns the number of parameters."""
    model_class = getattr(transformers, recipe["architecture"])
    model = model_class(model_class.config_class(**recipe["config"]))
    _vary_vectors(model)
    model.generation_config = transformers.GenerationConfig(**recipe["generation_config"])
    model.save_pretrained(target)
    write_byte_tokenizer(recipe["tokenizer"], recipe["chat_template"], target)
    if "preprocessor_config" in recipe:
        (target / "preprocessor_config.json").write_text(json.dumps(recipe["preprocessor_config"], indent=2) + "\n")
    return int(model.num_parameters())


@torch.no_grad()
def _vary_vectors(model: torch.nn.Module) -> None:
    """Norms and biases start at one and zero, where leaving them out would go unnoticed."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.empty_like(parameter).uniform_(-0.25, 0.25))
