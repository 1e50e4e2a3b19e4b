"""Numbers on the pages carry their unit and no digit too many."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.pages import format


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (9_999, "9,999"), (10_000, "10.0 k"), (12_345, "12.3 k"), (999_950, "1.00 M"), (1_204_000, "1.20 M")],
)
def test_a_count_is_exact_while_it_is_short(value: int, text: str) -> None:
    assert format.count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (8.21, "8.2 s"),
        (9.97, "10 s"),
        (59.7, "1 min"),
        (250, "4 min 10 s"),
        (3599.6, "1 h"),
        (11_520, "3 h 12 min"),
        (86_399, "1 d"),
        (190_800, "2 d 5 h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert format.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(2e-4, "2e-4"), (1.5e-5, "1.5e-5"), (0.0, "0"), (1.2345e-4, "1.23e-4"), (1.0, "1e0")]
)
def test_a_learning_rate_reads_like_one_types_it(value: float, text: str) -> None:
    assert format.rate(value) == text


@pytest.mark.parametrize(("share", "text"), [(1.0, "100 %"), (0.99996, "99.9 %"), (0.943, "94.3 %"), (0.0, "0.0 %")])
def test_only_what_is_whole_is_a_hundred_percent(share: float, text: str) -> None:
    assert format.percent(share) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(512, "512 B"), (2048, "2.00 KiB"), (1_234_567, "1.18 MiB"), (80 * 2**30, "80.0 GiB")]
)
def test_bytes_have_binary_units(num_bytes: int, text: str) -> None:
    assert format.size(num_bytes) == text


@given(st.floats(min_value=1e-12, max_value=1e15))
def test_three_digits_stay_within_half_a_percent(value: float) -> None:
    assert math.isclose(float(format.significant(value)), value, rel_tol=0.0051)


@given(st.floats(min_value=0, max_value=1e9))
def test_a_duration_never_shows_a_whole_larger_unit(seconds: float) -> None:
    parts = format.duration(seconds).split()
    amounts = dict(zip(parts[1::2], map(float, parts[::2]), strict=True))
    assert amounts.get("s", 0) < 60 and amounts.get("min", 0) < 60 and amounts.get("h", 0) < 24


def test_what_is_unknown_is_a_dash() -> None:
    functions = (format.count, format.size, format.percent, format.loss, format.rate, format.duration, format.moment)
    assert {function(None) for function in functions} == {format.DASH}


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0 %"), (0.0431, "+4.3 %"), (-0.5, "-50.0 %"), (12.3, "+1,230 %"), (0.0001, "+0.010 %")]
)
def test_a_deviation_that_is_not_0_is_not_told_as_0(share: float, text: str) -> None:
    assert format.deviation(share) == text


def test_money_is_told_to_the_cent_and_less_than_one_as_that() -> None:
    assert (
        format.money(1234.5, "EUR") == "1,234.50 EUR" and format.money(0.001) == "< 0.01" and format.money(0) == "0.00"
    )


def test_hours_keep_three_digits() -> None:
    assert [format.hours(value) for value in (0.01234, 4.5, 1234.4)] == ["0.0123", "4.50", "1,234"]
    assert format.ratio(1.234) == "123 %"
