"""Predicted beside actual, like with like."""

import pytest

from core.deviation import Deviation, of_steps
from core.events import RunTotals

TOTALS = RunTotals(steps=10, rows=40, tokens=900, trained_tokens=500, slots=1000, is_exact=True)


def test_a_deviation_is_a_share_of_what_was_predicted() -> None:
    assert Deviation(name="seconds", predicted=200, actual=250).deviation == pytest.approx(0.25)
    assert Deviation(name="rows", predicted=0, actual=0).deviation == 0
    for predicted, actual in ((None, 3), (3, None), (0, 3)):
        assert Deviation(name="rows", predicted=predicted, actual=actual).deviation is None
    assert Deviation(name="seconds", predicted=2, actual=1).model_dump()["deviation"] == -0.5
    assert Deviation(name="kept_bytes", predicted=2, actual=1).unit == "bytes"


def test_a_run_that_ended_early_is_held_against_as_many_steps() -> None:
    half = RunTotals(steps=5, rows=20, tokens=450, trained_tokens=240, slots=500, is_exact=True)
    found = {each.name: each for each in of_steps(TOTALS, half)}
    assert found["rows"].deviation == found["slots"].deviation == found["padding_efficiency"].deviation == 0
    assert found["trained_tokens"].predicted == 250 and found["trained_tokens"].deviation == pytest.approx(-0.04)
    assert all(each.predicted is None for each in of_steps(None, half))
