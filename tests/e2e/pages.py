"""What the browser tests share: a signed-in page on which nothing goes wrong unseen, and pictures of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from playwright.sync_api import Browser, Page, expect

if TYPE_CHECKING:
    from tests.e2e.conftest import RunningStack

PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 860}


@contextmanager
def signed_in(browser: Browser, stack: RunningStack) -> Iterator[Page]:
    """An operator. No script may fail, and nothing may be asked of anybody but the stack."""
    context = browser.new_context(base_url=stack.url, viewport=DESKTOP)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith((stack.url, "data:", "blob:")) or problems.append(asked.url))
    page.goto("/console/")
    page.get_by_label("User name").fill("admin")
    page.get_by_label("Password").fill(stack.admin_password)
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("#chat").get_by_label("Model")).not_to_have_value("")  # its scripts have run
    yield page
    context.close()
    assert problems == []


def shot(page: Page, name: str) -> None:
    """A picture of the whole page in $SCREENSHOTS, when it is set."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def shots(page: Page, name: str) -> None:
    """In light, in dark, and on a phone, where nothing may be wider than the screen."""
    shot(page, name)
    page.emulate_media(color_scheme="dark")
    shot(page, f"{name}-dark")
    page.emulate_media(color_scheme="light")
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    shot(page, f"{name}-phone")
    page.set_viewport_size(DESKTOP)
