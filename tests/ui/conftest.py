"""A stack and a browser for the tests of Prefect's UI: make test-ui. What they see is kept in build/ui."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.factories.paths import ROOT
from tests.factories.stack import Stack, stack

__all__ = ["page", "stack"]

if TYPE_CHECKING:
    from playwright.sync_api import Page

SHOTS = ROOT / "build" / "ui"


@pytest.fixture(scope="session")
def page(stack: Stack) -> Iterator[Page]:
    """A browser that has logged in."""
    from playwright.sync_api import sync_playwright

    SHOTS.mkdir(parents=True, exist_ok=True)
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "no browser: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        page.goto(f"{stack.settings.ui}/v2/login")
        page.locator("input").fill(stack.settings.login)
        page.get_by_role("button", name="Login").click()
        page.wait_for_url("**/dashboard**")
        yield page
        browser.close()
