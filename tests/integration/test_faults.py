"""Faults of the Hub and of the machine: success after those that pass, one sentence for those that do not."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infra.dev.hub.launch import HubStandIn
from requant.tasks.store import open_store
from requant.tasks.store.verify import verify_store
from tests.factories.paths import ROOT
from tests.factories.requant import Outcome, Requant


def assert_one_sentence(outcome: Outcome, *words: str, status: int = 1) -> None:
    assert outcome.status == status, outcome.stderr
    assert "Traceback" not in outcome.stderr
    error = outcome.document["error"]
    assert "\n" not in error
    for word in words:
        assert word in error, error


def test_the_hub_failing_twice_is_waited_for(requant: Requant, hub: HubStandIn) -> None:
    for status in (500, 429):
        hub.fault(r"/api/models/demo/pico/revision/", times=1, status=status)
    outcome = requant.run(publish=None)
    assert outcome.status == 0, outcome.stderr
    assert "answers 500" in outcome.stderr and "answers 429" in outcome.stderr and "; try 2 of " in outcome.stderr


def test_a_shard_that_is_cut_twice_and_one_that_is_altered_arrive_whole_in_the_end(
    requant: Requant, hub: HubStandIn
) -> None:
    (before,) = (path.read_bytes() for path in requant.store.glob("artifacts/download/*"))
    requant.forget_base()
    hub.fault(r"/resolve/.*00001-of-00002\.safetensors", method="GET", times=2, cut_after_bytes=20_000)
    # The first answer is the header that the preflight reads.
    hub.fault(r"/resolve/.*00002-of-00002\.safetensors", method="GET", skip=1, times=1, corrupt=True)
    outcome = requant.run(publish=None)
    assert outcome.status == 0, outcome.stderr
    assert re.search(r"00002-of-00002\.safetensors of demo/pico@\w+ arrived altered", outcome.stderr)
    assert outcome.states["download"] == "ran"
    assert [path.read_bytes() for path in requant.store.glob("artifacts/download/*")] == [before]
    assert verify_store(open_store(requant.environment["REQUANT_STORE"]), deep=True).problems == []


def test_the_hub_failing_while_publishing_is_waited_for(requant: Requant, hub: HubStandIn) -> None:
    hub.fault(r"/commit/main", method="POST", times=1, status=500)
    hub.fault(r"/commit/main", method="POST", times=1, cut_after_bytes=0)  # carried out, its answer lost
    outcome = requant.run(publish={"repo_id": "me/flaky"})
    assert outcome.status == 0, outcome.stderr
    assert outcome.document["status"] == "published"


def test_a_repo_that_does_not_exist(requant: Requant) -> None:
    outcome = requant.run(base={"repo_id": "demo/nothing"})
    assert_one_sentence(outcome, "demo/nothing does not exist")
    assert "Retry" not in outcome.stderr


def test_a_revision_that_does_not_exist(requant: Requant) -> None:
    assert_one_sentence(requant.run(base={"revision": "v9"}), "demo/pico@v9 does not exist")


def test_a_gated_repo(requant: Requant, hub: HubStandIn, base: Path) -> None:
    hub.seed("demo/gated", base)
    hub.set_repo("demo/gated", gated=True)
    outcome = requant.run(base={"repo_id": "demo/gated"})
    assert_one_sentence(outcome, "demo/gated is gated", "accept its terms")
    assert "Retry" not in outcome.stderr


def test_a_wrong_token(requant: Requant) -> None:
    outcome = requant.variant(HF_TOKEN="hf_not_a_token").run()
    assert_one_sentence(outcome, "refuses HF_TOKEN")
    assert "hf_not_a_token" not in outcome.stdout + outcome.stderr
    assert "Retry" not in outcome.stderr


def test_a_target_that_may_not_be_written(requant: Requant) -> None:
    assert_one_sentence(requant.run(publish={"repo_id": "somebody-else/model"}), "somebody-else/model")


def test_a_store_that_cannot_be_reached_at_the_start(requant: Requant) -> None:
    store = {"REQUANT_STORE": "s3://nothing/here", "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    outcome = requant.variant(**store, **keys).run()
    assert_one_sentence(outcome, "s3://nothing/here cannot be reached", "AWS_ENDPOINT_URL_S3")
    assert "Retry" not in outcome.stderr and "trying again" not in outcome.stderr


def test_a_disk_too_small_is_refused_before_anything_is_fetched(
    requant: Requant, hub: HubStandIn, tmp_path: Path, as_root: None
) -> None:
    """A real one: a file system of 600 kB, into which the base's shards do not fit."""
    hub.reset_traffic()
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)], check=True)
    try:
        outcome = requant.variant(REQUANT_STORE=(small / "store").as_uri()).run()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
    assert_one_sentence(outcome, "of disk below", "are free", "free disk space")
    assert "Retry" not in outcome.stderr
    assert not [t for t in hub.traffic() if t["path"].endswith(".safetensors") and t["status"] != 206]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantise": {}}, "did you mean quantize"),
        ({"quantize": {"iters": "many"}}, "quantize.iters"),
        ({"quantize": {"bits": 5}}, "quantize.bits: 5"),
        ({"quantize": {"calibration": "./nothing.txt"}}, "nothing.txt does not exist"),
    ],
)
def test_a_wrong_recipe_is_one_sentence_and_status_2(requant: Requant, changes: dict[str, object], words: str) -> None:
    outcome = requant.run(**changes)
    assert_one_sentence(outcome, words, status=2)


def test_a_missing_recipe_file_is_status_2(requant: Requant) -> None:
    outcome = requant("run", str(requant.folder / "none.yaml"), "--json")
    assert_one_sentence(outcome, "none.yaml does not exist", status=2)


def test_requant_installed_elsewhere_works_outside_the_checkout(requant: Requant, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns("build", ".venv", ".git", "*.egg-info", "tests", "infra")
    shutil.copytree(ROOT, copy, ignore=ignore)
    subprocess.run([*pip, "--target", str(target), str(copy)], check=True, capture_output=True)
    environment = {**requant.environment, "PYTHONPATH": str(target)}
    command = [sys.executable, "-m", "requant", "run", str(requant.write_recipe(publish=None)), "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(Outcome(0, done.stdout, "").states.values()) == {"reused"}
