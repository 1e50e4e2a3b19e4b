from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from core import packing
from core.errors import UserError
from core.packing import (
    PlanSettings,
    SampleSet,
    best_fit,
    lower_bound,
    next_fit,
    plan_epoch,
    plan_run,
    sample_hash,
    wrap,
)

CAPACITY = 64
length_lists = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=120).map(np.array)
MODES = ["packed", "padding_free", "grouped", "padded"]
ALGORITHMS = ["best_fit", "wrapped", "sequential"]


def settings(batch_by="samples", per_step=7, mode="packed", **more):
    return PlanSettings(mode, more.pop("row_length", CAPACITY), batch_by, per_step, **more)


any_settings = st.builds(
    settings,
    batch_by=st.sampled_from(["samples", "tokens", "rows"]),
    per_step=st.integers(1, 150),
    mode=st.sampled_from(MODES),
    algorithm=st.sampled_from(["best_fit", "sequential"]),
    row_length=st.integers(CAPACITY, 3 * CAPACITY),
    micro_batch_size=st.integers(1, 4),
    num_ranks=st.integers(1, 4),
)


def all_but_the_first(positions, starts, ends):
    """Every token trained: all of a piece are targets but its first."""
    return ends - starts - 1


def tokens(row):
    return sum(segment.length for segment in row)


# -- best fit --------------------------------------------------------------------------------------------------------


def decreasing_best_fit_one_by_one(lengths, capacity):
    """The textbook's: the contents of each row, as sorted lengths."""
    rows = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@given(length_lists, st.integers(CAPACITY, 5 * CAPACITY))
def test_every_sample_lies_in_one_row_and_no_row_is_over_its_capacity(lengths, capacity):
    packs = best_fit(lengths, capacity)
    assert sorted(packs.indices.tolist()) == list(range(len(lengths)))
    rows = list(packs)
    assert len(rows) == len(packs) and all(len(row) for row in rows)
    assert max(int(lengths[row].sum()) for row in rows) <= capacity


@given(length_lists, st.integers(CAPACITY, 5 * CAPACITY))
def test_packing_by_histogram_fills_rows_as_best_fit_does_one_by_one(lengths, capacity):
    by_histogram = sorted(int(lengths[row].sum()) for row in best_fit(lengths, capacity))
    assert by_histogram == sorted(sum(row) for row in decreasing_best_fit_one_by_one(lengths, capacity))


@given(length_lists)
def test_rows_lie_between_the_lower_bound_and_the_guarantee_of_decreasing_fits(lengths):
    num_rows, bound = len(best_fit(lengths, CAPACITY)), lower_bound(lengths, CAPACITY)
    assert -(-int(lengths.sum()) // CAPACITY) <= bound <= num_rows
    assert num_rows <= 11 / 9 * optimum_at_most(lengths) + 6 / 9


def optimum_at_most(lengths):
    """An upper bound of the fewest rows: best of several greedy orders, good enough to test a guarantee of 11/9."""
    orders = [sorted(lengths.tolist(), reverse=True), lengths.tolist(), sorted(lengths.tolist())]
    fewest = len(lengths)
    for order in orders:
        spaces = []
        for length in order:
            fitting = [index for index, space in enumerate(spaces) if space >= length]
            if fitting:
                spaces[fitting[0]] -= length
            else:
                spaces.append(CAPACITY - length)
        fewest = min(fewest, len(spaces))
    return fewest


def test_the_lower_bound_sees_that_samples_over_half_a_row_do_not_share():
    assert lower_bound(np.array([33] * 10), 64) == 10, "by tokens alone it were 6"
    assert lower_bound(np.array([40] * 4 + [24] * 4), 64) == 4
    assert lower_bound(np.array([40] * 4 + [25] * 4), 64) == 6


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("short", lambda rng, count: rng.lognormal(4.8, 0.7, count)),
        ("chat", lambda rng, count: rng.lognormal(6.6, 0.9, count)),
        ("uniform", lambda rng, count: rng.uniform(1, 4096, count)),
        ("two humps", lambda rng, count: np.where(rng.random(count) < 0.5, rng.uniform(20, 200, count), rng.uniform(1500, 4000, count))),
    ],
)  # fmt: skip
def test_a_large_set_packs_within_a_thousandth_of_the_lower_bound(name, draw):
    lengths = np.clip(draw(np.random.default_rng(1), 200_000), 8, 4096).astype(int)
    bound = lower_bound(lengths, 4096)
    assert bound > 1000, "a thousandth means something"
    assert len(best_fit(lengths, 4096)) <= 1.001 * bound


def test_a_sample_longer_than_a_row_is_refused_with_both_numbers():
    for refuse in (
        lambda: best_fit(np.array([5, 65]), CAPACITY),
        lambda: lower_bound(np.array([5, 65]), CAPACITY),
        lambda: plan_epoch(np.array([5, 65]), settings(mode="padded"), 1, 1),
    ):
        with pytest.raises(UserError) as refused:
            refuse()
        assert refused.value.code == "plan.sample_longer_than_row"
        assert refused.value.parameters == {"length": 65, "row_length": CAPACITY}


def test_rows_longer_than_sixteen_bits_pack_too():
    lengths = np.array([70_000, 60_000, 10_000, 131_072, 1])
    rows = [sorted(row.tolist()) for row in best_fit(lengths, 131_072)]
    assert sorted(rows) == [[0, 1, 4], [2], [3]]


# -- sequential and wrapped ------------------------------------------------------------------------------------------


@given(length_lists, st.integers(CAPACITY, 5 * CAPACITY))
def test_next_fit_keeps_the_order_and_closes_a_row_only_when_the_next_does_not_fit(lengths, capacity):
    rows = [row.tolist() for row in next_fit(lengths, capacity)]
    assert [position for row in rows for position in row] == list(range(len(lengths)))
    assert all(lengths[row].sum() <= capacity for row in rows)
    for row, following in pairwise(rows):
        assert lengths[row].sum() + lengths[following[0]] > capacity


@given(length_lists, st.integers(1, 5 * CAPACITY))
def test_wrapped_rows_are_all_full_but_the_last_and_hold_every_token_once(lengths, capacity):
    packs, starts, ends = wrap(lengths, capacity)
    rows = [
        [token for piece in range(start, end) for token in tokens_of(packs.indices[piece], starts[piece], ends[piece])]
        for start, end in pairwise(packs.offsets)
    ]
    assert all(len(row) == capacity for row in rows[:-1]) and 1 <= len(rows[-1]) <= capacity
    every = [(position, token) for position, length in enumerate(lengths) for token in range(length)]
    assert [token for row in rows for token in row] == every


def tokens_of(position, start, end):
    return [(position, token) for token in range(start, end)]


@given(length_lists, st.integers(1, 5), st.integers(2, 2 * CAPACITY))
def test_a_wrapped_epoch_counts_its_cuts_and_the_targets_that_come_first_behind_them(lengths, rows_per_step, capacity):
    capacity = max(capacity, int(lengths.max()))
    if lengths.max() == 1:
        lengths = lengths + 1
        capacity += 1
    wrapped = settings("rows", rows_per_step, row_length=capacity, algorithm="wrapped")
    try:
        plan = plan_epoch(lengths, wrapped, 3, 1, all_but_the_first)
    except UserError as refused:
        assert refused.code == "plan.wrapped_to_nothing"
        assert lengths.sum() - len(lengths) <= (lengths.sum() - 1) // capacity, "a cut for each of the targets"
        assume(False)
    steps = list(plan)
    segments = [segment for step in steps for segment in step.segments]
    assert all(step.rows is not None and sum(step.rows, ()) == step.segments for step in steps)
    assert [len(step.rows) for step in steps[:-1]] == [rows_per_step] * (len(steps) - 1)
    assert all(tokens(row) <= capacity for step in steps for row in step.rows)
    left_out = int(lengths.sum()) - plan.tokens
    assert (left_out > 0) == (plan.rows_without_targets > 0)
    assert plan.targets_lost == plan.num_cuts, "each cut costs the token behind it"
    trained = sum(segment.length - 1 for segment in segments)
    assert trained + plan.targets_lost == int(lengths.sum()) - len(lengths)
    assert all(any(segment.length > 1 for segment in step.segments) for step in steps), "no step is without a target"


def test_wrapped_rows_without_a_single_target_are_refused():
    only_behind_the_cut = lambda positions, starts, ends: ((starts < 64) & (ends > 64)).astype(int)  # noqa: E731
    with pytest.raises(UserError) as refused:
        plan_epoch(np.array([64]), settings("rows", 1, algorithm="wrapped"), 1, 1, only_behind_the_cut)
    assert refused.value.code == "plan.wrapped_to_nothing"


# -- an epoch --------------------------------------------------------------------------------------------------------


@given(length_lists, any_settings, st.integers(0, 2**40), st.integers(1, 5))
def test_every_sample_comes_once_an_epoch(lengths, some_settings, seed, epoch):
    steps = list(plan_epoch(lengths, some_settings, seed, epoch))
    seen = Counter(sample for step in steps for sample in step.sample_ids)
    assert seen == Counter(range(len(lengths)))
    assert [step.index for step in steps] == list(range(len(steps)))
    assert [step.ends_epoch for step in steps] == [False] * (len(steps) - 1) + [True]
    assert steps[-1].epochs_done == epoch


@given(
    length_lists,
    st.sampled_from(["samples", "tokens"]),
    st.integers(1, 200),
    st.sampled_from(MODES),
    st.integers(CAPACITY, 4 * CAPACITY),
    st.integers(1, 5),
    st.integers(1, 5),
)
def test_by_samples_or_tokens_a_step_is_the_same_set_in_every_layout(
    lengths, batch_by, per_step, mode, row_length, micro_batch_size, num_ranks
):
    plain = plan_epoch(lengths, settings(batch_by, per_step), 3, 1)
    other_settings = settings(
        batch_by, per_step, mode, row_length=row_length, micro_batch_size=micro_batch_size, num_ranks=num_ranks
    )
    other = plan_epoch(lengths, other_settings, 3, 1)
    assert list(plain) == list(other)
    assert all(segment == (segment.sample, 0, lengths[segment.sample]) for step in plain for segment in step.segments)


@given(length_lists, st.integers(1, 300))
def test_by_tokens_a_step_closes_with_the_sample_that_reaches_the_number(lengths, tokens_per_step):
    steps = list(plan_epoch(lengths, settings("tokens", tokens_per_step), 3, 1))
    for step in steps:
        assert lengths[list(step.sample_ids[:-1])].sum() < tokens_per_step
    assert all(lengths[list(step.sample_ids)].sum() >= tokens_per_step for step in steps[:-1])


@given(length_lists, st.integers(1, 9))
def test_by_rows_a_step_is_rows_of_the_epoch_packed_as_one(lengths, rows_per_step):
    plan = plan_epoch(lengths, settings("rows", rows_per_step), 3, 1)
    steps = list(plan)
    rows = [row for step in steps for row in step.rows]
    assert len(rows) == len(best_fit(lengths, CAPACITY))
    assert [len(step.rows) for step in steps[:-1]] == [rows_per_step] * (len(steps) - 1)
    assert all(tuple(segment for row in step.rows for segment in row) == step.segments for step in steps)
    assert max(map(tokens, rows)) <= CAPACITY


def test_by_rows_the_longest_samples_do_not_all_come_first():
    lengths = np.concatenate((np.full(200, CAPACITY), np.full(400, CAPACITY // 2)))
    first_half = plan_epoch(lengths, settings("rows", 200), 1, 1).step(0)
    assert 70 < sum(len(row) == 1 for row in first_half.rows) < 130, "of 400 rows half hold one long sample"


def test_by_rows_and_padded_a_row_is_one_sample():
    lengths = np.arange(1, 11)
    by_rows = plan_epoch(lengths, settings("rows", 3, "padded"), 3, 1)
    by_samples = plan_epoch(lengths, settings("samples", 3), 3, 1)
    assert [step.sample_ids for step in by_rows] == [step.sample_ids for step in by_samples]


@pytest.mark.parametrize("batch_by", ["samples", "tokens", "rows"])
def test_epochs_and_seeds_differ_and_the_same_ones_agree(batch_by):
    lengths = np.random.default_rng(0).integers(1, CAPACITY, 300)
    plan = settings(batch_by, 5)

    def order(seed, epoch):
        return plan_epoch(lengths, plan, seed, epoch).order.tolist()

    assert order(1, 1) == order(1, 1)
    assert order(1, 1) != order(1, 2) and order(1, 1) != order(2, 1)


def test_neighbours_in_a_packed_row_vary_by_epoch():
    lengths = np.random.default_rng(0).integers(8, CAPACITY, 400)

    def neighbours(epoch):
        return {
            frozenset(pair)
            for step in plan_epoch(lengths, settings("rows", 4), 1, epoch)
            for row in step.rows
            for pair in pairwise(segment.sample for segment in row)
        }

    first, second = neighbours(1), neighbours(2)
    assert len(first) > 100, "rows do hold several samples"
    assert len(first & second) < 0.2 * len(first)


def test_the_order_of_a_seed_stands_for_ever():
    """A resumed job must find the order that an older numpy drew."""
    assert plan_epoch(np.full(8, 4), settings("samples", 8), 42, 1).order.tolist() == [1, 2, 5, 3, 6, 0, 4, 7]


def test_weights_repeat_a_set_in_whole_and_draw_the_rest_anew_each_epoch():
    sets = (SampleSet(40, 2.0), SampleSet(30, 0.5), SampleSet(10, 1.25), SampleSet(3, 0.07))
    lengths = np.full(83, 5)
    weighted = settings(per_step=8, sets=sets)
    assert weighted.redraws_sets
    drawn = []
    for epoch in (1, 2):
        seen = Counter(plan_epoch(lengths, weighted, 1, epoch).order.tolist())
        assert [seen[sample] for sample in range(40)] == [2] * 40
        half = {sample for sample in range(40, 70) if seen[sample]}
        assert len(half) == 15 and all(seen[sample] == 1 for sample in half)
        assert sorted(seen[sample] for sample in range(70, 80)) == [1] * 7 + [2] * 3
        assert sum(seen[sample] for sample in range(80, 83)) == 1, "rounded up: no set vanishes"
        drawn.append(half)
    assert drawn[0] != drawn[1]


# -- a run -----------------------------------------------------------------------------------------------------------


@given(length_lists, any_settings, st.sampled_from([0.1, 0.5, 1.0, 2.0, 2.5]))
def test_a_step_is_the_same_however_one_gets_to_it(lengths, some_settings, epochs):
    plan = plan_run(lengths, some_settings, 9, epochs=epochs)
    walked = [plan.step_at(number) for number in range(1, plan.total_steps + 1)]
    for number in range(plan.total_steps, 0, -1):
        assert plan.step_at(number) == walked[number - 1]
    resumed = plan_run(lengths, some_settings, 9, epochs=epochs)
    assert resumed.step_at(plan.total_steps) == walked[-1]


@given(length_lists, any_settings, st.integers(1, 40))
def test_epochs_follow_one_another_until_max_steps(lengths, some_settings, max_steps):
    plan = plan_run(lengths, some_settings, 9, max_steps=max_steps)
    assert plan.total_steps == max_steps
    expected = []
    epoch = 0
    while len(expected) < max_steps:
        epoch += 1
        expected += list(plan_epoch(lengths, some_settings, 9, epoch))
    assert [plan.step_at(number) for number in range(1, max_steps + 1)] == expected[:max_steps]
    assert len(plan.steps_of_epoch) == epoch


def test_half_an_epoch_is_half_of_its_steps_rounded_up():
    plan = plan_run(np.full(50, 4), settings(per_step=10), 1, epochs=2.5)
    assert plan.steps_of_epoch == (5, 5, 3)
    assert plan.steps_per_epoch == 5
    assert plan.step_at(13).epochs_done == pytest.approx(2.6)
    assert plan_run(np.full(50, 4), settings(per_step=10), 1, epochs=0.2).steps_of_epoch == (1,)
    assert plan_run(np.full(50, 4), settings(per_step=10), 1, max_steps=2).steps_per_epoch == 5


@pytest.mark.parametrize("batch_by", ["tokens", "rows"])
def test_where_epochs_differ_in_steps_each_is_counted_by_itself(batch_by):
    lengths = np.concatenate((np.full(20, 60), np.full(400, 3)))
    uneven = settings(batch_by, 64 if batch_by == "tokens" else 1, sets=(SampleSet(420, 0.55),))
    plan = plan_run(lengths, uneven, 5, epochs=6.0)
    counts = tuple(len(plan_epoch(lengths, uneven, 5, epoch)) for epoch in range(1, 7))
    assert len(set(counts)) > 1, "the case occurs"
    assert plan.steps_of_epoch == counts


def test_each_epoch_is_planned_once_to_be_counted_and_none_but_the_last_two_is_kept(monkeypatch):
    planned = []
    real = packing.plan_epoch
    monkeypatch.setattr(packing, "plan_epoch", lambda *given, **more: planned.append(given[-1]) or real(*given, **more))
    plan = plan_run(np.arange(1, 60), settings("tokens", 100), 5, epochs=9.0)
    assert planned == [*range(1, 10)]
    assert plan.step_at(plan.total_steps).epoch == 9
    assert planned == [*range(1, 10)], "the newest epochs are at hand"
    assert plan.step_at(1).epoch == 1 and planned == [*range(1, 10), 1]


def test_the_hash_tells_other_samples_and_another_order_apart():
    assert sample_hash((1, 2, 3)) == sample_hash(np.array([1, 2, 3]))
    assert len({sample_hash(ids) for ids in ((1, 2, 3), (3, 2, 1), (1, 2), ())}) == 4
