"""The console and the admin in a real browser. Screenshots of every page are kept in $SCREENSHOTS when it is set."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.e2e.conftest import RunningStack
from tests.e2e.pages import PHONE, shot


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def test_a_wrong_password_is_told_kindly(browser: Browser, stack: RunningStack) -> None:
    page = browser.new_page(base_url=stack.url)
    page.goto("/console/")
    page.get_by_label("User name").fill("admin")
    page.get_by_label("Password").fill("wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("do not match")
    shot(page, "login")
    page.close()


def test_a_chat_streams_with_its_speed_and_its_code(page: Page) -> None:
    chat = page.locator("#chat")
    expect(chat.get_by_label("Model")).to_have_value("smollm2-135m")
    page.get_by_label("Max tokens").fill("40")
    chat.get_by_label("Temperature").fill("0")  # drawn by chance, a small model need not know
    ask(page, "What is the capital of France?")
    answer = page.locator(".message.assistant").last
    expect(answer).to_contain_text("Paris", timeout=20_000)
    expect(chat.locator(".stats")).to_contain_text("tokens/s", timeout=20_000)
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=20_000)
    shot(page, "playground")
    page.get_by_role("button", name="View code").click()
    expect(page.locator("#snippet")).to_contain_text("curl -N")
    shot(page, "playground-code")
    page.get_by_role("button", name="Python").click()
    expect(page.locator("#snippet")).to_contain_text("from openai import OpenAI")
    page.get_by_role("button", name="Close").click()
    page.set_viewport_size(PHONE)
    shot(page, "playground-phone")


def test_stop_ends_an_answer_at_once(page: Page) -> None:
    page.get_by_label("Max tokens").fill("2000")
    ask(page, "Write a very long story about the sea, with many chapters.")
    expect(page.locator("#chat .stats")).to_contain_text("tokens/s", timeout=20_000)
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=3_000)
    expect(page.locator(".message.assistant small").last).to_contain_text("stopped")


def test_a_tab_without_a_model_says_how_to_get_one(page: Page) -> None:
    page.get_by_role("tab", name="Images").click()
    expect(page.locator("#images .missing")).to_contain_text("manage.py models pull sd-turbo")
    expect(page.locator("#images").get_by_label("Model")).to_have_value("")
    shot(page, "playground-without-model")


def test_a_key_is_made_shown_once_and_revoked(page: Page) -> None:
    page.get_by_role("link", name="Keys").click()
    page.get_by_label("Name").fill("from the browser")
    page.get_by_role("button", name="Create key").click()
    expect(page.locator("#secret")).to_have_text(re.compile(r"^sk-.{40,}$"))
    shot(page, "keys")
    page.goto("/console/keys/")
    expect(page.locator("#secret")).to_have_count(0)
    page.on("dialog", lambda dialog: dialog.accept())
    row = page.get_by_role("row", name="from the browser")
    row.get_by_role("button", name="Revoke").click()
    expect(page.get_by_role("row", name="from the browser")).to_contain_text("revoked")


def test_the_dashboard_draws_what_happened(page: Page) -> None:
    ask(page, "Hi")
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=20_000)
    page.get_by_role("link", name="Dashboard").click()
    expect(page.locator("#models tbody")).to_contain_text("smollm2-135m", timeout=20_000)
    expect(page.locator("#chart-tps svg")).to_be_visible()
    expect(page.locator("#workers")).to_contain_text("local-0")
    expect(page.locator("#problem")).to_be_hidden()
    shot(page, "dashboard")
    page.emulate_media(color_scheme="dark")
    shot(page, "dashboard-dark")
    page.set_viewport_size(PHONE)
    shot(page, "dashboard-phone")


def test_the_quickstart_names_this_server(page: Page, stack: RunningStack) -> None:
    page.get_by_role("link", name="Quickstart").click()
    expect(page.locator("#base")).to_have_text(f"{stack.url}/v1")
    shot(page, "quickstart")


@pytest.mark.parametrize(
    "path",
    [
        "accounts/organization", "accounts/plan", "accounts/apikey", "accounts/user", "accounts/usageday",
        "accounts/auditlog", "fleet/model", "fleet/host", "fleet/gpu", "fleet/worker", "fleet/placement",
    ],
)  # fmt: skip
def test_every_list_of_the_admin_opens(page: Page, path: str) -> None:
    response = page.goto(f"/admin/{path}/")
    assert response is not None
    assert response.status == 200
    expect(page.locator("#changelist, #content").first).to_be_visible()
    shot(page, "admin-" + path.replace("/", "-"))


def test_the_admin_creates_a_key_and_shows_it_once(page: Page) -> None:
    page.goto("/admin/accounts/apikey/add/")
    page.locator("[name=organization]").select_option(label="demo")
    page.locator("[name=name]").fill("from the admin")
    shot(page, "admin-key-add")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_text("Copy the key now")).to_contain_text("sk-")
