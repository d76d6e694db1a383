"""Tiny diffusion pipelines: each part of its real class, saved by the pipeline's own means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import transformers

from gpu_daemon.runners.tiny.tokenizers import clip_tokenizer, t5_tokenizer

_TOKENIZERS = {"CLIPTokenizer": clip_tokenizer, "T5Tokenizer": t5_tokenizer}
_ABSENT = {"StableDiffusionPipeline": ("safety_checker", "feature_extractor", "image_encoder")}


def make_diffusion(recipe: dict[str, Any], target: Path) -> int:
    """Writes `target` and returns the number of parameters."""
    parts = {name: _part(**part) for name, part in recipe["components"].items()}
    tokenizer = _TOKENIZERS[recipe["tokenizer"]["class"]](recipe["tokenizer"])
    absent = dict.fromkeys(_ABSENT.get(recipe["pipeline"], ()))
    pipeline = getattr(diffusers, recipe["pipeline"])(**parts, **absent, tokenizer=tokenizer)
    pipeline.save_pretrained(target, safe_serialization=True)
    return sum(part.num_parameters() for part in parts.values() if hasattr(part, "num_parameters"))


def _part(**described: Any) -> Any:
    """A model or a scheduler of `library.class`, as it starts."""
    if described["library"] == "diffusers":
        return getattr(diffusers, described["class"]).from_config(described["config"])
    part_class = getattr(transformers, described["class"])
    return part_class(part_class.config_class(**described["config"]))
