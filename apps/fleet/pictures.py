"""How many tokens a picture is to a model: known from its size alone, so that it is priced before anything is decoded."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PictureSizes:
    """A model sees squares of `factor` pixels, a token each, of pictures with `min_pixels` to `max_pixels`."""

    min_pixels: int = 56 * 56
    max_pixels: int = 12_845_056
    factor: int = 28

    def tokens(self, width: int, height: int, bound: int = 0) -> int:
        """Of a picture of this size, shrunk to `bound` pixels unless that is 0. Sides go to the nearest multiple of the factor;
        where that is too much or too little, the picture is scaled first, and sides go down or up."""
        most = max(self.min_pixels, min(self.max_pixels, bound or self.max_pixels))
        across, down = round(width / self.factor), round(height / self.factor)
        pixels = across * down * self.factor**2
        if pixels > most:
            shrink = math.sqrt(width * height / most)
            across, down = (max(1, math.floor(side / shrink / self.factor)) for side in (width, height))
        elif pixels < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (width * height))
            across, down = (math.ceil(side * grow / self.factor) for side in (width, height))
        return across * down


def picture_sizes(folder: Path) -> PictureSizes:
    """Of the model in a folder. Raises OSError, ValueError or KeyError when its file is missing or damaged."""
    config = json.loads((folder / "preprocessor_config.json").read_text())
    edges = config.get("size") or {}
    return PictureSizes(
        min_pixels=int(config.get("min_pixels") or edges["shortest_edge"]),
        max_pixels=int(config.get("max_pixels") or edges["longest_edge"]),
        factor=int(config["patch_size"]) * int(config["merge_size"]),
    )
