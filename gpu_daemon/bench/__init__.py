"""`python -m gpu_daemon.bench --model NAME`: what this device does with a model at full size, its weights random.

A file for each kind of model.
"""

from __future__ import annotations

import argparse
from importlib import import_module

_KINDS = {
    "smollm2-135m": "text",
    "smollm2-360m": "text",
    "smollm2-1.7b": "text",
    "qwen3-14b": "text",
    "qwen2.5-vl-3b": "vision",
    "kokoro-82m": "speech",
    "sd-turbo": "diffusion",
    "cogvideox-2b": "diffusion",
}


def main(arguments: list[str] | None = None) -> None:
    """Hands over to the model's kind, which has options of its own: `--model NAME --help` lists them."""
    parser = argparse.ArgumentParser(prog="python -m gpu_daemon.bench", description=__doc__, add_help=False)
    parser.add_argument("--model", choices=list(_KINDS), default="smollm2-135m")
    chosen, others = parser.parse_known_args(arguments)
    kind = import_module(f"gpu_daemon.bench.{_KINDS[chosen.model]}")
    kind.main(["--model", chosen.model, *others])
