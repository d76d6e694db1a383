"""Images in a chat, as they come in data URLs: bounded and measured by their headers alone, never fetched and never decoded."""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO

from django.conf import settings
from PIL import Image

from apps.api.messages import ImageUrl, Message
from apps.core.errors import InvalidRequest

# A daemon has the same bounds, where images are decoded.
MAX_SIDE = 16_384
MAX_PIXELS = 33_000_000
MAX_ASPECT = 200
MAX_SCANS = 100  # of a progressive JPEG, each of which goes over the whole picture
LOW_PIXELS = 512 * 512  # what `detail: low` shrinks an image to
_DATA_URL = re.compile(r"data:image/(?:png|jpeg|jpg|webp);base64,", re.IGNORECASE)
_SCAN = b"\xff\xda"
Image.MAX_IMAGE_PIXELS = None  # it only warns where ours refuse


@dataclass(frozen=True, slots=True)
class Picture:
    """A file as the client sent it. `bound` is the most pixels that the model is to see of it; 0 is the model's own bound."""

    data: bytes
    width: int
    height: int
    bound: int


class BadPicture(InvalidRequest):
    """One that cannot be read, or is of no kind that is read here. The text never is a decoder's."""

    code = "invalid_image"


def found(messages: Sequence[Message]) -> Iterator[tuple[str, ImageUrl]]:
    """Every image, with its place in the body."""
    for place, message in enumerate(messages):
        for number, image in message.images:
            yield f"messages[{place}].content[{number}].image_url", image


def read_all(messages: Sequence[Message]) -> list[Picture]:
    """Every image, in order. Raises InvalidRequest that names the first which is refused."""
    urls = list(found(messages))
    most, whole = settings.ENV.max_images, settings.ENV.max_images_bytes
    if len(urls) > most:
        raise InvalidRequest(f"A request has {most} images at the most.", code="too_many_images", param=urls[most][0])
    left, images = whole, []
    for param, url in urls:
        images.append(_read(url, param))
        left -= len(images[-1].data)
        if left < 0:
            message = f"{param}: the images of a request are {whole} bytes together at the most."
            raise InvalidRequest(message, code="image_too_large", param=param)
    return images


def _read(image: ImageUrl, param: str) -> Picture:
    data = _bytes(image.url, param)
    try:
        width, height = _webp_size(data) if data[8:12] == b"WEBP" else _size(data)
    except Exception as error:  # noqa: BLE001  Whatever a parser dies of, it is the file's fault.
        reason = str(error) if isinstance(error, _Reason) else "is damaged, or no PNG, JPEG or WebP"
        raise BadPicture(f"{param}: {reason}.", param=param) from None
    return Picture(data, width, height, LOW_PIXELS if image.detail == "low" else 0)


def _bytes(url: str, param: str) -> bytes:
    head = _DATA_URL.match(url)
    if head is None:
        message = f"{param}: send the image itself, as data:image/png;base64,... (or jpeg, webp). No address is fetched."
        raise InvalidRequest(message, code="invalid_image_url", param=param)
    most = settings.ENV.max_image_bytes
    if (len(url) - head.end()) * 3 // 4 > most + 2:
        raise InvalidRequest(f"{param}: an image is {most} bytes at the most.", code="image_too_large", param=param)
    try:
        return binascii.a2b_base64(url[head.end() :], strict_mode=True)
    except ValueError:
        raise BadPicture(f"{param}: is not base64.", param=param) from None


class _Reason(Exception):
    """What a client is told."""


def _size(data: bytes) -> tuple[int, int]:
    """Of a PNG or a JPEG. Opening one reads its header; verifying a PNG checks that all of it is there."""
    with Image.open(BytesIO(data), formats=("PNG", "JPEG")) as image:
        size = _within_bounds(*image.size, animated=image.format == "PNG" and getattr(image, "is_animated", False))
        if image.format == "PNG":
            image.verify()
        elif data.count(_SCAN) > MAX_SCANS:
            raise _Reason("has too many scans")
        return size


def _webp_size(data: bytes) -> tuple[int, int]:
    """Of a WebP, by the three kinds of header it may have: Pillow sets a canvas up as it opens one."""
    if data[:4] != b"RIFF" or len(data) < max(30, _number(data, 4, 4) + 8):
        raise ValueError("cut short")
    kind = data[12:16]
    if kind == b"VP8X":
        return _within_bounds(_number(data, 24, 3) + 1, _number(data, 27, 3) + 1, animated=bool(data[20] & 2))
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = _number(data, 21, 4)
        return _within_bounds((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        return _within_bounds(_number(data, 26, 2) & 0x3FFF, _number(data, 28, 2) & 0x3FFF)
    raise ValueError("no WebP")


def _number(data: bytes, start: int, size: int) -> int:
    return int.from_bytes(data[start : start + size], "little")


def _within_bounds(width: int, height: int, *, animated: bool = False) -> tuple[int, int]:
    long, short = max(width, height), min(width, height)
    if short < 1:
        raise ValueError("empty")
    if animated:
        raise _Reason("is animated: send one picture of it")
    if long > MAX_SIDE or long * short > MAX_PIXELS:
        raise _Reason(f"is {width} x {height}: an image has {MAX_PIXELS} pixels at the most, and {MAX_SIDE} on a side")
    if long > MAX_ASPECT * short:
        raise _Reason(f"is {width} x {height}: one side is {MAX_ASPECT} times the other at the most")
    return width, height
