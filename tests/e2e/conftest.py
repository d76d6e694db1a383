"""The whole stack, started once by the command people start it with, stopped at the end with nothing left behind."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
import psutil
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from apps.fleet.weights import make_tiny
from tests.e2e.bad_input import SEEING
from tests.e2e.pages import signed_in
from tests.services import ROOT, free_port

STOP_SECONDS = 15
BROWSER_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
FOX = "The quick brown fox jumps over the lazy dog."
T = TypeVar("T")
TINY = ("sd-turbo", "cogvideox-2b", "qwen2.5-vl-3b", "qwen3-14b")


@dataclass(frozen=True)
class RunningStack:
    url: str
    key: str
    admin_password: str
    var: Path
    env: dict[str, str]

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def manage(self, *arguments: str) -> str:
        """Output of a management command run beside the stack."""
        command = [sys.executable, "manage.py", *arguments]
        return subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, check=True).stdout

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=110)


@pytest.fixture(scope="package")
def models_dir(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """Real weights, and a tiny model that sees."""
    folder = tmp_path_factory.mktemp("models")
    (folder / smollm2.name).symlink_to(smollm2)
    make_tiny(SEEING, folder, lambda *_: None)
    return folder


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[RunningStack]:
    """Every embedded service, a real model, one gateway; shared by all e2e tests."""
    with started(tmp_path_factory.mktemp("stack"), MODELS_DIR=str(models_dir)) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser of a file's own: while one is open its event loop runs in this thread, where no asynchronous test can."""
    chromium = shutil.which("chromium")
    assert chromium, "the browser tests need chromium; `make tools` says how to get it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=BROWSER_FLAGS)
        yield browser
        browser.close()


@contextmanager
def started(folder: Path, **environment: str) -> Iterator[RunningStack]:
    """A stack of its own in `folder`, up until the block ends."""
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)  # Postgres, not being root, must be able to reach its data
    var, port, key = folder / "var", free_port(), "sk-" + secrets.token_urlsafe(32)
    ours = {"DATABASE_URL", "REDIS_URL", "CLICKHOUSE_URL", "SECRET_KEY", "DAEMON_TOKEN", "METRICS_TOKEN"}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= {"VAR_DIR": str(var), "PORT": str(port), "INFERENCE_BOOTSTRAP_KEY": key, **environment}
    log = folder / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "manage.py", "up"], cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        _wait(process, log)
        password = (var / "secrets" / "admin_password").read_text().strip()
        yield RunningStack(f"http://127.0.0.1:{port}", key, password, var, env)
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=STOP_SECONDS)
        left = [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        assert not left, f"left behind: {left}"


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 400
    while "Ctrl-C stops everything" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(log.read_text())
        time.sleep(0.2)


@pytest.fixture
def page(browser: Browser, stack: RunningStack) -> Iterator[Page]:
    """A signed-in operator."""
    with signed_in(browser, stack) as page:
        yield page


@pytest.fixture(scope="package")
def media_stack(
    tmp_path_factory: pytest.TempPathFactory, smollm2: Path, kokoro: Path, whisper: Path, minilm: Path
) -> Iterator[RunningStack]:
    """A stack with every modality: speech, hearing and embeddings are real, what no registry has is tiny. Models are loaded one
    by one, and requests wait for them, so tests can begin before all are there."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "models").mkdir()
    real = (smollm2, kokoro, whisper, minilm)
    for weights in real:
        (folder / "models" / weights.name).symlink_to(weights.resolve())
    names = [*TINY, *(weights.name for weights in real)]
    with started(folder, MODELS_DIR=str(folder / "models"), DEMO_MODELS=",".join(names)) as running:
        yield running


@pytest.fixture(scope="package")
def fox(media_stack: RunningStack) -> bytes:
    """A recording, spoken by the stack itself."""
    body = {"model": "kokoro-82m", "voice": "af_heart", "input": FOX, "response_format": "wav"}
    with media_stack.client() as client:
        return client.post("/v1/audio/speech", json=body).raise_for_status().content


def until(ask: Callable[[], T], good: Callable[[T], bool], seconds: float = 60) -> T:
    """The first answer that is good."""
    deadline = time.monotonic() + seconds
    while not good(answer := ask()):
        assert time.monotonic() < deadline, answer
        time.sleep(0.3)
    return answer
