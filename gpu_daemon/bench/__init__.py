"""`python -m gpu_daemon.bench --model NAME`: what this device does with a model at full size, its weights random.

A file for each kind of model.
"""

from __future__ import annotations

import argparse
from importlib import import_module

_KINDS = {"sd-turbo": "diffusion", "cogvideox-2b": "diffusion"}  # every other model is one of text
_DEFAULT = "smollm2-135m"


def main(arguments: list[str] | None = None) -> None:
    """Hands over to the model's kind, which has options of its own: `--model NAME --help` lists them."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", default=_DEFAULT)
    chosen, others = parser.parse_known_args(arguments)
    kind = import_module(f"gpu_daemon.bench.{_KINDS.get(chosen.model, 'text')}")
    kind.main(["--model", chosen.model, *others])
