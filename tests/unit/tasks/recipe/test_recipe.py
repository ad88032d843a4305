"""Recipes: what is refused before any work, and with which sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from requant.tasks.errors import RecipeError
from requant.tasks.recipe.loader import load_recipe, parse_recipe
from requant.tasks.recipe.quantize_section import PRESETS
from tests.factories.counting import calls
from tests.factories.recipes import SMALL, sentence, write


def with_key(key: str, value: str) -> str:
    """A small recipe with `a.b` set to a YAML value."""
    section, _, name = key.partition(".")
    if section == "base":
        return f"base: {{repo_id: a/b, {name}: {value}}}\n"
    if section == "publish" and name not in {"", "repo_id"}:
        return f"{SMALL}publish: {{repo_id: a/b, {name}: {value}}}\n"
    return SMALL + (f"{section}: {{{name}: {value}}}\n" if name else f"{section}: {value}\n")


def problems(folder: Path, text: str) -> list[str]:
    """The refusal of a recipe with several problems: a line each."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text))
    first, *lines = str(caught.value).split("\n- ")
    assert re.fullmatch(r"the recipe has \d+ problems:", first) and not any("\n" in line for line in lines)
    return lines


def test_a_recipe_of_a_base_alone_has_the_reference_cards_settings(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL))
    assert (recipe.base.repo_id, recipe.base.revision) == ("Qwen/Qwen3.6-27B", "main")
    quantize = recipe.quantize
    assert quantize.resolved == (4, 128, True)
    assert (quantize.iters, quantize.nsamples, quantize.seqlen, quantize.batch_size) == (200, 128, 2048, 8)
    assert (quantize.seed, quantize.format) == (42, "auto_round")
    assert (recipe.mtp, recipe.allow_remote_code, recipe.publish) == ("keep", False, None)
    assert recipe.gates.model_dump() == {
        "max_perplexity_increase": 0.05, "min_top1_agreement": 0.85, "min_mtp_acceptance_ratio": 0.95,
        "max_kl_divergence": 0.25, "max_block_error": 0.5, "max_weight_slope_error": 0.03, "max_weight_offset": 0.25,
        "min_task_recovery": 0.95, "mtp_acceptance": None, "max_probe_loss": 0.1,
        "max_experts_without_tokens": None,
    }  # fmt: skip


def test_every_key_of_a_recipe_is_read(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, """
base: {repo_id: a/b, revision: v1.0}
quantize:
  scheme: W8A16G64
  bits: 4
  group_size: 32
  sym: false
  format: auto_round:auto_awq
  iters: 0
  nsamples: 16
  seqlen: 64
  batch_size: 2
  lr: 0.005
  seed: 7
  calibration: me/text@main
  layers: {lm_head: {bits: 8}}
  torch_compile: false
  low_gpu_mem: true
  device: cuda:1
mtp: drop
allow_remote_code: true
gates: {max_perplexity_increase: null, min_top1_agreement: 0, min_mtp_acceptance_ratio: 1}
benchmark: {engine: none}
publish: {repo_id: me/out, private: false}
"""))  # fmt: skip
    assert recipe.quantize.resolved == (4, 32, False)
    assert recipe.quantize.layers == {"lm_head": {"bits": 8}}
    assert (recipe.quantize.lr, recipe.quantize.torch_compile, recipe.quantize.low_gpu_mem) == (0.005, False, True)
    assert (recipe.gates.max_perplexity_increase, recipe.gates.min_top1_agreement) == (None, 0)
    assert recipe.publish is not None and (recipe.publish.repo_id, recipe.publish.private) == ("me/out", False)
    assert (recipe.mtp, recipe.benchmark.engine, recipe.quantize.calibration) == ("drop", "none", "me/text@main")


RESOLVED = {
    "W4A16": (4, 128, True),
    "W2A16": (2, 128, True),
    "W3A16": (3, 128, True),
    "W8A16": (8, 128, True),
    "W2A16G32": (2, 32, True),
    "W4A16G64": (4, 64, True),
}


@pytest.mark.parametrize("scheme", RESOLVED)
def test_a_scheme_stands_for_bits_group_size_and_symmetry(scheme: str, tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, with_key("quantize.scheme", scheme))).quantize.resolved == RESOLVED[scheme]


@pytest.mark.parametrize(("key", "close"), [
    ("bsae.repo_id", "base"), ("base.repoid", "repo_id"), ("quantize.iter", "iters"),
    ("gates.min_top1", "min_top1_agreement"), ("publish.privat", "private"),
    ("benchmark.flag", "flags"), ("mtpp", "mtp"), ("quantize.presets", "preset"),
])  # fmt: skip
def test_an_unknown_key_is_refused_with_the_one_that_was_meant(key: str, close: str, tmp_path: Path) -> None:
    message = sentence(tmp_path, with_key(key, "1"))
    assert key.split(".")[0] in message and f"did you mean {close}?" in message


def test_an_unknown_key_like_no_other_is_refused_with_all_that_are_allowed(tmp_path: Path) -> None:
    message = sentence(tmp_path, with_key("publish.zzz", "1"))
    assert message == (
        "publish.zzz is not a key of a recipe: allowed are repo_id, private, gated, license, collection, pull_request, "
        "overwrite"
    )


WRONG = {
    "base.repo_id": ["5", "null", "[]", "a/b/c", "../b", "'a b/c'", "/a", "a/", '"a/b\\n"', "'https://huggingface.co/a/b'"],
    "base.revision": ["5", "''", "null", "1.0"],
    "quantize.bits": ["5", "'4'", "true", "16", "0"],
    "quantize.group_size": ["0", "-2", "100", "'32'"],
    "quantize.sym": ["1", "'yes'", "0"],
    "quantize.scheme": ["W5A16", "W4A8", "4", "MXFP4", "w4a16", "W4A16G128x", "null"],
    "quantize.format": ["gguf", "auto_gptq", "1", "auto_round:marlin"],
    "quantize.iters": ["-1", "1.5", "'200'", "true", "10001", "null"],
    "quantize.nsamples": ["0", "-5", "1e3"],
    "quantize.seqlen": ["0", "15", "200000"],
    "quantize.batch_size": ["0", "2000", "'8'"],
    "quantize.lr": ["0", "-1", "2", ".nan", "'fast'"],
    "quantize.seed": ["-1", "4294967296", "'x'"],
    "quantize.layers": ["[]", "lm_head"],
    "quantize.torch_compile": ["1", "maybe", "null"],
    "quantize.gpus": ["0", "many", "1.5", "true", "null"],
    "quantize.device": ["gpu", "'cuda:'", "cuda:x", "0"],
    "mtp": ["KEEP", "true", "int3", "null"],
    "allow_remote_code": ["1", "'true'"],
    "gates.max_perplexity_increase": ["'5%'", ".nan", "-2", "true"],
    "gates.min_top1_agreement": ["1.1", "-0.1", "85"],
    "benchmark.engine": [
        "fast", "1", "'url:'", "url:ftp://a", "url:http://me:secret@host", "'url:http://a b'", "'url:http://a/?key=1'",
    ],
    "benchmark.prompts": ["card", "[]"],
    "benchmark.concurrency": ["0", "'4'", "1000"],
    "benchmark.draft_tokens": ["0", "9"],
    "benchmark.max_tokens": ["0", "1.5"],
    "publish.repo_id": [
        "a b", "5", "noslash", "me/a--b", "me/a..b", "m--e/a", "me/-a", "me/a-", "me/.a", "me/a.", "me-/a", "me/a.git",
        f"me/{'a' * 97}", "me/a/b", "/a", "me/", "me/ä", "''", '"me/a\\n"',
    ],
    "publish.private": ["1", "'no'"],
    "publish": ["[]", "me/out"],
    "quantize": ["[]", "W4A16", "null"],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_wrong_value_is_refused_with_its_key_and_value(key: str, value: str, tmp_path: Path) -> None:
    message = sentence(tmp_path, with_key(key, value))
    assert key in message
    assert repr(yaml.safe_load(value)) in message


def test_what_is_allowed_is_said(tmp_path: Path) -> None:
    assert "2, 3, 4 or 8" in sentence(tmp_path, with_key("quantize.bits", "5"))
    assert "owner/name" in sentence(tmp_path, with_key("base.repo_id", "a/b/c"))
    assert "W4A16" in sentence(tmp_path, with_key("quantize.scheme", "W5A16"))
    assert "auto, vllm, torch, none, or url:http" in sentence(tmp_path, with_key("benchmark.engine", "sglang"))


def test_a_recipe_without_a_base_is_refused(tmp_path: Path) -> None:
    assert sentence(tmp_path, "mtp: keep\n") == "base is missing: every recipe needs it"
    assert "base.repo_id is missing" in sentence(tmp_path, "base: {}\n")


IMPOSSIBLE = {
    "{batch_size: 8, nsamples: 4}": "batch_size 8 is larger than nsamples 4",
    "{format: 'auto_round:auto_awq', bits: 8}": "holds 4 bits only, not 8",
    "{format: 'auto_round:auto_awq', scheme: W2A16}": "holds 4 bits only, not 2",
    "{format: 'auto_round:auto_gptq', sym: false}": "loses accuracy with sym false",
    "{preset: auto-round-worst}": "'auto-round-worst'",
    "{preset: [auto-round]}": "preset",
    "{preset: {}}": "preset",
    "{preset: null}": "preset",
}


@pytest.mark.parametrize("quantize", IMPOSSIBLE)
def test_an_impossible_combination_is_refused(quantize: str, tmp_path: Path) -> None:
    assert IMPOSSIBLE[quantize] in sentence(tmp_path, f"{SMALL}quantize: {quantize}\n")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_stands_for_its_keys_and_nothing_else(preset: str, tmp_path: Path) -> None:
    short = load_recipe(write(tmp_path, f"{SMALL}quantize: {{preset: {preset}}}\n"))
    long = load_recipe(write(tmp_path, f"{SMALL}quantize: {json.dumps(PRESETS[preset])}\n"))
    assert short == long


def test_presets_are_those_of_auto_round() -> None:
    best, light = PRESETS["auto-round-best"], PRESETS["auto-round-light"]
    assert (best["iters"], best["nsamples"], light["iters"], light["lr"]) == (1000, 512, 50, 5e-3)


def test_a_key_beside_a_preset_wins(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, f"{SMALL}quantize: {{iters: 3, preset: auto-round-best}}\n"))
    assert (recipe.quantize.iters, recipe.quantize.nsamples) == (3, 512)


def test_set_overrides_adds_and_nests(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, f"{SMALL}quantize: {{iters: 5}}\n"),
        [
            "quantize.iters=7",
            "mtp=drop",
            "gates.min_top1_agreement=null",
            "publish.repo_id=me/x",
            "quantize.layers.lm_head.bits=8",
        ],
    )
    assert (recipe.quantize.iters, recipe.mtp, recipe.gates.min_top1_agreement) == (7, "drop", None)
    assert recipe.quantize.layers == {"lm_head": {"bits": 8}}
    assert recipe.publish is not None and recipe.publish.repo_id == "me/x"


def test_a_path_that_is_not_there_is_named_as_it_was_given() -> None:
    for given in ("./nothing", "nothing", "recipes/nothing.yml"):
        with pytest.raises(RecipeError, match=f"^{re.escape(given)} does not exist: name the YAML file of a recipe"):
            load_recipe(given)


def test_a_repo_with_the_name_of_a_folder_beside_the_recipe_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "my-finetune").mkdir()
    recipe = load_recipe(write(tmp_path, "base: my-finetune\n"))
    assert recipe.base.repo_id == "my-finetune" and "write ./my-finetune" in caplog.text


def test_the_last_of_two_overrides_wins(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, SMALL), ["mtp=drop", "mtp=keep"]).mtp == "keep"


def test_a_value_may_hold_an_equals_sign(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, SMALL), ["base.revision=a=b"]).base.revision == "a=b"


OVERRIDES = {
    "quantize.iters": "KEY=VALUE",
    "=5": "KEY=VALUE",
    "": "KEY=VALUE",
    "quantize.iters=[": "not YAML",
    "quantize.iters=!!python/object/apply:os.system [id]": "not YAML",
    "quantize.lr=2020-13-45": "quantize.lr",
    "quantize.iters=many": "quantize.iters",
    "quantize.itres=5": "did you mean iters?",
    "iters=5": "iters is not a key of a recipe: did you mean quantize.iters?",
    "quantize.engine=vllm": "quantize.engine is not a key of a recipe: did you mean eval.engine or benchmark.engine?",
    "sets=[tools]": "did you mean probes.sets?",
    "publish.private=true": "publish.repo_id is missing: add it",
    "base.repo_id.x=1": "not a group of keys",
    "mtp.x.y=1": "mtp",
    "quantize=5": "quantize",
    "quantize.iters=!!bool x": "quantize.iters",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_override_is_refused(override: str, tmp_path: Path) -> None:
    assert OVERRIDES[override] in sentence(tmp_path, SMALL + "mtp: keep\n", override)


HOSTILE = {
    "a python object": SMALL + "mtp: !!python/object/apply:os.system ['touch /tmp/owned']\n",
    "a python name": SMALL + "mtp: !!python/name:os.system\n",
    "a tag of its own": SMALL + "mtp: !keep drop\n",
    "a list": "- base\n",
    "a word": "base\n",
    "nothing": "",
    "null": "null\n",
    "two documents": SMALL + "---\n" + SMALL,
    "cut": "base: {repo_id: ",
    "a tab": "base:\n\trepo_id: a/b\n",
    "an unknown anchor": "base: *nothing\n",
    "a key that is a list": "? [a, b]\n: 1\n" + SMALL,
    "a key that is a number": SMALL + "5: 1\n",
    "a key that is null": SMALL + "null: 1\n",
    "a key with a line break": SMALL + '"a\\nb": 1\n',
    "binary": bytes(range(256)),
    "NUL bytes": b"\0" * 64,
    "a picture": b"\x89PNG\r\n\x1a\n" + b"\xff" * 64,
    "UTF-16 without a mark": SMALL.encode("utf-16-le"),
    "a control character": b"base: {repo_id: a\x07/b}\n",
    "nested lists": "base: " + "[" * 600 + "\n",
    "nested mappings": SMALL + "quantize: " + "{layers: " * 3000 + "1" + "}" * 3000 + "\n",
    "a mapping in itself": "base: &b {repo_id: *b}\n",
    "a list in itself": SMALL + "quantize: {layers: &l {a: *l}}\n",
    "an impossible date": SMALL + "mtp: 2020-13-45\n",
    "an impossible bool": SMALL + "mtp: !!bool perhaps\n",
    "an empty integer": SMALL + "mtp: !!int ''\n",
    "an impossible timestamp": SMALL + "mtp: !!timestamp x\n",
    "an endless integer": SMALL + f"quantize: {{seed: {'9' * 5000}}}\n",
    "a long value": SMALL + f"mtp: {'x' * 100_000}\n",
    "a long key": SMALL + f"? {'x' * 100_000}\n: 1\n",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_recipe_is_refused_in_one_sentence(text: str | bytes, tmp_path: Path) -> None:
    sentence(tmp_path, text)
    assert not Path("/tmp/owned").exists()


@pytest.mark.parametrize(
    "value", ["2020-01-01", "!!binary aGk=", "!!set {a, b}", ".nan"], ids=["date", "bytes", "set", "nan"]
)
def test_a_layer_setting_that_json_cannot_hold_is_refused(value: str, tmp_path: Path) -> None:
    """It could not be part of a stage key, nor be handed to the process that quantizes."""
    assert "quantize.layers" in sentence(tmp_path, f"{SMALL}quantize: {{layers: {{lm_head: {{bits: {value}}}}}}}\n")


def test_aliases_that_grow_a_millionfold_are_refused_before_they_are_followed(tmp_path: Path) -> None:
    lines = ["x0: &x0 [a, a, a, a, a, a, a, a, a, a]"]
    lines += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 7)]
    for base in ("*x6", "{repo_id: *x6}"):  # a million, written out
        text = "\n".join([*lines, f"base: {base}", ""])
        assert calls(lambda text=text: problems(tmp_path, text)) < 100_000
        assert max(map(len, problems(tmp_path, text))) < 300


def test_a_calibration_file_is_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    recipe = load_recipe(write(tmp_path, with_key("quantize.calibration", "texts/a.txt")))
    assert recipe.quantize.calibration == str((tmp_path / "texts" / "a.txt").resolve())


@pytest.mark.parametrize(
    "name", ["none.txt", "./none.parquet", "/none/at/all.jsonl", "~nobody-of-that-name/a.txt", '"./a\\0b"']
)
def test_a_calibration_file_that_is_not_there_is_refused_by_its_key(name: str, tmp_path: Path) -> None:
    assert "quantize.calibration" in sentence(tmp_path, with_key("quantize.calibration", name))


@pytest.mark.parametrize("name", ["builtin:python", "HuggingFaceFW/fineweb@abc", "wikitext"])
def test_a_text_that_is_no_file_is_left_as_it_is(name: str, tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, with_key("quantize.calibration", name))).quantize.calibration == name


SOURCES = [
    "builtin:mixed",
    {"source": "me/chats@main:default:train", "weight": 2.0, "field": "chosen"},
    {"source": "texts/a.txt", "weight": None, "field": None},
    "self",
]


def test_calibration_is_one_source_or_a_list_with_weights_and_survives_json() -> None:
    recipe = parse_recipe({"base": {"repo_id": "a/b"}, "quantize": {"calibration": SOURCES}})
    assert [(one.source, one.weight, one.field) for one in recipe.quantize.sources] == [
        ("builtin:mixed", None, None), ("me/chats@main:default:train", 2.0, "chosen"), ("texts/a.txt", None, None),
        ("self", None, None),
    ]  # fmt: skip
    assert parse_recipe(json.loads(recipe.model_dump_json())) == recipe
    for one in (SOURCES[1], "me/text"):
        found = parse_recipe({"base": {"repo_id": "a/b"}, "quantize": {"calibration": one}})
        assert len(found.quantize.sources) == 1


def test_every_local_source_of_a_list_is_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl.gz").write_bytes(b"")
    named = "[texts/a.jsonl.gz, {source: ./texts, weight: 2}, me/text]"
    found = load_recipe(write(tmp_path, with_key("quantize.calibration", named))).quantize.sources
    assert [one.source for one in found] == [f"{tmp_path}/texts/a.jsonl.gz", f"{tmp_path}/texts", "me/text"]
    told = sentence(tmp_path, with_key("quantize.calibration", "[me/text, {source: ./gone, weight: 2}]"))
    assert told.startswith(f"quantize.calibration.1.source: the file {tmp_path}/gone does not exist")


WRONG_SOURCES = {
    "quantize.calibration: [] is not allowed": [],
    "quantize.calibration: 5 is not allowed": 5,
    "quantize.calibration: '' is not allowed": "",
    "quantize.calibration.0: [1] is not allowed": [[1]],
    "quantize.calibration.0.weight: 0 is not allowed": [{"source": "a", "weight": 0}],
    "quantize.calibration.0.wieght is not a key of a recipe: did you mean weight?": [{"source": "a", "wieght": 1}],
    "quantize.calibration.source is missing: add it": {"weight": 1.0},
    "quantize: calibration names self twice": ["self", "self"],
    "quantize: calibration builtin:mixed has no columns to choose from": {"source": "builtin:mixed", "field": "a"},
    "quantize: calibration builtin:prose does not exist": ["builtin:mixed", "builtin:prose"],
}


@pytest.mark.parametrize(("told", "given"), WRONG_SOURCES.items())
def test_a_wrong_source_is_told_with_its_place(told: str, given: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"base": {"repo_id": "a/b"}, "quantize": {"calibration": given}})
    assert str(caught.value).startswith(told)


def test_every_problem_of_a_recipe_is_told_at_once_and_each_key_once(tmp_path: Path) -> None:
    text = "model: me/x\nquantize: {bits: '4', torch_compile: maybe, grop_size: 3}\noutputs: [{}, {scheme: W9A16}]\n"
    told = problems(tmp_path, text)
    assert [line.split(" ")[0].rstrip(":") for line in told] == [
        "base", "quantize.bits", "quantize.torch_compile", "quantize.grop_size", "outputs.1.scheme", "model"
    ]  # fmt: skip
    many = problems(tmp_path, SMALL + "".join(f"gates{number}: 1\n" for number in range(1000)))
    assert len(many) == 21 and many[-1] == "and 980 more"


def test_a_wrong_value_of_a_probe_is_told_with_its_key(tmp_path: Path) -> None:
    text = f"{SMALL}probes: {{max_context: 5, retrieval_minutes: x}}\n"
    assert [line.split(":")[0] for line in problems(tmp_path, text)] == [
        "probes.max_context",
        "probes.retrieval_minutes",
    ]


def test_a_recipe_survives_json(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, f"{SMALL}quantize: {{preset: auto-round-light}}\npublish: {{repo_id: a/b}}\n"))
    document: dict[str, Any] = json.loads(recipe.model_dump_json())
    assert parse_recipe(document) == recipe


def test_a_recipe_may_not_publish_over_its_own_base() -> None:
    with pytest.raises(RecipeError, match=r"^publish.repo_id A/b is the base itself: name a repo of your own$"):
        parse_recipe({"base": {"repo_id": "a/b"}, "publish": {"repo_id": "A/b"}})


def test_what_the_hub_says_of_a_repos_name_is_handed_on() -> None:
    def said(repo_id: str) -> str:
        with pytest.raises(RecipeError) as caught:
            parse_recipe({"base": {"repo_id": "a/b"}, "publish": {"repo_id": repo_id}})
        return str(caught.value)

    whole = "publish.repo_id: write owner/name as the Hub takes it (it names no owner), not 'noslash'"
    assert said("noslash") == whole
    assert "(cannot have -- or .. in repo_id), not 'me/a--b'" in said("me/a--b")
    assert "the maximum length is 96" in said(f"me/{'a' * 97}")


def test_a_base_without_an_owner_is_one_of_the_hubs_oldest() -> None:
    assert parse_recipe({"base": {"repo_id": "gpt2"}}).base.repo_id == "gpt2"


def test_a_builtin_text_that_does_not_exist_is_refused_before_any_work() -> None:
    with pytest.raises(RecipeError, match="builtin:prose does not exist: use builtin:mixed or builtin:python"):
        parse_recipe({"base": {"repo_id": "a/b"}, "quantize": {"calibration": "builtin:prose"}})


@pytest.mark.parametrize(
    ("benchmark", "words"),
    [
        ({"base_engine": "vllm"}, "benchmark.base_engine: use url:http://HOST:PORT"),
        ({"base_engine": "url:http://me:secret@host"}, "benchmark.base_engine: use url:http://HOST:PORT"),
        ({"engine": "url:http://a:1", "base_engine": "url:http://a:1"}, "base_engine url:http://a:1 serves the result"),
        ({"engine": "url:http://a:1/v1", "base_engine": "url:http://a:1/"}, "url:http://a:1/ serves the result"),
        ({"acceptance_precision": 0}, "benchmark.acceptance_precision"),
        ({"acceptance_precision": "exact"}, "benchmark.acceptance_precision"),
    ],
)
def test_an_impossible_comparison_of_drafts_is_refused_by_name(benchmark: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        parse_recipe({"base": {"repo_id": "a/b"}, "benchmark": benchmark})


def test_unknown_keys_that_are_like_no_other_are_told_in_one_sentence(tmp_path: Path) -> None:
    (told,) = [*{sentence(tmp_path, f"{SMALL}zzz: 1\nyyy: 2\nxxx: 3\n")}]
    assert told.startswith("zzz is not a key of a recipe, nor are yyy, xxx: allowed are base, ")
    first, second = problems(tmp_path, f"{SMALL}zzz: 1\nquantise: 2\nyyy: 3\n")
    assert first.startswith("zzz is not a key of a recipe, nor is yyy: ") and "did you mean quantize?" in second


def test_a_mapping_with_nothing_like_a_key_is_no_recipe(tmp_path: Path) -> None:
    config = {"architectures": ["A"], "hidden_size": 8, "model_type": "qwen3", "head_dim": 4, "torch_dtype": "bfloat16"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path} is no recipe: it has none of its keys, as base: owner/name"
    assert "did you mean quantize.iters" in "".join(problems(tmp_path, "iters: 5\n"))


def test_a_folder_of_recipes_in_place_of_one_is_named_as_that(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lr: 3\n")
    (tmp_path / "b.yaml").write_text(SMALL)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path)
    assert (
        str(caught.value) == f"{tmp_path} is a folder of recipes, and no model: name one of them, as {tmp_path}/b.yaml"
    )
    (tmp_path / "config.json").write_text("{}")
    assert load_recipe(tmp_path).base.folder == str(tmp_path), "a recipe may lie beside its model"
