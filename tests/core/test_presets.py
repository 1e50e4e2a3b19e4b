"""What `auto` means, and that each preset is a spec that this release runs."""

import pytest

from core.presets import PRESETS, auto_learning_rate, auto_num_validation_rows
from core.spec import Full, Lora, parse_spec
from core.unbuilt import unbuilt

B = 1_000_000_000


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.key)
def test_each_preset_is_a_spec_that_runs(preset) -> None:  # type: ignore[no-untyped-def]
    spec = parse_spec({"data": {"train": [{"dataset": "d"}]}, **preset.spec})
    assert not list(unbuilt(spec))


@pytest.mark.parametrize(
    ("method", "size", "rate"),
    [
        (Lora(), 1 * B, 2e-4),
        (Lora(), 13 * B, 2e-4),
        (Lora(), 70 * B, 1e-4),
        (Full(), 3 * B, 2e-5),
        (Full(), 7 * B, 1e-5),
        (Full(), 70 * B, 2e-6),
        (Full(), 400 * B, 2e-6),
    ],
)
def test_the_learning_rate_follows_method_and_size(method: Lora | Full, size: int, rate: float) -> None:
    assert auto_learning_rate(method, size)[0] == pytest.approx(rate)
    assert f"{size / B:.3g} B" in auto_learning_rate(method, size)[1].text()


def test_the_learning_rate_of_a_full_fine_tune_falls_with_size() -> None:
    rates = [auto_learning_rate(Full(), size * B)[0] for size in (1, 3, 8, 14, 32, 70)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) >= 4


@pytest.mark.parametrize(("rows", "held_out"), [(499, 0), (500, 50), (5000, 100), (100_000, 500)])
def test_validation_auto_holds_two_percent_out(rows: int, held_out: int) -> None:
    assert auto_num_validation_rows(rows)[0] == held_out
