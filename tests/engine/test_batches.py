import itertools
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.layout import MicroBatch
from core.packing import Segment
from core.preflight import StepWork
from tests.engine import tiny
from tests.engine.jobs import wait_until
from worker.engine.batches import Ahead, make_batch

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
