"""Tiny checkpoints: marked, the same for the same seed, and never in the place of real weights."""

from __future__ import annotations

import hashlib

import pytest

from apps.fleet import weights
from apps.fleet.weights.errors import WeightsError

MODEL = "qwen3-14b"


def quiet(stage: str, progress: float) -> None:
    pass


def digest(models) -> str:
    return hashlib.sha256((models / MODEL / weights.MANIFEST).read_bytes()).hexdigest()


def test_the_same_seed_makes_the_same_bytes(tmp_path) -> None:
    for models in ("a", "b"):
        weights.make_tiny(MODEL, tmp_path / models, quiet)
        weights.verify(MODEL, tmp_path / models, quiet)
        assert weights.is_tiny(tmp_path / models / MODEL)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_a_tiny_one_gives_way_to_another_seed_and_to_real_weights(tmp_path, monkeypatch) -> None:
    models, real = tmp_path / "models", tmp_path / "real"
    weights.make_tiny(MODEL, models, quiet)
    before = digest(models)
    weights.make_tiny(MODEL, models, quiet, seed=5)
    assert digest(models) != before
    real.mkdir()
    (real / "config.json").write_text("{}")
    weights.pull(MODEL, models, quiet, source=real)
    assert not weights.is_tiny(models / MODEL)
    with pytest.raises(WeightsError, match="has weights already"):
        weights.make_tiny(MODEL, models, quiet)


def test_a_model_without_a_recipe_is_said(tmp_path) -> None:
    with pytest.raises(WeightsError, match="no recipe"):
        weights.make_tiny("whisper-tiny.en", tmp_path, quiet)
