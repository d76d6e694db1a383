"""Weights from the hub: the files of a pinned revision, each checked against what the hub says of it.

Only safetensors, configs and tokenizers are taken. Code and pickles never are, so a repository without safetensors has
nothing for us. A download that was stopped goes on where it was.
"""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import httpx

from apps.fleet.weights.errors import Report, WeightsError
from apps.fleet.weights.folder import Filling, keep_only
from apps.fleet.weights.manifest import sha256

_TIMEOUT_SECONDS = 10.0
_CHUNK_BYTES = 1 << 20
_WANTED = ("*.json", "*.txt", "*.jinja", "*.model")


@dataclass(frozen=True, slots=True)
class Repository:
    """`weights` are patterns of its safetensors: some repositories hold the same weights several times."""

    name: str
    revision: str
    disk_bytes: int
    weights: tuple[str, ...] = ("*.safetensors",)


_COGVIDEOX_PARTS = ("text_encoder/*.safetensors", "transformer/*.safetensors", "vae/*.safetensors")
_SD_TURBO_PARTS = ("text_encoder/*.fp16.safetensors", "unet/*.fp16.safetensors", "vae/*.fp16.safetensors")
REPOSITORIES = {
    "smollm2-135m": Repository(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac", 300_000_000, ("model.safetensors",)
    ),
    "smollm2-360m": Repository(
        "HuggingFaceTB/SmolLM2-360M-Instruct", "a10cc1512eabd3dde888204e902eca88bddb4951", 800_000_000, ("model.safetensors",)
    ),
    "smollm2-1.7b": Repository(
        "HuggingFaceTB/SmolLM2-1.7B-Instruct", "31b70e2e869a7173562077fd711b654946d38674", 3_500_000_000, ("model.safetensors",)
    ),
    "qwen3-14b": Repository("Qwen/Qwen3-14B", "40c069824f4251a91eefaf281ebe4c544efd3e18", 30_000_000_000),
    "qwen2.5-vl-3b": Repository("Qwen/Qwen2.5-VL-3B-Instruct", "66285546d2b821cf421d4f5eb2576359d3770cd3", 8_000_000_000),
    "sd-turbo": Repository("stabilityai/sd-turbo", "b261bac6fd2cf515557d5d0707481eafa0485ec2", 2_700_000_000, _SD_TURBO_PARTS),
    "cogvideox-2b": Repository(
        "zai-org/CogVideoX-2b", "1137dacfc2c9c012bed6a0793f4ecf2ca8e7ba01", 14_000_000_000, _COGVIDEOX_PARTS
    ),
}


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    """`digest` is the SHA-256 of a large file, and git's SHA-1 of a small one."""

    name: str
    size: int
    digest: str
    is_large: bool

    def is_at(self, path: Path) -> bool:
        if not path.is_file():
            return False
        return self.digest == (sha256(path) if self.is_large else _git_sha1(path.read_bytes()))


def from_hub(repository: Repository) -> Filling:
    def fill(partial: Path, report: Report) -> None:
        download = partial / "download"
        keep_only(partial, download)
        report("asking the hub", 0.0)
        files = _listed(repository)
        _download(repository, files, download, report)
        for number, file in enumerate(files, 1):
            report("checking", number / len(files))
            if not file.is_at(download / file.name):
                (download / file.name).unlink(missing_ok=True)
                raise WeightsError(f"{repository.name}/{file.name} is damaged: its hash is not the hub's; try again")
        for file in files:
            target = partial / file.name.replace(".fp16.", ".")  # a variant's name, which loaders have to be told
            target.parent.mkdir(parents=True, exist_ok=True)
            (download / file.name).rename(target)
        shutil.rmtree(download)

    return Filling(repository.disk_bytes, fill)


def _listed(repository: Repository) -> list[_RemoteFile]:
    """The files of the pinned revision that are wanted. Raises WeightsError when the hub cannot be asked, or has none."""
    from httpx2 import HTTPError  # what the hub's client speaks
    from huggingface_hub import HfApi  # by need: it takes half a second, and most processes that come here never ask

    try:
        info = HfApi().model_info(repository.name, revision=repository.revision, files_metadata=True, timeout=_TIMEOUT_SECONDS)
    except (HTTPError, OSError) as error:
        raise WeightsError(_unreachable(repository, error)) from None
    found = [
        _RemoteFile(
            name=sibling.rfilename,
            size=sibling.size or 0,
            digest=sibling.lfs.sha256 if sibling.lfs else sibling.blob_id or "",
            is_large=bool(sibling.lfs),
        )
        for sibling in info.siblings or ()
    ]
    wanted = _wanted(repository, found)
    if not any(file.name.endswith(".safetensors") for file in wanted):
        raise WeightsError(f"{repository.name} has no safetensors at {repository.revision[:7]}, and nothing else is loaded")
    return wanted


def _wanted(repository: Repository, files: Iterable[_RemoteFile]) -> list[_RemoteFile]:
    """Configs and tokenizers at most one folder deep, and the weights' patterns."""
    shallow = [file for file in files if file.name.count("/") <= 1 and ".." not in file.name.split("/")]
    patterns = (*_WANTED, *repository.weights)
    return [file for file in shallow if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in patterns)]


def _unreachable(repository: Repository, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return (f"the hub cannot be asked for {repository.name} ({reason}); bring the files and use `--from FOLDER`, "
            "or try the architecture with `manage.py models make-tiny`")  # fmt: skip


def _download(repository: Repository, files: list[_RemoteFile], folder: Path, report: Report) -> None:
    """Into `folder`, going on with files that are there in part. Raises WeightsError."""
    total, done = sum(file.size for file in files) or 1, 0
    for file in files:

        def growing(size: int, before: int = done) -> None:
            report("downloading", min(0.99, (before + size) / total))

        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        try:
            _fetch(repository, file, path, growing)
        except httpx.HTTPError as error:
            reason = str(error).splitlines()[:1] or [type(error).__name__]
            raise WeightsError(
                f"cannot download {repository.name}/{file.name}: {reason[0]}; the same command goes on"
            ) from None
        done += file.size


def _fetch(repository: Repository, file: _RemoteFile, path: Path, growing: Callable[[int], None]) -> None:
    """Asks for the rest until it is there, or until a try brings nothing. Raises httpx.HTTPError."""
    from huggingface_hub import get_token, hf_hub_url

    url = hf_hub_url(repository.name, file.name, revision=repository.revision)
    token = get_token()
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
    while (size := path.stat().st_size) < file.size:
        try:
            _fetch_rest(url, headers | {"Range": f"bytes={size}-"}, path, growing)
        except httpx.TransportError:
            if path.stat().st_size == size:
                raise


def _fetch_rest(url: str, headers: dict[str, str], path: Path, growing: Callable[[int], None]) -> None:
    """Appends what the server sends, or begins anew when it sends the whole."""
    with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_SECONDS) as response:
        response.raise_for_status()
        with path.open("ab" if response.status_code == httpx.codes.PARTIAL_CONTENT else "wb") as part:
            for chunk in response.iter_raw(_CHUNK_BYTES):
                part.write(chunk)
                growing(part.tell())


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
