"""Picture files as the pixels a vision tower sees. Files are a client's: bounded before they are decoded, and never trusted."""

from __future__ import annotations

import hashlib
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from gpu_daemon.engine.picture import Picture
from gpu_daemon.errors import InvalidPicture

# The site has the same bounds, where clients are told of them.
MAX_SIDE = 16_384
MAX_PIXELS = 33_000_000
MAX_ASPECT = 200
MAX_SCANS = 100  # of a progressive JPEG, each of which goes over the whole picture
_FORMATS = ("PNG", "JPEG", "WEBP")
_SCAN = b"\xff\xda"
Image.MAX_IMAGE_PIXELS = None  # Pillow only warns where ours refuse


def read_picture(data: bytes, processor: Qwen2VLImageProcessorPil, max_pixels: int) -> Picture:
    """At the size the model sees, shrunk to `max_pixels` unless that is 0. Takes up to a second. Raises InvalidPicture."""
    image = _decode(data)
    factor = processor.patch_size * processor.merge_size
    lowest, highest = processor.size["shortest_edge"], processor.size["longest_edge"]
    bounds = {"min_pixels": lowest, "max_pixels": max(lowest, min(highest, max_pixels or highest))}
    height, width = smart_resize(image.height, image.width, factor, **bounds)
    pixels = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    key = hashlib.blake2b(pixels.data, digest_size=16, key=b"%d x %d" % (height, width)).digest()
    return Picture(key, height // factor, width // factor, pixels)


def _decode(data: bytes) -> Image.Image:
    try:
        with Image.open(BytesIO(data), formats=_FORMATS) as image:
            _require_bounds(image, data)
            return _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # noqa: BLE001  Whatever a decoder dies of, it is the file's fault.
        raise InvalidPicture(f"a picture cannot be decoded ({type(error).__name__})") from None


def _require_bounds(image: Image.Image, data: bytes) -> None:
    """By the header alone: nothing is decoded yet. Raises ValueError."""
    long, short = max(image.size), min(image.size)
    if long > MAX_SIDE or long * short > MAX_PIXELS or long > MAX_ASPECT * short:
        raise ValueError("too large, or too long for its width")
    if image.format != "MPO" and getattr(image, "is_animated", False):  # a photo may have other photos behind it
        raise ValueError("animated")
    if image.format in ("JPEG", "MPO") and data.count(_SCAN) > MAX_SCANS:
        raise ValueError("too many scans")


def _rgb(image: Any) -> Image.Image:
    """Three bytes a pixel, what is transparent as it is underneath."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # palettes may be transparent
    converted: Image.Image = image.convert("RGB")
    return converted
