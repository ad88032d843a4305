"""Find problems with the texts of a run before it begins: rows that cannot be used, or too few tokens.

A local or built-in text is read until it is certain that it has enough tokens. A Hub data set may have gigabytes, so it
is read only at the beginning of a run, which fetches it anyway. Where the number of characters leaves room for doubt,
the tokens are counted with the base's tokenizer. The checks are those of the stages themselves: `plan_samples` for the
calibration samples, `window_count` for measuring.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from requant.tasks.checkpoint.checkpoint import read_json
from requant.tasks.checkpoint.companions import TEMPLATES, TOKENIZER
from requant.tasks.errors import CheckpointError, RecipeError
from requant.tasks.hub.sparse_checkout import fetch_files
from requant.tasks.planning.inputs import Inputs
from requant.tasks.planning.tokenizer import TOKENIZER_FILE, broken_tokenizer, missing_tokenizer
from requant.tasks.quantizing.packing import Length
from requant.tasks.quantizing.samples import Supply, plan_samples, tokens_to_read
from requant.tasks.recipe.quantize_section import BUILTIN
from requant.tasks.recipe.recipe import BUILTIN_EVALUATION, Recipe
from requant.tasks.texts.documents import read_documents
from requant.tasks.texts.forms import explain_unusable, form_of
from requant.tasks.texts.rendering import ReadingLimit, render
from requant.tasks.texts.rows import read_rows
from requant.tasks.texts.text import MAX_CHARACTERS_PER_TOKEN, Text, has_rows
from requant.tasks.validating import window_count

# With a vocabulary of 200,000 entries, the prose of builtin:mixed has 4.4 characters per token, more than its other
# domains (tasks/texts/builtin/README.md). So the plan of a default recipe fetches no tokenizer. A run, which fetches
# the base anyway, counts the tokens.
MAX_CHARACTERS_PER_BUILTIN_TOKEN = 4.8
# Of the built-in chats, samples of at least this length use this share at least. Measured: over 93 % of each domain.
MIN_PACKED_TOKENS, PACKED_SHARE = 2048, 0.85
MAX_TOKENS_PER_WINDOW = 4  # how much of a text for measuring is counted, in windows
MAX_TOKENIZER_BYTES = 256_000_000
MAX_PLANNED_BYTES = 1 << 20  # a larger tokenizer is not fetched for a plan


@dataclass(frozen=True)
class _Need:
    """How many tokens a stage needs of a text, and the length of the samples that it makes of it, if it makes any."""

    text: Text
    tokens: int
    weight: float | None = None
    sample_tokens: int | None = None


class Texts:
    """The texts of a run.

    `files_of` returns the files of a text with so many tokens, and puts those of a data set into the folder that it
    gets. `folder` is the sparse checkout of the base, into which its tokenizer is fetched if it is needed. `scratch` is
    an empty folder for the files that are read. With `fetch`, a Hub data set is fetched and read too.
    """

    def __init__(
        self,
        files_of: Callable[[Text, Path, int], list[Path]],
        inputs: Inputs,
        folder: Path,
        scratch: Path,
        *,
        fetch: bool,
    ) -> None:
        self._files_of, self._base, self._folder = files_of, inputs.base, folder
        self._scratch, self._fetch = scratch, fetch
        self._calibration, self._validation = inputs.calibration, inputs.validation
        self._files: dict[_Need, list[Path]] = {}
        self._counted: dict[_Need, Supply] = {}
        self._fetched: set[str] = set()
        self.notes: list[str] = []

    def problems(self, recipe: Recipe, to_run: Set[str], window_tokens: int) -> list[str]:
        """Say which texts the stages `to_run` cannot use, in one sentence per text.

        `window_tokens` is the length of the windows in which a text is measured.
        """
        if to_run & {"quantize", "validate"} and (told := self._tokenizer_problem(recipe.allow_remote_code)):
            return [told]
        asked = recipe.quantize

        def check_samples(supplies: Sequence[Supply]) -> None:
            plan_samples(supplies, asked.nsamples, asked.seqlen, asked.seed)

        def check_windows(supplies: Sequence[Supply]) -> None:
            window_count(sum(supplies[0].tokens.values()), window_tokens, supplies[0].name)

        sources = self._calibration.sources
        limits = tokens_to_read([source.weight for source in sources], asked.nsamples, asked.seqlen)
        samples = [
            _Need(source.text, limit, source.weight, asked.seqlen)
            for source, limit in zip(sources, limits, strict=True)
        ]
        checks: list[tuple[str, str, list[_Need], Callable[[Sequence[Supply]], None]]]
        checks = [("quantize", "quantize.calibration", samples, check_samples)]
        for domain, text in self._validation.domains or (("", self._validation),):
            key = f"validation.text.{domain}" if domain else "validation.text"
            checks.append(("validate", key, [_Need(text, MAX_TOKENS_PER_WINDOW * window_tokens)], check_windows))
        problems = []
        for stage, key, needs, check in checks:
            if stage not in to_run:
                continue
            try:
                self._check(key, needs, check, recipe.allow_remote_code)
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

    def _tokenizer_problem(self, remote_code: bool) -> str | None:
        """Say why the base has no tokenizer that can be loaded; return None if it has one.

        A plan loads a tokenizer only if it is small or on this machine; a run, which fetches the base anyway, always.
        """
        path = self._folder / TOKENIZER_FILE
        if problem := missing_tokenizer(self._folder, self._base.repo_id, remote_code=remote_code):
            return problem
        try:
            if path.is_file():
                if self._fetch or path.is_symlink() or path.stat().st_size <= MAX_PLANNED_BYTES:
                    self._fetch_unless_here([TOKENIZER_FILE])
                    return broken_tokenizer(path)
            elif self._fetch:
                self._fetch_tokenizer(remote_code)
                probe = self._scratch / "probe.txt"
                self._scratch.mkdir(exist_ok=True)
                probe.write_text("text")
                render(self._folder, [probe], self._scratch / "probe", chats=False, remote_code=remote_code)
        except CheckpointError as error:
            return str(error)
        return None

    def _has_template(self) -> bool:
        """Check whether the base has a chat template, in a file of its own or in its tokenizer's settings."""
        if any(next(self._folder.glob(pattern), None) for pattern in TEMPLATES):
            return True
        path = self._folder / "tokenizer_config.json"
        if not path.is_file():
            return False
        self._fetch_unless_here([path.name])
        return bool(read_json(path).get("chat_template"))

    def _check(
        self, key: str, needs: Sequence[_Need], check: Callable[[Sequence[Supply]], None], remote_code: bool
    ) -> None:
        """Raise RecipeError, or what `check` raises, unless the texts have enough tokens."""
        for text in (need.text for need in needs):
            if text.columns and not _has_usable_column(text) and _has_same_columns(text):
                raise RecipeError(explain_unusable(text.name, text.columns, text.field))
        unknown = {need: note for need in needs if (note := self._explain_unknown(need.text))}
        self.notes += [note for note in (f"{key}: {note}" for note in unknown.values()) if note not in self.notes]

        def supplies(supply_of: Callable[[_Need], Supply]) -> list[Supply]:
            return [_assume_enough(need) if need in unknown else supply_of(need) for need in needs]

        certain = supplies(self._supply_at_least)
        try:
            check(certain)
        except RecipeError:  # There are too few characters to be certain.
            check(supplies(lambda need: self._count(need, remote_code)))

    def _explain_unknown(self, text: Text) -> str:
        """Say why it is not judged whether a text has enough tokens; return nothing if it is judged."""
        if text.waits_for_base:
            return "the base writes it in the run"
        if text.dataset is not None and not self._fetch:
            return f"whether {text.name} has enough tokens is not judged: a run reads it first"
        return ""

    def _supply_at_least(self, need: _Need) -> Supply:
        """Return what a text has for certain, going by its characters.

        Packing loses the rest of a chat that a sample is cut in. How much that is at most is known of built-in texts:
        other chats count as nothing.
        """
        text = need.text
        builtin = text.name in BUILTIN + BUILTIN_EVALUATION
        ratio = MAX_CHARACTERS_PER_BUILTIN_TOKEN if builtin and not self._fetch else MAX_CHARACTERS_PER_TOKEN
        used_of_chats = 1.0
        if need.sample_tokens is not None:
            used_of_chats = PACKED_SHARE if builtin and need.sample_tokens >= MIN_PACKED_TOKENS else 0.0
        supply = Supply(text.label, need.weight)
        for domain, tokens in _count_at_least(text, self._paths(need), need.tokens, ratio, used_of_chats).items():
            supply.add(domain, Length((tokens,), chat=False))
        return supply

    def _paths(self, need: _Need) -> list[Path]:
        if need not in self._files:
            self._files[need] = self._files_of(need.text, self._scratch / f"text-{len(self._files)}", need.tokens)
        return self._files[need]

    def _count(self, need: _Need, remote_code: bool) -> Supply:
        """Count the tokens of a text's documents, as the stages do."""
        text = need.text
        if need not in self._counted:
            self._fetch_tokenizer(remote_code)
            rendered = render(
                self._folder,
                self._paths(need),
                self._scratch / "rendered",
                name=text.label,
                chats=text.chats,
                remote_code=remote_code,
                limit=ReadingLimit(
                    tokens=None if text.mixed else need.tokens, field=text.field, sample_tokens=need.sample_tokens
                ),
            )
            supply = self._counted[need] = Supply(text.label, need.weight)
            for document in read_documents(rendered.path):
                supply.add(document.domain if text.mixed else "", Length(document.tokens, document.chat))
        return self._counted[need]

    def _fetch_tokenizer(self, remote_code: bool) -> None:
        patterns = (*TOKENIZER, *TEMPLATES, *(("*.py",) if remote_code else ()))
        self._fetch_unless_here(patterns)

    def _fetch_unless_here(self, patterns: Sequence[str]) -> None:
        """Fetch the files of the base whose paths match, once. Raises CheckpointError if they are too large."""
        files = [f for f in self._base.wanted if any(fnmatch.fnmatch(f.path, pattern) for pattern in patterns)]
        if sum(f.size for f in files) > MAX_TOKENIZER_BYTES:
            raise CheckpointError(f"the tokenizer of {self._base.name} has over {MAX_TOKENIZER_BYTES:,} bytes")
        # A file that the store has is a link into it, and must not be written to.
        missing = [f.path for f in files if not (self._folder / f.path).is_symlink() and f.path not in self._fetched]
        fetch_files(self._base, self._folder, missing)
        self._fetched |= {*missing}


def _assume_enough(need: _Need) -> Supply:
    """Return a supply as long as is needed, for a text of which nothing is known: the others are checked beside it."""
    supply = Supply(need.text.label, need.weight)
    supply.add("", Length((need.tokens,), chat=False))
    return supply


def _has_same_columns(text: Text) -> bool:
    """Check whether all files of a data set have the columns of its first one, as Parquet files do."""
    files = [file for file in text.dataset.files if has_rows(file.path)] if text.dataset else []
    return len(files) == 1 or all(file.path.endswith(".parquet") for file in files)


def _has_usable_column(text: Text) -> bool:
    """Check whether a row with the columns of a data set's first file can be read."""
    return text.field in text.columns if text.field is not None else form_of(text.columns) is not None


def _count_at_least(
    text: Text, paths: Sequence[Path], needed: int, ratio: float, used_of_chats: float = 1.0
) -> Mapping[str, int]:
    """Count the tokens that a text has at least, by domain, if a token has at most `ratio` characters.

    Of chats, this share is counted. Reading stops at `needed` tokens.
    """
    characters = Counter[str]()
    for row in read_rows(paths, text.label, chats=text.chats, field=text.field):
        share = 1.0 if row.text else used_of_chats
        characters[row.domain if text.mixed else ""] += int(row.characters * share)
        if not text.mixed and characters.total() >= ratio * needed:
            break
    return {domain: int(count / ratio) for domain, count in characters.items()}
