"""Select the rows of the probe `tools` from bfcl-eval: `python -m infra.dev.probe_rows UNPACKED_WHEEL`.

UNPACKED_WHEEL is the folder of `pip download --no-deps bfcl-eval==2026.3.23`, unzipped. Written is
tasks/probing/questions/tools.jsonl.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from requant.tasks.probing.tool_calls import ToolCall
from requant.tasks.probing.tools import ROWS, ToolRow, are_expected, call_problem, to_row

SEED = 22
COUNTS = {"simple_python": 60, "multiple": 40, "parallel": 30, "live_multiple": 40, "irrelevance": 40}
MAX_ROW_BYTES = 4_000
# The names of types in BFCL, and those of JSON Schema: bfcl_eval/constants/type_mappings.py. `any` is left out.
TYPES = {"dict": "object", "float": "number", "tuple": "array"}


def schema(value: Any) -> Any:
    """Turn a schema of BFCL into JSON Schema."""
    if isinstance(value, list):
        return [schema(one) for one in value]
    if not isinstance(value, dict):
        return value
    turned = {key: schema(one) for key, one in value.items() if key not in {"default", "optional"}}
    kind = turned.get("type")
    if isinstance(kind, str):
        turned["type"] = TYPES.get(kind, kind)
        if kind == "any":
            del turned["type"]
    return turned


def example(values: list[Any]) -> Any:
    """Take the first possible value, in objects too."""
    value = next((one for one in values if one != ""), "")
    return {name: example(v) for name, v in value.items() if v != [""]} if isinstance(value, dict) else value


def is_consistent(row: ToolRow) -> bool:
    """Check that the first possible calls of a row fit its own schema, which those of some rows do not."""
    calls = []
    for wanted in row.calls:
        ((name, parameters),) = wanted.items()
        arguments = {key: example(list(values)) for key, values in parameters.items() if "" not in values}
        calls.append(ToolCall(name, arguments))
    return not any(call_problem(row, call) for call in calls) and (not calls or are_expected(calls, row.calls))


def select(data: Path) -> list[dict[str, Any]]:
    chosen: list[dict[str, Any]] = []
    for category, count in COUNTS.items():
        file = f"BFCL_v4_{category}.json"
        lines = (data / file).read_text(encoding="utf-8").splitlines()
        answers_path = data / "possible_answer" / file
        answers = {}
        if answers_path.exists():
            listed = map(json.loads, answers_path.read_text(encoding="utf-8").splitlines())
            answers = {one["id"]: one["ground_truth"] for one in listed}
        rows = []
        for asked in map(json.loads, lines):
            row = {
                "id": asked["id"],
                "category": category,
                "messages": asked["question"][0],
                "tools": schema(asked["function"]),
                "calls": answers.get(asked["id"], []),
            }
            if len(json.dumps(row)) > MAX_ROW_BYTES or len(asked["question"]) > 1:
                continue
            if is_consistent(to_row(row)):
                rows.append(row)
        chosen += random.Random(SEED).sample(rows, count)
    return chosen


def main() -> None:
    rows = select(Path(sys.argv[1]) / "bfcl_eval" / "data")
    lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
    ROWS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{ROWS}: {len(rows)} rows, {ROWS.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
