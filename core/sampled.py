"""A large data set's profile before all of it is read: measured of rows that are spread evenly over the file, and
repeated until it has the whole file's size.

What is planned from such a profile has numbers of the right size, and none of them is exact. Nobody is refused by it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.packing import IntArray
from core.profile import Column, DataProfile

NUM_SAMPLED = 2000  # rows: a share among them is off by 1.1 % (one standard deviation), and they take a second or two
LEAST_ROWS = 4 * NUM_SAMPLED  # of a file that is worth it; all of a smaller one is there nearly as soon

_ODD = np.uint64(0x9E3779B97F4A7C15)


def spread_rows(num_rows: int, num_spread: int = NUM_SAMPLED) -> npt.NDArray[np.int64]:
    """Indices of so many rows, evenly over the file, the first among them."""
    return np.arange(num_spread, dtype=np.int64) * num_rows // num_spread


def stretch(profile: DataProfile, num_rows: int) -> DataProfile:
    """A profile of sampled rows as if the file were `num_rows` of their like. Copies of a row have hashes of their own,
    so that they are no equal rows and not all held out together; what equals each other in the sample does so in each
    copy of it. What is known of single rows (the preview, refused ones) stays as it is."""
    if num_rows <= profile.num_rows or not len(profile.sample_row):
        return profile
    _, first = np.unique(np.asarray(profile.sample_row.numbers), return_index=True)
    num_good = len(first)
    num_wanted = num_good * num_rows // profile.num_rows
    copies, rest = divmod(num_wanted, num_good)
    rows = np.concatenate((np.tile(np.arange(num_good), copies), spread_rows(num_good, rest)))
    copy_of_row = np.arange(num_wanted) // num_good
    num_samples = np.diff(np.append(first, len(profile.sample_row)))
    samples = _runs_of(first[rows], num_samples[rows])
    stretched = _Stretched(profile, samples)
    hashes = np.asarray(profile.sample_hash.numbers).astype(np.uint64)[samples]
    copy_of_sample = np.repeat(copy_of_row, num_samples[rows]).astype(np.uint64)
    return profile.model_copy(
        update={
            "num_rows": num_rows,
            "num_refused": num_rows - num_wanted,
            "num_fell_back": profile.num_fell_back * num_wanted // num_good,
            "num_tokens_if_split": _scaled(profile.num_tokens_if_split, num_wanted / num_good),
            "sample_row": _column(np.repeat(np.arange(num_wanted), num_samples[rows])),
            "sample_length": stretched.column(profile.sample_length),
            "sample_trained": stretched.column(profile.sample_trained),
            "sample_turns": stretched.column(profile.sample_turns),
            "sample_hash": _column(hashes * (_ODD * copy_of_sample * np.uint64(2) + np.uint64(1))),
            **stretched.runs(),
        }
    )


@dataclass(frozen=True, eq=False)
class _Stretched:
    profile: DataProfile
    samples: IntArray  # which of the profile's, one after another

    def column(self, column: Column) -> Column:
        return _column(np.asarray(column.numbers)[self.samples])

    def runs(self) -> dict[str, Column]:
        counts, bounds = self.profile.sample_runs, self.profile.run_bounds
        if counts is None or bounds is None:
            return {}
        num_runs = np.asarray(counts.numbers).astype(np.int64)
        before = np.cumsum(num_runs) - num_runs
        chosen = _runs_of(before[self.samples], num_runs[self.samples])
        pairs = np.asarray(bounds.numbers).reshape(-1, 2)[chosen]
        return {"sample_runs": self.column(counts), "run_bounds": _column(pairs.reshape(-1))}


def _runs_of(starts: IntArray, lengths: IntArray) -> IntArray:
    """starts[0], starts[0] + 1, ... lengths[0] numbers of it, then those of the next."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def _scaled(number: int | None, factor: float) -> int | None:
    return None if number is None else round(number * factor)


def _column(numbers: npt.NDArray[np.integer]) -> Column:
    return Column(numbers.astype(np.uint64, order="C").data)
