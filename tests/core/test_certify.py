"""What a certificate says of its layouts, and how it travels as events."""

import math
from typing import Any

import pytest

from core import events
from core.certify import (
    FP32_TOLERANCE,
    Certificate,
    Curve,
    Finding,
    NotRun,
    Reference,
    Tried,
    compare,
    deviation_text,
    layouts,
    left_out,
    read_certificate,
    told,
)
from core.events import parse_event
from core.spec import parse_spec


def curve(*losses: float, norms: float = 1.0, in_a_row: int = 3) -> Curve:
    return Curve(
        losses=losses,
        grad_norms=(norms,) * len(losses),
        slots=640,
        most_segments_in_a_row=in_a_row,
        ranks=1,
        attention="flash",
        seconds=0.25,
    )


ALONE = Reference("each sample alone, fp32", curve(3.0, 2.5, in_a_row=1))
REFUSED = NotRun("packed, attention flex", "flex_attention has no backward pass on a CPU", "bad_spec")


def tried(name: str, *losses: float, **more: Any) -> Finding:
    return compare(name, curve(*losses, **more), ALONE.curve, None)


EQUAL = tried("packed, best_fit", 3.0, 2.5 * (1 + 5e-6))
DIFFERENT = tried("packed, sequential", 3.0, 2.5, norms=1.001)


def test_the_largest_relative_difference_of_any_step_counts() -> None:
    assert (EQUAL.loss_deviation, EQUAL.norm_deviation) == (pytest.approx(5e-6), 0.0)
    assert EQUAL.holds and not DIFFERENT.holds and DIFFERENT.norm_deviation == pytest.approx(1e-3)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_differs_wherever_it_stands(wrong: float) -> None:
    for found in (tried("a", wrong, 2.5), tried("b", 3.0, wrong), tried("c", 3.0, 2.5, norms=wrong)):
        assert not found.holds and math.isinf(max(found.loss_deviation, found.norm_deviation))


def test_nothing_differs_from_nothing_by_anything() -> None:
    still = curve(3.0, norms=0.0)
    assert compare("the same", still, still, None).holds
    assert not compare("it moves", curve(3.0, norms=1e-9), still, None).holds


@pytest.mark.parametrize(
    ("all_tried", "code", "holds"),
    [
        ([ALONE, EQUAL, REFUSED], "certify.equal", True),
        ([ALONE, EQUAL, DIFFERENT], "certify.differs", False),
        ([ALONE, EQUAL, NotRun("packed, 2 ranks, ZeRO 2", "killed", "killed")], "certify.fault", False),
        ([ALONE, tried("padded", 3.0, 2.5, in_a_row=1)], "certify.nothing_packed", True),
        ([ALONE, tried("padded", 3.0, 2.0, in_a_row=1)], "certify.differs", False),
    ],
)
def test_the_verdict_is_one_sentence(all_tried: list[Tried], code: str, holds: bool) -> None:
    certificate = Certificate.of("fp32", all_tried)
    assert (certificate.verdict.code, certificate.holds, certificate.steps) == (code, holds, 2)
    assert certificate.verdict.text()


def test_the_verdict_has_the_numbers_and_the_names() -> None:
    equal, differs = (Certificate.of("fp32", [ALONE, *found]).verdict.text() for found in ([EQUAL], [EQUAL, DIFFERENT]))
    assert equal.startswith("Equal: 1 layouts") and "5e-6" in equal and deviation_text(FP32_TOLERANCE) in equal
    assert differs.startswith("NOT equal: 1 of 2 layouts") and "packed, sequential" in differs and "1e-3" in differs


def test_a_certificate_is_read_again_from_its_events() -> None:
    broken = tried("padded", 3.0, math.nan)
    all_tried = [ALONE, EQUAL, broken, REFUSED]
    sent = [
        parse_event({"seq": seq, "ts": 0.0, "kind": "layout", **told(each, "fp32")})
        for seq, each in enumerate(all_tried, 1)
    ]
    heard = [event for event in sent if isinstance(event, events.Layout)]
    assert len(heard) == 4 and [event.is_equal for event in heard] == [None, True, False, None]
    read = read_certificate([events.Layout.model_validate_json(event.model_dump_json()) for event in heard])
    assert read is not None and read.references == (ALONE,) and read.not_run == (REFUSED,)
    assert read.findings[0] == EQUAL and not read.findings[1].holds
    assert math.isnan(read.findings[1].curve.losses[1]) and math.isinf(read.findings[1].loss_deviation)
    assert read_certificate([]) is None


def test_a_deviation_is_written_short() -> None:
    told = [deviation_text(deviation) for deviation in (0.0, 1.234e-7, 9.96e-6, 1e-5, 0.25, 12.0, math.inf)]
    assert told == ["0", "1.2e-7", "1e-5", "1e-5", "2.5e-1", "1.2e1", "inf"]


def test_what_a_job_has_no_layouts_for_is_told_with_the_reason() -> None:
    by_samples = parse_spec({"data": {"train": [{"dataset": "d"}]}})
    by_rows = parse_spec({"data": {"train": [{"dataset": "d"}]}, "batch": {"rows_per_step": 2}})
    assert [*left_out(by_samples, 2)] == []
    assert [run.name for run in left_out(by_samples, 1)] == ["several ranks, ZeRO 0 to 3"]
    assert len([*left_out(by_rows, 1)]) == 2 and not any(run.is_fault for run in left_out(by_rows, 1))
    assert len([*layouts(by_samples, 2)]) == len([*layouts(by_rows, 2)]) + 4 == len([*layouts(by_samples, 1)]) + 4
