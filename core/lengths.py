"""How long samples are, and what a limit on their length does to them.

A `Cut` is what a job makes of a data set at one `data.max_length`, when it drops what is longer and packs the rest into
rows of that length: exact, by the function that packs the job. `candidate_lengths` picks the few limits that are worth
comparing, so that a page can hold all of them and show another one at once.

Only samples with something to teach count here: the others are never trained on. Nothing is held out for validation,
which a job decides.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from core.errors import Reason
from core.packing import IntArray, count_rows, fill
from core.presets import LENGTH_MULTIPLE, auto_max_length
from core.profile import DataProfile

BINS_PER_OCTAVE = 4
MOST_CANDIDATES = 16
LEAST_STEPS = (
    16  # up to the longest sample: where samples are short, candidates are multiples of less than `auto` takes
)
QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)


@dataclass(frozen=True)
class LengthBin:
    start: int  # tokens
    below: int
    samples: int
    trained_tokens: int


@dataclass(frozen=True)
class Cut:
    """What is longer is dropped, and what is left is packed by best fit into rows of `max_length`."""

    max_length: int  # tokens
    samples_beyond: int
    tokens_beyond: int
    trained_tokens_beyond: int
    samples: int  # that are kept
    tokens: int
    trained_tokens: int
    rows: int

    @property
    def kept_share(self) -> float:
        """Of the trained tokens."""
        whole = self.trained_tokens + self.trained_tokens_beyond
        return self.trained_tokens / whole if whole else 0.0

    @property
    def fill(self) -> float:
        return fill(self.tokens, self.rows, self.max_length) if self.rows else 0.0

    @property
    def all_padded_efficiency(self) -> float:
        """Were each of them padded to max_length instead."""
        return fill(self.tokens, self.samples, self.max_length) if self.samples else 0.0


def of_teaching(profile: DataProfile) -> tuple[IntArray, IntArray]:
    """Length and trained tokens of each sample that has any of those: the others are never trained on."""
    lengths = np.asarray(profile.sample_length.numbers).astype(np.int64)
    trained = np.asarray(profile.sample_trained.numbers).astype(np.int64)
    return lengths[trained > 0], trained[trained > 0]


def bin_lengths(lengths: IntArray, trained: IntArray) -> tuple[LengthBin, ...]:
    """From the shortest to the longest sample. Each bin reaches 19 % further than the one before: lengths spread over
    orders of magnitude, and one long sample must not press all others into a corner."""
    if len(lengths) == 0:
        return ()
    octaves = int(lengths.max()).bit_length()
    edges = np.unique(np.rint(2 ** (np.arange(octaves * BINS_PER_OCTAVE + 1) / BINS_PER_OCTAVE)).astype(np.int64))
    bins = np.searchsorted(edges, lengths, side="right") - 1
    samples = np.bincount(bins, minlength=len(edges))
    trained_tokens = np.bincount(bins, weights=trained, minlength=len(edges))
    return tuple(
        LengthBin(int(edges[index]), int(edges[index + 1]), int(samples[index]), round(float(trained_tokens[index])))
        for index in range(int(bins.min()), int(bins.max()) + 1)
    )


def candidate_lengths(lengths: IntArray, limit: int | None = None, also: Iterable[int] = ()) -> tuple[int, ...]:
    """Limits that keep some of the samples, the shortest first: powers of two, and what keeps such shares of them;
    none above `limit`, the model's context. Always those in `also`."""
    if len(lengths) == 0:
        return ()
    shortest, longest = int(lengths.min()), int(lengths.max())
    most = longest if limit is None else min(longest, limit)
    step = LENGTH_MULTIPLE
    while step > 1 and step * LEAST_STEPS > longest:
        step //= 2

    def up(length: int) -> int:
        rounded = -(-length // step) * step
        return rounded if limit is None else min(rounded, limit)

    enough = up(most)
    # numpy's own interpolation would make lengths that no sample has.
    ordered = np.sort(lengths)
    shares = {up(int(ordered[int(np.ceil(share * len(ordered))) - 1])) for share in QUANTILES}
    powers = [2**exponent for exponent in range(enough.bit_length()) if max(shortest, step) <= 2**exponent < enough]
    found = {length for length in shares if shortest <= length <= enough} | {enough} if enough >= shortest else set()
    room = MOST_CANDIDATES - len(found)
    found |= set(sorted(set(powers) - found, reverse=True)[:room])
    return tuple(sorted(found | set(also)))


def choose_length(
    lengths: IntArray, trained: IntArray, context_length: int, row_length: int | None
) -> tuple[int, Reason]:
    """What `auto` becomes: by the histogram, what all samples of a length lose together."""
    distinct, place = np.unique(lengths, return_inverse=True)
    targets = np.bincount(place, weights=trained).astype(np.int64)
    return auto_max_length(distinct.tolist(), targets.tolist(), context_length, row_length)


def cut_at(max_length: int, lengths: IntArray, trained: IntArray) -> Cut:
    is_kept = lengths <= max_length
    kept = lengths[is_kept]
    tokens, trained_tokens = int(kept.sum()), int(trained[is_kept].sum())
    return Cut(
        max_length=max_length,
        samples_beyond=len(lengths) - len(kept),
        tokens_beyond=int(lengths.sum()) - tokens,
        trained_tokens_beyond=int(trained.sum()) - trained_tokens,
        samples=len(kept),
        tokens=tokens,
        trained_tokens=trained_tokens,
        rows=count_rows(kept, max_length),
    )


@dataclass(frozen=True)
class CutReport:
    """A data set's samples under one limit after the other."""

    samples: int  # that have something to teach
    tokens: int
    trained_tokens: int
    longest: int  # tokens
    bins: tuple[LengthBin, ...]
    cuts: tuple[Cut, ...]  # the shortest first
    auto: int | None  # tokens: what data.max_length: auto becomes if nothing is held out; None without a sample


def compare_cuts(profile: DataProfile, context_length: int | None = None, also: Iterable[int] = ()) -> CutReport:
    """`context_length` is the model's, where it is known."""
    lengths, trained = of_teaching(profile)
    longest = int(lengths.max(initial=0))
    auto = None
    if len(lengths):
        auto, _ = choose_length(lengths, trained, context_length or longest + LENGTH_MULTIPLE, None)
        also = (auto, *also)
    return CutReport(
        samples=len(lengths),
        tokens=int(lengths.sum()),
        trained_tokens=int(trained.sum()),
        longest=longest,
        bins=bin_lengths(lengths, trained),
        cuts=tuple(cut_at(limit, lengths, trained) for limit in candidate_lengths(lengths, context_length, also)),
        auto=auto,
    )
