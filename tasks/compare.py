"""Compare two checkpoints of one base: which is closer to it, where, and is the difference real?

Base and checkpoints are measured one after another on the same text, as validate does it, with one decoder block in
memory at a time. Nothing is stored.

A difference is real if its interval does not contain 0. The interval has two parts. One is the text: the error of the
mean over other windows of this kind, by bootstrap, in which both checkpoints read the same windows. The other is chance
in the making: two runs of one recipe with other seeds round differently, and differ by SEED_SPREAD although neither
recipe is better. All intervals of a comparison hold together at 95 % (Bonferroni).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.errors import CheckpointError, TokenizerError
from requant.tasks.validating.compare import kl_by_place
from requant.tasks.validating.comparison import Answer, Difference, DomainComparison, OverallAnswer
from requant.tasks.validating.domains import MIN_WINDOWS
from requant.tasks.validating.measure import measure, run_settings
from requant.tasks.validating.measurement import Doubles, Floats, Measurement, aligned, resampled
from requant.tasks.validating.model import RunSettings

ERROR_RATE = 0.05  # of all rows of a comparison together
# Standard deviation from seed to seed: of the mean KL divergence in a domain, as a share of it, and of a draft
# acceptance rate. docs/explanation/gates.md has the measurements.
SEED_SPREAD = 0.045
ACCEPTANCE_SEED_SPREAD = 0.005
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Distances:
    """The distance of a checkpoint from its base by window, float64 `[n]`.

    kl: mean KL(base || checkpoint) of the next token, in nats; nll: mean loss in nats; top1: share of places with the
    base's choice; accepted: draft acceptance rate of the first draft, None without an MTP head that torch can run, and
    with losses that are not finite.
    """

    domains: tuple[str, ...]
    kl: Doubles
    nll: Doubles
    top1: Doubles
    accepted: Doubles | None

    @classmethod
    def of(cls, measured: Measurement, base: Measurement, kl: Floats) -> Distances:
        """Reduce the measurement of a checkpoint to values by window. `kl` is by place, `[n, L-1]`."""
        names = {int(i): name for name, rows in base.windows_by_domain.items() for i in rows}
        # With NaN losses the drafts always agree, so no rate is reported.
        has_rate = bool(measured.drafts.size and np.isfinite(measured.nll).all())
        return cls(
            domains=tuple(names[i] for i in range(len(base.tokens))),
            kl=kl.mean(axis=1, dtype=np.float64),
            nll=measured.nll.mean(axis=1, dtype=np.float64),
            top1=(measured.top1 == base.top1).mean(axis=1, dtype=np.float64),
            accepted=measured.first_accepted.mean(axis=1) if has_rate else None,
        )

    def up_to(self, windows: int) -> Distances:
        """Return the values of the first windows."""
        accepted = None if self.accepted is None else self.accepted[:windows]
        return Distances(self.domains[:windows], self.kl[:windows], self.nll[:windows], self.top1[:windows], accepted)


def compare_checkpoints(
    a: Path, b: Path, base: Path, text: Path, tokens: int | None = None, *, remote_code: bool = False
) -> dict[str, DomainComparison]:
    """Compare two checkpoints by domain of a text.

    `text` is a file that `text_for_measuring` of evaluation_text.py returned, and `tokens` how many are measured of
    each of its domains. Raises CheckpointError for a checkpoint that cannot be run, or that is of another base.
    """
    Checkpoint.open(base).sound()
    for folder in (a, b):  # before anything is measured
        _check_same_base(folder, base)
    settings = run_settings(base, remote_code)
    of_base = measure(base, text, settings, tokens)

    def distances_of(folder: Path) -> Distances:
        try:
            measured = measure(folder, text, settings, tokens)
        except TokenizerError as error:
            log.warning(f"{error}: it is measured on the base's tokens")
            measured = measure(folder, text, replace(settings, tokens_of=base), tokens)
        return _distances(folder, base, of_base, measured, settings)

    return compare_distances(distances_of(a), distances_of(b), window_tokens=of_base.tokens.shape[1])


def _check_same_base(folder: Path, base: Path) -> None:
    """Raise CheckpointError if the vocabulary of a checkpoint has another size than its base's."""
    ours, theirs = (Checkpoint.open(path).text_config.get("vocab_size") for path in (folder, base))
    if ours != theirs:
        raise CheckpointError(
            f"{folder} is of another base than {base}: its vocabulary (vocab_size in config.json) has {ours} tokens, "
            f"and the base's has {theirs}"
        )


def _distances(
    folder: Path, base: Path, of_base: Measurement, measured: Measurement, settings: RunSettings
) -> Distances:
    """Reduce the measurement of a checkpoint to its distances from the base."""
    of_base, measured = aligned(of_base, measured)
    if not np.array_equal(of_base.tokens, measured.tokens):
        raise CheckpointError(
            f"{folder} is of another base than {base}: its tokenizer makes other tokens of the same text"
        )
    return Distances.of(measured, of_base, kl_by_place(folder, base, measured, of_base, settings))


def compare_distances(a: Distances, b: Distances, window_tokens: int) -> dict[str, DomainComparison]:
    """Compare two checkpoints by domain. Both were measured on the same windows, of which one may have fewer."""
    common = min(len(a.domains), len(b.domains))
    a, b = a.up_to(common), b.up_to(common)
    rows = {name: np.array([i for i, domain in enumerate(a.domains) if domain == name]) for name in a.domains}
    drafts = a.accepted is not None and b.accepted is not None
    judged = sum(len(indices) >= MIN_WINDOWS for indices in rows.values()) * (2 if drafts else 1)
    z = NormalDist().inv_cdf(1 - ERROR_RATE / 2 / max(1, judged))
    compared = {}
    for name, at in rows.items():
        acceptance = None
        if a.accepted is not None and b.accepted is not None:
            acceptance = _difference(a.accepted[at], b.accepted[at], z, relative=False)
        compared[name] = DomainComparison(
            tokens=len(at) * window_tokens,
            kl_divergence=_difference(a.kl[at], b.kl[at], z, relative=True),
            perplexity=(_perplexity(a.nll[at]), _perplexity(b.nll[at])),
            top1_agreement=(float(a.top1[at].mean()), float(b.top1[at].mean())),
            mtp_acceptance=acceptance,
        )
    return compared


def overall(domains: Sequence[DomainComparison]) -> OverallAnswer | None:
    """Sum up the answers of all rows."""
    answers = {part.answer for row in domains for part in (row.kl_divergence, row.mtp_acceptance) if part}
    if {"a", "b"} <= answers:
        return "mixed"
    for answer in ("a", "b", "no difference"):
        if answer in answers:
            return answer
    return None


def _difference(a: Doubles, b: Doubles, z: float, *, relative: bool) -> Difference:
    """Compare values by window: divergences, of which less is better, if `relative`, otherwise rates.

    The relative difference is `(b - a) / max(a, b)`, which lies between -1 and 1 and exists for a divergence of 0.
    """

    def difference(means: Doubles) -> Doubles:
        of_a, of_b = means[..., 0], means[..., 1]
        if not relative:
            return np.asarray(of_a - of_b)
        largest = np.maximum(of_a, of_b)
        return np.asarray((of_b - of_a) / np.where(largest > 0, largest, 1.0))

    pairs = np.stack([a, b], axis=1)
    value = float(difference(pairs.mean(axis=0)))
    interval: tuple[float, float] | None = None
    answer: Answer | None = None
    if len(a) >= MIN_WINDOWS and np.isfinite(pairs).all():
        spread = float(difference(pairs[resampled(len(pairs))].mean(axis=1)).std())
        # The spread of a / b from seed to seed is a share of a / b, which is 1 - |difference|.
        seeds = SEED_SPREAD * (1 - abs(value)) if relative else ACCEPTANCE_SEED_SPREAD
        half_width = z * math.sqrt(spread**2 + 2 * seeds**2)
        interval = max(-1.0, value - half_width), min(1.0, value + half_width)
        answer = "a" if interval[0] > 0 else "b" if interval[1] < 0 else "no difference"
    return Difference(a=float(a.mean()), b=float(b.mean()), difference=value, interval=interval, answer=answer)


def _perplexity(nll: Doubles) -> float:
    return float(np.exp(nll.mean()))
