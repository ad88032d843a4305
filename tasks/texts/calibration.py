"""The calibration texts of a run: one source or several with weights, each pinned to its content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from requant.tasks.artifact import Manifest, digest_of
from requant.tasks.recipe.quantize_section import SELF, CalibrationSetting, Quantize, Source
from requant.tasks.texts.text import Text, find_text


@dataclass(frozen=True)
class CalibrationSource:
    """A text to take samples from. weight: its share of the samples beside the other weights, if the recipe has any."""

    text: Text
    weight: float | None = None


@dataclass(frozen=True)
class Calibration:
    """All sources of the calibration samples, in the recipe's order."""

    sources: tuple[CalibrationSource, ...]

    @classmethod
    def of(cls, *texts: Text) -> Calibration:
        """Return a calibration with these texts, without weights."""
        return cls(tuple(map(CalibrationSource, texts)))

    @property
    def name(self) -> str:
        """The names of the sources, each pinned to what it was."""
        return ", ".join(source.text.name for source in self.sources)

    @property
    def digest(self) -> str:
        """The digest of the contents and weights. That of a single source is the text's, as weights are relative."""
        if len(self.sources) == 1:
            return self.sources[0].text.digest
        return digest_of([[source.text.digest, source.weight] for source in self.sources])

    @property
    def chats(self) -> bool:
        """Whether a source has rows that the base's chat template renders."""
        return any(source.text.chats for source in self.sources)

    @property
    def waits_for_base(self) -> bool:
        """Whether a source is yet to be written by the base: then the digest is not known."""
        return any(source.text.waits_for_base for source in self.sources)

    def with_written(self, manifest: Manifest) -> Calibration:
        """Return this calibration with the files that the base wrote as its source `self`.

        They hold documents, which are rendered already.
        """
        written = Text(SELF, f"self:{manifest.digest}", written=manifest)
        return Calibration(
            tuple(replace(one, text=written) if one.text.waits_for_base else one for one in self.sources)
        )

    def pinned(self, quantize: Quantize, name_of: Callable[[Text], str]) -> CalibrationSetting:
        """Return the key `calibration` of `quantize` with the names that `name_of` gives in place of its own."""
        return pin_sources(quantize.calibration, [name_of(source.text) for source in self.sources])


def pin_sources(given: CalibrationSetting, names: list[str]) -> CalibrationSetting:
    """Return a recipe's key `calibration` with other names of its sources, in their order."""
    entries = given if isinstance(given, list) else [given]
    pinned = [
        entry.model_copy(update={"source": name}) if isinstance(entry, Source) else name
        for entry, name in zip(entries, names, strict=True)
    ]
    return pinned if isinstance(given, list) else pinned[0]


def find_calibration(quantize: Quantize) -> Calibration:
    """Find the texts that a recipe calibrates with. Raises RecipeError, HubError, HubUnavailable as `find_text`."""
    return Calibration(
        tuple(CalibrationSource(find_text(one.source, field=one.field), one.weight) for one in quantize.sources)
    )
