"""What a real run leaves in its store: everything known by its run, nothing that gc may take, all of it movable."""

from __future__ import annotations

from pathlib import Path

from tests.factories.requant import Outcome, Requant

Finished = tuple[Requant, Outcome]


def test_every_artifact_of_a_run_is_known_by_its_base_and_its_run(finished: Finished) -> None:
    done, outcome = finished
    artifacts = done("store", "ls", "--json").document["artifacts"]
    inner = {"measure", "noise_floor"}  # They are known through validate, which they were made in.
    assert {a["stage"] for a in artifacts} == {"download", "quantize", "mtp_fix", "validate", "benchmark", *inner}
    for artifact in artifacts:
        (user,) = artifact["used_by"]
        assert user["makes"] == "me/pico"
        assert artifact["base"] == f"demo/pico@{outcome.document['base']['sha']}"


def test_gc_takes_nothing_that_a_run_just_used_and_the_next_run_reuses_all(requant: Requant) -> None:
    before = requant("store", "ls", "--json").document["artifacts"]
    outcome = requant("store", "gc", "--keep-last", "1", "--older-than", "1s", "--max-size", "1kB", "--json")
    assert outcome.status == 0 and outcome.document["artifacts"] == []
    assert len(requant("store", "ls", "--json").document["artifacts"]) == len(before)
    assert set(requant.run(publish=None).states.values()) == {"reused"}


def test_a_result_moves_to_another_store_and_is_laid_out_there(
    requant: Requant, finished: Finished, tmp_path: Path
) -> None:
    sent = requant("store", "export", finished[1].digest[:16], str(tmp_path / "stick"), "--json")
    assert sent.status == 0, sent.stderr
    elsewhere = requant.variant(REQUANT_STORE=(tmp_path / "elsewhere").as_uri())
    assert elsewhere("store", "import", str(tmp_path / "stick"), "--json").status == 0
    out = elsewhere("store", "checkout", finished[1].digest[:16], str(tmp_path / "out"), "--json")
    assert out.document["digest"] == finished[1].digest
    first = finished[0].folder / "checkout"
    for path in (tmp_path / "out").rglob("*.safetensors"):
        assert path.read_bytes() == (first / path.name).read_bytes()
    assert elsewhere("store", "verify", "--deep", "--json").document["problems"] == []
