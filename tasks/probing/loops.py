"""Is a text a loop? Repeated n-grams tell: how many there are, over the best of human texts and over models' loops.

Seq-rep-n of Welleck et al., "Neural Text Generation with Unlikelihood Training" (ICLR 2020): the share of n-grams of a
text that occurred in it before. Here n is 8, and the text is a window of 256 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 8
WINDOW = 256
MIN_TOKENS = 64  # a shorter text cannot be told from an emphasis
MAX_REPEATED = 0.5


def repeated_share(tokens: Sequence[int]) -> float:
    """Return the share of the n-grams that occurred before; 0 for a text that is shorter than two of them."""
    ngrams = [tuple(tokens[at : at + NGRAM]) for at in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if len(ngrams) > 1 else 0.0


def worst_share(tokens: Sequence[int]) -> float:
    """Return the largest share of repeated n-grams in a window, half a window apart, the last one at the end."""
    if len(tokens) < MIN_TOKENS:
        return 0.0
    last = max(0, len(tokens) - WINDOW)
    starts = {*range(0, last + 1, WINDOW // 2), last}
    return max(repeated_share(tokens[start : start + WINDOW]) for start in starts)


def is_loop(tokens: Sequence[int]) -> bool:
    """Check whether a window of an answer mostly repeats itself, wherever it is.

    `loops` in `writing/rows.py`, which leaves out rows of calibration text, looks at their ends alone and asks for more
    repetition.
    """
    return worst_share(tokens) > MAX_REPEATED
