"""A sampled profile, stretched to its file's size, is of that size in everything that a plan counts."""

import numpy as np
import pytest

from core.preflight import plan_job
from core.profile import DataProfile
from core.sampled import NUM_SAMPLED, spread_rows, stretch
from core.spec import parse_spec
from core.wire import Device
from tests.app.scene import MODEL

CPU = Device(id="cpu0", kind="cpu", name="", memory_bytes=2**33)


def sampled(num_rows: int = 40) -> DataProfile:
    """Every tenth row is refused, every other good one gave two samples, the last two good rows are equal."""
    good = [row for row in range(num_rows) if row % 10]
    samples = [row for place, row in enumerate(good) for _ in range(1 + place % 2)]
    hashes = {row: 10_000 + row for row in good} | {good[-1]: 10_000 + good[-2]}
    lengths = [20 + row for row in samples]
    return DataProfile.model_validate(
        {
            "num_rows": num_rows,
            "format": "messages",
            "multi_turn": "split",
            "multi_turn_reason": "",
            "num_refused": num_rows - len(good),
            "refused": (),
            "num_fell_back": 4,
            "sample_row": [25 * row for row in samples],
            "sample_length": lengths,
            "sample_trained": [5 + row % 2 for row in samples],
            "sample_turns": [1] * len(samples),
            "sample_hash": [hashes[row] for row in samples],
            "sample_runs": [1 + row % 2 for row in samples],
            "run_bounds": [b for row in samples for b in ((2, 7) if row % 2 == 0 else (2, 7, 9, 10))],
        }
    )


def test_spread_rows_are_the_first_and_then_evenly_far_apart() -> None:
    rows = spread_rows(51_234)
    assert len(rows) == NUM_SAMPLED and rows[0] == 0
    assert set(np.diff(rows).tolist()) == {25, 26}
    assert 51_234 - 26 <= rows[-1] < 51_234
    assert spread_rows(2000).tolist() == list(range(2000))


@pytest.mark.parametrize("num_rows", [41, 79, 80, 1000])
def test_what_is_stretched_has_the_files_size_and_the_samples_shares(num_rows: int) -> None:
    before = sampled()
    after = stretch(before, num_rows)
    assert DataProfile.model_validate_json(after.model_dump_json()) == after
    assert after.num_rows == num_rows
    good = len(set(after.sample_row))
    assert after.num_refused + good == num_rows
    assert abs(good / num_rows - 0.9) < 0.03
    tokens, stretched = sum(before.sample_length), sum(after.sample_length)
    assert abs(stretched / num_rows - tokens / 40) / (tokens / 40) < 0.05
    assert after.sample_runs is not None and after.run_bounds is not None
    # Every copy of a sample is the sample.
    assert set(zip(after.sample_length, after.sample_trained, after.sample_runs, strict=True)) == set(
        zip(before.sample_length, before.sample_trained, before.sample_runs or (), strict=True)
    )
    bounds = np.asarray(after.run_bounds.numbers).reshape(-1, 2)
    assert (bounds[:, 1] - bounds[:, 0]).sum() == sum(after.sample_trained)


def test_copies_are_no_equal_rows_and_equal_rows_stay_equal() -> None:
    before, after = sampled(), stretch(sampled(), 400)
    first_of_row = dict(zip(reversed(after.sample_row), reversed(after.sample_hash), strict=True))
    assert len(first_of_row) == 360
    assert len(set(first_of_row.values())) == 10 * len(set(before.sample_hash)) == 350


def test_a_sample_that_is_the_file_stays_as_it_is() -> None:
    profile = sampled()
    assert stretch(profile, 40) is profile


def test_a_plan_from_it_has_the_right_size() -> None:
    """The same file, known by a sample and known whole."""
    whole = stretch(sampled(400), 4000)  # any file of such rows
    spec = parse_spec({"data": {"train": [{"dataset": "rows"}]}})
    exact = plan_job(spec, {"rows": whole}, MODEL, CPU)
    about = plan_job(spec, {"rows": stretch(sampled(40), 4000)}, MODEL, CPU)
    assert exact.total_steps > 400
    assert abs(about.total_steps / exact.total_steps - 1) < 0.02
    assert about.counts["rows"] == exact.counts["rows"] == 4000
