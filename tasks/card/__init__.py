"""The model card of a release.

card.md.jinja  the card: headings, sentences and tables in the order in which they appear
filters.py     escaping: what Markdown cannot read as more than text
facts.py       what a card is made of
card.py        renders the template
card_data.py   the front matter: license, tags, and `model-index` with the measured values
base_card.py   what is taken over from the base's card: license, language, pipeline tag, citation
serving.py     commands that serve the model, as run or as they would be
rows.py        rows of tables, for the card and for a run's report
pinned.py      `recipe.yaml`: the recipe with base and texts pinned
"""
