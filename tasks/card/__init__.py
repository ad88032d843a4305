"""The model card of a release.

card.md.jinja  the card: headings, sentences and tables in the order in which they appear
filters.py     escaping, so that Markdown reads every value as text
facts.py       the values that a card shows
card.py        renders the template
card_data.py   the front matter: license, tags, and `model-index` with the measured values
base_card.py   parts of the base's card: license, language, pipeline tag, citation
serving.py     commands that serve the model
rows.py        rows of tables, for the card and for a run's report
pinned.py      `recipe.yaml`: the recipe, with base and texts pinned
"""
