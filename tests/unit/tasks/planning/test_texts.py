"""A run's texts, read before it begins."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from requant.tasks.errors import RecipeError
from requant.tasks.excerpt import text_files
from requant.tasks.hub.revision import HubFile, Revision
from requant.tasks.planning.inputs import Inputs
from requant.tasks.planning.texts import (
    MAX_CHARACTERS_PER_BUILTIN_TOKEN,
    MAX_PLANNED_BYTES,
    Texts,
    _count_at_least,
)
from requant.tasks.quantizing.samples import SampleSource, calibration_samples, shares
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.quantize_section import PRESETS, SELF
from requant.tasks.store import Store
from requant.tasks.texts.calibration import Calibration, CalibrationSource, find_calibration
from requant.tasks.texts.text import BUILTIN_FOLDER, Text, find_text
from requant.tasks.validating import window_length
from tests.factories.paths import ROOT, TINY

pytestmark = pytest.mark.usefixtures("quick_rendering")

BASE = Revision("a/b", "0" * 40, ())
RUN = {"quantize", "validate"}
LONG = window_length({"max_position_embeddings": 32_768})


def problems(
    store: Store,
    calibration: Text,
    validation: Text,
    *,
    to_run: set[str] = RUN,
    fetch: bool = True,
    notes: list[str] | None = None,
    **quantize: Any,
) -> list[str]:
    """What a plan says of two texts. The skeleton is the tiny base's own folder: nothing is to be fetched."""
    small = {"nsamples": 8, "seqlen": 64, "batch_size": 4, **quantize}
    recipe = parse_recipe({"base": {"repo_id": "a/b"}, "quantize": small})
    texts = Texts(
        functools.partial(text_files, store),
        Inputs(BASE, Calibration.of(calibration), validation),
        TINY,
        store.cache.root / "scratch",
        fetch=fetch,
    )
    found = texts.problems(recipe, to_run, LONG)
    if notes is not None:
        notes += texts.notes
    return found


def local(folder: Path, name: str, content: str) -> Text:
    (folder / name).write_text(content)
    return find_text(str(folder / name))


PYTHON, EVALUATION = find_text("builtin:python"), find_text("builtin:python-evaluation")


def test_the_builtin_texts_have_nothing_wrong(store: Store) -> None:
    assert problems(store, PYTHON, EVALUATION) == []
    assert problems(store, find_text("builtin:mixed"), find_text("builtin:mixed-evaluation")) == []


def test_a_validation_text_too_short_is_told_before_any_work(store: Store, tmp_path: Path) -> None:
    (told,) = problems(store, PYTHON, local(tmp_path, "short.txt", "x = 1\n"))
    assert told == ("validation.text: short.txt has 5 tokens, and measuring needs at least 512: name a longer text")


def test_a_calibration_text_too_short_is_told_with_the_sentence_of_the_stage(store: Store, tmp_path: Path) -> None:
    text = local(tmp_path, "short.txt", "x = 1\n" * 20)
    (told,) = problems(store, text, EVALUATION)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    with pytest.raises(ValueError) as caught:
        calibration_samples(tokenizer, [SampleSource(name=text.name, paths=[text.path])], 8, 64)
    assert told == f"quantize.calibration: {caught.value}" and "8 samples of 64 need 512" in told


def test_a_text_too_short_is_told_with_what_it_has_room_for_and_what_to_name_instead() -> None:
    tokens = {"prose": 120_000, "code": 119_000, "chat": 74_000}
    best = PRESETS["auto-round-best"]
    with pytest.raises(RecipeError) as caught:
        shares(tokens, best["nsamples"], best["seqlen"])
    told = str(caught.value)
    assert "512 samples of 2048 need 1,048,576" in told and "room for 152 of this length" in told
    assert "set quantize.nsamples to at most 152" in told and "a Hub data set or a local file" in told
    assert sum(shares(tokens, 152, 2048).values()) == 152
    with pytest.raises(RecipeError, match=r"room for 0 of this length: lower quantize\.seqlen, or"):
        shares({"": 15}, 1, 16)


def test_the_recipe_in_the_documentation_has_enough_text(store: Store) -> None:
    page = (ROOT / "docs" / "how-to" / "recipe.md").read_text()
    recipe = parse_recipe(yaml.safe_load(page.split("```yaml\n")[1].split("```")[0]))
    inputs = Inputs(BASE, find_calibration(recipe.quantize), EVALUATION)
    texts = Texts(functools.partial(text_files, store), inputs, TINY, store.cache.root / "scratch", fetch=False)
    for name, one in recipe.each.items():
        assert texts.problems(one, {"quantize"}, LONG) == [], name


def test_a_text_that_the_characters_do_not_judge_is_counted(store: Store, tmp_path: Path) -> None:
    enough = local(tmp_path, "enough.txt", "x = 1\n" * 130)  # 780 characters, at least 4 tokens a line
    assert problems(store, enough, EVALUATION) == []


def test_chats_are_counted_as_the_template_makes_them(store: Store, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "x"}]}] * 90  # 512 tokens with the template's alone
    text = local(tmp_path, "chats.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert text.chats and problems(store, text, EVALUATION) == []


def test_enough_chats_are_read_however_little_of_each_can_be_in_a_sample(store: Store, tmp_path: Path) -> None:
    """Each has one turn of 300 tokens: one sample of 64 comes of each, and 8 are needed."""
    rows = [{"messages": [{"role": "user", "content": f"x{n} = 1\n" * 60}]} for n in range(20)]
    text = local(tmp_path, "long.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert problems(store, text, EVALUATION) == []
    (told,) = problems(store, text, EVALUATION, nsamples=21)
    assert "21 samples of 64 need 1,344; there is room for 20 of this length" in told


def test_a_file_that_is_cut_off_is_told_although_its_beginning_has_enough_tokens(store: Store, tmp_path: Path) -> None:
    text = local(tmp_path, "cut.jsonl", (json.dumps({"text": "x = 1\n" * 200}) + "\n") * 3 + '{"text": "cut o')
    (told,) = problems(store, text, EVALUATION)
    assert told.startswith("quantize.calibration: cut.jsonl cannot be read (JSONDecodeError: Unterminated string")


def test_rows_that_cannot_be_used_are_told_by_their_columns(store: Store, tmp_path: Path) -> None:
    text = local(tmp_path, "rows.jsonl", '{"prompt": "a", "answer": "b"}\n')
    sentence = "the rows of rows.jsonl have the columns prompt, answer; a row needs text, messages, conversations, "
    told = problems(store, text, text)
    assert [one.partition(": ")[0] for one in told] == ["quantize.calibration", "validation.text"]
    assert all(sentence in one for one in told)


def test_what_no_stage_will_read_is_not_looked_at(store: Store, tmp_path: Path) -> None:
    text = local(tmp_path, "short.txt", "x")
    assert problems(store, text, text, to_run={"publish"}) == []


def test_a_data_set_is_judged_by_its_columns_and_else_not_judged(store: Store) -> None:
    notes: list[str] = []
    wrong = Text("me/wrong@1", "d", dataset=BASE, columns=("prompt", "answer"))
    right = Text("me/right@1", "d", dataset=BASE, columns=("text", "id"))
    (told,) = problems(store, right, wrong, fetch=False, notes=notes)
    assert told.startswith("validation.text: the rows of me/wrong@1 have the columns prompt, answer;")
    lines = replace(BASE, files=tuple(HubFile(name, 9, "b", None) for name in ("a.jsonl", "b.jsonl")))
    assert problems(store, right, replace(wrong, dataset=lines), fetch=False) == []  # the other file may have others
    assert notes == ["quantize.calibration: whether me/right@1 has enough tokens is not judged: a run reads it first"]


def test_beside_a_source_that_is_not_judged_the_others_are(store: Store, tmp_path: Path) -> None:
    short = local(tmp_path, "short.txt", "x = 1\n" * 20)
    later = Text("me/right@1", "d", dataset=BASE, columns=("text",))
    recipe = parse_recipe({"base": {"repo_id": "a/b"}, "quantize": {"nsamples": 8, "seqlen": 64, "batch_size": 4}})

    def told(*sources: CalibrationSource) -> tuple[list[str], list[str]]:
        inputs = Inputs(BASE, Calibration(sources), EVALUATION)
        texts = Texts(functools.partial(text_files, store), inputs, TINY, tmp_path / "scratch", fetch=False)
        return texts.problems(recipe, {"quantize"}, LONG), texts.notes

    for unknown in (later, find_text(SELF)):
        (problem,), (note,) = told(CalibrationSource(unknown, 1), CalibrationSource(short, 1))
        assert problem.startswith(
            "quantize.calibration: short.txt has 100 tokens and room for 1 of the 4 samples of 64"
        )
        assert note.startswith("quantize.calibration: ")
        assert told(CalibrationSource(unknown), CalibrationSource(short)) == ([], [note])  # it fills up


def test_the_builtin_mixed_text_is_enough_for_the_default_samples(store: Store) -> None:
    assert problems(store, find_text("builtin:mixed"), EVALUATION, nsamples=128, seqlen=2048) == []


def test_the_plan_of_a_default_recipe_fetches_no_large_tokenizer(store: Store, tmp_path: Path) -> None:
    """The one in this sparse checkout is nothing but zeros: reading it would be a problem."""
    recipe = parse_recipe({"base": {"repo_id": "a/b"}})
    with (tmp_path / "tokenizer.json").open("wb") as stream:
        stream.truncate(MAX_PLANNED_BYTES + 1)

    def told(calibration: Text, fetch: bool) -> list[str]:
        texts = Texts(
            functools.partial(text_files, store),
            Inputs(BASE, Calibration.of(calibration), validation),
            tmp_path,
            tmp_path / "scratch",
            fetch=fetch,
        )
        return texts.problems(recipe, RUN, LONG)

    validation = find_text(recipe.validation.text)
    assert told(find_text("builtin:mixed"), fetch=False) == told(PYTHON, fetch=False) == []
    (problem,) = told(PYTHON, fetch=True)  # a run loads it
    assert "the tokenizer of the base cannot be loaded" in problem


def test_the_least_tokens_of_a_builtin_text_are_below_those_that_were_counted() -> None:
    """With 200,000 entries, as tasks/texts/builtin/README.md has it: with fewer entries there are more tokens."""
    lines = re.findall(
        r"^\| `(\w+)` \| [\d,]+ \| [\d,]+ \| ([\d,]+) \|", (BUILTIN_FOLDER / "README.md").read_text(), re.M
    )
    counted = {domain: int(tokens.replace(",", "")) for domain, tokens in lines}
    text = find_text("builtin:mixed")
    assert text.path is not None
    least = _count_at_least(text, [text.path], 0, MAX_CHARACTERS_PER_BUILTIN_TOKEN)
    assert set(least) == set(counted) and all(0 < least[domain] < 0.98 * counted[domain] for domain in counted)
    # A close bound, except where reasoning, calls and schemas of tools are tokens whose characters are not counted.
    assert all(least[domain] > 0.77 * counted[domain] for domain in ("prose", "code", "chat"))


def test_tasks_that_want_a_chat_template_are_told_that_the_base_has_none(store: Store, tmp_path: Path) -> None:
    """lm-eval would say so after the quantization."""
    recipe = parse_recipe({"base": {"repo_id": "a/b"}, "eval": {"tasks": ["gsm8k"], "chat_template": True}})
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.json").symlink_to(TINY / "tokenizer.json")

    def told(**changes: Any) -> list[str]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))
        texts = Texts(
            functools.partial(text_files, store),
            Inputs(BASE, Calibration.of(PYTHON), EVALUATION),
            tmp_path,
            tmp_path / "scratch",
            fetch=True,
        )
        return texts.problems(recipe, {"validate"}, LONG)

    assert told() == ["eval.chat_template: the base has no chat template: leave it out, or set it to false"]
    assert told(chat_template="{{ messages }}") == []
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert told() == []


def test_a_text_that_is_gone_is_told_where_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"validation\.text: .*gone\.txt cannot be read"):
        find_text(str(tmp_path / "gone.txt"), "validation.text")
