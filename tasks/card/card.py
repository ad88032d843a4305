"""The model card. Its text is in card.md.jinja.

Every number was measured, and every command is marked as run or not run.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from requant.tasks.card import rows
from requant.tasks.card.base_card import cited
from requant.tasks.card.card_data import card_data, license_name
from requant.tasks.card.facts import CardFacts, scheme_words
from requant.tasks.card.filters import Markdown, fence, hub_link, named, number, rendered, repo_name, table
from requant.tasks.card.pinned import reads_local_files, recipe_text
from requant.tasks.card.probes import probe_tables
from requant.tasks.card.serving import ENGINES, serving_of
from requant.tasks.formatting import gigabytes
from requant.tasks.planning.reasons import kept_groups
from requant.tasks.plots import Picture
from requant.tasks.redaction import public

TEMPLATE = "card.md.jinja"
MAKER_PICTURES = ("losses", "matrices")  # They say how tuning went.


def make_card(facts: CardFacts) -> str:
    """Render the README.md of a published repo."""
    template = environment().get_template(TEMPLATE)
    return template.render(
        facts=facts,
        files=facts.files,
        recipe=facts.recipe,
        measured=facts.measured,
        benchmark=facts.benchmark,
        base=_base_words(facts),
        adapter=_adapter_words(facts),
        front_matter=Markdown(card_data(facts).to_yaml()),
        serving=serving_of(facts),
        engine_names=ENGINES,
        kept=kept_groups(facts.files.kept_names, facts.files.kept_reasons),
        recipe_text=recipe_text(facts),
        local_files=reads_local_files(facts),
        license=license_name(facts),
        citation=cited(facts.files.base_card),
        table=table,
        rows=rows,
        pictures=_pictures(facts),
        speed_tables=_speed_tables(facts),
        probe_tables=probe_tables(facts.probes) if facts.probes else [],
    )


def _pictures(facts: CardFacts) -> list[Picture]:
    """Return the pictures for who downloads the model. All are in report.md."""
    left_out = {*MAKER_PICTURES, *(["throughput"] if facts.benchmark.engine == "torch" else [])}
    return [picture for picture in facts.pictures if picture.name not in left_out]


def _speed_tables(facts: CardFacts) -> list[tuple[rows.Row, list[rows.Row]]]:
    """Return the columns and rows of the tables of speed, without those about drafts if there is no head."""
    tables: list[tuple[rows.Row, list[rows.Row]]] = [
        (rows.SPEED_COLUMNS, rows.speed_rows(facts.benchmark)),
        (rows.PROMPT_COLUMNS, rows.prompt_rows(facts.benchmark)),
    ]
    return tables if facts.head else [rows.without_drafts(*table) for table in tables]


def _base_words(facts: CardFacts) -> Markdown:
    """Name the base: a link to its repo, or that it is a local checkpoint, and the repos that it is of."""
    if not facts.base.is_local:
        return hub_link(facts.recipe.base.name)
    repos = [facts.own_base_models] if isinstance(facts.own_base_models, str) else facts.own_base_models
    tuned = "" if facts.recipe.base.repo_id is not None else "a fine-tune of "
    linked = f" ({tuned}{' and '.join(map(hub_link, repos))})" if repos else ""
    return Markdown(f"A local checkpoint{linked}")


def _adapter_words(facts: CardFacts) -> Markdown:
    """Name the adapter: a link to its repo, or that it is a local one. Empty if there is none."""
    adapter = facts.recipe.adapter
    if adapter is None or facts.base.adapter is None:
        return Markdown("")
    name = "a local LoRA adapter" if adapter.repo_id is None else f"the LoRA adapter {hub_link(adapter.repo_id)}"
    return Markdown(f"{name} {'with the digest' if facts.base.adapter.is_local else 'at'}")


def environment() -> Environment:
    """Make the Jinja environment of the card, which escapes all values but Markdown. Missing values are errors."""
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        finalize=rendered,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for filter_ in (named, hub_link, repo_name, fence, number, gigabytes, public, scheme_words):
        jinja.filters[filter_.__name__] = filter_
    return jinja
