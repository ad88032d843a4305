"""The card's words on serving and speed: what ran is what is printed."""

from __future__ import annotations

from typing import Any

from requant.tasks.planning.document import EngineVerdict
from tests.factories.cards import MEASURED_IN_VLLM, card_of, recipe

COMMANDS: list[dict[str, Any]] = MEASURED_IN_VLLM["commands"]


def test_the_serving_command_is_the_one_that_ran() -> None:
    _, body = card_of(benchmark=MEASURED_IN_VLLM)
    assert "```bash\nvllm serve me/q-int4 \\\n  --dtype half \\\n  --speculative-config '{\"a\":1}'\n```" in body
    assert "was run by the pipeline that made this card, on these very files (vLLM 0.32.0, NVIDIA H100)" in body
    assert "No engine was run" not in body


def test_a_command_that_ran_without_anything_published_is_not_said_to_be_of_what_was() -> None:
    _, body = card_of(benchmark=MEASURED_IN_VLLM, recipe=recipe(publish=None))
    assert "was run by the pipeline" in body and "published" not in body.split("## Speed")[0]


def test_of_a_server_that_ran_already_nothing_is_told_that_nobody_knows() -> None:
    told = {k: v for k, v in MEASURED_IN_VLLM.items() if k not in {"version", "hardware"}}
    _, body = card_of(benchmark={**told, "engine": "url:http://x", "commands": []})
    speed = body.split("## Speed")[1].split("\n## ")[0]
    assert "a draft" not in speed and "tokens per second" in speed and "flags are not known" in speed


def test_a_recipes_flags_are_in_a_command_that_was_not_run_too() -> None:
    flags = {"kv-cache-dtype": "fp8", "enforce-eager": True}
    _, body = card_of(recipe=recipe(benchmark={"flags": flags, "draft_tokens": 2}))
    assert "--kv-cache-dtype fp8 \\\n  --enforce-eager \\\n  --speculative-config" in body
    assert (
        '"num_speculative_tokens":2' in body
        and "The commands were not run on these files." in body
        and "No engine was run." in body
    )


def test_the_commands_name_the_dtype_in_which_the_scales_were_judged() -> None:
    _, body = card_of(dtype="bfloat16")
    assert body.count("--dtype bfloat16") == 3  # vLLM with MTP and without, SGLang
    assert "with their scales in bfloat16, as an engine keeps them" in body
    _, body = card_of(dtype="bfloat16", recipe=recipe(benchmark={"flags": {"dtype": "half"}}))
    assert body.count("--dtype half") == 2 and body.count("--dtype float16") == 1 and "scales in float16" in body
    assert "dtype" not in card_of()[1]


def test_a_head_for_which_vllm_has_no_method_mtp_gets_no_command_with_drafts() -> None:
    """As the stages of DSpark, for which vLLM refuses the method."""
    _, body = card_of(by_mtp=False)
    assert "vllm serve" in body and "--speculative-config" not in body
    _, body = card_of(by_mtp=False, recipe=recipe(benchmark={"flags": {"speculative-config": {"method": "dspark"}}}))
    assert '"method":"dspark"' in body


def test_a_file_in_a_command_is_named_without_the_folder_it_lies_in() -> None:
    path = "/srv/mine/chat.jinja"
    _, body = card_of(recipe=recipe(benchmark={"flags": {"chat-template": path}}))
    assert "--chat-template chat.jinja" in body and "/srv/mine" not in body
    ran = [{**command, "words": [*command["words"], "--chat-template", path]} for command in COMMANDS]
    _, body = card_of(benchmark={**MEASURED_IN_VLLM, "commands": ran})
    assert "--chat-template chat.jinja" in body and "/srv/mine" not in body


GOOD = EngineVerdict(loads=True, mtp=True, reason="nothing is in the way", version="0.32.0")
NO_DRAFTS = EngineVerdict(loads=True, mtp=False, reason="its head is packed", version="0.32.0")
NO_MODEL = EngineVerdict(loads=False, mtp=False, reason="no kernel takes <3> bits", version="0.32.0")


def test_no_command_is_shown_for_an_engine_that_does_not_load_it() -> None:
    _, body = card_of(engines={"vllm": NO_MODEL, "sglang": GOOD, "transformers": GOOD})
    assert "vLLM does not load it: no kernel takes ?3? bits (vLLM 0.32.0)." in body and "vllm serve" not in body
    assert "--speculative-algorithm NEXTN" in body and "curl" in body and "from_pretrained" in body
    _, body = card_of(engines=dict.fromkeys(("vllm", "sglang", "transformers"), NO_MODEL))
    serving = body.split("## Serving")[1].split("\n## ")[0]
    assert "```" not in serving and serving.count("does not load it") == 3


def test_no_drafts_are_asked_for_where_the_head_does_not_draft() -> None:
    _, body = card_of(engines={"vllm": NO_DRAFTS, "sglang": NO_DRAFTS, "transformers": NO_DRAFTS})
    assert "vLLM does not draft with its MTP head: its head is packed (vLLM 0.32.0)." in body
    assert "vllm serve me/q-int4\n" in body and "speculative" not in body.split("## Serving")[1].split("\n## ")[0]


def test_what_was_not_judged_is_said_to_be_so_and_no_drafts_are_asked_for_in_sglang() -> None:
    unknown = EngineVerdict(loads=None, mtp=None, reason="there are no rules for it", version="0.5.23")
    drafting = GOOD.model_copy(update={"mtp": None, "reason": "its scheme is new"})
    _, body = card_of(engines={"vllm": drafting, "sglang": unknown, "transformers": GOOD})
    assert "vLLM 0.32.0 loads it, and whether it drafts is not judged (its scheme is new);" in body
    assert "whether SGLang 0.5.23 loads it is not judged (there are no rules for it);" in body
    assert "sglang.launch_server" in body and "--speculative-algorithm" not in body
    assert body.count("By headers and configs") == 1 and "transformers 0.32.0 loads it." in body


def test_what_an_engine_did_outweighs_what_was_expected_of_it() -> None:
    _, body = card_of(benchmark=MEASURED_IN_VLLM, engines={"vllm": NO_MODEL})
    assert "does not load it" not in body and "(not run)" not in body


def test_a_base_that_brings_code_is_served_with_what_allows_it() -> None:
    _, body = card_of(recipe=recipe(allow_remote_code=True))
    assert body.count("\n  --trust-remote-code") == 3  # vLLM with MTP and without, SGLang
    assert 'AutoModelForCausalLM.from_pretrained("me/q-int4", device_map="auto", trust_remote_code=True)' in body
    assert "trust" not in card_of()[1]


def test_speed_is_told_with_mtp_and_without() -> None:
    _, body = card_of(benchmark=MEASURED_IN_VLLM)
    assert "| greedy, one at a time | 50.0 | 100.0 | 2.00 | 80.0% |" in body
    assert "| sampled, one at a time | 40.0 | - | - | - |" in body
    assert "| card: a\\|b | 100 | 50.0 | 100.0 | 80.0% |" in body


def test_an_unpublished_card_speaks_of_the_folder_that_it_lies_in() -> None:
    _, body = card_of(recipe=recipe(publish=None))
    assert "vllm serve . \\\n" in body and 'from_pretrained(".", ' in body


def test_somebodys_server_is_not_named() -> None:
    asked = recipe(benchmark={"engine": "url:http://gpu7.customer.example:8000", "concurrency": 2})
    _, body = card_of(recipe=asked)
    assert "customer" not in body and "concurrency: 2" in body
