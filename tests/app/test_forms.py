"""The form and the spec say the same: what is written into one is read from the other."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.forms import CONTROLS, SECTIONS, spec_of_form, state_of_form, state_of_spec, written_spec
from core.presets import PRESETS
from core.spec import GROUPS, JobSpec, parse_spec, spec_fields

DATA = {"train": [{"dataset": "talks"}]}


def through_the_form(spec: JobSpec) -> JobSpec:
    state = state_of_spec(written_spec(spec))
    pairs = [(key, text) for key, text in state.values.items()]
    for name, weight in state.train:
        pairs += [("data.train.dataset", name), ("data.train.weight", weight)]
    return parse_spec(spec_of_form(state_of_form(pairs)))


@pytest.mark.parametrize(
    "part",
    [
        {},
        {"batch": {"rows_per_step": 8, "micro_batch_size": 2}},
        {"batch": {"tokens_per_step": 65536}},
        {"method": {"type": "full"}},
        {"method": {"rank": 64, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}},
        {"method": {"target_modules": ["q_proj"]}},
        {"schedule": {"max_steps": 200, "warmup_steps": 0, "learning_rate": 3e-5, "decay": "linear"}},
        {"schedule": {"epochs": 0.5, "warmup_epochs": 0.1}},
        {"evaluation": {"every_steps": 50, "sample_prompts": ["What is 2 + 2, exactly?", "And 3?"]}},
        {"evaluation": {"per_epoch": None}},
        {"checkpoint": {"every_minutes": None, "every_epoch": False}},
        {"optimizer": {"max_grad_norm": None, "betas": [0.9, 0.95], "eps": 1e-6}},
        {"data": DATA | {"validation": None}},
        {"data": DATA | {"validation": {"fraction": 0.1}, "overlong": "drop"}},
        {
            "data": {
                "train": [{"dataset": "a", "weight": 0.5}, {"dataset": "b@0123456"}],
                "validation": {"dataset": "c"},
            }
        },
        {"name": "Ünï <b>", "tags": ["first", "second"], "notes": "two\nlines", "priority": -3, "seed": 7},
        {"compute": {"gradient_checkpointing": True, "dtype": "fp32"}, "parallel": {"zero_stage": 0}},
    ],
)
def test_a_spec_passes_through_the_form_unchanged(part: dict[str, object]) -> None:
    spec = parse_spec({"data": DATA} | part)
    assert through_the_form(spec) == spec
    assert parse_spec(written_spec(spec)) == spec


@given(
    st.floats(min_value=1e-9, max_value=10, exclude_min=True),
    st.integers(1, 10**6),
    st.integers(0, 2**32 - 1),
    st.floats(min_value=0, max_value=0.999),
)
def test_no_number_changes_on_its_way_through_the_form(rate: float, samples: int, seed: int, ratio: float) -> None:
    spec = parse_spec(
        {
            "data": DATA,
            "schedule": {"learning_rate": rate, "warmup_ratio": ratio},
            "batch": {"samples_per_step": samples},
            "seed": seed,
        }
    )
    assert through_the_form(spec) == spec


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.key)
def test_a_preset_fills_the_form(preset: object) -> None:
    spec = {"data": DATA} | dict(preset.spec)  # type: ignore[attr-defined]
    assert through_the_form(parse_spec(spec)) == parse_spec(spec)


def test_every_knob_of_the_spec_is_in_the_form() -> None:
    shown = {control.key for section in SECTIONS for control in (*section.basic, *section.advanced)}
    chosen = {option.key for section in SECTIONS for choice in section.alternatives for option in choice.options}
    own_way = {"spec_version", "data.train", "data.train.dataset", "data.train.weight", "data.validation"}
    assert shown | chosen | own_way - {""} >= {key for key, _ in spec_fields()}
    assert {section.title for section in SECTIONS} == set(GROUPS)
    assert not shown & chosen


def test_what_was_typed_stays_and_its_error_finds_the_input() -> None:
    from core.errors import USER_FAULTS

    pairs = [
        ("data.train.dataset", "talks"),
        ("data.train.weight", "-1"),
        ("schedule.learning_rate", "fast"),
        ("batch", "rows_per_step"),
        ("batch.rows_per_step", "many"),
        ("tags", "a, b"),
        ("optimizer.betas", "0.9, 2"),
    ]
    state = state_of_form(pairs)
    with pytest.raises(USER_FAULTS) as caught:
        parse_spec(spec_of_form(state))
    state = state.with_errors(caught.value.errors)
    assert set(state.errors) == {
        "data.train.0.weight",
        "schedule.learning_rate",
        "batch.rows_per_step",
        "optimizer.betas",
    }
    assert state.value("schedule.learning_rate") == "fast" and state.train == (("talks", "-1"),)


def test_a_method_without_adapters_leaves_their_knobs_alone() -> None:
    assert CONTROLS["method.rank"].default == "16"
    state = state_of_form([("data.train.dataset", "talks"), ("method.type", "full"), ("method.rank", "16")])
    assert parse_spec(spec_of_form(state)).method.type == "full"


def test_a_spec_that_is_no_spec_still_fills_what_it_can() -> None:
    state = state_of_spec(
        {"data": {"train": "talks"}, "schedule": ["x"], "method": {"rank": "many", "alpha": math.inf}}
    )
    assert state.value("method.rank") == "many" and state.train == ()
