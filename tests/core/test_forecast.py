"""Time is work over the best pace that is known, and what was off is learned once."""

from typing import Any

import pytest

from core import forecast as module
from core.disk import DiskPlan
from core.errors import Reason
from core.events import RunTotals
from core.forecast import (
    Forecast,
    Place,
    TimeForecast,
    disk_of,
    forecast_time,
    learn,
    likeness_of,
    memory_seen,
    work_of,
)
from core.past_run import STEPS_NEEDED, PastRun, accuracy
from core.preflight import JobPlan, plan_job
from core.spec import parse_spec
from core.wire import Device
from tests.core.shapes import llama
from tests.core.test_preflight import CPU, MODEL, lengths_of, profile

SHAPE = llama(hidden=64, layers=2, heads=4, key_value_heads=2, intermediate=128, vocabulary=512)
GPU = Device(id="gpu0", kind="gpu", name="NVIDIA L40S", memory_bytes=48 << 30, has_bf16=True)


def plan_on(device: Device = CPU, shape: Any = SHAPE, **parts: Any) -> JobPlan:
    spec = {"data": {"train": [{"dataset": "d"}], "validation": None}, **parts}
    return plan_job(
        parse_spec(spec), {"d": profile(lengths_of(200))}, MODEL.model_copy(update={"shape": shape}), device
    )


def past(plan: JobPlan, pace: float = 1e9, device: Device = CPU, **changes: Any) -> PastRun:
    """A job of the same work at `pace` FLOP/s."""
    work = work_of(plan, disk_of(plan))
    told: dict[str, Any] = {
        "job": "job_a",
        "host": "host_a",
        "likeness": likeness_of(plan, device),
        "packing": plan.spec.packing.mode,
        "is_trial": False,
        "has_succeeded": True,
        "steps": plan.total_steps,
        "slots": round(work.slots),
        "flops": work.flops,
        "step_s": None if work.flops is None else work.flops / pace,
        "startup_s": 7.0,
        "seconds": None,
    }
    return PastRun.model_validate(told | changes)


def time_of(plan: JobPlan, *history: PastRun, device: Device = CPU, host: str | None = None) -> TimeForecast:
    return forecast_time(plan, work_of(plan, disk_of(plan)), device, host, history)


def test_jobs_like_it_give_the_pace_and_their_spread_the_range() -> None:
    plan = plan_on()
    flops = work_of(plan, None).flops
    assert flops
    found = time_of(plan, *(past(plan, pace) for pace in (1e9, 4e9, 2e9)))
    assert found.basis == "history" and found.steps_s == pytest.approx(flops / 2e9)
    assert found.why.parameters["num_jobs"] == 3 and "2 GFLOP/s" in found.why.text()
    assert found.low_s and found.high_s and found.seconds
    around_s = found.seconds - found.steps_s
    assert found.high_s == pytest.approx(flops / 1e9 + 1.1 * around_s)
    assert found.low_s == pytest.approx(flops / 4e9 + 0.9 * around_s)
    # The start is theirs too.
    without = past(plan, startup_s=None)
    assert time_of(plan, past(plan)).seconds == pytest.approx(
        (time_of(plan, without).seconds or 0) - module.STARTUP_S - MODEL.bytes / module.READ_BYTES_PER_S + 7.0
    )


def test_one_job_or_equal_ones_still_leave_a_margin() -> None:
    plan = plan_on()
    one, several = time_of(plan, past(plan)), time_of(plan, past(plan), past(plan))
    for found, margin in ((one, module.MARGIN_OF_ONE), (several, module.MARGIN_OF_SEVERAL)):
        assert found.steps_s and found.high_s and found.seconds
        assert found.high_s == pytest.approx((1 + margin) * found.seconds)
    assert one.why.code == "forecast.one_job"


@pytest.mark.parametrize(
    "parts",
    [{"method": {"type": "full"}}, {"parallel": {"devices": 2}}, {"compute": {"attention": "eager"}}],
)
def test_a_job_of_another_shape_says_nothing(parts: dict[str, Any]) -> None:
    plan = plan_on(**parts)
    assert time_of(plan, past(plan_on())).basis == "formula"
    assert time_of(plan, past(plan)).basis == "history"


def test_only_the_last_few_count_and_those_of_this_host_where_it_has_some() -> None:
    plan = plan_on()
    flops = work_of(plan, None).flops
    assert flops
    newest = [past(plan, 1e9)] * module.LAST_RUNS
    assert time_of(plan, *newest, past(plan, 9e9)).steps_s == pytest.approx(flops / 1e9)
    here = past(plan, 5e9, host="host_b")
    assert time_of(plan, *newest, here, host="host_b").steps_s == pytest.approx(flops / 5e9)


def test_a_dry_run_stands_in_and_gives_way_to_jobs_that_are_packed_alike() -> None:
    plan = plan_on()
    trial = past(plan, 3e9, is_trial=True, steps=10)
    found = time_of(plan, trial)
    assert found.basis == "trial" and "a dry run of 10 steps" in found.why.text()
    padded = past(plan, 1e9, packing="padded")
    assert time_of(plan, padded, trial).basis == "trial"
    assert time_of(plan, padded).basis == "history"
    assert time_of(plan, trial, padded, past(plan, 2e9)).basis == "history"


def test_a_few_steps_of_a_job_that_failed_tell_no_pace() -> None:
    plan = plan_on()
    few = past(plan, has_succeeded=False, steps=STEPS_NEEDED - 1)
    assert time_of(plan, few).basis == "formula"
    assert time_of(plan, few.model_copy(update={"steps": STEPS_NEEDED})).basis == "history"


def test_the_formula_is_a_share_of_the_peak_and_says_how_wrong_it_may_be() -> None:
    plan = plan_on(GPU, parallel={"devices": 2}, compute={"gradient_checkpointing": False})
    flops = work_of(plan, None).flops
    assert flops
    found = time_of(plan, device=GPU)
    assert found.basis == "formula" and found.steps_s == pytest.approx(flops / (2 * 0.3 * 362e12))
    assert "right within a factor of 3" in found.why.text() and "362 TFLOP/s" in found.why.text()
    assert found.seconds and found.high_s == pytest.approx(3 * found.seconds)
    assert found.low_s == pytest.approx(found.seconds / 3)
    again = plan_on(GPU, parallel={"devices": 2}, compute={"gradient_checkpointing": True})
    assert time_of(again, device=GPU).steps_s == pytest.approx(1.5 * found.steps_s)
    assert time_of(plan_on()).steps_s == pytest.approx((work_of(plan_on(), None).flops or 0) / module.CPU_FLOPS)


def test_without_a_peak_or_sizes_there_is_no_formula_but_a_pace_by_positions() -> None:
    unknown = GPU.model_copy(update={"name": "NVIDIA RTX 9999"})
    found = time_of(plan_on(unknown), device=unknown)
    assert found.seconds is None and "no peak is known of NVIDIA RTX 9999" in found.why.text()
    plan = plan_on(shape=None)
    found = time_of(plan)
    assert found.seconds is None and found.planned_s is None and "sizes are not known" in found.why.text()
    work = work_of(plan, None)
    found = time_of(plan, past(plan, step_s=50.0))
    assert found.basis == "history" and found.steps_s == pytest.approx(50.0) and "positions/s" in found.why.text()
    assert work.flops is None


def test_evaluations_cost_forward_passes_and_checkpoints_their_bytes() -> None:
    parts = {"data": {"train": [{"dataset": "d"}], "validation": {"fraction": 0.25}}, "schedule": {"epochs": 2.0}}
    plan = plan_on(**parts, evaluation={"per_epoch": 3})
    work = work_of(plan, disk_of(plan))
    held_out = int(plan.selection.validation.lengths.sum())
    assert held_out and work.evaluation_share == pytest.approx(6 * held_out / 2 / (2 * plan.packing.mine.tokens))
    full = plan_on(**parts, evaluation={"per_epoch": 3}, method={"type": "full"})
    assert work_of(full, None).evaluation_share == pytest.approx(work.evaluation_share * 2 / 3)
    rare = plan_on(schedule={"max_steps": 40}, checkpoint={"every_epoch": False, "keep_best": 0})
    often = plan_on(schedule={"max_steps": 40}, checkpoint={"every_epoch": False, "keep_best": 0, "every_steps": 1})
    save_s = module.SAVE_S + work.checkpoint_bytes / module.SAVE_BYTES_PER_S
    assert (time_of(often).seconds or 0) - (time_of(rare).seconds or 0) == pytest.approx(39 * save_s)


def test_what_jobs_took_over_what_was_planned_multiplies_the_next_and_is_said() -> None:
    plan = plan_on()
    bare = time_of(plan, past(plan))
    seen = [past(plan, basis="history", planned_s=10.0, seconds=seconds) for seconds in (13.0, 12.0, 30.0)]
    found = time_of(plan, *seen)
    assert found.correction == pytest.approx(1.3)
    assert found.corrected is not None
    assert found.corrected.text() == "the last 3 jobs like this took 1.3x what was planned; that is included"
    assert found.seconds == pytest.approx(1.3 * (bare.seconds or 0)) and found.planned_s == pytest.approx(bare.seconds)


def test_nothing_is_learned_twice() -> None:
    """A forecast by formula was three times too low. The pace is measured now, so that is in it already."""
    plan = plan_on()
    seen = past(plan, basis="formula", planned_s=10.0, seconds=30.0)
    assert time_of(plan, seen).correction == 1.0
    assert learn([seen], "formula", likeness_of(plan, CPU))[0] == 3.0
    # Another model on this device has no pace yet, and the formula is as far off for it.
    other = plan_on(method={"type": "full"})
    found = time_of(other, seen)
    assert found.basis == "formula" and found.correction == 3.0 and found.seconds
    assert found.high_s == pytest.approx(module.FACTOR_OF_CORRECTED * found.seconds)
    elsewhere = likeness_of(plan, GPU)
    assert learn([seen], "formula", elsewhere)[1] is None


def test_memory_is_told_beside_its_plan() -> None:
    plan = plan_on()
    likeness = likeness_of(plan, CPU)
    assert memory_seen([past(plan)], likeness) is None
    ratio, said = memory_seen([past(plan, memory_ratio=each) for each in (0.9, 1.1, 0.8)], likeness) or (0, None)
    assert ratio == 0.9 and said and "of the last 3 jobs like this was 90 % of their plan" in said.text()


def test_the_worst_forecast_is_the_one_farthest_off_to_either_side() -> None:
    found = accuracy([1.0, 1.5, 0.5])
    assert found and (found.num_jobs, found.usual, found.worst) == (3, 1.0, 0.5)
    assert accuracy([]) is None


def test_hours_are_of_all_devices_and_cost_what_a_gpu_hour_does() -> None:
    totals = RunTotals(steps=1, rows=1, tokens=1, trained_tokens=1, slots=1, is_exact=True)
    why = Reason("forecast.starts", {"devices": "gpu0", "host": "ada"})
    forecast = Forecast(
        time=TimeForecast(seconds=1800, why=why),
        device_kind="gpu",
        num_devices=4,
        price=2.5,
        currency="EUR",
        place=Place(position=None, host="ada", host_id="host_a", why=why),
        totals=totals,
        steps_per_epoch=1,
        planned_peak_bytes=None,
        disk=DiskPlan(checkpoint_bytes=1, most_checkpoints=1, kept_checkpoints=1, result_bytes=1, cache_bytes=1),
    )
    assert forecast.device_hours(1800) == 2.0 and forecast.cost(1800) == 5.0 and forecast.cost(None) is None
    assert forecast.model_copy(update={"device_kind": "cpu"}).cost(1800) is None
    assert Forecast.model_validate_json(forecast.model_dump_json()) == forecast
