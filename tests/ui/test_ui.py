"""The way of a person: choose a recipe, fill the form, start a run, watch it, read what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.factories.requant import wait_for
from tests.factories.stack import BASE, Stack
from tests.ui.conftest import SHOTS

if TYPE_CHECKING:
    from playwright.sync_api import Page


def expect(what: Any) -> Any:
    """What playwright expects of a page, waiting for it. Only the extra `serve` has playwright."""
    from playwright import sync_api

    return sync_api.expect(what)


def shot(page: Page, name: str) -> None:
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True, animations="disabled")  # at their ends


def open_form(page: Page, stack: Stack, deployment: str) -> None:
    page.goto(f"{stack.settings.ui}/v2/deployments")
    (found,) = stack.ask("POST", "deployments/filter", {"deployments": {"name": {"any_": [deployment]}}})
    page.locator(f"a[href*='/deployments/deployment/{found['id']}']").first.click()
    shot(page, f"deployment-{deployment}")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run", exact=True).click()
    expect(page.get_by_role("button", name="Submit")).to_be_visible()


def newest(stack: Stack, deployment: str, before: set[str]) -> str:
    runs = stack.ask("POST", "flow_runs/filter", {"deployments": {"name": {"any_": [deployment]}}})
    return next((str(run["id"]) for run in runs if run["id"] not in before), "")


def submit(page: Page, stack: Stack, deployment: str) -> str:
    """Press the button; the run that it started."""
    before = {
        run["id"] for run in stack.ask("POST", "flow_runs/filter", {"deployments": {"name": {"any_": [deployment]}}})
    }
    page.get_by_role("button", name="Submit").click()
    return str(wait_for(lambda: newest(stack, deployment, before), 30, "the run"))


def open_run(page: Page, stack: Stack, run: str, tab: str) -> None:
    page.goto(f"{stack.settings.ui}/v2/runs/flow-run/{run}?tab={tab}")


def open_artifact(page: Page, stack: Stack, run: str, key: str) -> None:
    filters = {"artifacts": {"flow_run_id": {"any_": [run]}, "key": {"any_": [key]}}}
    (artifact,) = stack.ask("POST", "artifacts/filter", filters)
    page.goto(f"{stack.settings.ui}/v2/artifacts/artifact/{artifact['id']}")


def picture_widths(page: Page) -> list[int]:
    """In pixels, of all pictures of a text, at one moment: the page builds a text again while it loads."""
    widths: list[int] = page.locator("img[src^='data:image/png']").evaluate_all(
        "images => images.map(image => image.naturalWidth)"
    )
    return widths


def test_a_recipe_is_chosen_by_name_run_and_its_gates_report_and_pictures_are_seen(page: Page, stack: Stack) -> None:
    open_form(page, stack, "demo")
    expect(page.get_by_label("Repo Id").first).to_have_value("demo/tiny-qwen3_5-mtp")
    shot(page, "form-demo")
    run = submit(page, stack, "demo")

    child = wait_for(lambda: stack.child_runs(run), 120, "the quantize run")[0]["id"]
    wait_for(lambda: stack.logs(child) and any("block 1 of" in line for line in stack.logs(child)), 300, "a block")
    open_run(page, stack, run, "Logs")
    page.get_by_role("combobox", name="log sort order").click()  # the page renders only the lines that are in sight
    page.get_by_role("option", name="Newest to oldest").click()
    expect(page.get_by_text("quantize: waiting for run")).to_be_visible()
    shot(page, "running")
    open_run(page, stack, child, "Artifacts")
    expect(page.get_by_text("quantize-progress")).to_be_visible()
    shot(page, "progress")

    page.goto("about:blank")  # where a spinner turns, the browser takes half a core from the run
    assert stack.finish(run)["state"]["name"] == "Published"
    open_run(page, stack, run, "Artifacts")
    expect(page.get_by_text("Published").first).to_be_visible()
    expect(page.get_by_text("All 17 gates passed")).to_be_visible()
    shot(page, "finished")
    open_artifact(page, stack, run, "requant-gates")
    expect(page.get_by_text("weight_slope", exact=True).first).to_be_visible()
    shot(page, "gates")
    open_artifact(page, stack, run, "requant-report")
    expect(page.get_by_role("heading", name="Gates").first).to_be_visible()
    wait_for(lambda: len(widths := picture_widths(page)) >= 4 and min(widths) > 100, 60, "the report's four pictures")
    shot(page, "report")
    page.goto(f"{stack.settings.ui}/v2/runs")
    expect(page.get_by_text("tiny-qwen3_5-mtp W4A16").first).to_be_visible()
    shot(page, "runs")


@pytest.mark.slow
def test_a_wrong_value_is_refused_by_the_form(page: Page, stack: Stack) -> None:
    open_form(page, stack, "requantize")
    page.get_by_label("Repo Id").first.fill("not a repo")
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_text("does not match").first).to_be_visible()
    shot(page, "refused")


@pytest.mark.slow
def test_a_recipe_that_no_form_can_see_through_ends_with_a_sentence(page: Page, stack: Stack) -> None:
    open_form(page, stack, "requantize")
    page.get_by_label("Repo Id").first.fill(BASE)
    page.get_by_label("Nsamples").fill("4")
    run = submit(page, stack, "requantize")
    assert stack.finish(run)["state"]["name"] == "Failed"
    open_run(page, stack, run, "Details")
    expect(page.get_by_text("quantize: batch_size 8 is larger than nsamples 4").first).to_be_visible()
    shot(page, "failed")
