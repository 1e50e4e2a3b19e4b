"""The spec: parsed once, frozen, every fault found in one look and named with its remedy."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import USER_FAULTS, UserErrors
from core.spec import (
    BatchByRows,
    BatchBySamples,
    Full,
    JobSpec,
    Lora,
    ValidationDataset,
    ValidationFraction,
    parse_spec,
    spec_fields,
    suggest_key,
)

DATA = {"train": [{"dataset": "dialogues"}]}


def spec_of(**parts: Any) -> JobSpec:
    return parse_spec({"data": DATA, **parts})


def faults_of(**parts: Any) -> dict[str, str]:
    with pytest.raises(USER_FAULTS) as caught:
        spec_of(**parts)
    return {error.field: error.text() for error in caught.value.errors}


def test_a_name_and_a_data_set_are_enough() -> None:
    spec = spec_of()
    assert isinstance(spec.batch, BatchBySamples) and spec.batch.samples_per_step == 32
    assert isinstance(spec.method, Lora) and spec.method.rank == 16
    assert spec.schedule.epochs == 3.0 and spec.evaluation.per_epoch == 2


def test_what_is_stored_loads_again_as_the_same_spec() -> None:
    spec = spec_of(
        batch={"rows_per_step": 4},
        method={"type": "full"},
        data={**DATA, "validation": {"fraction": 0.1}},
        schedule={"max_steps": 10, "warmup_ratio": "1e-1"},
    )
    assert parse_spec(json.loads(json.dumps(spec.model_dump(mode="json")))) == spec


def test_the_first_version_of_a_stored_spec_still_loads() -> None:
    # Never edit this text: it is what version 1 stored.
    stored = (
        '{"spec_version": 1, "name": "n", "data": {"train": [{"dataset": "d", "weight": 2.0}], "validation": null},'
        '"batch": {"micro_batch_size": 1, "samples_per_step": null, "tokens_per_step": 4096, "rows_per_step": null},'
        '"method": {"type": "qlora", "rank": 8}, "schedule": {"epochs": null, "max_steps": 5, "learning_rate": 1e-5}}'
    )
    spec = parse_spec(json.loads(stored))
    assert spec.batch.tokens_per_step == 4096 and spec.method.type == "qlora" and spec.data.validation is None


def test_naming_one_alternative_switches_the_others_defaults_off() -> None:
    assert spec_of(schedule={"max_steps": 7}).schedule.epochs is None
    assert isinstance(spec_of(batch={"rows_per_step": 2}).batch, BatchByRows)
    assert spec_of(evaluation={"every_steps": 5}).evaluation.per_epoch is None
    assert spec_of(batch={"samples_per_step": None, "rows_per_step": 2}).batch.rows_per_step == 2


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ({"batch": {"samples_per_step": 2, "rows_per_step": 2}}, ("batch.samples_per_step", "batch.rows_per_step")),
        ({"batch": {"tokens_per_step": 2, "rows_per_step": 2}}, ("batch.tokens_per_step", "batch.rows_per_step")),
        ({"schedule": {"epochs": 1, "max_steps": 2}}, ("schedule.epochs", "schedule.max_steps")),
        ({"schedule": {"warmup_steps": 1, "warmup_ratio": 0.1}}, ("schedule.warmup_ratio", "schedule.warmup_steps")),
        ({"evaluation": {"every_steps": 1, "per_epoch": 2}}, ("evaluation.every_steps", "evaluation.per_epoch")),
    ],
)
def test_two_alternatives_are_an_error_that_names_both(parts: dict[str, Any], names: tuple[str, str]) -> None:
    (text,) = faults_of(**parts).values()
    assert all(name in text for name in names)


@pytest.mark.parametrize(
    ("parts", "field", "words"),
    [
        ({"schedule": {"learning_rate": -1e-4}}, "schedule.learning_rate", ["-0.0001", "above 0"]),
        ({"schedule": {"learning_rate": "fast"}}, "schedule.learning_rate", ["fast", "2e-4"]),
        ({"schedule": {"learning_rate": float("nan")}}, "schedule.learning_rate", ["nan"]),
        ({"schedule": {"epochs": None, "max_steps": None}}, "schedule", ["epochs, max_steps"]),
        ({"schedule": {"warmup_steps": 20, "max_steps": 10}}, "schedule.warmup_steps", ["20", "below 10"]),
        ({"method": {"rank": 0}}, "method.rank", ["0", "at least 1"]),
        ({"method": {"rank": True}}, "method.rank", ["not a number"]),
        ({"method": {"type": "dora"}}, "method.type", ["dora", "lora, qlora, full"]),
        ({"method": {"type": "full", "rank": 8}}, "method.rank", ["another choice"]),
        ({"method": "lora"}, "method", ["a mapping is expected"]),
        ({"parallel": {"zero_stage": 4}}, "parallel.zero_stage", ["4", "0, 1, 2 or 3"]),
        ({"priority": 11}, "priority", ["11", "at most 10"]),
        ({"name": "a\x00b"}, "name", ["control character", "2"]),
        ({"tags": "prod"}, "tags", ["a list is expected"]),
        ({"seed": 1.5}, "seed", ["1.5", "whole number"]),
        ({"compute": {"compile": "maybe"}}, "compute.compile", ["maybe", "true nor false"]),
        ({"data": {"train": []}}, "data.train", ["at least 1"]),
        ({"data": {}}, "data.train", ["missing"]),
        ({"data": {**DATA, "validation": {"fraction": 2}}}, "data.validation.fraction", ["2", "below 1"]),
        ({"packing": {"row_length": 8}, "data": {**DATA, "max_length": 16}}, "packing.row_length", ["16", "8"]),
        ({"packing": {"algorithm": "wrapped"}}, "packing.algorithm", ["rows_per_step"]),
        ({"packing": {"mode": "padded", "algorithm": "sequential"}}, "packing.algorithm", ["packed only"]),
    ],
)
def test_bad_values_are_named_with_the_number_and_the_remedy(
    parts: dict[str, Any], field: str, words: list[str]
) -> None:
    faults = faults_of(**parts)
    assert list(faults) == [field]
    assert all(word in faults[field] for word in words), faults[field]


def test_all_faults_are_found_in_one_look() -> None:
    assert set(faults_of(method={"rank": 0}, seed=-1, shedule={})) == {"method.rank", "seed", "shedule"}


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("schedule.learningrate", "schedule.learning_rate"),
        ("learning_rate", "schedule.learning_rate"),
        ("lora_rank", "method.rank"),
        ("shedule", "schedule"),
        ("zero", None),
        ("parallel.zero_stages", "parallel.zero_stage"),
    ],
)
def test_an_unknown_key_gets_the_key_that_was_meant(key: str, meant: str | None) -> None:
    assert suggest_key(key) == meant
    parent, _, leaf = key.rpartition(".")
    (text,) = faults_of(**({parent: {leaf: 1}} if parent else {leaf: 1})).values()
    assert (f"did you mean {meant}?" in text) == (meant is not None)


def test_numbers_may_come_as_text() -> None:
    spec = spec_of(schedule={"learning_rate": "2e-4", "max_steps": "1_000"}, batch={"tokens_per_step": "1e5"})
    assert (spec.schedule.learning_rate, spec.schedule.max_steps) == (2e-4, 1000)
    assert spec.batch.tokens_per_step == 100_000


def test_validation_is_auto_nothing_a_share_or_a_set() -> None:
    assert spec_of().data.validation == "auto"
    assert spec_of(data={**DATA, "validation": None}).data.validation is None
    assert spec_of(data={**DATA, "validation": {"fraction": "0.1"}}).data.validation == ValidationFraction(fraction=0.1)
    assert spec_of(data={**DATA, "validation": {"dataset": "v"}}).data.validation == ValidationDataset(dataset="v")


def test_a_spec_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        spec_of().seed = 1  # type: ignore[misc]


def test_every_knob_has_a_title_a_help_and_a_group() -> None:
    fields = dict(spec_fields())
    assert len(fields) > 60
    for key, field in fields.items():
        if key == "spec_version":
            continue
        assert field.title and field.description and field.json_schema_extra["group"], key  # type: ignore[index]


def test_method_full_has_no_adapter_knobs() -> None:
    assert set(Full.model_fields) == {"type"}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*JobSpec.model_fields, "dataset", "x", "epochs", "type"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_no_input_makes_anything_but_a_spec_or_user_errors(data: object) -> None:
    try:
        spec = parse_spec(data)
    except USER_FAULTS as fault:
        assert all(error.text() for error in fault.errors)
        assert not isinstance(fault, UserErrors) or fault.errors
    else:
        assert parse_spec(spec.model_dump(mode="json")) == spec
