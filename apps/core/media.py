"""Files that were made for clients: kept in Django's default storage, given out by signed links that lapse.

With more than one gateway the storage must be one that all of them reach: a shared folder, or an object store.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import timedelta

from django.core import signing
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.utils import timezone

from apps.core.errors import NotFound

LINK_SECONDS = 3600
KEEP = timedelta(hours=24)  # files that are only linked to
SUFFIXES = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "video/mp4": "mp4"}
_SALT = "media-link"
_LINKED = "linked"  # the folder of files that nothing but links leads to


@dataclass(frozen=True, slots=True)
class StoredFile:
    data: bytes
    mime: str


def save(data: bytes, mime: str, folder: str = _LINKED) -> str:
    """Keeps a file, and returns its name. Blocks: call it in a thread."""
    name = f"{folder}/{timezone.now():%Y%m%d}/{secrets.token_hex(16)}.{SUFFIXES[mime]}"
    return str(default_storage.save(name, ContentFile(data)))


def save_raw(data: bytes, folder: str) -> str:
    """Keeps a file of any kind, which no link leads to. Blocks: call it in a thread."""
    return str(default_storage.save(f"{folder}/{secrets.token_hex(16)}", ContentFile(data)))


def load(name: str) -> bytes:
    """Raises FileNotFoundError. Blocks: call it in a thread."""
    with default_storage.open(name) as file:
        return bytes(file.read())


def remove(name: str) -> None:
    default_storage.delete(name)


def token(name: str, mime: str) -> str:
    """What a link carries: it opens this file, for LINK_SECONDS."""
    return signing.dumps([name, mime], salt=_SALT, compress=True)


def opened(link: str) -> StoredFile:
    """The file of a link's token. Raises NotFound for one that lapsed, or is none of ours. Blocks: call it in a thread."""
    try:
        name, mime = signing.loads(link, salt=_SALT, max_age=LINK_SECONDS)
        return StoredFile(load(name), mime)
    except (signing.BadSignature, FileNotFoundError):
        raise NotFound("This link has lapsed, or leads nowhere.") from None


def purge() -> int:
    """Removes linked files that are older than KEEP, by the day in their names. Returns how many."""
    try:
        days, _ = default_storage.listdir(_LINKED)
    except FileNotFoundError:
        return 0
    oldest = f"{timezone.now() - KEEP:%Y%m%d}"
    lapsed = [
        f"{_LINKED}/{day}/{file}" for day in days if day < oldest for file in default_storage.listdir(f"{_LINKED}/{day}")[1]
    ]
    for name in lapsed:
        default_storage.delete(name)
    return len(lapsed)
