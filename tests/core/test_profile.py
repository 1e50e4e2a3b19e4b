"""Columns: a million samples' facts without an object for each."""

import json
from array import array
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from core.profile import Column, DataProfile

numbers = st.lists(st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1)), max_size=50)

FACTS: dict[str, Any] = {
    "num_rows": 3,
    "format": "messages",
    "multi_turn": "whole",
    "multi_turn_reason": "",
    "num_refused": 0,
    "refused": [],
    "sample_row": [0, 1, 2],
    "sample_length": [10, 300, 70_000],
    "sample_trained": [5, 100, 3],
    "sample_turns": [1, 2, 1],
    "sample_hash": [7, 2**63 + 1, 0],
}


@given(numbers)
def test_a_column_reads_like_the_list_that_it_came_from(values: list[int]) -> None:
    column = Column(values)
    assert list(column) == values and column == values and len(column) == len(values)
    assert [column[index] for index in range(len(values))] == values
    assert column[1:4] == values[1:4] and column[::-1] == values[::-1]
    assert np.asarray(column.numbers).tolist() == values
    assert column.numbers.readonly


@pytest.mark.parametrize(("largest", "num_bytes"), [(255, 1), (256, 2), (65_536, 4), (2**32 - 1, 4), (2**32, 8)])
def test_a_number_is_as_wide_as_the_largest_needs(largest: int, num_bytes: int) -> None:
    for source in ([0, largest], array("Q", [0, largest]), memoryview(np.array([0, largest], dtype=np.uint64))):
        assert Column(source).numbers.itemsize == num_bytes


def test_a_profile_comes_back_from_json_as_it_went() -> None:
    profile = DataProfile.model_validate({**FACTS, "sample_runs": [1, 0, 2], "run_bounds": [1, 6, 3, 5, 9, 10]})
    text = profile.model_dump_json()
    assert set(json.loads(text)["sample_length"]) == {"type", "zlib"}
    assert DataProfile.model_validate_json(text) == profile
    assert profile.sample_length.numbers.itemsize == 4


def test_a_profile_of_before_columns_still_loads() -> None:
    old = {**FACTS, "sample_hash": ["0000000000000007", "8000000000000001", "00" * 8]}
    assert DataProfile.model_validate_json(json.dumps(old)) == DataProfile.model_validate(FACTS)


def test_a_million_samples_are_a_few_megabytes() -> None:
    draw = np.random.default_rng(1)
    lengths = np.clip(draw.lognormal(6, 0.8, 1_000_000), 8, 8192).astype(np.uint64)
    column = Column(memoryview(lengths))
    assert column.numbers.nbytes == 2_000_000
    assert len(json.dumps(column.packed())) < 2_200_000


@pytest.mark.parametrize(
    "value",
    [
        [-1],
        [2**64],
        ["a"],
        "abc",
        {"type": "u2"},
        {"type": "i4", "zlib": ""},
        {"type": "u4", "zlib": "!"},
        {"type": "u4", "zlib": "eJw="},
        {"type": "u4", "zlib": Column([1, 2, 3]).packed()["zlib"]},
        {"type": "u4", "zlib": "", "more": 1},
    ],
    ids=str,
)
def test_what_is_no_column_is_refused(value: object) -> None:
    with pytest.raises(ValidationError):
        DataProfile.model_validate({**FACTS, "sample_length": value})


def test_a_column_does_not_unpack_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.profile.MAX_COLUMN_BYTES", 1000)
    assert Column.parse(Column([0] * 1000).packed()) == [0] * 1000
    with pytest.raises(ValueError, match="torn, or longer than 1000 bytes"):
        Column.parse(Column([0] * 1001).packed())


@pytest.mark.parametrize(
    "wrong", [{"sample_row": [1]}, {"sample_runs": [1, 1, 1]}, {"sample_runs": [1, 0, 0], "run_bounds": [1]}], ids=str
)
def test_columns_that_do_not_fit_each_other_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataProfile.model_validate(FACTS | wrong)
