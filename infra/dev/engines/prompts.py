"""Prompts for measuring draft acceptance rates: `python -m infra.dev.engines.prompts [--places] > prompts.json`.

Heads of one model are compared on the beginnings of 52 functions, with 200 tokens each: more than 5,000 drafted tokens
at a draft acceptance rate of 95 %. The output tokens are the same for all heads, so only the drafts differ.

Models are compared at 2,100 places of a real text, with 16 tokens each: about 19,000 drafted tokens. A small model that
generates 200 tokens soon repeats itself, and its rate is that of the repetition: results of different seeds were 5
points apart. At many places they are less than one point apart.
"""

from __future__ import annotations

import argparse
import json

from requant.tasks.serving.prompts import CODE_LENGTH, python_prompts
from requant.tasks.texts.text import EVALUATION

COUNT, TOKENS = 52, 200
PLACES, PLACE_TOKENS = 2100, 16


def places(count: int = PLACES, length: int = CODE_LENGTH) -> list[str]:
    """Return `count` pieces of `length` characters of the evaluation text, evenly spread from its start to its end."""
    text = EVALUATION.read_text(encoding="utf-8")
    last = len(text) - length
    return [text[start : start + length] for start in (last * number // count for number in range(count))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", action="store_true", help="to compare models, not heads of one model")
    print(json.dumps(places() if parser.parse_args().places else python_prompts(COUNT), indent=1))


if __name__ == "__main__":
    main()
