"""Find problems with the texts of a run before it begins: rows that cannot be used, or too few tokens.

A local or built-in text is read until it is certain that it has enough tokens. A Hub data set may have gigabytes, so it
is read only at the beginning of a run, which fetches it anyway. Where the number of characters leaves room for doubt,
the tokens are counted with the base's tokenizer. The checks are those of the stages themselves: `shares` for the
calibration samples, `window_count` for measuring.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from requant.tasks.checkpoint.checkpoint import read_json
from requant.tasks.errors import CheckpointError, RecipeError
from requant.tasks.hub.sparse_checkout import fetch_files
from requant.tasks.planning.inputs import Inputs
from requant.tasks.quantizing.samples import shares
from requant.tasks.recipe.quantize_section import BUILTIN
from requant.tasks.recipe.recipe import BUILTIN_EVALUATION, Recipe
from requant.tasks.texts.rendering import TEMPLATES, TOKENIZER, ReadingLimit, render
from requant.tasks.texts.rows import COLUMNS, explain_unusable, read_rows
from requant.tasks.texts.text import Text, has_rows
from requant.tasks.validating import window_count

# No natural text has more characters per token. A text with this many for each token that is needed has enough.
MAX_CHARACTERS_PER_TOKEN = 8
# With a vocabulary of 200,000 entries, the largest in use, the prose of builtin:mixed has 4.2 characters per token, its
# code 4.0 and its chats 4.1 (tasks/texts/builtin/README.md). So the plan of a default recipe fetches no tokenizer. A
# run, which fetches the base anyway, counts the tokens.
MAX_CHARACTERS_PER_BUILTIN_TOKEN = 4.6
MAX_TOKENIZER_BYTES = 256_000_000


class Texts:
    """The texts of a run.

    `files_of` returns the files of a text, and puts those of a data set into the folder that it gets. `folder` is the
    sparse checkout of the base, into which its tokenizer is fetched if it is needed. `scratch` is an empty folder for
    the files that are read. With `fetch`, a Hub data set is fetched and read too.
    """

    def __init__(
        self,
        files_of: Callable[[Text, Path], list[Path]],
        inputs: Inputs,
        folder: Path,
        scratch: Path,
        *,
        fetch: bool,
    ) -> None:
        self._files_of, self._base, self._folder = files_of, inputs.base, folder
        self._scratch, self._fetch = scratch, fetch
        self._texts = {"quantize.calibration": inputs.calibration, "validation.text": inputs.validation}
        self._files: dict[str, list[Path]] = {}
        self._tokens: dict[str, dict[str, int]] = {}
        self._has_tokenizer = False
        self.notes: list[str] = []

    def problems(self, recipe: Recipe, to_run: Collection[str], window_tokens: int) -> list[str]:
        """Say which texts the stages `to_run` cannot use, in one sentence per text.

        `window_tokens` is the length of the windows in which a text is measured.
        """
        asked = recipe.quantize

        def check_samples(tokens: Mapping[str, int]) -> None:
            shares(tokens, asked.nsamples, asked.seqlen, asked.seed)

        def check_windows(tokens: Mapping[str, int]) -> None:
            window_count(sum(tokens.values()), window_tokens, self._texts["validation.text"].name)

        needed = {"quantize": ("quantize.calibration", check_samples, asked.nsamples * asked.seqlen)}
        needed["validate"] = ("validation.text", check_windows, window_tokens)
        problems = []
        for stage, (key, check, tokens) in needed.items():
            if stage not in to_run:
                continue
            try:
                self._check(key, check, tokens, recipe.allow_remote_code)
            except RecipeError as error:
                problems.append(f"{key}: {error}")
            except CheckpointError as error:
                problems.append(str(error))
        if recipe.eval and recipe.eval.chat_template and "validate" in to_run:
            try:
                if not self._has_template():
                    problems.append(
                        "eval.chat_template: the base has no chat template: leave it out, or set it to false"
                    )
            except CheckpointError as error:
                problems.append(str(error).replace(f"{self._folder}/", ""))
        return problems

    def _has_template(self) -> bool:
        """Check whether the base has a chat template, in a file of its own or in its tokenizer's settings."""
        if any(next(self._folder.glob(pattern), None) for pattern in TEMPLATES):
            return True
        path = self._folder / "tokenizer_config.json"
        if not path.is_file():
            return False
        if not path.is_symlink() and not self._has_tokenizer:
            fetch_files(self._base, self._folder, [f.path for f in self._base.wanted if f.path == path.name])
        return bool(read_json(path).get("chat_template"))

    def _check(self, key: str, check: Callable[[Mapping[str, int]], None], needed: int, remote_code: bool) -> None:
        """Raise RecipeError, or what `check` raises, unless a text has the `needed` tokens."""
        text = self._texts[key]
        if text.columns and not set(text.columns) & set(COLUMNS) and _has_same_columns(text):
            raise RecipeError(explain_unusable(text.name, text.columns))
        if text.dataset is not None and not self._fetch:
            note = f"{key}: whether {text.name} has enough tokens is not judged: a run fetches and reads it first"
            self.notes += [note] if note not in self.notes else []
            return
        builtin = text.name in BUILTIN + BUILTIN_EVALUATION and not self._fetch
        ratio = MAX_CHARACTERS_PER_BUILTIN_TOKEN if builtin else MAX_CHARACTERS_PER_TOKEN
        certain = _count_at_least(text, self._paths(key), needed, ratio)
        try:
            check(certain)
        except RecipeError:  # There are too few characters to be certain.
            check(self._count(key, needed, remote_code))

    def _paths(self, key: str) -> list[Path]:
        if key not in self._files:
            self._files[key] = self._files_of(self._texts[key], self._scratch / key)
        return self._files[key]

    def _count(self, key: str, needed: int, remote_code: bool) -> Mapping[str, int]:
        """Count the tokens of a text by domain, as the stages do."""
        text = self._texts[key]
        if key not in self._tokens:
            self._fetch_tokenizer(remote_code)
            most = None if text.mixed else 4 * needed
            rendered = render(
                self._folder,
                self._paths(key),
                self._scratch / "rendered",
                name=text.name,
                chats=text.chats,
                remote_code=remote_code,
                limit=ReadingLimit(tokens=most),
            )
            self._tokens[key] = rendered.tokens if text.mixed else {"": sum(rendered.tokens.values())}
        return self._tokens[key]

    def _fetch_tokenizer(self, remote_code: bool) -> None:
        if self._has_tokenizer:
            return
        patterns = (*TOKENIZER, *TEMPLATES, *(("*.py",) if remote_code else ()))
        files = [f for f in self._base.wanted if any(fnmatch.fnmatch(f.path, pattern) for pattern in patterns)]
        if sum(f.size for f in files) > MAX_TOKENIZER_BYTES:
            raise CheckpointError(f"the tokenizer of {self._base.name} has over {MAX_TOKENIZER_BYTES:,} bytes")
        # A file that the store has is a link into it, and must not be written to.
        fetch_files(self._base, self._folder, [f.path for f in files if not (self._folder / f.path).is_symlink()])
        self._has_tokenizer = True


def _has_same_columns(text: Text) -> bool:
    """Check whether all files of a data set have the columns of its first one, as Parquet files do."""
    files = [file for file in text.dataset.files if has_rows(file.path)] if text.dataset else []
    return len(files) == 1 or all(file.path.endswith(".parquet") for file in files)


def _count_at_least(text: Text, paths: Sequence[Path], needed: int, ratio: float) -> Mapping[str, int]:
    """Count the tokens that a text has at least, by domain, if a token has at most `ratio` characters.

    Reading stops at `needed` tokens.
    """
    characters = Counter[str]()
    for row in read_rows(paths, text.name, chats=text.chats):
        characters[row.domain if text.mixed else ""] += row.characters
        if not text.mixed and characters.total() >= ratio * needed:
            break
    return {domain: int(count / ratio) for domain, count in characters.items()}
