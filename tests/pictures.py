"""Picture files for tests: seeded noise in every format, and files that no client should get decoded."""

from __future__ import annotations

import base64
import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image


def picture(width: int = 56, height: int = 56, *, seed: int = 0, form: str = "PNG", **options) -> bytes:
    """Blocks of colours, so that no resizing makes two seeds alike."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
    return saved(image, form, **options)


def saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def frames(count: int, form: str) -> bytes:
    images = [Image.fromarray(np.full((32, 32, 3), 40 * i, np.uint8)) for i in range(count)]
    return saved(images[0], form, save_all=True, append_images=images[1:])


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    """One that says it is of a size, with next to nothing in it; `more` chunks come before its data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + data + chunk(b"IEND", b"")


def webp(width: int, height: int, *, animated: bool = False) -> bytes:
    """The extended header of one, with next to nothing behind it."""
    flags = 2 if animated else 0
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<IB3x", 10, flags) + size + b"ANMF" + struct.pack("<I", 0)
    return b"RIFF" + struct.pack("<I", len(body)) + body


TRUNCATED = picture(600, 400)[:-400]
BOMBS = {
    "10,000 x 10,000": png(10_000, 10_000),
    "a line": png(16_000, 10),
    "beyond any side": png(20_000, 100),
    "a million frames": png(64, 64, chunk(b"acTL", struct.pack(">II", 1_000_000, 0))),
    "moving WebP": frames(3, "WEBP"),
    "wide WebP": webp(16_383, 16_383),
    "many scans": picture(form="JPEG", progressive=True).replace(b"\xff\xda", b"\xff\xda" * 200, 1),
    "GIF": picture(form="GIF"),
    "nothing": b"",
    "no picture": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "truncated": TRUNCATED,
}
