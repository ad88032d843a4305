"""Tasks of lm-eval on lines of the evaluation text, one of each kind that an engine answers differently."""

from __future__ import annotations

import json
from pathlib import Path

from requant.tasks.recipe.recipe import Eval
from requant.tasks.texts.text import EVALUATION

ITEMS, LINES = 40, 4  # each item is a line of the evaluation text after so many others
DATA = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
doc_to_text: "{{before}}"
target_delimiter: ""
"""
TASKS = {
    "line_choice": """
output_type: multiple_choice
doc_to_target: 0
doc_to_choice: lines
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "line_perplexity": """
output_type: loglikelihood
doc_to_target: "{{lines[0]}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
""",
    "line_written": """
output_type: generate_until
doc_to_target: "{{lines[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def line_tasks(folder: Path) -> Eval:
    """Write the definitions of the tasks and their data into a folder."""
    lines = [line for line in EVALUATION.read_text().splitlines() if line.strip()]
    starts = range(0, (LINES + 1) * ITEMS, LINES + 1)
    rows = [
        {"before": "\n".join(lines[at : at + LINES]) + "\n", "lines": [lines[at + LINES], lines[-at - 1]]}
        for at in starts
    ]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        data = DATA.replace("DATA", str(folder / "lines.jsonl"))
        (folder / f"{name}.yaml").write_text(f"task: {name}{text}{data}")
    return Eval(tasks=list(TASKS), definitions=str(folder))
