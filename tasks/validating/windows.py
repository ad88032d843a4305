"""The windows of tokens on which a checkpoint is measured: those of each domain of a text are spread over the domain.

The file of a text is plain text, which has no domains, or JSON Lines with one row of `domain` and `text` per domain.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.errors import TokenizerError, TooFewTokens
from requant.tasks.validating import (
    DOMAIN_TOKENS,
    LENGTH,
    LONG_CONTEXT,
    OTHER,
    WHOLE_TEXT,
    WINDOWS,
    window_count,
    window_length,
)
from requant.tasks.validating.measurement import Ints
from requant.tasks.validating.model import load_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Windows:
    """Windows of a text.

    tokens: `[n, L]`; domains: the domain of each window. The windows of LONG_CONTEXT come last. They follow each other
    in one text without a gap, and are computed as one.
    """

    tokens: Ints
    domains: tuple[str, ...]

    @property
    def separate(self) -> int:
        """The number of windows that are computed each by itself."""
        return sum(domain != LONG_CONTEXT for domain in self.domains)

    @property
    def varied(self) -> list[int]:
        """The indices of all windows: first the first one of each domain, then the second ones."""
        seen = Counter[str]()
        rank = []
        for domain in self.domains:
            rank.append(seen[domain])
            seen[domain] += 1
        return sorted(range(len(rank)), key=lambda index: rank[index])

    def up_to(self, tokens: int) -> Windows:
        """Return the windows with a long text of at most so many tokens, but at least one window."""
        last = self.separate + max(1, tokens // self.tokens.shape[1])
        return Windows(self.tokens[:last], self.domains[:last])


def read_domains(path: Path) -> dict[str, str]:
    """Read the text of each domain from a file that `text_for_measuring` of evaluation_text.py returned."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return {WHOLE_TEXT: content}
    return {row["domain"]: row["text"] for row in map(json.loads, content.split("\n")[:-1])}


def windows(
    folder: Path,
    text: Path,
    checkpoint: Checkpoint,
    *,
    tokens: int | None = None,
    remote_code: bool = False,
) -> Windows:
    """Cut windows from each domain of a text.

    tokens: how many are measured of each domain; None: DOMAIN_TOKENS, or WINDOWS windows of a text without domains. A
    domain with fewer is measured on the windows that it has.

    Raises TooFewTokens if the text has fewer tokens than one window, TokenizerError if the tokenizer cannot be loaded
    or makes a token outside of the vocabulary.
    """
    tokenizer = load_tokenizer(folder, remote_code=remote_code)
    length = window_length(checkpoint.text_config, LENGTH)
    ids = {
        domain: tokenizer(content, add_special_tokens=False)["input_ids"]
        for domain, content in read_domains(text).items()
    }
    ids = _long_enough(ids, length)
    total = sum(map(len, ids.values()))
    if total < length:  # only another tokenizer can tell whether the text or this tokenizer is the cause
        raise TooFewTokens(
            f"the tokenizer of {folder.name} makes only {total:,} tokens of the text {text.name}, and measuring "
            f"needs at least {length}"
        )
    most = WINDOWS if tokens is None and ids.keys() == {WHOLE_TEXT} else max(1, (tokens or DOMAIN_TOKENS) // length)
    found: list[Ints] = []
    domains: list[str] = []
    for domain in sorted(ids, key=lambda domain: domain == LONG_CONTEXT):
        count = window_count(len(ids[domain]), length, text.name, most)
        stride = length if domain == LONG_CONTEXT else (len(ids[domain]) - length) // max(count - 1, 1)
        if count < most and len(ids) > 1:
            log.info(f"{domain}: {count * length:,} tokens are measured, since the text has no more")
        found += [np.array(ids[domain][i * stride : i * stride + length], np.int32) for i in range(count)]
        domains += [domain] * count
    vocabulary = int(checkpoint.text_config.get("vocab_size") or 1 << 31)
    highest = max(int(window.max()) for window in found)
    if highest >= vocabulary:
        raise TokenizerError(f"the tokenizer of {folder} makes token {highest}, the model knows {vocabulary}")
    return Windows(np.stack(found), tuple(domains))


def _long_enough(ids: Mapping[str, list[int]], length: int) -> dict[str, list[int]]:
    """Return the tokens of each domain that has a window; those of all others become the domain OTHER, if it has one.

    A text that has one window in all keeps its only domain, so that the caller can say how short it is.
    """
    if len(ids) == 1:
        return dict(ids)
    enough = {domain: tokens for domain, tokens in ids.items() if len(tokens) >= length}
    rest = [token for domain, tokens in ids.items() if domain not in enough for token in tokens]
    rest += enough.pop(OTHER, []) if rest else []
    return {**enough, OTHER: rest} if len(rest) >= length or not enough else enough
