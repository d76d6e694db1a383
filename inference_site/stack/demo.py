"""Which models `manage.py up` brings, and where their weights come from: a package's real ones, or tiny ones made here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from apps.fleet.weights import PACKAGES, RECIPES, Report, WeightsError, is_here, is_tiny, make_tiny, pull
from inference_site.stack.errors import StackError

MODEL = "smollm2-135m"  # always there: it answers the first question


def demo_models(setting: str) -> tuple[str, ...]:
    """The models that `DEMO_MODELS` names, the first answer's first. Raises StackError for one that cannot be had here."""
    known = [*PACKAGES, *(name for name in RECIPES if name not in PACKAGES)]
    wanted = known if setting.strip() == "all" else [name.strip() for name in setting.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in known]:
        raise StackError(
            f"DEMO_MODELS names {unknown[0]}, which has neither a package nor a recipe; known are {', '.join(known)}"
        )
    return tuple(dict.fromkeys([MODEL, *wanted]))


def bring(models: tuple[str, ...], models_dir: Path, say: Callable[[str], None], report: Report) -> None:
    """Has the weights of each model there. Raises StackError without the first; what else cannot be fetched is said."""
    for model in models:

        def of_model(stage: str, progress: float, model: str = model) -> None:
            report(f"{model}: {stage}", progress)

        try:
            _bring(model, models_dir, say, of_model)
        except WeightsError as error:
            if model == MODEL:
                raise StackError(str(error)) from None
            say(str(error))


def _bring(model: str, models_dir: Path, say: Callable[[str], None], report: Report) -> None:
    """Real weights that are here stay; a package that cannot be fetched gives way to a tiny checkpoint, where there is one."""
    if model in PACKAGES:
        try:
            pull(model, models_dir, report)
        except WeightsError as error:
            if model not in RECIPES:
                raise
            say(f"{error}; a tiny {model} stands in for it")
    folder = models_dir / model
    if not is_here(folder) or is_tiny(folder):
        make_tiny(model, models_dir, report)
