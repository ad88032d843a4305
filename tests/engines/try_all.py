"""try_all.py DRAFT PROMPTS.json TOKENS MODEL_DIR[:HOW]...: what vLLM does with each, as a JSON list.

Runs in vLLM's interpreter. DRAFT is infra/dev/engines/draft.py. Each is started with MTP, and again without MTP where
that fails. HOW is one of vision, half, float and twice. `twice`: with two drafts per step.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    spec = importlib.util.spec_from_file_location("draft", sys.argv[1])
    assert spec is not None and spec.loader is not None
    draft: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draft)
    out = draft.quiet_stdout()
    prompts, tokens = json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3])
    found = []
    for argument in sys.argv[4:]:
        path, _, how = argument.partition(":")
        dtype = {"half": "half", "float": "float32", "twice": "float32"}.get(how, "bfloat16")
        options = {"vision": how == "vision", "dtype": dtype, "drafts": 2 if how == "twice" else 1}
        with_mtp = draft.draft(Path(path), prompts, tokens, **options)
        without = draft.draft(Path(path), prompts, 1, mtp=False, **options) if with_mtp["error"] else None
        found.append({"with": with_mtp, "without": without})
    json.dump(found, out)
    out.close()


if __name__ == "__main__":
    main()
