"""`requant store`: what each command says as JSON and at a terminal, and how it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from requant.flows.cli.store import store as command
from requant.tasks.artifact import Manifest
from requant.tasks.errors import RequantError
from requant.tasks.store import Store, open_store
from requant.tasks.store.runs import Run
from tests.factories.stores import ago, keep

KEYS = ("a" * 64, "b" * 64)
SHA = "c" * 40


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("REQUANT_STORE", (tmp_path / "store").as_uri())
    monkeypatch.setenv("COLUMNS", "200")
    opened = open_store()
    opened.check()
    return opened


def keep_model(store: Store, key: str, data: bytes, stage: str = "quantize", **record: object) -> Manifest:
    return keep(store, key, {"model.safetensors": data, "config.json": b"{}"}, stage, **record)


def used(store: Store, *keys: str, recipe: str = "0123456789abcdef", makes: str = "me/result") -> None:
    run = Run(recipe, f"a/base@{SHA}", makes, tuple(("quantize", key) for key in keys))
    store.backend.write(run.key, run.to_json())


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments), catch_exceptions=True)


def document(*arguments: str, status: int = 0) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == status, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_ls_says_what_each_artifact_is_from_which_base_and_who_uses_it(store: Store) -> None:
    manifest = keep_model(store, KEYS[0], b"weights", started="2026-01-01T00:00:00+00:00")
    keep_model(store, KEYS[1], b"other", stage="download", base={"repo_id": "x/y", "sha": "d" * 40})
    used(store, KEYS[0])
    used(store, KEYS[0], recipe="fedcba9876543210", makes="W4A16 g128")
    said = document("ls")
    assert said["store"] == store.url and said["damaged"] == []
    row, download = sorted(said["artifacts"], key=lambda row: row["stage"], reverse=True)
    assert {k: row[k] for k in ("stage", "key", "digest", "files", "bytes", "base", "started")} == {
        "stage": "quantize", "key": KEYS[0], "digest": manifest.digest, "files": 2, "bytes": 9,
        "base": f"a/base@{SHA}", "started": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    assert {user["makes"] for user in row["used_by"]} == {"me/result", "W4A16 g128"}
    assert 0 <= row["unused_seconds"] < 60
    assert (download["base"], download["used_by"]) == (f"x/y@{'d' * 40}", [])
    table = run("ls").stdout
    assert f"a/base@{SHA[:7]}" in table and manifest.digest[:12] in table and "and 1 more" in table


def test_ls_of_an_empty_store_says_so(store: Store) -> None:
    assert document("ls")["artifacts"] == [] and run("ls").stdout == f"{store.url} is empty\n"


def test_ls_names_what_cannot_be_read(store: Store) -> None:
    keep_model(store, KEYS[0], b"1")
    store.backend.write(f"artifacts/quantize/{KEYS[1]}", b"{")
    said = document("ls")
    assert len(said["artifacts"]) == 1 and said["damaged"][0].startswith(f"artifacts/quantize/{KEYS[1]}: ")


def test_verify_fails_until_what_is_lost_is_repaired(store: Store) -> None:
    manifest = keep_model(store, KEYS[0], b"1")
    assert document("verify", "--deep") == {"checked": 2, "problems": [], "repairs": []}
    store.cache.path(f"blobs/sha256/{manifest['config.json'].sha256[:2]}/{manifest['config.json'].sha256}").unlink()
    assert len(document("verify", status=1)["problems"]) == 1
    assert len(document("verify", "--repair", status=1)["repairs"]) == 1
    assert document("verify") == {"checked": 0, "problems": [], "repairs": []}


def test_gc_says_what_would_go_and_then_what_went(store: Store) -> None:
    manifest = keep_model(store, KEYS[0], b"weights")
    ago(store.cache.root, 40)
    keep_model(store, KEYS[1], b"young")
    said = document("gc", "--older-than", "30d", "--dry-run")
    assert said["dry_run"] and [a["digest"] for a in said["artifacts"]] == [manifest.digest]
    assert len(document("ls")["artifacts"]) == 2
    gone = document("gc", "--older-than", "30d")
    assert {**gone, "dry_run": True} == said and gone["blobs"] == {"count": 1, "bytes": 7}
    assert len(document("ls")["artifacts"]) == 1
    assert "0 artifacts, 0 blobs" in run("gc", "--older-than", "30d").stdout


def test_rm_deletes_the_named_artifact_and_keeps_the_blobs_of_others(store: Store) -> None:
    removed = keep_model(store, KEYS[0], b"weights")
    keep_model(store, KEYS[1], b"other")  # with the same config.json
    ago(store.cache.root, 2)
    said = document("rm", removed.digest[:12], "--dry-run")
    assert [a["digest"] for a in said["artifacts"]] == [removed.digest] and len(document("ls")["artifacts"]) == 2
    gone = document("rm", KEYS[0][:9])
    assert {**gone, "dry_run": True} == said and gone["blobs"] == {"count": 1, "bytes": 7}
    assert document("verify")["problems"] == [] and len(document("ls")["artifacts"]) == 1


def test_rm_says_which_artifact_stays_since_a_run_needs_it(store: Store) -> None:
    young = keep_model(store, KEYS[0], b"weights")
    result = run("rm", young.digest[:12])
    assert result.exit_code == 1 and f"{young.digest[:12]} stays: it is younger than --grace" in result.output
    ago(store.cache.root, 2)
    used(store, KEYS[0])  # just now
    assert document("rm", young.digest[:12], status=1)["artifacts"] == []
    assert len(document("ls")["artifacts"]) == 1


def test_rm_of_what_is_not_there_deletes_nothing(store: Store) -> None:
    keep_model(store, KEYS[0], b"weights")
    ago(store.cache.root, 2)
    result = run("rm", KEYS[0], "ffff")
    assert isinstance(result.exception, RequantError) and "begins with 'ffff'" in str(result.exception)
    assert len(document("ls")["artifacts"]) == 1


def test_du_adds_up_the_blobs_of_each_base_once(store: Store) -> None:
    base = {"repo_id": "x/y", "sha": "d" * 40}
    keep_model(store, KEYS[0], b"weights", base=base)
    keep_model(store, KEYS[1], b"weights", stage="mtp_fix", base={**base, "sha": "e" * 40})
    keep_model(store, KEYS[0], b"others", stage="mtp_fix")
    said = document("du")
    assert said["bases"] == [
        {"repo_id": "x/y", "artifacts": 2, "bytes": 9, "own_bytes": 7},
        {"repo_id": None, "artifacts": 1, "bytes": 8, "own_bytes": 6},
    ]
    assert said["stored_bytes"] == 15
    assert [line.split()[0] for line in run("du").stdout.splitlines()] == ["base", "x/y", "-", "0.0"]


def test_gc_says_when_what_must_stay_does_not_fit(store: Store) -> None:
    keep_model(store, KEYS[0], b"weights")
    said = document("gc", "--max-size", "0.001kB")
    assert not said["fits"] and said["stays"]["bytes"] == 9
    assert "that is more than --max-size" in run("gc", "--max-size", "0.001kB").stdout


@pytest.mark.parametrize(
    "wrong",
    [
        ("--older-than", "30"),
        ("--older-than", "soon"),
        ("--older-than", "-3d"),
        ("--max-size", "5e9"),
        ("--max-size", "10 bananas"),
        ("--keep-last", "0"),
        ("--grace", "1s"),
    ],
)
def test_a_wrong_value_is_wrong_usage_and_deletes_nothing(store: Store, wrong: tuple[str, str]) -> None:
    keep_model(store, KEYS[0], b"1")
    ago(store.cache.root, 400)
    result = run("gc", *wrong)
    assert result.exit_code == 2 and wrong[0] in result.stderr
    assert len(document("ls")["artifacts"]) == 1


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5h", 5400), ("30d", 2592000), ("2W", 1209600)])
def test_ages_are_read_with_their_units(text: str, seconds: float) -> None:
    from requant.flows.cli.store import AGE

    assert AGE.convert(text, None, None) == seconds


def test_an_artifact_travels_on_a_stick(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = keep_model(store, KEYS[0], b"weights", seconds=5)
    sent = document("export", manifest.digest[:12], str(tmp_path / "stick"))
    assert sent["bytes_moved"] == 9 and sent["artifacts"][0]["digest"] == manifest.digest
    monkeypatch.setenv("REQUANT_STORE", (tmp_path / "elsewhere").as_uri())
    arrived = document("import", str(tmp_path / "stick"))
    assert arrived["source"] == (tmp_path / "stick").as_uri() and arrived["bytes_moved"] == 9
    assert document("import", str(tmp_path / "stick"), KEYS[0][:8])["bytes_moved"] == 0
    path = document("checkout", KEYS[0][:8], str(tmp_path / "out"))["path"]
    assert (Path(path) / "model.safetensors").read_bytes() == b"weights"


def test_what_is_not_there_is_not_made_by_an_import(store: Store, tmp_path: Path) -> None:
    result = run("import", str(tmp_path / "nowhere"))
    assert result.exit_code == 2 and "there is no store at" in result.stderr
    assert not (tmp_path / "nowhere").exists()


def test_a_store_is_not_copied_into_itself(store: Store) -> None:
    keep_model(store, KEYS[0], b"1")
    assert run("export", KEYS[0], store.url).exit_code == 2
