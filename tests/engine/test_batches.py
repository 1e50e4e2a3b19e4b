import itertools
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from core.layout import MicroBatch, lay_out
from core.packing import Algorithm, IntArray, Mode, PlanSettings, Segment, as_lengths, plan_epoch
from core.preflight import StepWork
from tests.engine import tiny
from tests.engine.jobs import wait_until
from worker.engine.batches import Ahead, make_batch, make_step

ROWS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=4)


def samples_of(rows: list[list[int]]) -> tuple[tiny.Given, MicroBatch]:
    """Samples whose tokens say whose they are, every third token trained, each whole in its row."""
    numbers = itertools.count()
    segments = tuple(tuple(Segment(next(numbers), 0, length) for length in row) for row in rows)
    lengths = [length for row in rows for length in row]
    contents = tuple(
        (np.arange(length, dtype=np.int32) + 100 * (number + 1), np.arange(length) % 3 == 1)
        for number, length in enumerate(lengths)
    )
    return tiny.Given(contents), segments


@given(ROWS)
def test_each_target_is_the_next_trained_token_of_its_own_sample(rows: list[list[int]]) -> None:
    samples, segments = samples_of(rows)
    batch = make_batch(segments, samples)
    inputs = batch.token_ids_BN.flatten()[batch.target_index_T]
    assert torch.equal(batch.targets_T, inputs + 1), "tokens of a sample count up, so the next one is one more"
    assert torch.equal(batch.targets_T // 100 - 1, batch.sample_of_target_T), "the owner is the sample itself"
    assert batch.num_targets == sum(samples.num_targets)
    assert batch.sample_ids == tuple(segment.sample for row in segments for segment in row)


@given(ROWS)
def test_positions_restart_in_every_segment_and_stay_within_the_longest_sample(rows: list[list[int]]) -> None:
    samples, segments = samples_of(rows)
    batch = make_batch(segments, samples)
    longest = max(max(row) for row in rows)
    width = max(sum(row) for row in rows)
    assert batch.slots == len(rows) * width
    for row, segments, positions in zip(rows, batch.segments, batch.position_ids_BN.tolist(), strict=True):
        assert sum(segments) == width and list(segments[: len(row)]) == row
        assert positions == [position for length in segments for position in range(length)]
        assert max(segments) <= longest


def test_a_pad_longer_than_any_sample_is_cut_so_that_positions_stay_in_the_context() -> None:
    samples, segments = samples_of([[5, 5, 5], [2]])
    batch = make_batch(segments, samples)
    assert batch.segments == ((5, 5, 5), (2, 5, 5, 3))


def test_a_piece_has_no_target_in_its_first_token_and_counts_its_positions_from_nought() -> None:
    token_ids, trained = np.arange(100, 110, dtype=np.int32), np.arange(10) > 2
    samples = tiny.Given(((token_ids, trained),))
    batch = make_batch(((Segment(0, 0, 4), Segment(0, 4, 9)), (Segment(0, 9, 10),)), samples)
    assert batch.token_ids_BN.tolist()[0] == [*range(100, 109)]
    assert batch.segments == ((4, 5), (1, 5, 3)), "the second row's pad is no longer than the longest piece"
    assert batch.position_ids_BN.tolist()[0] == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert batch.targets_T.tolist() == [103, 105, 106, 107, 108], "104 and 109 come first in their pieces"
    assert batch.target_index_T.tolist() == [2, 4, 5, 6, 7]
    assert batch.sample_of_target_T.tolist() == [0, 1, 1, 1, 1] and batch.sample_ids == (0, 0, 0)


def test_a_dummy_row_is_one_pad_token_and_has_no_target() -> None:
    batch = make_batch(((),), tiny.some_samples())
    assert (batch.slots, batch.num_targets, batch.segments, batch.sample_ids) == (1, 0, ((1,),), ())
    assert batch.targets_T.dtype == batch.target_index_T.dtype == torch.int64


WAYS = [("packed", "best_fit"), ("packed", "sequential"), ("packed", "wrapped")]
WAYS += [("padding_free", "best_fit"), ("grouped", "best_fit"), ("padded", "best_fit")]


@pytest.mark.parametrize(("mode", "algorithm"), WAYS)
@given(
    num_ranks=st.integers(1, 8),
    micro_batch_size=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=30),
    per_step=st.integers(1, 30),
)
def test_tensors_have_the_slots_tokens_and_targets_that_the_plan_counted(
    mode: Mode, algorithm: Algorithm, num_ranks: int, micro_batch_size: int, lengths: list[int], per_step: int
) -> None:
    samples, _ = samples_of([lengths])

    def count(positions: IntArray, starts: IntArray, ends: IntArray) -> IntArray:
        pieces = zip(positions.tolist(), starts.tolist(), ends.tolist(), strict=True)
        return as_lengths(int(samples.contents[sample][1][start + 1 : end].sum()) for sample, start, end in pieces)

    assume(sum(samples.num_targets) > 4)
    settings = PlanSettings(mode, 50, "rows", per_step, micro_batch_size, num_ranks, algorithm=algorithm)
    for step in plan_epoch(as_lengths(lengths), settings, 1, 1, count):
        targets = {segment: int(count(*np.array([segment]).T)[0]) for segment in step.segments}
        work = StepWork(1, 1.0, step.segments, targets, lay_out(step, settings))
        of_ranks = [make_step(work, samples, rank).batches for rank in range(num_ranks)]
        assert len({len(batches) for batches in of_ranks}) == 1
        batches = [batch for rank in of_ranks for batch in rank]
        assert sum(batch.slots for batch in batches) == work.layout.slots
        assert sum(batch.num_targets for batch in batches) == work.num_targets
        assert sorted(sample for batch in batches for sample in batch.sample_ids) == sorted(work.sample_ids)


def test_items_come_in_their_order_and_an_error_where_it_happened() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ZeroDivisionError

    with Ahead(items()) as ahead:
        assert [ahead.next() for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(ZeroDivisionError):
            ahead.next()


def test_no_more_is_made_ahead_than_was_allowed_and_leaving_ends_the_thread() -> None:
    made = []
    with Ahead((made.append(number) or number for number in itertools.count()), num_ahead=2) as ahead:
        wait_until(lambda: len(made) == 3)
        assert ahead.next() == 0
        wait_until(lambda: len(made) == 4)
    assert "batches" not in {thread.name for thread in threading.enumerate()}
    assert len(made) <= 5


def test_a_step_knows_its_divisor_before_the_first_pass() -> None:
    samples = tiny.some_samples()
    step = tiny.step_of(samples, "packed", 80, 2)
    assert isinstance(step.work, StepWork) and len(step.batches) > 1
    assert step.num_targets == sum(samples.num_targets) == sum(batch.num_targets for batch in step.batches)
