"""`manage.py models`."""

from __future__ import annotations

import io
import json

import pytest
from django.conf import settings
from django.core.management import CommandError, call_command

from apps.fleet import weights


@pytest.fixture
def models_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "ENV", settings.ENV.model_copy(update={"models_dir": tmp_path}))
    return tmp_path


def run(*arguments: str) -> str:
    out = io.StringIO()
    call_command("models", *arguments, stdout=out)
    return out.getvalue()


@pytest.mark.django_db
def test_the_list_says_where_each_model_s_weights_are(models_dir, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    call_command("loaddata", "models", verbosity=0)
    for name, file in (("sd-turbo", "model_index.json"), ("qwen3-14b", "config.json")):
        (models_dir / name).mkdir()
        (models_dir / name / file).write_text(json.dumps({"padding": "x" * 3_000_000}))
    (models_dir / "qwen3-14b" / "tiny.json").write_text("{}")
    run("list")
    rows = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert len(rows) == 10
    for name, words in {
        "sd-turbo": ("image", "here", "3 MB"),
        "qwen3-14b": ("text", "tiny", "3 MB"),
        "smollm2-360m": ("362 M", "hub"),
        "kokoro-82m": ("speech", "can be pulled"),
        "whisper-tiny.en": ("transcription", "can be pulled", "MIT"),
    }.items():
        assert all(word in rows[name] for word in words), rows[name]


def test_tiny_ones_are_made_checked_and_replaced_by_a_folder_s(models_dir, tmp_path_factory) -> None:
    assert "sd-turbo: ready" in run("make-tiny", "sd-turbo")
    assert run("verify").endswith("sd-turbo: as it was pulled\n")
    real = tmp_path_factory.mktemp("real")
    (real / "config.json").write_text("{}")
    run("pull", "sd-turbo", "--from", str(real))
    assert not weights.is_tiny(models_dir / "sd-turbo")
    (models_dir / "sd-turbo" / "config.json").write_text("[]")
    with pytest.raises(CommandError, match="missing or changed"):
        run("verify", "sd-turbo")


def test_what_cannot_be_done_is_one_line(models_dir) -> None:
    for arguments in (("verify", "qwen3-14b"), ("make-tiny", "minilm-l6-v2"), ("make-tiny",), ("pull", "../x")):
        with pytest.raises(CommandError) as caught:
            run(*arguments)
        assert "\n" not in str(caught.value)
