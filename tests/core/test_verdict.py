"""What is remarked before launch, and that each fix mends what it says it does."""

from typing import Any

import pytest

from core.errors import USER_FAULTS, UserError
from core.fix import Fix, applied, fixes_of, told
from core.preflight import JobPlan, plan_job
from core.profile import DataProfile
from core.spec import parse_spec
from core.verdict import Remark, verdict
from core.wire import Device
from tests.core.shapes import llama
from tests.core.test_preflight import CPU, MODEL, plan_of, profile

OLD_GPU = Device(id="gpu0", kind="gpu", name="Tesla T4", memory_bytes=16 << 30)


def cut_anywhere(lengths: list[int]) -> DataProfile:
    """Samples that may be split: each is a turn of ten tokens, then one of the rest, trained."""
    facts = profile(lengths, [length - 10 for length in lengths])
    bounds = [bound for length in lengths for bound in (10, length)]
    return facts.model_validate(facts.model_dump() | {"sample_runs": [1] * len(lengths), "run_bounds": bounds})


def warnings(plan: JobPlan) -> dict[str, Remark]:
    return {remark.said.code: remark for remark in verdict(plan) if remark.level == "warning"}


def mended(spec: dict[str, Any], fix: Fix) -> dict[str, Any]:
    """The parts of a spec, as plan_of takes them, with a fix."""
    whole = parse_spec({**spec, "data": {"train": [{"dataset": "d"}], **spec.get("data", {})}})
    return applied(whole, fix)


FACTS = cut_anywhere([100] * 300 + [400] * 3)


@pytest.mark.parametrize(
    ("code", "spec", "device", "fixes"),
    [
        (
            "verdict.samples_too_long",
            {"data": {"max_length": 128, "overlong": "drop"}},
            CPU,
            [{"data.max_length": 400}, {"data.overlong": "split"}],
        ),
        (
            "verdict.samples_too_long",
            {"data": {"max_length": 128, "overlong": "drop"}, "packing": {"row_length": 200}},
            CPU,
            [{"data.max_length": 400, "packing.row_length": 400}, {"data.overlong": "split"}],
        ),
        ("verdict.samples_truncated", {"data": {"max_length": 128, "overlong": "truncate"}}, CPU,
         [{"data.max_length": 400}]),
        ("verdict.targets_lost", {"data": {"max_length": 128, "overlong": "truncate"}}, CPU,
         [{"data.max_length": 400}]),
        (
            "verdict.targets_lost_at_row_ends",
            {"packing": {"algorithm": "wrapped"}, "batch": {"rows_per_step": 4}, "data": {"max_length": 448}},
            CPU,
            [{"packing.algorithm": "best_fit"}],
        ),
        ("verdict.no_bf16", {"compute": {"dtype": "bf16"}}, OLD_GPU, [{"compute.dtype": "auto"}]),
        ("verdict.half_on_cpu", {"compute": {"dtype": "bf16"}}, CPU, [{"compute.dtype": "auto"}]),
        ("verdict.half_on_cpu", {"compute": {"dtype": "fp16"}}, CPU, [{"compute.dtype": "auto"}]),
        ("verdict.paged_on_cpu", {"optimizer": {"name": "paged_adamw_8bit"}}, CPU,
         [{"optimizer.name": "adamw_8bit"}]),
        (
            "verdict.warmup_one_step",
            {"schedule": {"epochs": 10, "warmup_ratio": 0.001}},
            CPU,
            [{"schedule.warmup_steps": 10, "schedule.warmup_ratio": None}],
        ),
        ("verdict.warmup_one_step", {"schedule": {"epochs": 10, "warmup_steps": 1}}, CPU,
         [{"schedule.warmup_steps": 10}]),
        (
            "verdict.warmup_most_of_run",
            {"schedule": {"epochs": 10, "warmup_epochs": 6}},
            CPU,
            [{"schedule.warmup_steps": 10, "schedule.warmup_epochs": None}],
        ),
    ],
)  # fmt: skip
def test_each_warning_has_its_fixes_and_each_of_them_mends_it(
    code: str, spec: dict[str, Any], device: Device, fixes: list[Fix]
) -> None:
    remark = warnings(plan_of(FACTS, device, **spec))[code]
    assert list(remark.fixes) == fixes
    for fix in fixes:
        assert code not in warnings(plan_of(FACTS, device, **mended(spec, fix))), fix


@pytest.mark.parametrize(
    "spec",
    [
        {"schedule": {"epochs": 10, "warmup_ratio": 0.05}},
        {"schedule": {"epochs": 10, "warmup_steps": 0}},
        {"schedule": {"max_steps": 2}},
        {"schedule": {"max_steps": 2, "warmup_ratio": 0.01}},  # nothing longer would do for two steps
        {"schedule": {"epochs": 10, "warmup_ratio": 0.5}},
        {"optimizer": {"name": "adamw_8bit"}},
    ],
)
def test_what_is_in_order_is_not_remarked(spec: dict[str, Any]) -> None:
    assert warnings(plan_of(cut_anywhere([100] * 320), **spec)) == {}


def test_a_sample_longer_than_the_context_is_no_reason_to_set_a_longer_limit() -> None:
    plan = plan_of(cut_anywhere([100] * 900 + [5000]), data={"max_length": 128, "overlong": "drop", "validation": None})
    (remark,) = warnings(plan).values()
    assert remark.fixes == ({"data.overlong": "split"},)
    split = warnings(plan_of(cut_anywhere([100] * 900 + [5000]), data={"overlong": "split", "validation": None}))
    assert set(split) == {"verdict.targets_lost"} and not split["verdict.targets_lost"].fixes


@pytest.mark.parametrize(
    ("code", "spec", "fixes"),
    [
        ("plan.above_context", {"data": {"max_length": 8192}}, [{"data.max_length": 4096}]),
        ("spec.row_shorter_than_sample", {"data": {"max_length": 512}, "packing": {"row_length": 256}},
         [{"packing.row_length": 512}]),
        ("spec.warmup_longer_than_run", {"schedule": {"max_steps": 93, "warmup_steps": 93}},
         [{"schedule.warmup_steps": 10}]),
        ("spec.warmup_longer_than_run", {"schedule": {"epochs": 1, "warmup_epochs": 2}},
         [{"schedule.warmup_steps": 1, "schedule.warmup_epochs": None}]),
        ("spec.warmup_longer_than_run", {"schedule": {"max_steps": 1, "warmup_ratio": 0.5}},
         [{"schedule.warmup_steps": 0, "schedule.warmup_ratio": None}]),
        ("plan.overlong", {"data": {"max_length": 128}}, [{"data.max_length": 400}, {"data.overlong": "split"}]),
        ("plan.overlong", {"packing": {"row_length": 128}},
         [{"data.max_length": 400, "packing.row_length": 400}, {"data.overlong": "split"}]),
        ("spec.algorithm_needs_packed", {"packing": {"mode": "padded", "algorithm": "sequential"}},
         [{"packing.algorithm": "best_fit"}]),
        ("spec.wrapped_needs_rows", {"packing": {"algorithm": "wrapped"}}, [{"packing.algorithm": "best_fit"}]),
        ("spec.adapter_needs_method", {"model": {"adapter": "job_1"}, "method": {"type": "full"}},
         [{"model.adapter": None}]),
        ("spec.offload_needs_adamw", {"optimizer": {"name": "adamw_8bit"}, "parallel": {"offload": "optimizer"}},
         [{"optimizer.name": "adamw"}, {"parallel.offload": "none"}]),
        ("plan.flex_on_cpu", {"compute": {"attention": "flex"}}, [{"compute.attention": "auto"}]),
        ("plan.compile_on_cpu", {"compute": {"compile": True}}, [{"compute.compile": False}]),
        ("spec.at_least", {"batch": {"rows_per_step": 0}}, [{"batch.rows_per_step": 1}]),
        ("spec.at_most", {"method": {"rank": 5000}}, [{"method.rank": 4096}]),
    ],
)  # fmt: skip
def test_each_error_has_its_fixes_and_each_of_them_mends_it(code: str, spec: dict[str, Any], fixes: list[Fix]) -> None:
    facts = cut_anywhere([100] * 30 + [400] * 3)
    (error,) = faults_of(facts, spec)
    assert error.code == code
    assert list(fixes_of(error)) == fixes
    for fix in fixes:
        assert code not in [each.code for each in faults_of(facts, merged(spec, fix))], fix


def faults_of(facts: DataProfile, spec: dict[str, Any]) -> tuple[UserError, ...]:
    try:
        plan_of(facts, **{part: dict(values) for part, values in spec.items()})
    except USER_FAULTS as fault:
        return fault.errors
    return ()


def merged(spec: dict[str, Any], fix: Fix) -> dict[str, Any]:
    """By hand, since a spec with an error in it is none yet."""
    changed = {part: dict(values) for part, values in spec.items()}
    for field, value in fix.items():
        part, name = field.split(".")
        changed.setdefault(part, {})[name] = value
    return changed


def test_a_sentence_names_what_a_fix_sets_and_not_what_it_gives_up() -> None:
    fix: Fix = {
        "batch.samples_per_step": 32,
        "batch.rows_per_step": None,
        "data.overlong": None,
        "data.validation": {"fraction": 0.02},
        "compute.compile": False,
        "schedule.learning_rate": 2e-4,
        "optimizer.betas": [0.9, 0.95],
    }
    assert told(fix) == (
        "batch.samples_per_step 32, data.overlong null, data.validation {fraction: 0.02}, compute.compile false, "
        "schedule.learning_rate 0.0002, optimizer.betas [0.9, 0.95]"
    )


# -- what memory has room for ----------------------------------------------------------------------------------------

SHAPE = llama(hidden=2048, layers=16, heads=32, key_value_heads=8, intermediate=8192)


def planned(spec: dict[str, Any], gigabytes: float, facts: DataProfile) -> JobPlan:
    device = Device(id="gpu0", kind="gpu", name="G", memory_bytes=round(gigabytes * 1e9), has_bf16=True)
    whole = {**spec, "data": {"train": [{"dataset": "d"}], **spec.get("data", {})}}
    return plan_job(parse_spec(whole), {"d": facts}, MODEL.model_copy(update={"shape": SHAPE}), device)


@pytest.mark.parametrize(
    ("spec", "gigabytes", "fixed"),
    [
        ({"batch": {"micro_batch_size": 32}, "compute": {"gradient_checkpointing": False}}, 24,
         ["compute.gradient_checkpointing", "batch.micro_batch_size", "data.max_length"]),
        ({"batch": {"micro_batch_size": 16, "samples_per_step": 64}, "data": {"max_length": 2048}}, 8,
         ["batch.micro_batch_size", "data.max_length"]),
        ({"batch": {"micro_batch_size": 16, "samples_per_step": 64}, "data": {"max_length": 2048},
          "packing": {"row_length": 2048}}, 8, ["batch.micro_batch_size", "data.max_length"]),
    ],
)  # fmt: skip
def test_what_by_estimate_does_not_fit_is_warned_of_and_each_fix_makes_it_fit(
    spec: dict[str, Any], gigabytes: float, fixed: list[str]
) -> None:
    facts = cut_anywhere([2000] * 400)
    remark = warnings(planned(spec, gigabytes, facts))["verdict.memory_short"]
    assert [next(iter(fix)) for fix in remark.fixes] == fixed
    assert f"{gigabytes} GB" in remark.said.text()
    for fix in remark.fixes:
        assert "verdict.memory_short" not in warnings(planned(mended(spec, fix), gigabytes, facts)), fix


def test_tool_calls_that_the_template_leaves_out_are_warned_of() -> None:
    facts = FACTS.model_copy(update={"num_with_calls": 1200, "num_calls_dropped": 1100})
    remark = warnings(planned({}, 80, facts))["verdict.calls_dropped"]
    assert remark.field == "model.chat_template" and remark.fixes == ({"model.chat_template": "chatml"},)
    assert "1,100 of the 1,200 conversations" in remark.said.text()
    seen = FACTS.model_copy(update={"num_with_calls": 1200})
    assert "verdict.calls_dropped" not in warnings(planned({}, 80, seen)) | warnings(planned({}, 80, FACTS))


def test_what_nothing_mends_has_no_button() -> None:
    remark = warnings(planned({"method": {"type": "full"}, "parallel": {"offload": "none"}}, 2, FACTS))
    assert remark["verdict.memory_short"].fixes == ()


def test_a_longer_limit_is_offered_only_where_it_fits() -> None:
    """Rows of 3,000 tokens, eight a pass, are more than a small device holds; a large one offers the limit."""
    facts = cut_anywhere([500] * 900 + [3000])
    spec = {"data": {"max_length": 512, "overlong": "drop"}, "batch": {"micro_batch_size": 8}}
    large, small = (warnings(planned(spec, gigabytes, facts)) for gigabytes in (80, 6))
    assert {"data.max_length": 3000} in large["verdict.samples_too_long"].fixes
    assert "verdict.no_room_for_longer" not in large
    assert small["verdict.samples_too_long"].fixes == ({"data.overlong": "split"},)
    said = small["verdict.no_room_for_longer"].said
    assert 512 <= int(said.parameters["fits"]) < 3000
    # And it is true: with the limit the plan does not fit.
    longer = planned(mended(spec, {"data.max_length": 3000}), 6, facts)
    assert longer.memory.chosen is not None and not longer.memory.chosen.fits


def test_a_refusal_for_length_says_where_memory_has_no_room_for_a_longer_limit() -> None:
    facts = cut_anywhere([500] * 300 + [3000] * 30)
    spec = {"data": {"max_length": 512}, "batch": {"micro_batch_size": 8}}
    with pytest.raises(UserError) as large:
        planned(spec, 80, facts)
    assert large.value.code == "plan.overlong"
    longer, split = fixes_of(large.value)
    assert longer == {"data.max_length": 3000} and split == {"data.overlong": "split"}
    with pytest.raises(UserError) as small:
        planned(spec, 6, facts)
    assert small.value.code == "plan.overlong_memory" and fixes_of(small.value) == (split,)
    assert "3000" in small.value.text() and f"at most {small.value.parameters['fits']} fit G" in small.value.text()
