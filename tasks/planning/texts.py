"""What is wrong with a run's texts, found before it begins: rows that cannot be used, too few tokens.

A local or built-in text is read, as far as it takes to be sure; a Hub data set only where it may be fetched whole
(`fetch`, before a run): it may be gigabytes. Where the characters alone do not tell, the tokens are counted with the
base's tokenizer. The limits are those of the stages themselves: `shares` of the samples, `window_count` of measuring.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from requant.tasks.checkpoint.checkpoint import read_json
from requant.tasks.errors import CheckpointError, RecipeError
from requant.tasks.hub.sparse_checkout import fetch_files
from requant.tasks.planning.inputs import Inputs
from requant.tasks.quantizing.samples import shares
from requant.tasks.recipe.quantize import BUILTIN
from requant.tasks.recipe.recipe import BUILTIN_EVALUATION, Recipe
from requant.tasks.texts.rendering import TEMPLATES, TOKENIZER, render
from requant.tasks.texts.rows import COLUMNS, read_rows, unusable
from requant.tasks.texts.text import Text, has_rows
from requant.tasks.validating import window_count, window_length

CHARACTERS_A_TOKEN = 8  # of natural text it has fewer: a text of so many characters for each token needed is enough
# The built-in texts have fewer too. With a vocabulary of 200,000 entries, which is as large as they come, the prose of
# builtin:mixed has 4.2 characters a token, its code 4.0 and its chats 4.1 (tasks/texts/builtin/README.md). So the plan
# of a default recipe fetches no tokenizer. A run, which will fetch the base anyway, counts.
CHARACTERS_A_TOKEN_OF_OURS = 4.6
MAX_TOKENIZER = 256_000_000  # bytes of a tokenizer's files


class Texts:
    """The texts of a run.

    `files_of` gives the files of a text; those of a data set are laid into the folder that it is called with. `folder`
    is the skeleton of the base, into which its tokenizer is fetched where it is needed. `scratch` is an empty folder
    for what is read. `fetch`: a text that is a Hub data set is fetched and read too.
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

    def problems(self, recipe: Recipe, to_run: Collection[str], text_config: Mapping[str, Any]) -> list[str]:
        """Say what would end a run of these stages because of its texts, one sentence for each text."""
        asked = recipe.quantize

        def samples(tokens: Mapping[str, int]) -> None:
            shares(tokens, asked.nsamples, asked.seqlen, asked.seed)

        def windows(tokens: Mapping[str, int]) -> None:
            text = self._texts["validation.text"]
            window_count(sum(tokens.values()), window_length(text_config), text.name)

        needed = {"quantize": ("quantize.calibration", samples, asked.nsamples * asked.seqlen)}
        needed["validate"] = ("validation.text", windows, window_length(text_config))
        found = []
        for stage, (key, check, tokens) in needed.items():
            if stage not in to_run:
                continue
            try:
                self._check(key, check, tokens, recipe.allow_remote_code)
            except RecipeError as error:
                found.append(f"{key}: {error}")
            except CheckpointError as error:
                found.append(str(error))
        if recipe.eval and recipe.eval.chat_template and "validate" in to_run:
            try:
                if not self._has_template():
                    found.append("eval.chat_template: the base has no chat template: leave it out, or set it to false")
            except CheckpointError as error:
                found.append(str(error).replace(f"{self._folder}/", ""))
        return found

    def _has_template(self) -> bool:
        """Tell whether the base has a chat template: in a file of its own, or in its tokenizer's settings."""
        if any(next(self._folder.glob(pattern), None) for pattern in TEMPLATES):
            return True
        path = self._folder / "tokenizer_config.json"
        if not path.is_file():
            return False
        if not path.is_symlink() and not self._has_tokenizer:
            fetch_files(self._base, self._folder, [f.path for f in self._base.wanted if f.path == path.name])
        return bool(read_json(path).get("chat_template"))

    def _check(self, key: str, check: Callable[[Mapping[str, int]], None], needed: int, remote_code: bool) -> None:
        text = self._texts[key]
        if text.columns and not set(text.columns) & set(COLUMNS) and _alike(text):
            raise RecipeError(unusable(text.name, text.columns))
        if text.dataset is not None and not self._fetch:
            note = f"{key}: whether {text.name} has enough tokens is not judged: a run fetches and reads it first"
            self.notes += [note] if note not in self.notes else []
            return
        ours = text.name in BUILTIN + BUILTIN_EVALUATION and not self._fetch
        ratio = CHARACTERS_A_TOKEN_OF_OURS if ours else CHARACTERS_A_TOKEN
        certain = _at_least(text, self._paths(key), needed, ratio)
        try:
            check(certain)
        except RecipeError:  # too few characters to be sure
            check(self._count(key, needed, remote_code))

    def _paths(self, key: str) -> list[Path]:
        if key not in self._files:
            self._files[key] = self._files_of(self._texts[key], self._scratch / key)
        return self._files[key]

    def _count(self, key: str, needed: int, remote_code: bool) -> Mapping[str, int]:
        """Count the tokens of a text by domain, as the stages will have them."""
        text = self._texts[key]
        if key not in self._tokens:
            self._bring_tokenizer(remote_code)
            most = None if text.mixed else 4 * needed
            found = render(
                self._folder,
                self._paths(key),
                self._scratch / "rendered",
                name=text.name,
                chats=text.chats,
                remote_code=remote_code,
                most_tokens=most,
            )
            self._tokens[key] = found.tokens if text.mixed else {"": sum(found.tokens.values())}
        return self._tokens[key]

    def _bring_tokenizer(self, remote_code: bool) -> None:
        if self._has_tokenizer:
            return
        patterns = (*TOKENIZER, *TEMPLATES, *(("*.py",) if remote_code else ()))
        files = [f for f in self._base.wanted if any(fnmatch.fnmatch(f.path, pattern) for pattern in patterns)]
        if sum(f.size for f in files) > MAX_TOKENIZER:
            raise CheckpointError(f"the tokenizer of {self._base.name} has over {MAX_TOKENIZER:,} bytes")
        # What the store has is a link into it, and must not be written to.
        fetch_files(self._base, self._folder, [f.path for f in files if not (self._folder / f.path).is_symlink()])
        self._has_tokenizer = True


def _alike(text: Text) -> bool:
    """Tell whether the files of a data set have the columns of its first one: of several, Parquet files do."""
    files = [file for file in text.dataset.files if has_rows(file.path)] if text.dataset else []
    return len(files) == 1 or all(file.path.endswith(".parquet") for file in files)


def _at_least(text: Text, paths: Sequence[Path], needed: int, ratio: float) -> Mapping[str, int]:
    """Count the tokens that a text has in any case, by domain, from its characters, of which a token has at most
    `ratio`; reading ends when these do."""
    characters = Counter[str]()
    for row in read_rows(paths, text.name, chats=text.chats):
        characters[row.domain if text.mixed else ""] += row.characters
        if not text.mixed and characters.total() >= ratio * needed:
            break
    return {domain: int(count / ratio) for domain, count in characters.items()}
