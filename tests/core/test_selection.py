"""What becomes of every row, sample and target: against a plain version that looks at every token."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from core.packing import sample_hash
from core.preflight import JobPlan, plan_job
from core.profile import DataProfile, ModelProfile
from core.selection import Samples, select
from core.spec import JobSpec, parse_spec
from core.wire import Device

CONTEXT = 512
MODEL = ModelProfile(
    name="m",
    content_hash="0",
    architecture="LlamaForCausalLM",
    num_parameters=2_000_000,
    context_length=CONTEXT,
    vocabulary=4096,
    dtype="float32",
    has_chat_template=True,
    bytes=8,
)
CPU = Device(id="cpu0", kind="cpu", name="CPU", memory_bytes=1 << 34)
Mask = tuple[bool, ...]
Piece = tuple[int, int, int]  # sample, start, end


def profile_of(masks: Sequence[Mask], rows: Sequence[int], hashes: Sequence[int], num_refused: int = 0) -> DataProfile:
    """The facts of samples whose trained tokens are given one by one. `hashes` are by row."""
    bounds: list[int] = []
    runs = []
    for mask in masks:
        place = num_runs = 0
        for is_trained, group in groupby(mask):
            length = len(list(group))
            if is_trained:
                bounds += [place, place + length]
                num_runs += 1
            place += length
        runs.append(num_runs)
    return DataProfile.model_validate(
        {
            "num_rows": len(set(rows)) + num_refused,
            "format": "messages",
            "multi_turn": "whole",
            "multi_turn_reason": "",
            "num_refused": num_refused,
            "refused": (),
            "sample_row": list(rows),
            "sample_length": [len(mask) for mask in masks],
            "sample_trained": [sum(mask) for mask in masks],
            "sample_turns": runs,
            "sample_hash": [hashes[row] for row in rows],
            "sample_runs": runs,
            "run_bounds": bounds,
        }
    )


@st.composite
def masks(draw: Any) -> Mask:
    """Turns: some tokens that are not trained, some that are; the first never is."""
    turns = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=6))
    mask = [False]
    for context, answer in turns:
        mask += [False] * context + [True] * answer
    return tuple(mask + [False] * draw(st.integers(0, 3)))


@dataclass(frozen=True)
class Data:
    masks: list[Mask]
    rows: list[int]
    hashes: list[int]  # by row

    @property
    def profile(self) -> DataProfile:
        return profile_of(self.masks, self.rows, self.hashes, num_refused=2)


@st.composite
def data_sets(draw: Any, max_size: int = 40) -> Data:
    count = draw(st.integers(1, max_size))
    rows = [0]
    for goes_on in draw(st.lists(st.booleans(), min_size=count - 1, max_size=count - 1)):
        rows.append(rows[-1] + goes_on)
    hashes = draw(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), min_size=count, max_size=count))
    return Data(draw(st.lists(masks(), min_size=count, max_size=count)), rows, hashes)


# -- the plain version -----------------------------------------------------------------------------------------------


def targets_in(mask: Mask, start: int, end: int) -> int:
    return sum(mask[place] for place in range(start + 1, end))


def plain_pieces(sample: int, mask: Mask, max_length: int, overlong: str | None) -> list[Piece]:
    if len(mask) <= max_length:
        return [(sample, 0, len(mask))]
    if overlong in (None, "drop"):
        return []
    pieces = []
    start = 0
    while start < len(mask):
        end = min(start + max_length, len(mask))
        if end < len(mask) or overlong == "truncate":
            turn_ends = [
                place for place in range(start + 1, end + 1) if mask[place - 1] and (*mask, False)[place] is False
            ]
            end = turn_ends[-1] if turn_ends else end
        pieces.append((sample, start, end))
        start = end
        if overlong == "truncate":
            break
    return [piece for piece in pieces if targets_in(mask, *piece[1:])]


def plain_select(spec: JobSpec, sets: Sequence[Data], max_length: int) -> tuple[list[Piece], list[Piece]]:
    samples = [
        (place, row, mask, part.hashes[row])
        for place, part in enumerate(sets)
        for row, mask in zip(part.rows, part.masks, strict=True)
    ]
    rows = list(dict.fromkeys((place, row) for place, row, _, _ in samples))
    if spec.data.max_samples is not None and spec.data.max_samples < len(rows):
        generator = random.Random(spec.seed)
        rows = sorted(rows, key=lambda _: generator.random())[: spec.data.max_samples]
    taken = set(rows)
    wanted = 0
    if spec.data.validation is not None and spec.data.validation != "auto":
        wanted = max(1, round(spec.data.validation.fraction * len(taken)))  # type: ignore[union-attr]
    by_hash: dict[int, set[tuple[int, int]]] = {}
    for place, row, _, digest in samples:
        if (place, row) in taken:
            by_hash.setdefault(digest, set()).add((place, row))
    held_out: set[tuple[int, int]] = set()
    for digest in sorted(by_hash):
        if len(held_out) >= wanted or len(held_out) + len(by_hash[digest]) >= len(taken):
            break
        held_out |= by_hash[digest]
    train, validation = [], []
    for number, (place, row, mask, _) in enumerate(samples):
        if (place, row) in taken and any(mask):
            pieces = plain_pieces(number, mask, max_length, spec.data.overlong)
            (validation if (place, row) in held_out else train).extend(pieces)
    return train, validation


# -- equal -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(
    st.lists(data_sets(), min_size=1, max_size=2),
    st.integers(2, 80),
    st.sampled_from(["drop", "truncate", "split"]),
    st.one_of(st.none(), st.integers(1, 50)),
    st.sampled_from([None, {"fraction": 0.2}]),
)
def test_selection_is_what_looking_at_every_token_gives_and_every_count_adds_up(
    sets: list[Data], max_length: int, overlong: str, max_samples: int | None, validation: Any
) -> None:
    names = ["a", "b"][: len(sets)]
    data = {"train": [{"dataset": name} for name in names], "max_length": max_length, "overlong": overlong}
    spec = parse_spec({"data": {**data, "max_samples": max_samples, "validation": validation}})
    train, held_out = plain_select(spec, sets, max_length)
    profiles = {name: part.profile for name, part in zip(names, sets, strict=True)}
    if not train:
        with pytest.raises(UserError, match="no sample is left"):
            select(spec, profiles, CONTEXT)
        return
    selection = select(spec, profiles, CONTEXT)
    assert selection.train.segments() == tuple(train)
    assert selection.validation.segments() == tuple(held_out)
    every = [mask for part in sets for mask in part.masks]
    assert selection.train.targets.tolist() == [targets_in(every[sample], start, end) for sample, start, end in train]
    first_of_second = len(sets[0].masks)
    of_first = sum(sample < first_of_second for sample, _, _ in train)
    assert selection.train_of_set == (of_first, len(train) - of_first)[: len(sets)]

    counts = selection.counts
    assert counts["rows"] == sum(
        counts[key] for key in ("rows_refused", "rows_beyond_max_samples", "rows_held_out", "rows_taken")
    )
    assert counts["samples"] == sum(
        counts[f"samples_{key}"] for key in ("without_trained_tokens", "too_long", "cut_to_nothing", "trained")
    )
    assert counts["targets"] == sum(counts[f"targets_{key}"] for key in ("too_long", "lost", "trained"))
    assert counts["pieces"] == len(train) and counts["samples_trained"] == len({sample for sample, _, _ in train})
    assert counts["targets_trained"] == int(selection.train.targets.sum())
    assert counts["samples_truncated"] == (overlong == "truncate") * sum(
        end < len(every[sample]) for sample, _, end in train
    )


@given(st.lists(masks(), min_size=1, max_size=8), st.data())
def test_targets_of_any_piece_are_known_without_tokens(some: list[Mask], data: Any) -> None:
    samples = Samples((profile_of(some, range(len(some)), [0] * len(some)),))
    pieces = []
    for sample, mask in enumerate(some):
        start = data.draw(st.integers(0, len(mask) - 1))
        pieces.append((sample, start, data.draw(st.integers(start + 1, len(mask)))))
    counted = samples.count_targets(*np.array(pieces).T)
    assert counted.tolist() == [targets_in(some[sample], start, end) for sample, start, end in pieces]


def turns(*lengths: int) -> Mask:
    """Untrained and trained by turns, the first token apart."""
    return (False, *(place % 2 == 1 for place, length in enumerate(lengths) for _ in range(length)))


def chosen(mask: Mask, overlong: str, max_length: int = 20) -> tuple[list[tuple[int, int]], dict[str, int]]:
    spec = parse_spec({"data": {"train": [{"dataset": "d"}], "max_length": max_length, "overlong": overlong}})
    selection = select(spec, {"d": profile_of([mask], [0], [0])}, CONTEXT)
    return [(start, end) for _, start, end in selection.train.segments()], selection.counts


def test_truncating_keeps_whole_turns() -> None:
    kept, counts = chosen(turns(4, 5, 4, 5, 4, 5), "truncate")
    assert kept == [(0, 19)] and counts["samples_truncated"] == 1
    assert (counts["targets_trained"], counts["targets_lost"]) == (10, 5)


def test_a_turn_longer_than_the_limit_is_cut_hard() -> None:
    kept, counts = chosen(turns(4, 40), "truncate")
    assert kept == [(0, 20)]
    assert (counts["targets_trained"], counts["targets_lost"]) == (15, 25)
    kept, counts = chosen(turns(4, 40), "split")
    assert kept == [(0, 20), (20, 40), (40, 45)]
    assert counts["targets_lost"] == 2, "the two tokens behind the cuts have nothing to be predicted from"


def test_splitting_at_turns_loses_no_target_and_leaves_out_what_teaches_nothing() -> None:
    kept, counts = chosen(turns(4, 5, 30, 5, 4, 5), "split")
    assert kept == [(0, 10), (30, 45), (45, 54)], "between them lie 20 tokens without a target"
    assert counts["pieces_without_targets"] == 1 and counts["targets_lost"] == 0
    assert counts["samples_split"] == 1 and counts["pieces"] == 3


def test_a_prompt_longer_than_the_limit_leaves_nothing_and_is_counted() -> None:
    with pytest.raises(UserError, match="1 samples cut to nothing"):
        chosen(turns(40, 5), "truncate")


def test_a_profile_without_runs_can_be_dropped_from_but_not_cut() -> None:
    whole = profile_of([turns(4, 5), turns(4, 40)], [0, 1], [0, 1])
    old = whole.model_copy(update={"sample_runs": None, "run_bounds": None})

    def counts(overlong: str) -> dict[str, int]:
        data = {"train": [{"dataset": "d"}], "max_length": 20, "overlong": overlong}
        return select(parse_spec({"data": data}), {"d": old}, CONTEXT).counts

    assert counts("drop")["samples_too_long"] == 1
    with pytest.raises(UserError, match="measured by an earlier release"):
        counts("split")


# -- through a whole plan --------------------------------------------------------------------------------------------


def data_of(count: int, seed: int) -> Data:
    draw = random.Random(seed)
    rows = [0]
    for _ in range(count - 1):
        rows.append(rows[-1] + (draw.random() < 0.6))
    some = [turns(*(1 + int(60 * draw.random() ** 2) for _ in range(2 * draw.randint(1, 4)))) for _ in rows]
    return Data(some, rows, [draw.randrange(2**64) for _ in range(rows[-1] + 1)])


def plan_of(sets: dict[str, Data], **parts: Any) -> JobPlan:
    data = {"train": [{"dataset": name} for name in sets], **parts.pop("data", {})}
    return plan_job(
        parse_spec({"data": data, **parts}), {name: part.profile for name, part in sets.items()}, MODEL, CPU
    )


ROWS = {"batch": {"rows_per_step": 3, "micro_batch_size": 2}}
WAYS: list[dict[str, Any]] = [
    {"batch": {"samples_per_step": 7}},
    {"batch": {"tokens_per_step": 300}, "packing": {"algorithm": "sequential"}},
    {"packing": {"mode": "padding_free"}, "batch": {"micro_batch_size": 3}},
    {"packing": {"mode": "grouped"}, "batch": {"micro_batch_size": 3}},
    ROWS,
    {**ROWS, "packing": {"algorithm": "sequential", "row_length": 150}},
    {**ROWS, "packing": {"algorithm": "wrapped", "row_length": 150}},
    {**ROWS, "packing": {"algorithm": "wrapped"}},
]


@pytest.mark.parametrize("overlong", ["drop", "truncate", "split"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_each_target_of_an_epoch_is_trained_once_or_counted(way: dict[str, Any], overlong: str) -> None:
    part = data_of(150, 3)
    plan = plan_of({"d": part}, **way, data={"max_length": 100, "overlong": overlong}, schedule={"epochs": 1})
    counts = plan.plan_event()["counts"]
    assert isinstance(counts, dict)
    trained = [0] * len(part.masks)
    for number in range(1, plan.total_steps + 1):
        work = plan.step(number)
        for sample, start, end in work.segments:
            assert work.targets[sample, start, end] == targets_in(part.masks[sample], start, end)  # type: ignore[index]
            trained[sample] += targets_in(part.masks[sample], start, end)
        assert work.num_targets > 0
    lost_at_row_ends = counts.get("targets_lost_at_row_ends", 0)
    assert sum(trained) + lost_at_row_ends == counts["targets_trained"]
    assert counts["targets"] == sum(counts[f"targets_{key}"] for key in ("too_long", "lost", "trained"))
    assert plan.plan_event()["num_trained_tokens"] == sum(trained)
    if plan.settings.algorithm == "wrapped":
        assert counts["cuts"] > 0 and lost_at_row_ends > 0
    if overlong == "split":
        assert counts["pieces"] > counts["samples_trained"], "several pieces of a sample"


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_report_of_a_jobs_own_way_is_what_its_steps_are(way: dict[str, Any]) -> None:
    plan = plan_of({"d": data_of(150, 4)}, **way, data={"max_length": 100, "overlong": "split"})
    layouts = [plan.step(number).layout for number in range(1, plan.run.steps_per_epoch + 1)]
    mine = plan.packing.mine
    assert mine.is_exact and len(layouts) == mine.steps_per_epoch
    assert mine.rows == sum(layout.rows for layout in layouts)
    assert mine.slots == sum(layout.slots for layout in layouts)
    assert mine.tokens == sum(layout.tokens for layout in layouts)
    assert plan.plan_event()["num_rows"] == mine.rows


@pytest.mark.parametrize(
    ("parts", "steps", "validation", "digest"),
    [
        ({}, 201, "90d71b2b28fa13c5", "eb635b5791cc4dd0"),
        ({"data": {"max_samples": 900}}, 135, "ee38269194f0aa72", "c8844a1501f17e67"),
        ({"batch": {"tokens_per_step": 3000}, "seed": 5}, 216, "90d71b2b28fa13c5", "95253b1396bad4b6"),
        (
            {"batch": {"rows_per_step": 3}, "data": {"validation": {"fraction": 0.1}}},
            645,
            "946d16f03aeb3c88",
            "a427d87695a8abed",
        ),
        (
            {"data": {"max_length": 150, "overlong": "drop"}, "schedule": {"epochs": 2.5}},
            128,
            "c01d75f5dec36b8e",
            "1522a9cb3d80518f",
        ),
    ],
    ids=str,
)
def test_the_steps_of_a_seed_stand_for_ever(parts: dict[str, Any], steps: int, validation: str, digest: str) -> None:
    """As the plain version of before drew them: a resumed job finds its samples again."""
    plan = plan_of({"a": data_of(1500, 1), "b": data_of(700, 2)}, **parts)
    ids = (sample for number in range(1, plan.total_steps + 1) for sample in plan.step(number).sample_ids)
    assert (plan.total_steps, sample_hash(plan.validation_ids), sample_hash(ids)) == (steps, validation, digest)
