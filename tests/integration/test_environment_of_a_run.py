"""Runs in the environments that users have: behind a proxy, with modules of their own, with the Hub switched off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.factories.answers import Answers, answers
from tests.factories.requant import Requant

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def proxy() -> Iterator[Answers]:
    """A proxy that reaches nothing on this machine."""
    with answers(403, b"forbidden") as server:
        yield server


def behind(requant: Requant, proxy: Answers, **more: str) -> Requant:
    """`requant` as somebody runs it whose company has a proxy, and who exempts nothing from it."""
    own = {name: value for name, value in requant.environment.items() if name.lower() not in PROXIES}
    return Requant(requant.folder, {**own, "HTTP_PROXY": proxy.url, "http_proxy": proxy.url, **more}, requant.recipe)


def test_a_run_behind_a_proxy_starts_its_own_server_and_keeps_the_users_modules(
    requant: Requant, proxy: Answers, tmp_path: Path
) -> None:
    """Prefect, its events, its tasks and the Hub stand-in are all on loopback here."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "sitecustomize.py").write_text(
        f"import sys\nwith open({str(tmp_path / 'started')!r}, 'a') as log: print(*sys.orig_argv, file=log)\n"
    )
    there = behind(requant, proxy, PYTHONPATH=str(modules))
    del there.environment["PREFECT_API_URL"]
    outcome = there.run(publish=None, new_process=True)
    assert outcome.status == 0, outcome.stderr
    assert set(outcome.states.values()) == {"reused"}
    assert proxy.asked == []
    assert "-m requant.flows.embedded" in (tmp_path / "started").read_text()


def test_the_hub_is_still_asked_through_the_proxy(requant: Requant, proxy: Answers) -> None:
    there = behind(requant, proxy, HF_ENDPOINT="http://hub.example")
    outcome = there("inspect", "demo/pico", "--json", new_process=True)
    assert outcome.status == 1 and "403" in outcome.document["error"]
    assert proxy.asked and all(url.startswith("http://hub.example/api/models/demo/pico") for url in proxy.asked)


@pytest.mark.parametrize(
    "words",
    [
        "inspect demo/pico",
        pytest.param("plan {recipe}", marks=pytest.mark.slow),
        "run {recipe}",
        pytest.param("watch --once --recipes {folder}", marks=pytest.mark.slow),
    ],
)
def test_a_command_that_asks_the_hub_says_that_it_is_switched_off(words: str, requant: Requant) -> None:
    recipe = requant.write_recipe()
    arguments = words.format(recipe=recipe, folder=recipe.parent).split()
    outcome = requant.variant(HF_HUB_OFFLINE="1")(*arguments, "--json", new_process=True)
    assert outcome.status == 1 and "Traceback" not in outcome.stderr, outcome.stderr
    assert "which HF_HUB_OFFLINE=1 switches off: unset HF_HUB_OFFLINE" in outcome.stdout


def test_a_command_that_needs_no_hub_works_without_it(requant: Requant, base: Path) -> None:
    offline = requant.variant(HF_HUB_OFFLINE="1")
    assert offline("inspect", str(base), "--json", new_process=True).status == 0
    assert offline("store", "ls", "--json", new_process=True).status == 0
