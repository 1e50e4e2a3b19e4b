"""A step in memory: whatever the mode, the algorithm, the ranks and the micro-batch, each segment lies in it once."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.arrangement import FEW, deal_evenly, pack
from core.errors import UserError
from core.layout import MOST_SAMPLES, SHARE_OF_OTHERS, lay_out, padded_efficiency, report
from core.packing import (
    PlanSettings,
    SampleSet,
    Segment,
    Step,
    best_fit,
    fill,
    lower_bound,
    next_fit,
    plan_epoch,
)

CAPACITY = 64
MODES = ["packed", "padding_free", "grouped", "padded"]
length_lists = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=120).map(np.array)


def settings(batch_by="samples", per_step=7, mode="packed", **more):
    return PlanSettings(mode, more.pop("row_length", CAPACITY), batch_by, per_step, **more)


@st.composite
def any_settings(draw):
    mode, algorithm = draw(st.sampled_from(MODES)), "best_fit"
    batch_by = draw(st.sampled_from(["samples", "tokens", "rows"]))
    if mode == "packed":
        algorithm = draw(st.sampled_from(["best_fit", "sequential", *["wrapped"] * (batch_by == "rows")]))
    return settings(
        batch_by,
        draw(st.integers(1, 150)),
        mode,
        row_length=draw(st.integers(CAPACITY, 3 * CAPACITY)),
        micro_batch_size=draw(st.integers(1, 4)),
        num_ranks=draw(st.integers(1, 8)),
        algorithm=algorithm,
    )


def every_token(positions, starts, ends):
    """Any token is a target, so that no row is left out."""
    return ends - starts


def plan(lengths, chosen):
    return plan_epoch(lengths, chosen, 2, 1, every_token)


def tokens(row):
    return sum(segment.length for segment in row)


def rows_of(layout):
    return [row for passes in layout.ranks for micro_batch in passes for row in micro_batch if row]


def step_of(lengths):
    return Step(1, 0, 1, tuple(Segment(sample, 0, int(length)) for sample, length in enumerate(lengths)))


@given(length_lists, any_settings())
def test_each_segment_lies_in_one_row_and_slots_are_what_the_passes_compute(lengths, chosen):
    for step in plan(lengths, chosen):
        layout = lay_out(step, chosen)
        assert len(layout.ranks) == chosen.num_ranks
        assert len({len(passes) for passes in layout.ranks}) == 1, "each rank runs as many micro-batches"
        slots = rows = 0
        for micro_batch in (micro_batch for passes in layout.ranks for micro_batch in passes):
            assert 1 <= len(micro_batch) <= chosen.micro_batch_size
            slots += len(micro_batch) * max(tokens(row) if row else 1 for row in micro_batch)
            rows += sum(1 for row in micro_batch if row)
            assert micro_batch == ((),) or all(micro_batch), "a dummy stands alone"
            if chosen.mode == "packed":
                assert max(map(tokens, micro_batch)) <= chosen.row_length
            elif chosen.mode == "padding_free":
                assert len(micro_batch) == 1 and len(micro_batch[0]) <= chosen.micro_batch_size
            else:
                assert all(len(row) <= 1 for row in micro_batch)
        assert (layout.slots, layout.rows, layout.tokens) == (slots, rows, tokens(step.segments))
        assert layout.padding_efficiency == layout.tokens / slots
        assert Counter(segment for row in rows_of(layout) for segment in row) == Counter(step.segments)
        if step.rows is not None:
            assert Counter(rows_of(layout)) == Counter(step.rows)


@given(length_lists, any_settings())
def test_a_rank_runs_a_dummy_only_where_there_is_not_a_sample_for_every_pass(lengths, chosen):
    for step in plan(lengths, chosen):
        if step.rows is not None:
            continue
        layout = lay_out(step, chosen)
        num_dummies = sum(micro_batch == ((),) for passes in layout.ranks for micro_batch in passes)
        num_passes = len(layout.ranks) * len(layout.ranks[0])
        # Packed, a rank may hold a single sample where another's many need several rows.
        rank_has_enough = [sum(len(row) for rows in passes for row in rows) for passes in layout.ranks]
        if chosen.mode != "packed":
            assert num_dummies == max(0, num_passes - len(step.segments))
        elif chosen.micro_batch_size == 1 and min(rank_has_enough) >= len(layout.ranks[0]):
            assert num_dummies == 0


@given(length_lists, st.integers(1, 8), st.sampled_from(["best_fit", "sequential"]))
def test_one_packed_row_a_pass_computes_no_pad(lengths, num_ranks, algorithm):
    one_row = settings(per_step=40, num_ranks=num_ranks, algorithm=algorithm)
    for step in plan(lengths, one_row):
        layout = lay_out(step, one_row)
        num_dummies = sum(not row for passes in layout.ranks for micro_batch in passes for row in micro_batch)
        assert layout.slots == layout.tokens + num_dummies


@given(length_lists, st.integers(1, 8), st.integers(1, 5))
def test_padding_free_computes_no_pad_whatever_the_micro_batch(lengths, num_ranks, micro_batch_size):
    free = settings(per_step=30, mode="padding_free", num_ranks=num_ranks, micro_batch_size=micro_batch_size)
    for step in plan(lengths, free):
        layout = lay_out(step, free)
        num_dummies = sum(micro_batch == ((),) for passes in layout.ranks for micro_batch in passes)
        assert layout.slots == layout.tokens + num_dummies
        rounds = -(-len(step.segments) // (num_ranks * micro_batch_size))
        assert len(layout.ranks[0]) == rounds, "micro_batch_size samples a pass"


@given(length_lists, st.integers(2, 5))
def test_grouped_computes_no_more_than_padded(lengths, micro_batch_size):
    grouped = settings(mode="grouped", micro_batch_size=micro_batch_size)
    step = step_of([*lengths, *lengths[:1]] * micro_batch_size)  # with a short pass it depends on which that is
    layout = lay_out(step, grouped)
    assert layout.slots <= lay_out(step, replace(grouped, mode="padded")).slots
    widths = [tokens(row) for row in rows_of(layout)]
    assert widths == sorted(widths, reverse=True)


def test_sequential_rows_keep_the_steps_order():
    lengths = [40, 30, 30, 20, 44, 60]
    rows = rows_of(lay_out(step_of(lengths), settings(per_step=6, algorithm="sequential")))
    assert sorted([segment.sample for segment in row] for row in rows) == [[0], [1, 2], [3, 4], [5]]


@pytest.mark.parametrize("batch_by", ["samples", "rows"])
@pytest.mark.parametrize("mode", MODES)
def test_a_sample_that_comes_twice_in_a_step_is_laid_out_twice(batch_by, mode):
    lengths = np.random.default_rng(1).integers(1, CAPACITY, 20)
    doubled = settings(batch_by, 40, mode, num_ranks=2, sets=(SampleSet(20, 2.0),))
    (step,) = plan(lengths, doubled)
    assert max(Counter(step.sample_ids).values()) == 2
    layout = lay_out(step, doubled)
    assert Counter(segment for row in rows_of(layout) for segment in row) == Counter(step.segments)
    assert layout.tokens == 2 * int(lengths.sum())


@pytest.mark.parametrize(
    ("mode", "micro_batch_size", "evenness"),
    [("packed", 1, 1.03), ("padding_free", 1, 1.03), ("padding_free", 4, 1.1), ("grouped", 4, 1.25)],
)
def test_ranks_get_even_work_though_lengths_are_not(mode, micro_batch_size, evenness):
    rng = np.random.default_rng(4)
    lengths = np.clip(rng.lognormal(6, 1, 256), 8, 4096).astype(int)
    four = settings(per_step=256, mode=mode, row_length=4096, num_ranks=4, micro_batch_size=micro_batch_size)
    layout = lay_out(step_of(lengths), four)
    work = [sum(s.length * (24_576 + s.length) for p in rank for row in p for s in row) for rank in layout.ranks]
    assert max(lengths) > 20 * min(lengths)
    assert max(work) <= evenness * min(work)


def test_packed_rows_of_like_width_share_a_micro_batch():
    lengths = np.random.default_rng(1).integers(20, CAPACITY, 80)
    layout = lay_out(step_of(lengths), settings(per_step=80, micro_batch_size=4))
    flat = [tokens(row) for micro_batch in layout.ranks[0] for row in micro_batch]
    assert len(set(flat)) > 1, "there is something to sort"
    assert flat == sorted(flat, reverse=True)


def test_padded_rows_keep_the_steps_order_and_each_pass_is_as_wide_as_its_longest():
    layout = lay_out(step_of([3, 9, 4, 5, 1]), settings(per_step=5, mode="padded", micro_batch_size=2))
    assert [row[0].sample for row in rows_of(layout)] == [0, 1, 2, 3, 4]
    assert layout.slots == 2 * 9 + 2 * 5 + 1


def test_a_rank_that_has_run_out_runs_a_dummy_row_whose_slot_counts():
    layout = lay_out(step_of([4, 5, 6]), settings(per_step=3, mode="padded", num_ranks=2))
    assert layout.ranks[0][1] == ((),), "the heaviest comes first, the other two go to the other rank"
    assert (layout.tokens, layout.slots, layout.rows) == (15, 16, 3)


# -- what it saves ---------------------------------------------------------------------------------------------------


@given(length_lists)
def test_the_padded_baseline_is_eight_to_a_batch_in_their_order(lengths):
    batches = [lengths[start : start + 8].tolist() for start in range(0, len(lengths), 8)]
    slots = sum(max(batch) * len(batch) for batch in batches)
    assert padded_efficiency(step_of(lengths).segments) == pytest.approx(int(lengths.sum()) / slots)


def test_fill_is_tokens_over_the_rows_capacity():
    assert fill(tokens=90, rows=2, row_length=64) == 90 / 128


OWN = [("packed", "best_fit"), ("packed", "sequential"), ("packed", "wrapped")]
OWN += [("padding_free", "best_fit"), ("grouped", "best_fit"), ("padded", "best_fit")]


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize(
    ("batch_by", "mode", "algorithm"),
    [
        (batch_by, mode, algorithm)
        for batch_by in ("samples", "tokens", "rows")
        for mode, algorithm in OWN
        if algorithm != "wrapped" or batch_by == "rows"
    ],
)
def test_the_report_of_each_way_is_the_sum_of_its_steps_as_they_are_laid_out(batch_by, mode, algorithm, num_ranks):
    lengths = np.random.default_rng(2).integers(1, CAPACITY, 200)
    per_step = 64 if batch_by == "tokens" else 6
    own = settings(batch_by, per_step, mode, micro_batch_size=4, num_ranks=num_ranks, algorithm=algorithm)
    answer = report(lengths, own, 11, CAPACITY, every_token, most_steps=SHARE_OF_OTHERS * len(lengths))
    assert (answer.mine.mode, answer.mine.algorithm) == (mode, algorithm)
    assert len(answer.ways) == (6 if batch_by == "rows" else 5)
    for way in answer.ways:
        chosen = replace(own, mode=way.mode, algorithm=way.algorithm)
        epoch = plan_epoch(lengths, chosen, 11, 1, every_token)
        layouts = [lay_out(step, chosen) for step in epoch]
        assert way.is_exact and way.steps_per_epoch == len(layouts)
        assert way.tokens == int(lengths.sum())
        assert way.slots == sum(layout.slots for layout in layouts)
        assert way.rows == sum(layout.rows for layout in layouts)
        assert way.passes == sum(len(layout.ranks[0]) for layout in layouts)
        assert way.fill == way.tokens / (way.rows * CAPACITY)
        assert (way.num_cuts > 0) == (way.algorithm == "wrapped")
    efficiency = {(way.mode, way.algorithm): way.padding_efficiency for way in answer.ways}
    assert efficiency["padded", "best_fit"] < efficiency["grouped", "best_fit"] < efficiency["padding_free", "best_fit"]
    assert answer.of("padded").padding_efficiency == efficiency["padded", "best_fit"]
    assert answer.all_padded_efficiency == pytest.approx(lengths.mean() / CAPACITY)
    assert answer.fewest_rows == lower_bound(lengths, CAPACITY)
    plain = replace(own, mode="padded", algorithm="best_fit")
    batches = [
        [segment.length for segment in step.segments[at : at + 8]]
        for step in plan_epoch(lengths, plain, 11, 1)
        for at in range(0, len(step.segments), 8)
    ]
    assert answer.baseline.slots == sum(len(batch) * max(batch) for batch in batches)
    assert answer.baseline.rows == len(lengths) and answer.baseline.passes == len(batches)
    assert answer.relative_cost(answer.mine) == answer.mine.slots / answer.baseline.slots


def test_a_report_of_some_steps_says_that_it_is_an_estimate_of_the_whole_epoch():
    lengths = np.random.default_rng(2).integers(1, CAPACITY, 4000)
    exact = report(lengths, settings(per_step=4), 11, CAPACITY)
    rough = report(lengths, settings(per_step=4), 11, CAPACITY, most_steps=800)
    assert exact.mine.is_exact and not rough.mine.is_exact
    assert (rough.mine.steps_laid_out, rough.of("padded").steps_laid_out) == (100, 50)
    for right, estimate in zip(exact.ways, rough.ways, strict=True):
        assert estimate.tokens == right.tokens
        assert estimate.rows == pytest.approx(right.rows, rel=0.1)
        assert estimate.slots == pytest.approx(right.slots, rel=0.1)


def test_large_steps_are_laid_out_in_part_too():
    lengths = np.full(4 * MOST_SAMPLES, 3)
    answer = report(lengths, settings(per_step=MOST_SAMPLES // 4), 1, CAPACITY)
    assert (answer.mine.steps_laid_out, answer.mine.steps_per_epoch) == (1, 16)
    assert answer.of("padded").steps_laid_out == 1


# -- few samples, one by one -----------------------------------------------------------------------------------------


@given(length_lists, st.integers(CAPACITY, 3 * CAPACITY))
def test_few_samples_are_packed_into_rows_of_the_widths_that_many_are(lengths, capacity):
    assert len(lengths) <= FEW
    few = pack(lengths.tolist(), capacity)
    assert sorted(number for row in few for number in row) == list(range(len(lengths)))
    many = best_fit(lengths, capacity)
    assert Counter(int(lengths[row].sum()) for row in few) == Counter(int(lengths[row].sum()) for row in many)


@given(length_lists, st.integers(CAPACITY, 3 * CAPACITY))
def test_few_samples_in_sequence_make_the_rows_that_many_do(lengths, capacity):
    assert pack(lengths.tolist(), capacity, is_sequential=True) == [row.tolist() for row in next_fit(lengths, capacity)]


def test_a_sample_that_no_row_takes_is_refused_among_few_as_among_many():
    for is_sequential in (False, True):
        with pytest.raises(UserError, match="65"):
            pack([3, 65], CAPACITY, is_sequential=is_sequential)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(2, 6))
def test_dealing_gives_every_rank_as_few_items_as_it_takes_and_the_next_to_the_least_laden(work, num_ranks):
    parts = deal_evenly(work, num_ranks)
    assert sorted(item for part in parts for item in part) == list(range(len(work)))
    assert max(map(len, parts)) <= -(-len(work) // num_ranks)
    free = deal_evenly(work, num_ranks, most=len(work))
    totals = [sum(work[item] for item in part) for part in free]
    assert max(totals) - min(totals) <= max(work), "else the last item of the fullest would have gone elsewhere"
