"""`python -m gpu_daemon.runners.tiny RECIPE.json TARGET SEED` writes the checkpoint that a recipe describes.

The same recipe and seed give the same bytes. A mark beside the weights says that they are no model's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from gpu_daemon import child

MARK = "tiny.json"
Recipe = dict[str, Any]


def make(recipe: Recipe, target: Path, seed: int) -> int:
    """Writes `target` and returns the number of parameters."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    parameters = _maker(recipe["kind"])(recipe, target)
    mark = {"tiny": True, "seed": seed, "parameters": parameters}
    (target / MARK).write_text(json.dumps(mark, indent=2) + "\n")
    return parameters


def _maker(kind: str) -> Callable[[Recipe, Path], int]:
    """Imported by need: each brings a large library."""
    if kind == "language":
        from gpu_daemon.runners.tiny.language import make_language

        return make_language
    if kind == "speech":
        from gpu_daemon.runners.tiny.speech import make_speech

        return make_speech
    if kind == "diffusion":
        from gpu_daemon.runners.tiny.diffusion import make_diffusion

        return make_diffusion
    raise child.UnsupportedFile(f"a recipe of the kind {kind!r} is not known")


def main(arguments: list[str]) -> int:
    seed = int(arguments.pop()) if len(arguments) == 3 else 0

    def work(source: Path, target: Path) -> Iterator[tuple[str, float]]:
        yield "building", 0.0
        target.mkdir(parents=True, exist_ok=True)
        make(json.loads(source.read_text()), target, seed)
        yield "done", 1.0

    return child.run(work, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
