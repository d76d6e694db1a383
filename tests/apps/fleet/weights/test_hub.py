"""The hub's own client against a hub on loopback: what is taken, what is checked, and that a pull goes on."""

from __future__ import annotations

import json
import struct

import pytest

from apps.fleet import weights
from apps.fleet.weights.errors import WeightsError
from tests.apps.fleet.weights.fake_hub import FakeHub

MODEL = "sd-turbo"


def tensors(size: int) -> bytes:
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(range(256)) * (size // 256)


LARGE = "unet/diffusion_pytorch_model.fp16.safetensors"
TENSORS = tensors(1 << 20)
FILES = {
    "model_index.json": b'{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}',
    "unet/config.json": b"{}",
    LARGE: TENSORS,
    "unet/diffusion_pytorch_model.safetensors": b"the same again",
    "unet/diffusion_pytorch_model.bin": b"a pickle",
    "sd_turbo.safetensors": b"the same in one file",
    "pipeline.py": b"1/0",
    "README.md": b"words",
}


def quiet(stage: str, progress: float) -> None:
    pass


@pytest.fixture
def hub(monkeypatch):
    repository = weights.REPOSITORIES[MODEL]
    found = FakeHub(repository.name, repository.revision, dict(FILES))
    with found.serving() as url:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)  # read from the environment once
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield found


def test_safetensors_and_configs_are_taken_and_nothing_else(hub, tmp_path) -> None:
    stages: list[str] = []
    weights.pull(MODEL, tmp_path, lambda stage, _: stages.append(stage))
    folder = tmp_path / MODEL
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert found == ["manifest.json", "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == TENSORS
    assert list(dict.fromkeys(stages)) == ["asking the hub", "downloading", "checking", "ready"]
    weights.verify(MODEL, tmp_path, quiet)


def test_a_file_that_is_not_what_the_hub_says_is_refused_and_fetched_again(hub, tmp_path) -> None:
    hub.damaged = {"unet/config.json"}
    with pytest.raises(WeightsError, match=r"unet/config\.json is damaged"):
        weights.pull(MODEL, tmp_path, quiet)
    assert not (tmp_path / MODEL).exists()
    hub.damaged = set()
    weights.pull(MODEL, tmp_path, quiet)
    weights.verify(MODEL, tmp_path, quiet)


def test_a_download_goes_on_where_it_was_cut(hub, tmp_path) -> None:
    hub.files[LARGE] = tensors(24 << 20)
    hub.cut_at = 15 << 20
    with pytest.raises(WeightsError, match="cannot download") as caught:
        weights.pull(MODEL, tmp_path, quiet)
    assert "\n" not in str(caught.value)
    hub.cut_at, hub.asked = None, []
    weights.pull(MODEL, tmp_path, quiet)
    assert [wanted for name, wanted in hub.asked if name == LARGE] == [f"bytes={15 << 20}-"]
    weights.verify(MODEL, tmp_path, quiet)


def test_a_repository_without_safetensors_has_nothing_for_us(hub, tmp_path) -> None:
    hub.files = {"model_index.json": b"{}", "unet/diffusion_pytorch_model.bin": b"a pickle"}
    with pytest.raises(WeightsError, match="no safetensors"):
        weights.pull(MODEL, tmp_path, quiet)


def test_a_hub_that_cannot_be_reached_is_one_line_that_says_what_else_to_do(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"cannot be asked for stabilityai/sd-turbo .*--from FOLDER") as caught:
        weights.pull(MODEL, tmp_path, quiet)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / MODEL).exists()
