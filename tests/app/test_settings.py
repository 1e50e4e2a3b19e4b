"""Settings are read once, and one that can't be read is refused with what to write."""

from pathlib import Path

import pytest

from app.settings import load_settings

NOWHERE = Path("/nonexistent")


def test_a_price_is_a_number_and_unset_says_nothing_of_money() -> None:
    assert load_settings({}, NOWHERE).price_per_gpu_hour is None
    priced = load_settings({"PEGBOX_PRICE_PER_GPU_HOUR": "2.50", "PEGBOX_CURRENCY": "EUR"}, NOWHERE)
    assert (priced.price_per_gpu_hour, priced.currency) == (2.5, "EUR")
    for text in ("cheap", "-1", "inf", "nan"):
        with pytest.raises(ValueError, match=f"'{text}' is no price; write a number"):
            load_settings({"PEGBOX_PRICE_PER_GPU_HOUR": text}, NOWHERE)
