"""The front matter as huggingface_hub reads it: measured values are evaluation results of the model."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from requant.tasks.card.card import make_card
from requant.tasks.hub.revision import Revision
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Recipe
from tests.factories.cards import MEASURED, base_card, card_of, facts_of, recipe

SHA = "5503434ddd753f426f4b38109466949a1217c2bb"
TASKS = {
    "arc_easy": {"metric": "acc", "base": 0.7, "ours": 0.68766, "recovery": 0.98},
    "gsm8k": {"metric": "exact_match, strict-match", "base": 0.0, "ours": 0.5, "recovery": None},
}


def card(**changes: Any) -> ModelCard:
    return ModelCard(make_card(facts_of(**changes)))


def results(**changes: Any) -> list[EvalResult]:
    found: list[EvalResult] = card(measured={**MEASURED, **changes}).data.eval_results
    return found


def test_a_card_loads_as_it_was_made() -> None:
    made = card(base_card=base_card("license: mit\nlanguage: [en, de]"), measured={**MEASURED, "tasks": TASKS})
    assert (made.data.license, made.data.language, made.data.model_name) == ("mit", ["en", "de"], "q-int4")
    assert made.data.base_model_relation == "quantized"
    assert ModelCard(str(made)).data.to_dict() == made.data.to_dict()


def test_perplexity_is_a_result_on_the_commit_of_its_text() -> None:
    (result,) = results(text=f"owner/texts@{SHA}")
    assert (result.metric_type, result.metric_value) == ("perplexity", 3.1416)
    assert (result.dataset_type, result.dataset_name) == ("owner/texts", "owner/texts")
    assert result.dataset_revision == SHA


def test_perplexity_and_divergence_are_results_in_each_domain() -> None:
    values = {"tokens": 8192, "base_perplexity": 3.0, "perplexity_increase": 0.1, "kl_divergence_p99": 1.0}
    values |= {"top1_agreement": 0.9}
    domains = {
        "code": {**values, "perplexity": 3.3, "kl_divergence": 0.0846},
        "chat": {**values, "perplexity": float("nan"), "kl_divergence": 0.0907},
    }
    _, code, code_kl, chat_kl = results(text="builtin:mixed-evaluation", domains=domains)
    assert (code.metric_type, code.metric_value, code.dataset_config) == ("perplexity", 3.3, "code")
    assert (code_kl.metric_type, code_kl.metric_value, code_kl.dataset_config) == ("kl_divergence", 0.0846, "code")
    assert chat_kl.dataset_name == "builtin:mixed-evaluation, chat" and chat_kl.metric_value == 0.0907


def test_each_task_is_a_result_of_its_first_metric() -> None:
    _, easy, maths = results(tasks=TASKS)
    assert (easy.dataset_type, easy.metric_type, easy.metric_value) == ("arc_easy", "acc", 0.6877)
    assert (maths.metric_type, maths.metric_name) == ("exact_match", "exact_match, strict-match")


def test_what_was_not_measured_or_is_no_number_is_no_result() -> None:
    odd = {"arc_easy": {**TASKS["arc_easy"], "ours": float("nan")}}
    data = card(measured={**MEASURED, "perplexity": None, "tasks": odd}).data
    assert not data.eval_results and "model-index" not in data.to_dict()


def test_a_text_of_somebodys_own_is_named_without_its_folder() -> None:
    (result,) = results(text="/data/customer/mine.txt")
    assert result.dataset_name == "mine.txt"


def test_a_license_that_is_linked_and_not_named_is_not_named() -> None:
    made = card(base_card=base_card("license_link: LICENSE"))
    assert made.data.license_link == "LICENSE" and "The base's card names no license" in made.text
    assert "mit, apache-2.0, see the front matter" in card(base_card=base_card("license: [mit, apache-2.0]")).text


def test_a_card_that_is_not_published_has_a_name_too() -> None:
    assert card(recipe=recipe(publish=None)).data.model_name == "Qwen3.6-27B in 4 bits"


def local_card(stated: str, **base: str) -> tuple[dict[str, Any], str]:
    """The card of a base in a folder whose own card states `stated`."""
    made = recipe(base={"folder": "/home/me/secret place/my tuné", **base})
    local = Revision("my tuné", SHA, (), is_local=True)
    return card_of(base_card=base_card(f"license: mit\n{stated}"), recipe=made, base=local)


@pytest.mark.parametrize(
    ("stated", "names"),
    [
        ("base_model: Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-4B"),
        ("base_model: [a/b, c/d]", ["a/b", "c/d"]),
        ("base_model:\n- /home/me/secret place\n- a/b\n- [c/d]", "a/b"),
    ],
)
def test_a_local_base_is_a_fine_tune_of_what_its_own_card_names(stated: str, names: str | list[str]) -> None:
    data, text = local_card(stated)
    assert (data["base_model"], data["base_model_relation"], data["license"]) == (names, "finetune", "mit")
    assert "A local checkpoint (a fine-tune of [" in text and "with the digest `5503434`" in text


@pytest.mark.parametrize("stated", ["", "base_model: /home/me/secret place", "base_model: {a: b}", "base_model: x"])
def test_a_local_base_of_nobody_knows_what_has_no_base_model(stated: str) -> None:
    data, text = local_card(stated)
    assert "base_model" not in data and "base_model_relation" not in data
    assert "A local checkpoint with the digest `5503434`" in text


def test_the_recipe_says_of_which_repo_a_local_base_is() -> None:
    data, text = local_card("base_model: a/b", repo_id="me/tuned")
    assert (data["base_model"], data["base_model_relation"]) == ("me/tuned", "quantized")
    assert "A local checkpoint ([me/tuned](https://huggingface.co/me/tuned)) with the digest" in text


def test_a_card_names_the_folder_of_a_local_base_and_nothing_above_it() -> None:
    for data, text in (local_card(""), local_card("base_model: a/b"), local_card("", repo_id="me/tuned")):
        assert "secret" not in f"{data}{text}" and "/home" not in f"{data}{text}"
        published = load_recipe_text(text)
        assert published.base.folder == "./my tuné" and published.base.revision == "main"
        assert "The recipe reads the base from a folder of its author that is not published" in text


def load_recipe_text(card: str) -> Recipe:
    """The recipe that a card shows."""
    match = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert match is not None
    return parse_recipe(yaml.safe_load(match[1]))
