"""Check that a base has a tokenizer, and that it can be loaded, without transformers."""

from __future__ import annotations

from pathlib import Path

from requant.tasks.checkpoint.companions import has_vocabulary
from requant.tasks.checkpoint.untrusted import shown

TOKENIZER_FILE = "tokenizer.json"


def missing_tokenizer(folder: Path, repo_id: str, *, remote_code: bool) -> str | None:
    """Say that a base in a folder has no tokenizer, going by the names of its files; return None if it has one.

    With `remote_code`, its settings may name the code of a tokenizer that has no other files.
    """
    names = [path.name for path in folder.iterdir()]
    if has_vocabulary(names) or (remote_code and "tokenizer_config.json" in names):
        return None
    return (
        f"the base {repo_id} has no tokenizer ({TOKENIZER_FILE} or a vocabulary): name a base with one, or add that "
        "of the model that it was made of"
    )


def broken_tokenizer(path: Path) -> str | None:
    """Say why a tokenizer.json cannot be loaded; return None if it can."""
    import tokenizers

    try:
        tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # what Rust panics with is no Exception
        first = next(iter(str(error).splitlines()), "")
        return (
            f"the tokenizer of the base cannot be loaded ({path.name}: {shown(first)}): restore the file, or name "
            "another base"
        )
    return None
