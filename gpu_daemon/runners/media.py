"""Pixels become files, in memory: PNG and JPEG with Pillow, MP4 (H.264) with PyAV."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

Pixels = npt.NDArray[np.uint8]  # [height, width, 3]
# With its macroblock tree, x264 makes other bytes of the same frames from run to run.
_ENCODER = {"preset": "veryfast", "crf": "18", "x264-params": "mbtree=0"}
_ENCODER_THREADS = 2
_HEADER_BYTES = 2048
_HEADER_BYTES_PER_FRAME = 64


def to_pixels(sample: torch.Tensor) -> Pixels:
    """[..., 3, height, width] from -1 to 1, as decoded, to [..., height, width, 3] in the host's memory."""
    bytes_ = (sample.float() / 2 + 0.5).nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    pixels: Pixels = bytes_.movedim(-3, -1).contiguous().cpu().numpy()
    return pixels


def png(pixels: Pixels) -> bytes:
    """Packed fast: a second spent here is one without denoising."""
    return _save(pixels, "PNG", compress_level=1)


def jpeg(pixels: Pixels) -> bytes:
    return _save(pixels, "JPEG", quality=80)


def _save(pixels: Pixels, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


class Mp4:
    """A video that grows frame by frame. Its index comes first, so that it plays while it is fetched."""

    def __init__(self, width: int, height: int, frames: int, fps: int) -> None:
        self._file = io.BytesIO()
        # `faststart` would read the written file again, by a name that memory does not have; room kept ahead does without.
        room = str(_HEADER_BYTES + _HEADER_BYTES_PER_FRAME * frames)
        self._container = av.open(self._file, "w", format="mp4", options={"moov_size": room})
        self._stream = self._container.add_stream("libx264", rate=fps, options=_ENCODER)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._stream.codec_context.thread_count = _ENCODER_THREADS

    def add(self, frames: Iterable[Pixels]) -> None:
        for pixels in frames:
            self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))

    def finish(self) -> bytes:
        """The whole file."""
        self._container.mux(self._stream.encode())
        self.close()
        return self._file.getvalue()

    def close(self) -> None:
        """Lets the encoder go, finished or not."""
        self._container.close()
