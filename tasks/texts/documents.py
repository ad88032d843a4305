"""Documents: rendered rows with the number of their tokens, and the turns at which a sample of a chat can begin.

The process that renders writes them to a file of JSON Lines (rendering_child.py). The plan counts samples by them, and
the stage quantize makes samples of them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Document:
    """A rendered row.

    chat: whether it is a chat, which is cut nowhere but at the end of a sample; turns: the places in the text, in
    characters, of the turns at which a sample of a chat can begin, without its beginning; tokens: how many there are
    in each piece between these places; ids: those of its tokens, if the text was written as tokens.
    """

    text: str
    tokens: tuple[int, ...]
    domain: str = ""
    chat: bool = False
    turns: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()

    @property
    def pieces(self) -> list[str]:
        """The text, cut at the turns. Its tokens are those of the pieces."""
        return [self.text[begin:end] for begin, end in itertools.pairwise([0, *self.turns, len(self.text)])]

    def sample_tokens(self, seqlen: int) -> int:
        """Return how many tokens samples of this length can have of it, if it alone fills them.

        Of a chat longer than a sample, what lies between the end of a sample and the next turn is in none.
        """
        total = sum(self.tokens)
        if not self.chat or total <= seqlen:
            return total
        found, begin, starts = 0, 0, list(itertools.accumulate(self.tokens[:-1]))
        while True:
            end = min(begin + seqlen, total)
            found += end - begin
            following = next((start for start in starts if start >= end), None)
            if following is None:
                return found
            begin = following

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of a file."""
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            turns, ids = tuple(row["turns"]), tuple(row.get("ids", ()))
            yield Document(row["text"], tuple(row["tokens"]), row["domain"], row["chat"], turns, ids)
