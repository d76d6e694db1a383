"""Tiny checkpoints: a model's architecture with a few seeded weights, made here, for what no weights are at hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from apps.fleet.weights import child
from apps.fleet.weights.errors import Report, WeightsError
from apps.fleet.weights.folder import TINY_MARK, Filling, install, is_here, is_tiny, model_folder

_RECIPES = Path(__file__).resolve().parents[3] / "fixtures" / "tiny"
_DISK_BYTES = 100_000_000
RECIPES = {path.stem: path for path in sorted(_RECIPES.glob("*.json"))}


def make_tiny(model: str, models_dir: Path, report: Report, *, seed: int = 0) -> None:
    """Makes `models_dir/model` a tiny checkpoint of that seed, or raises WeightsError: real weights never give way to it."""
    folder = model_folder(model, models_dir)
    recipe = RECIPES.get(model)
    if recipe is None:
        raise WeightsError(f"there is no recipe for a tiny {model} (only for {', '.join(RECIPES)})")
    if is_here(folder) and not is_tiny(folder):
        raise WeightsError(f"{model} has weights already; remove {folder} to have a tiny checkpoint in their place")

    def fill(partial: Path, report: Report) -> None:
        shutil.rmtree(partial)
        reason = child.run_module(
            "gpu_daemon.runners.tiny", str(recipe), str(partial), str(seed), verb="making a tiny one", report=report
        )
        if reason is not None:
            raise WeightsError(reason or f"a tiny {model} could not be made")

    install(folder, Filling(_DISK_BYTES, fill), report, keep=lambda: is_tiny(folder) and _seed(folder) == seed)


def _seed(folder: Path) -> int | None:
    try:
        seed = json.loads((folder / TINY_MARK).read_text())["seed"]
    except (ValueError, KeyError, TypeError):
        return None
    return seed if isinstance(seed, int) else None
