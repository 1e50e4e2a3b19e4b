"""How long samples are, and what a limit on their length does to them.

A `Cut` is what a job makes of a data set at one `data.max_length`, when it drops what is longer and packs the rest into
rows of that length: exact, by the function that packs the job. `candidate_lengths` picks the few limits that are worth
comparing, so that a page can hold all of them and show another one at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from core.packing import IntArray, count_rows, fill
from core.profile import DataProfile

HISTOGRAM_BINS = 40
MOST_CANDIDATES = 16
# Candidates are multiples of this, as `auto` has them; of shorter samples, of less.
LENGTH_STEP = 64  # tokens
LEAST_STEPS = 16  # up to the longest sample
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
    """Equal bins up to the longest sample."""
    longest = int(lengths.max(initial=0))
    width = longest // HISTOGRAM_BINS + 1
    bins = lengths // width
    num_bins = longest // width + 1
    samples = np.bincount(bins, minlength=num_bins).tolist()
    trained_tokens = np.bincount(bins, weights=trained, minlength=num_bins).tolist()
    return tuple(
        LengthBin(index * width, (index + 1) * width, num_samples, round(tokens))
        for index, (num_samples, tokens) in enumerate(zip(samples, trained_tokens, strict=True))
    )


def candidate_lengths(lengths: IntArray, limit: int | None = None, also: Iterable[int] = ()) -> tuple[int, ...]:
    """Limits that keep some of the samples, the shortest first: powers of two, and what keeps such shares of them;
    none above `limit`, the model's context. Always those in `also`."""
    if len(lengths) == 0:
        return ()
    shortest, longest = int(lengths.min()), int(lengths.max())
    most = longest if limit is None else min(longest, limit)
    step = LENGTH_STEP
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
