"""The placement board and the quotas in a real browser, on the real stack with a second worker."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from apps.fleet.weights import make_tiny
from tests.e2e.bad_input import SEEING
from tests.e2e.conftest import RunningStack
from tests.e2e.pages import shot, shots
from tests.services import ROOT, free_port

SLEEPER = "smollm2-360m"
PATIENCE = 30_000


@pytest.fixture(scope="module")
def second(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A daemon beside the stack's own, added while it serves; it keeps what it unloads in host memory."""
    models = tmp_path_factory.mktemp("second")
    (models / SEEING).symlink_to(Path(stack.env["MODELS_DIR"]) / SEEING)
    make_tiny(SLEEPER, models, lambda *_: None)
    port = free_port()
    token = (stack.var / "secrets" / "daemon_token").read_text().strip()
    command = [sys.executable, "-m", "gpu_daemon", "--worker-id", "local-1", "--port", str(port),
               "--models-dir", str(models), "--host-weights-bytes", str(1 << 30)]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "DAEMON_TOKEN": token}, stderr=subprocess.DEVNULL)
    stack.manage("fleet", "add-worker", "local-1", "--host", "local", "--port", str(port))
    with stack.client() as client:
        number = next(w["id"] for w in client.get("/api/workers/").json()["results"] if w["name"] == "local-1")
        wish = {"model": SEEING, "dry_run": True}
        while "needs at least" not in client.post(f"/api/workers/{number}/place/", json=wish).text:
            time.sleep(0.2)
    yield "local-1"
    stack.manage("fleet", "remove-worker", "local-1")
    process.terminate()
    process.wait(15)


def worker(page: Page, name: str) -> Locator:
    return page.get_by_role("article", name=f"Worker {name}")


def chip(page: Page, model: str, on: str) -> Locator:
    return worker(page, on).locator(".b-chip", has=page.locator("b", has_text=re.compile(f"^{re.escape(model)}$")))


def confirm(page: Page, name: str, *says: str) -> None:
    """Reads the dry run, and has it done."""
    dialog = page.get_by_role("dialog")
    for text in says:
        expect(dialog).to_contain_text(text)
    dialog.get_by_role("button", name=name, exact=True).click()
    expect(dialog).to_be_hidden()


def test_models_are_placed_pinned_moved_and_unloaded_from_the_board(page: Page, stack: RunningStack, second: str) -> None:
    page.goto("/admin/")
    page.get_by_role("link", name="Placement board").click()
    expect(worker(page, "local-0")).to_contain_text("serving", timeout=PATIENCE)
    expect(worker(page, second)).to_contain_text("serving", timeout=PATIENCE)
    expect(chip(page, "smollm2-135m", "local-0")).to_contain_text("ready")
    expect(page.locator("#freshness")).to_have_text("live")
    expect(page.locator("#notice")).to_be_hidden()

    # Place, by keyboard alone, while the board goes on being drawn.
    opener = worker(page, second).get_by_role("button", name="Place a model")
    opener.focus()
    page.wait_for_timeout(3500)
    expect(opener).to_be_focused()
    page.keyboard.press("Enter")
    page.get_by_label("Model", exact=True).select_option(SEEING)
    expect(page.get_by_role("dialog")).to_contain_text("from disk: needs at least")
    shot(page, "board-dry-run")
    confirm(page, "Place")
    expect(chip(page, SEEING, second)).to_contain_text("ready", timeout=PATIENCE)
    expect(chip(page, SEEING, second)).to_contain_text("tiny")
    expect(page.locator("#movements")).to_contain_text(f"local-1: loaded {SEEING}")

    chip(page, SEEING, second).get_by_role("button", name="Pin").click()
    confirm(page, "Pin", "local-1 has", "never evicted")
    expect(chip(page, SEEING, second).get_by_role("img", name="pinned")).to_be_visible()

    chip(page, SEEING, second).get_by_role("button", name="Move").click()
    confirm(page, "Move", "It leaves local-1 once local-0 serves it", "About")
    expect(chip(page, SEEING, "local-0")).to_contain_text("ready", timeout=PATIENCE)
    expect(chip(page, SEEING, second)).to_have_count(0, timeout=PATIENCE)
    expect(chip(page, SEEING, "local-0").get_by_role("img", name="pinned")).to_be_visible()

    chip(page, SEEING, "local-0").drag_to(worker(page, second))
    confirm(page, "Move", "Loads", "from disk")
    expect(chip(page, SEEING, second)).to_contain_text("ready", timeout=PATIENCE)

    chip(page, SEEING, second).get_by_role("button", name="Unload").click()
    confirm(page, "Unload", "no longer placed", "loaded again")
    expect(chip(page, SEEING, second)).to_have_count(0, timeout=PATIENCE)

    page.goto("/admin/accounts/auditlog/?q=model")
    for action in ("model placed", "model pinned", "model moved", "model unloaded"):
        expect(page.get_by_text(action).first).to_be_visible()


def test_what_sleeps_in_host_memory_is_shown_and_woken(page: Page, second: str) -> None:
    page.goto("/admin/board/")
    worker(page, second).get_by_role("button", name="Place a model").click()
    page.get_by_label("Model", exact=True).select_option(SLEEPER)
    confirm(page, "Place", "from disk")
    expect(chip(page, SLEEPER, second)).to_contain_text("ready", timeout=PATIENCE)
    chip(page, SLEEPER, second).get_by_role("button", name="Unload").click()
    confirm(page, "Unload")
    expect(chip(page, SLEEPER, second)).to_contain_text("asleep", timeout=PATIENCE)
    shots(page, "board")
    chip(page, SLEEPER, second).get_by_role("button", name="Place").click()
    confirm(page, "Place", "from host memory")
    expect(chip(page, SLEEPER, second)).to_contain_text("ready", timeout=PATIENCE)
    chip(page, SLEEPER, second).get_by_role("button", name="Pin").click()
    confirm(page, "Pin")
    expect(chip(page, SLEEPER, second).get_by_role("img", name="pinned")).to_be_visible()
    shots(page, "board-ready")


def test_a_drained_worker_says_so_until_it_is_opened_again(page: Page, second: str) -> None:
    page.goto("/admin/board/")
    worker(page, second).get_by_role("button", name="Drain").click()
    confirm(page, "Drain", "given nothing more")
    expect(worker(page, second)).to_contain_text("drained", timeout=PATIENCE)
    worker(page, second).get_by_role("button", name="Undrain").click()
    confirm(page, "Undrain", "takes requests again")
    expect(worker(page, second)).to_contain_text("serving", timeout=PATIENCE)


def test_the_board_says_when_it_is_stale_or_refused(page: Page, second: str) -> None:
    page.goto("/admin/board/")
    expect(worker(page, "local-0")).to_contain_text("serving", timeout=PATIENCE)
    page.route("**/api/board/", lambda route: route.abort())
    expect(page.get_by_role("alert")).to_contain_text("the gateway does not answer", timeout=PATIENCE)
    page.unroute("**/api/board/")
    expect(page.locator("#notice")).to_be_hidden(timeout=PATIENCE)
    page.route("**/api/workers/**", lambda route: route.fulfill(status=503, json={"error": {"message": "Come back later."}}))
    worker(page, "local-0").get_by_role("button", name="Drain").click()
    expect(page.get_by_role("dialog")).to_contain_text("Come back later.")
    expect(page.get_by_role("dialog").get_by_role("button", name="Drain")).to_be_disabled()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_a_quota_is_edited_in_place(page: Page, stack: RunningStack) -> None:
    page.goto("/admin/quotas/?q=demo")
    row = page.get_by_role("region", name="demo")
    row.get_by_text("Edit", exact=True).click()
    row.get_by_role("spinbutton", name="tokens per month").fill("2500")
    row.get_by_role("spinbutton", name="tokens per day").fill("1000000")
    row.get_by_role("button", name="Save").click()
    expect(page.get_by_text("demo: saved")).to_be_visible()
    expect(row).to_contain_text("/ 2,500")
    shots(page, "quotas")
    row.get_by_role("link", name="demo").click()
    expect(page.locator(".q-days li")).to_have_count(30)
    page.get_by_role("spinbutton", name="tokens per month").fill("")
    shot(page, "quota")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("demo: saved")).to_be_visible()
    page.goto("/admin/accounts/auditlog/?q=tokens_per_month")
    expect(page.get_by_text("tokens_per_month 2500 -> plan's").first).to_be_visible()
