"""Validation rows that the training data says too: equal ones exactly, nearly equal ones by group or by sketch."""

import random
from typing import Any

import numpy as np

from core.duplicates import group, sign, sketch
from core.overlap import Overlap, find_overlap
from core.preflight import plan_job
from core.profile import Column, DataProfile
from core.selection import Selection, select
from core.spec import parse_spec
from core.verdict import verdict
from core.wire import Device
from tests.app.scene import MODEL
from tests.core.test_duplicates import changed, prose

CPU = Device(id="cpu0", kind="cpu", name="", memory_bytes=2**33)


def facts(texts: list[str], samples_a_row: int = 1) -> DataProfile:
    """As a host measures them; a row's hash follows from its text."""
    signatures, has_words = sign(texts)
    first = group(signatures, has_words)
    is_grouped = np.bincount(first)[first] > 1
    of_sample = np.repeat(np.arange(len(texts)), samples_a_row)
    count = len(of_sample)
    return DataProfile.model_validate(
        {
            "num_rows": len(texts),
            "format": "text",
            "multi_turn": "whole",
            "multi_turn_reason": "",
            "num_refused": 0,
            "refused": (),
            "sample_row": of_sample.tolist(),
            "sample_length": [40] * count,
            "sample_trained": [20] * count,
            "sample_turns": [1] * count,
            "sample_hash": [random.Random(texts[row]).getrandbits(64) for row in of_sample.tolist()],
            "sample_group": Column(np.where(is_grouped, first + 1, 0)[of_sample].tolist()),
            "sample_sketches": Column(sketch(signatures, has_words)[of_sample].reshape(-1).tolist()),
        }
    )


def selected(
    data: dict[str, DataProfile], validation: Any, train: tuple[str, ...] = ("rows",), **more: Any
) -> Selection:
    spec = parse_spec({"data": {"train": [{"dataset": name} for name in train], "validation": validation, **more}})
    return select(spec, data, MODEL.context_length)


def texts_of(seed: int, count: int) -> list[str]:
    source = random.Random(seed)
    return [prose(source) for _ in range(count)]


def with_another_word(text: str, number: int) -> str:
    """75 of 81 shingles stay: 0.93 alike."""
    words = text.split()
    return " ".join([*words[:40], f"other{number}", *words[41:]])


def test_rows_of_a_validation_set_that_are_trained_are_counted_exactly() -> None:
    rows = texts_of(1, 300)
    data = {"rows": facts(rows), "held": facts([*rows[:7], *texts_of(2, 50)], samples_a_row=2)}
    assert find_overlap(selected(data, {"dataset": "held"})) == Overlap(num_rows=57, num_equal=7, num_alike=0)
    assert find_overlap(selected(data, {"dataset": "rows"})) == Overlap(num_rows=300, num_equal=300, num_alike=0)


def test_rows_that_nearly_stand_in_another_set_are_counted_by_their_sketches() -> None:
    rows = texts_of(1, 300)
    near = [with_another_word(text, number) for number, text in enumerate(rows[10:60])]
    data = {"rows": facts(rows), "held": facts([*rows[:3], *near, *texts_of(2, 47)])}
    overlap = find_overlap(selected(data, {"dataset": "held"}))
    assert (overlap.num_rows, overlap.num_equal) == (100, 3)
    assert 47 <= overlap.num_alike <= 50


def test_rows_that_are_held_out_have_no_equals_but_near_ones() -> None:
    rows, source = texts_of(1, 300), random.Random(9)
    rows = [*rows, *rows[:100], *(changed(text, 0.02, source) for text in rows[100:200])]
    selection = selected({"rows": facts(rows)}, {"fraction": 0.2})
    overlap = find_overlap(selection)
    assert overlap.num_rows == selection.counts["rows_held_out"] >= 100
    assert overlap.num_equal == 0
    group_of = list(selection.samples.profiles[0].sample_group or ())
    held = set(selection.validation.sample_ids.tolist())
    trained_groups = {group_of[row] for row in range(len(rows)) if row not in held} - {0}
    by_hand = sum(group_of[row] in trained_groups for row in held)
    assert overlap.num_alike == by_hand > 10


def test_two_training_sets_share_rows_across_the_split() -> None:
    """The hash sends equal rows of both to one side; nearly equal ones it can't."""
    rows = texts_of(1, 200)
    near = [with_another_word(text, number) for number, text in enumerate(rows)]
    data = {"rows": facts(rows), "more": facts(near)}
    overlap = find_overlap(selected(data, {"fraction": 0.1}, train=("rows", "more")))
    assert (overlap.num_rows, overlap.num_equal) == (40, 0)
    assert 30 <= overlap.num_alike < 40, "but for those whose likes are held out too"
    twice = find_overlap(selected(data, {"fraction": 0.1}, train=("rows", "rows")))
    assert (twice.num_rows, twice.count) == (20, 0)


def test_rows_that_are_not_trained_do_not_count() -> None:
    rows = texts_of(1, 300)
    data = {"rows": facts(rows), "held": facts(rows)}
    overlap = find_overlap(selected(data, {"dataset": "held"}, max_samples=100))
    assert overlap == Overlap(num_rows=300, num_equal=100, num_alike=0)


def test_what_a_trainer_measured_tells_equal_rows_alone() -> None:
    rows, source = texts_of(1, 300), random.Random(9)
    without: dict[str, Any] = {"sample_group": None, "sample_sketches": None}
    held = facts([*rows[:5], *(changed(text, 0.01, source) for text in rows[5:50])]).model_copy(update=without)
    overlap = find_overlap(
        selected({"rows": facts(rows).model_copy(update=without), "held": held}, {"dataset": "held"})
    )
    assert overlap.num_alike == 0 and 5 <= overlap.num_equal < 50
    assert find_overlap(selected({"rows": facts(rows).model_copy(update=without)}, "auto")).count == 0


def test_the_verdict_says_it_with_the_number_and_what_it_means() -> None:
    rows = texts_of(1, 300)
    spec = parse_spec({"data": {"train": [{"dataset": "rows"}], "validation": {"dataset": "held"}}})

    def said(held: list[str]) -> list[str]:
        plan = plan_job(spec, {"rows": facts(rows), "held": facts(held)}, MODEL, CPU)
        return [remark.said.text() for remark in verdict(plan) if remark.said.code.startswith("verdict.validation_")]

    assert said(texts_of(2, 60)) == []
    (equal,) = said([*rows[:5], *texts_of(2, 55)])
    assert equal.startswith("5 of 60 validation rows equal a training row") and "looks better than it is" in equal
    (about,) = said([*rows[:5], *(f"{text} indeed" for text in rows[5:10]), *texts_of(2, 50)])
    assert about.startswith("about 10 of 60 validation rows") and "(5 are equal, about 5 nearly)" in about
