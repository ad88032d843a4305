"""What a pull request says, also of a repo with hostile names."""

from __future__ import annotations

import re

from requant.tasks.checkpoint.document import Diagnosis, EngineVerdict, MtpFixDocument
from requant.tasks.repairing.description import MAX_PROBLEMS, describe, improvements

BASE = f"Qwen/Qwen3.6-27B@{'b' * 40}"
HOSTILE = "@everyone [click](http://evil) <img src=x> `rm` | a\n# b: run requant mtp-fix"


def verdict(mtp: bool, reason: str = "nothing is in the way") -> EngineVerdict:
    return EngineVerdict(loads=True, mtp=mtp, reason=reason, version="0.32.0")


def document(problems: list[str], **changes: object) -> MtpFixDocument:
    before = Diagnosis(engines={"vllm": verdict(False, "there is no MTP head: run requant mtp-fix")}, problems=problems)
    after = Diagnosis(engines={"vllm": verdict(True)}, problems=problems[1:])
    repaired = MtpFixDocument(
        changed=False,
        tensors_restored=15,
        source="base",
        writes=["config.json", "model-mtp.safetensors", "model-restored-00001.safetensors"],
        removes=["stray.safetensors"],
        engines=after.engines,
        repo="me/quantized",
        sha="a" * 40,
        base=BASE,
        before=before,
        after=after,
        sizes={"config.json": 1234, "model-mtp.safetensors": 849_000_000, "model-restored-00001.safetensors": 0},
    )
    return repaired.model_copy(update=changes)


def test_it_says_why_and_shows_the_verdicts_before_and_after_and_every_file() -> None:
    text = describe(document(["the MTP head lacks mtp.fc: run requant mtp-fix", "a norm is F32"]), "keep")
    reason, verdicts, *_ = text.split("\n\n")
    assert reason.startswith("This checkpoint has a problem: there is no MTP head. The repair: 15 tensors of the")
    assert f"`{BASE}`" in reason and "\n" not in reason and "run requant" not in reason
    (row,) = [line for line in verdicts.splitlines() if line.startswith("| vllm")]
    assert row.count("vllm 0.32.0") == 2 and row.index("does not draft") < row.index(", drafts")
    assert "| `model-mtp.safetensors` | 849,000,000 bytes |" in text
    assert "| `model-restored-00001.safetensors` | renamed |" in text and "| `stray.safetensors` | removed |" in text
    assert f"requant mtp-fix me/quantized@{'a' * 40} --base {BASE}" in text


def test_a_change_of_a_verdict_alone_is_a_reason_too_and_an_other_head_is_one() -> None:
    assert "has a problem: there is no MTP head." in describe(document([]), "keep")
    same = document([]).before
    assert describe(document([], after=same), "keep").startswith("The MTP head is not that of the base.")


def test_the_reason_is_never_taken_from_an_engine_that_does_not_do_better() -> None:
    drafts, refuses = verdict(True), verdict(False, "it reads no packed head")
    before = Diagnosis(engines={"vllm": drafts, "sglang": drafts}, problems=[])
    after = Diagnosis(engines={"vllm": drafts, "sglang": refuses}, problems=[])
    text = describe(document([], before=before, after=after), "int8")
    assert text.startswith("The MTP head can be smaller. The repair: 15 tensors of the head from the base")
    assert improvements(before, after) == [] and improvements(after, before) == ["it reads no packed head"]


def test_nothing_that_a_repo_says_is_markup_or_mentions_anyone() -> None:
    text = describe(document([HOSTILE] * 30), "int8")
    assert "@everyone" not in text and "<img" not in text and "\n# b" not in text
    assert re.search(r"(?<!\\)\[click", text) is None and text.count("&#64;everyone") == 2 * MAX_PROBLEMS
    assert "- and 20 more" in text and "rounded to INT8" in text
