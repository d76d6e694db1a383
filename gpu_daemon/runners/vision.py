"""A vision-language model's eyes: its own vision tower, and the embeddings of what it saw lately."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gpu_daemon.engine.picture import Picture
from gpu_daemon.errors import LoadFailed
from gpu_daemon.limits import SEEN_TOKENS
from gpu_daemon.runners.pictures import read_picture
from gpu_daemon.runners.pretrained import settle


class Vision:
    """`read` may be called by any thread, `look` by the engine's alone."""

    def __init__(self, model: Any, processor: Qwen2VLImageProcessorPil) -> None:
        """Keeps the tower of `model`; on a CPU in float32, as everything is computed there."""
        tower = model.model.visual
        self._tower = settle(tower.float(), tower.device) if tower.device.type == "cpu" else tower
        self._processor = processor
        self._mean, self._deviation = (
            torch.tensor(values, device=tower.device) for values in (processor.image_mean, processor.image_std)
        )
        self._seen: OrderedDict[bytes, Tensor] = OrderedDict()  # least recently looked at first
        self.pad_id = int(model.config.image_token_id)

    def read(self, data: bytes, max_pixels: int) -> Picture:
        """Raises InvalidPicture."""
        return read_picture(data, self._processor, max_pixels)

    def look(self, picture: Picture) -> Tensor:
        """The embeddings of its tokens, [tokens, hidden]."""
        found = self._seen.pop(picture.key, None)
        found = self._embed(picture) if found is None else found
        self._seen[picture.key] = found
        while len(self._seen) > 1 and sum(map(len, self._seen.values())) > SEEN_TOKENS:
            self._seen.popitem(last=False)
        return found

    def warm(self) -> None:
        """Looks at something, so that the first picture does not wait for what only the first waits for."""
        self._embed(self._blank(8, 8))

    def stress(self, tokens: int) -> None:
        """Looks at as large a picture as there can be in a sequence, while as much is remembered as ever is."""
        processor = self._processor
        side = processor.patch_size * processor.merge_size
        tokens = min(tokens, processor.size["longest_edge"] // side**2)
        rows = math.isqrt(tokens)
        blank = self._blank(rows, tokens // rows)
        width = self._embed(self._blank(2, 2)).shape[-1]
        self._seen[b""] = torch.ones(SEEN_TOKENS, width, dtype=self._tower.dtype, device=self._tower.device)
        self._embed(blank)
        del self._seen[b""]

    def _blank(self, rows: int, columns: int) -> Picture:
        side = self._processor.patch_size * self._processor.merge_size
        return Picture(b"", rows, columns, np.zeros((rows * side, columns * side, 3), np.uint8))

    @torch.inference_mode()
    def _embed(self, picture: Picture) -> Tensor:
        merge = self._processor.merge_size
        grid = torch.tensor([[1, picture.rows * merge, picture.columns * merge]], device=self._tower.device)
        embedding: Tensor = self._tower(self._patches(picture.pixels).to(self._tower.dtype), grid_thw=grid).pooler_output
        return embedding

    def _patches(self, pixels: np.ndarray) -> Tensor:
        """[patches, 3 * frames * patch * patch], as the model's processor makes them, but on the device and from bytes: an
        eighth of the memory while a picture waits. Patches that will be merged stand together; a picture is a film that stands
        still."""
        processor = self._processor
        patch, merge = processor.patch_size, processor.merge_size
        values = torch.from_numpy(pixels).to(self._tower.device).float() * (1 / 255)
        values = ((values - self._mean) / self._deviation).permute(2, 0, 1)
        down, across = (size // (merge * patch) for size in values.shape[1:])
        blocks = values.reshape(3, down, merge, patch, across, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
        film = blocks[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, processor.temporal_patch_size, -1, -1)
        return film.reshape(down * across * merge * merge, -1)


def read_processor(folder: Path) -> Qwen2VLImageProcessorPil:
    """What the model's folder says of sizes and colours. Raises LoadFailed."""
    try:
        return Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError):
        raise LoadFailed(f"{folder.name}: preprocessor_config.json is missing or damaged") from None
