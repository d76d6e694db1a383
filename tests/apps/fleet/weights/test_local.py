"""Weights from a folder that an operator has, such as a snapshot in a hub's cache."""

from __future__ import annotations

import json

import pytest

from apps.fleet import weights
from apps.fleet.weights.errors import WeightsError

MODEL = "qwen3-14b"


def quiet(stage: str, progress: float) -> None:
    pass


def test_a_snapshot_of_a_hub_s_cache_becomes_a_folder_of_files(tmp_path) -> None:
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    (snapshot / "sub").mkdir(parents=True)
    for blob, name in (("1", "config.json"), ("2", "sub/generation_config.json")):
        (blobs / blob).write_text(json.dumps({"blob": blob}))
        (snapshot / name).symlink_to(blobs / blob)
    models = tmp_path / "models"
    weights.pull(MODEL, models, quiet, source=snapshot)
    weights.verify(MODEL, models, quiet)
    taken = models / MODEL / "sub" / "generation_config.json"
    assert json.loads(taken.read_text()) == {"blob": "2"}
    assert not taken.is_symlink()


def test_a_folder_that_is_no_model_or_not_safe_is_refused(tmp_path) -> None:
    source, models = tmp_path / "mine", tmp_path / "models"
    source.mkdir()
    with pytest.raises(WeightsError, match="holds no model"):
        weights.pull(MODEL, models, quiet, source=source)
    (source / "config.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match="could run code"):
        weights.pull(MODEL, models, quiet, source=source)
    (source / "pytorch_model.bin").unlink()
    (source / "words.txt").symlink_to("/etc/hostname")
    with pytest.raises(WeightsError, match="leads out of the folder"):
        weights.pull(MODEL, models, quiet, source=source)
    assert not models.exists()
