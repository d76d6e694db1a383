"""A real browser for the tests of pages."""

from __future__ import annotations

import os
from pathlib import Path

from playwright.sync_api import Page

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
DESK = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 844}


def shot(page: Page, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def shots(page: Page, name: str) -> None:
    """A page of the admin, light, dark, and on a phone."""
    shot(page, name)
    page.evaluate("document.documentElement.classList.add('dark')")
    shot(page, f"{name}-dark")
    page.evaluate("document.documentElement.classList.remove('dark')")
    page.set_viewport_size(PHONE)
    shot(page, f"{name}-phone")
    page.set_viewport_size(DESK)
