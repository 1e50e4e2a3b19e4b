"""Limits on length: exact against packing again, few, and worth comparing."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.lengths import MOST_CANDIDATES, bin_lengths, candidate_lengths, cut_at
from core.packing import best_fit, count_rows

any_lengths = st.lists(st.integers(1, 6000), min_size=1, max_size=200).map(np.array)


@given(any_lengths, st.integers(0, 3000))
def test_rows_are_counted_as_best_fit_makes_them(lengths, more):
    capacity = int(lengths.max()) + more
    assert count_rows(lengths, capacity) == len(best_fit(lengths, capacity))


@given(any_lengths, st.integers(1, 7000))
def test_a_cut_is_exact_and_adds_up(lengths, max_length):
    trained = lengths // 3
    cut = cut_at(max_length, lengths, trained)
    kept = [length for length in lengths.tolist() if length <= max_length]
    assert (cut.samples, cut.tokens) == (len(kept), sum(kept))
    assert cut.samples + cut.samples_beyond == len(lengths)
    assert cut.tokens + cut.tokens_beyond == lengths.sum()
    assert cut.trained_tokens + cut.trained_tokens_beyond == trained.sum()
    assert cut.rows == len(best_fit(np.array(kept, dtype=np.int64), max_length))
    if kept:
        assert cut.all_padded_efficiency <= cut.fill <= 1
        assert cut.fill == sum(kept) / (cut.rows * max_length)


def test_of_no_samples_nothing_is_packed():
    cut = cut_at(10, np.array([20, 30]), np.array([5, 5]))
    assert (cut.samples_beyond, cut.rows, cut.fill, cut.all_padded_efficiency, cut.kept_share) == (2, 0, 0, 0, 0)
    assert candidate_lengths(np.array([], dtype=np.int64)) == ()


@given(any_lengths, st.none() | st.integers(1, 5000))
def test_candidates_are_few_rising_and_keep_something(lengths, limit):
    candidates = candidate_lengths(lengths, limit)
    assert list(candidates) == sorted(set(candidates)) and len(candidates) <= MOST_CANDIDATES
    if limit is None or limit >= lengths.min():
        assert candidates and candidates[0] >= lengths.min()
        assert candidates[-1] >= min(lengths.max(), limit or lengths.max())
    else:
        assert candidates == ()
    assert limit is None or not candidates or candidates[-1] <= limit


def test_candidates_are_powers_of_two_and_what_keeps_a_share_of_the_samples():
    lengths = np.arange(10, 2010)
    candidates = candidate_lengths(lengths, also=[777])
    assert {64, 128, 256, 512, 1024, 777} <= set(candidates)
    assert {1024, 1536, 1856, 1920, 2048} <= set(candidates)  # half, 75, 90, 95 % and all, in multiples of 64
    assert candidate_lengths(np.arange(10, 40))[-1] == 40  # of short samples in smaller steps


@pytest.mark.parametrize("longest", [1, 39, 40, 41, 5000])
def test_a_histogram_holds_every_sample_once(longest):
    lengths = np.append(np.arange(1, longest + 1), longest)
    trained = lengths // 2
    bins = bin_lengths(lengths, trained)
    assert len(bins) <= 52 and bins[0].start == 1 and bins[-1].start <= longest < bins[-1].below
    assert all(first.below == second.start for first, second in pairwise(bins))
    for each in bins:
        inside = (lengths >= each.start) & (lengths < each.below)
        assert (each.samples, each.trained_tokens) == (inside.sum(), trained[inside].sum())
    assert sum(each.samples for each in bins) == len(lengths)


def test_a_histogram_of_nothing_is_empty_and_one_long_sample_takes_few_bins():
    none = np.array([], dtype=np.int64)
    assert bin_lengths(none, none) == ()
    lengths = np.append(np.arange(100, 200), 12_000)
    assert [each.samples > 0 for each in bin_lengths(lengths, lengths)].index(False) >= 4
