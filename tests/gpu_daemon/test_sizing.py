"""Estimates against what loading and the largest step are then measured to take, and folders that are not whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gpu_daemon.errors import LoadFailed
from gpu_daemon.folders import Folders
from gpu_daemon.runners.tiny.__main__ import make
from gpu_daemon.runners.torch_runner import RunnerOptions, TorchRunner
from gpu_daemon.sizing import Conditions, estimate
from tests.gpu_daemon import conftest
from tests.gpu_daemon.conftest import TINY, make_tiny
from tests.gpu_daemon.peak import LENGTH, SAMPLES, measured_peak
from tests.services import ROOT

LARGER = {
    "vocab_size": 12_000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip
LARGER_VISION = {"depth": 4, "hidden_size": 320, "intermediate_size": 860, "num_heads": 4, "out_hidden_size": 512}
KV_BYTES = 2**26


def make_larger(folder: Path, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Large enough that what the process needs itself does not count."""
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8} if kind == "qwen2_5_vl" else {}  # as its rope has sections
    monkeypatch.setattr(conftest, "_SIZES", LARGER | heads | {"initializer_range": 0.02})
    monkeypatch.setattr(conftest, "_VISION", conftest._VISION | LARGER_VISION)
    torch.manual_seed(0)
    model = TINY[kind]()
    model.to(dtype).save_pretrained(folder)
    if kind == "qwen2_5_vl":
        Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=1_003_520).save_pretrained(folder)
    return folder


TEXT = Conditions(cuda=False, length=LENGTH, rows=LENGTH, samples=SAMPLES)


KINDS = [*((kind, torch.bfloat16) for kind in sorted(TINY)), ("llama", torch.float32)]


@pytest.mark.parametrize(("kind", "dtype"), KINDS, ids=[f"{kind}-{dtype.itemsize * 8} bits" for kind, dtype in KINDS])
def test_an_estimate_is_within_a_tenth_of_what_is_measured(tmp_path, kind: str, dtype: torch.dtype, monkeypatch) -> None:
    tiny = make_tiny(tmp_path / "tiny", kind)
    folder = make_larger(tmp_path / "larger", kind, dtype, monkeypatch)
    assert measured_peak(tiny, folder) == pytest.approx(estimate(folder, TEXT).peak, rel=0.1)


@pytest.mark.parametrize("name", ["minilm", "whisper", "kokoro"])
@pytest.mark.timeout(600)
def test_so_it_is_with_real_weights(request, name: str) -> None:
    folder = request.getfixturevalue(name)
    assert measured_peak(folder) == pytest.approx(estimate(folder, TEXT).peak, rel=0.1)


WIDER: dict[str, dict[str, dict[str, Any]]] = {
    "sd-turbo": {
        "unet": {"block_out_channels": [64, 128, 256, 256]},
        "vae": {"block_out_channels": [32, 64, 64, 64]},
    },
    "cogvideox-2b": {
        "transformer": {"num_attention_heads": 8, "attention_head_dim": 32, "sample_height": 16, "sample_width": 16,
                        "text_embed_dim": 256},
        "vae": {"block_out_channels": [32, 64, 64, 64], "norm_num_groups": 16},
        "text_encoder": {"d_model": 256, "d_ff": 1024},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(WIDER))
@pytest.mark.timeout(600)
def test_so_it_is_of_pipelines(tmp_path, name: str) -> None:
    recipe = json.loads((ROOT / "fixtures" / "tiny" / f"{name}.json").read_text())
    for part, sizes in WIDER[name].items():
        recipe["components"][part]["config"].update(sizes)
    make(recipe, tmp_path, seed=1)
    assert measured_peak(tmp_path) == pytest.approx(estimate(tmp_path, TEXT).peak, rel=0.1)


def test_kv_and_weights_are_counted_to_the_byte(tmp_path) -> None:
    folder = make_tiny(tmp_path / "m", "llama")
    options = RunnerOptions(device="cpu", max_model_len=512, kv_bytes=KV_BYTES, threads=1)
    runner = TorchRunner.load(folder, options, lambda *_: None)
    expected = estimate(folder, Conditions(cuda=False, length=512))
    assert expected.kv_token * runner.block_tokens == runner.block_bytes
    on_gpu = estimate(folder, Conditions(cuda=True, length=512))
    assert on_gpu.weights == runner.weight_bytes // 2 + 4 * 512 * 16, "bfloat16, and the angles"
    runner.close()


def break_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def write_nonsense(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def take_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def forge_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({"model.safetensors": "0" * 64}))


def take_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": {"hidden_size": "wide"}}))
    (folder / "preprocessor_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (take_sizes, "no sizes to count with"),
        (break_index, "the shard model-2.safetensors is missing"),
        (cut_short, "cut short"),
        (write_nonsense, "damaged"),
        (take_weights, "no weights"),
        (forge_manifest, "wrong SHA-256"),
    ],
)
def test_a_folder_that_is_not_whole_says_what_is_wrong(tmp_path, damage, why: str) -> None:
    folder = make_tiny(tmp_path / "m", "llama")
    damage(folder)
    at = Conditions(cuda=False, length=512)

    def look() -> None:
        estimate(folder, at)
        Folders(tmp_path, at).verify(folder)

    with pytest.raises(LoadFailed, match=why):
        look()


def test_folders_are_listed_with_what_they_need_or_why_they_cannot(tmp_path) -> None:
    make_tiny(tmp_path / "good", "llama")
    make_tiny(tmp_path / "good@r2", "llama")
    take_weights(make_tiny(tmp_path / "bad", "llama"))
    make_tiny(tmp_path / "No Name", "llama")
    found = {folder.name: folder for folder in Folders(tmp_path, Conditions(cuda=False, length=512)).scan()}
    assert sorted(found) == ["bad", "good", "good@r2"]
    assert found["good"].estimate is not None
    assert found["bad"].error == "bad: there are no weights"


def make_headers(folder: Path, shape: list[int]) -> None:
    """A safetensors file of zeros, without torch."""
    folder.mkdir(parents=True)
    size = 4 * shape[0] * shape[1]
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))


def test_components_of_a_pipeline_are_summed(tmp_path) -> None:
    (tmp_path / "sd").mkdir()
    index = {"_class_name": "P", "unet": ["diffusers", "U"], "vae": ["diffusers", "V"], "scheduler": ["diffusers", "S"]}
    (tmp_path / "sd" / "model_index.json").write_text(json.dumps(index))
    for part, shape in (("unet", [100, 100]), ("vae", [10, 10])):
        make_headers(tmp_path / "sd" / part, shape)
    (tmp_path / "sd" / "unet" / "config.json").write_text(json.dumps({"sample_size": 8, "block_out_channels": [32, 64]}))
    (tmp_path / "sd" / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [32, 64, 64, 64]}))
    found = estimate(tmp_path / "sd", Conditions(cuda=False, length=0))
    assert found.weights == 4 * (100 * 100 + 10 * 10)
    assert found.activations >= 64 * 64 * 32 * 4
    assert found.kv_token == 0
