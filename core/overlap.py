"""Validation rows that are no news: a row of the same content, or nearly the same, is trained.

Equal rows are told by the hash of their content, exactly. Held out of a set that is also trained, they never come up,
since the split goes by that hash; nearly equal ones do, and the groups in which the profile keeps them tell. Between
two data sets nearly equal rows are told by their sketches (core.duplicates), so that their number is an estimate.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.duplicates import Sketches, find_alike
from core.packing import IntArray
from core.profile import Column, DataProfile
from core.selection import Selection, begins_anew

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Overlap:
    """Of the validation rows, as many as are evaluated. `num_alike` misses what profiles without groups or sketches
    can't tell."""

    num_rows: int
    num_equal: int
    num_alike: int

    @property
    def count(self) -> int:
        return self.num_equal + self.num_alike


def find_overlap(selection: Selection) -> Overlap:
    trained = _rows_of(selection, _distinct(selection.train.sample_ids))
    evaluated = _rows_of(selection, _distinct(selection.validation.sample_ids))
    hashes = [_hashes(rows) for rows in trained]
    all_hashes = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
    num_rows = num_equal = num_alike = 0
    for rows in evaluated:
        mine = _hashes(rows)
        # Rows held out are those with the smallest hashes, so that as a rule nothing is left to compare.
        is_equal = np.isin(mine, all_hashes[all_hashes <= mine.max()])
        is_alike = np.zeros(len(is_equal), np.bool_)
        for others in trained:
            is_alike |= _alike(rows, others)
        num_rows += len(is_equal)
        num_equal += int(is_equal.sum())
        num_alike += int((is_alike & ~is_equal).sum())
    return Overlap(num_rows, num_equal, num_alike)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Some rows of a data set, each by its first sample."""

    profile: DataProfile
    samples: IntArray


def _rows_of(selection: Selection, sample_ids: IntArray) -> list[_Rows]:
    """Of each data set the rows of these samples (global ids, rising); a set that is named twice is one."""
    found: dict[int, _Rows] = {}
    first = 0
    for profile in selection.samples.profiles:
        num_samples = len(profile.sample_length)
        begin, end = np.searchsorted(sample_ids, (first, first + num_samples))
        first += num_samples
        samples = sample_ids[begin:end] - (first - num_samples)
        if id(profile) in found:
            samples = np.union1d(samples, found[id(profile)].samples)
        is_first_of_row = begins_anew(np.asarray(profile.sample_row.numbers)[samples])
        found[id(profile)] = _Rows(profile, samples[is_first_of_row])
    return [rows for rows in found.values() if len(rows.samples)]


def _distinct(sample_ids: IntArray) -> IntArray:
    """Of ids in their order, in which the pieces of a sample lie side by side."""
    distinct: IntArray = sample_ids[begins_anew(sample_ids)]
    return distinct


def _hashes(rows: _Rows) -> npt.NDArray[np.uint64]:
    return _at(rows.profile.sample_hash, rows.samples)


def _at(column: Column, samples: IntArray) -> npt.NDArray[np.uint64]:
    return np.asarray(column.numbers)[samples].astype(np.uint64)


def _alike(rows: _Rows, others: _Rows) -> BoolArray:
    """Which of the rows are nearly equal to any of the others."""
    if rows.profile is others.profile:
        if rows.profile.sample_group is None:
            return np.zeros(len(rows.samples), np.bool_)
        groups = _at(rows.profile.sample_group, rows.samples)
        return (groups > 0) & np.isin(groups, _at(rows.profile.sample_group, others.samples))
    mine, theirs = _sketches(rows), _sketches(others)
    if mine is None or theirs is None:
        return np.zeros(len(rows.samples), np.bool_)
    return find_alike(mine, theirs).is_alike


def _sketches(rows: _Rows) -> Sketches | None:
    column = rows.profile.sample_sketches
    if column is None:
        return None
    sketches: Sketches = np.asarray(column.numbers).astype(np.uint64).reshape(-1, 2)[rows.samples]
    return sketches
