"""How long a job will take, what it costs, what it leaves on a disk and when it starts; docs/forecast.md says it at
length.

Time is work over pace. The work is counted (core.flops, over the layouts that the trainer makes); the pace comes from
the best that is known:

    history   jobs like this one that ran: the median of their last few
    trial     a dry run of a few steps of a job like this one
    formula   a share of the device's peak, right within a factor

Steps are not all of it: starting, evaluations, checkpoints and the result are added by stated costs. What then is still
off for jobs that were forecast in the same way is learned: the median of what they took over what was planned for them
multiplies the next forecast. It is told, and the plan without it is kept, so that nothing is learned twice.

Everything here is a pure function of a plan and of past runs that are handed in, newest first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict

from core.borders import checkpoint_steps, evaluation_steps
from core.disk import DiskPlan, plan_disk
from core.errors import Reason
from core.events import RunTotals
from core.past_run import Basis, Likeness, PastRun, attention_class
from core.peaks import peak_flops
from core.preflight import JobPlan
from core.spec import Adapter
from core.wire import Device

LAST_RUNS = 5  # of those that are like the job; older ones ran other software
# A forecast by pace is given so much to either side, where what it was measured on lies closer together.
MARGIN_OF_ONE, MARGIN_OF_SEVERAL, MARGIN_OF_TRIAL = 0.25, 0.1, 0.3
# A step's passes reach a quarter to a half of a GPU's peak where matrices are large, and little where they are small.
SHARE_OF_PEAK = 0.3
# FLOP/s of a CPU's rank: two cores reach a few ten times 10^9, a whole server ten times that.
CPU_FLOPS = 20e9
FACTOR_OF_FORMULA = 3.0  # to either side
FACTOR_OF_CORRECTED = 2.0  # where jobs that were forecast by it have been seen

STARTUP_S = 15.0  # libraries, the plan, the probe and the longest batch
READ_BYTES_PER_S = 500e6  # of a model
# Written, made durable, hashed, read back and hashed again.
SAVE_BYTES_PER_S = 150e6
SAVE_S = 0.1
RESULT_S = 3.0  # it is opened again and compared, then sent


def likeness_of(plan: JobPlan, device: Device) -> Likeness:
    spec = plan.spec
    assert spec.parallel.zero_stage != "auto" and spec.compute.gradient_checkpointing != "auto"
    return Likeness(
        device=device.name,
        num_ranks=spec.parallel.devices,
        model=spec.model.base,
        method=spec.method.type,
        attention=attention_class(spec.compute.attention),
        dtype=spec.compute.dtype,
        recomputes=spec.compute.gradient_checkpointing,
        zero_stage=spec.parallel.zero_stage,
        offload=spec.parallel.offload,
    )


class TimeForecast(BaseModel):
    model_config = ConfigDict(frozen=True)

    seconds: float | None  # from the start on a host to the end; None where nothing is known to tell it from
    low_s: float | None = None
    high_s: float | None = None
    steps_s: float | None = None  # of the steps alone, by their pace
    basis: Basis | None = None
    why: Reason
    correction: float = 1.0  # that is in the time in all, the least and the most
    corrected: Reason | None = None

    @property
    def planned_s(self) -> float | None:
        return None if self.seconds is None else self.seconds / self.correction


class Place(BaseModel):
    """When it would start, if it were launched now."""

    model_config = ConfigDict(frozen=True)

    position: int | None  # in the queue, from 1; None: it starts at once
    host: str | None  # by its name: where it would start, or the likeliest to take it
    host_id: str | None
    why: Reason


class Forecast(BaseModel):
    model_config = ConfigDict(frozen=True)

    time: TimeForecast
    device_kind: Literal["gpu", "cpu"]
    num_devices: int  # on a CPU slots, one for all ranks
    price: float | None = None  # of a GPU-hour
    currency: str = ""
    disk: DiskPlan | None = None  # None where the model's sizes are not known
    disk_free_bytes: int | None = None  # of the host
    place: Place
    totals: RunTotals
    steps_per_epoch: int
    planned_peak_bytes: int | None
    memory_ratio: float | None = None  # of the last jobs like this: the peak over its plan
    memory_seen: Reason | None = None

    def device_hours(self, seconds: float | None) -> float | None:
        return None if seconds is None else seconds * self.num_devices / 3600

    def cost(self, seconds: float | None) -> float | None:
        hours = self.device_hours(seconds)
        return None if hours is None or self.price is None or self.device_kind == "cpu" else hours * self.price


# -- the work --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What takes time in a run."""

    slots: float  # of all steps
    flops: float | None
    evaluation_share: float  # of the steps' work, all evaluations together
    num_checkpoints: int  # without those by the clock
    minutes_between: float | None  # checkpoints by the clock
    checkpoint_bytes: int
    result_bytes: int
    model_bytes: int

    def amount(self, *, in_flops: bool) -> float | None:
        return self.flops if in_flops else self.slots


def work_of(plan: JobPlan, disk: DiskPlan | None) -> Work:
    """An epoch's work for each epoch's steps."""
    mine = plan.packing.mine
    epochs = plan.total_steps / plan.run.steps_per_epoch
    evaluated = len(evaluation_steps(plan)) * int(plan.selection.validation.lengths.sum())
    # A forward pass is one of the matrices' two products for frozen weights, one of three for trained ones.
    forward = 1 / 2 if isinstance(plan.spec.method, Adapter) else 1 / 3
    return Work(
        slots=epochs * mine.slots,
        flops=None if mine.flops is None else epochs * mine.flops,
        evaluation_share=forward * evaluated / (epochs * mine.tokens),
        num_checkpoints=len(checkpoint_steps(plan)),
        minutes_between=plan.spec.checkpoint.every_minutes,
        checkpoint_bytes=disk.checkpoint_bytes if disk else 0,
        result_bytes=disk.result_bytes if disk else 0,
        model_bytes=plan.model.bytes,
    )


def disk_of(plan: JobPlan) -> DiskPlan | None:
    samples = plan.selection.samples
    return plan_disk(
        plan.spec,
        plan.model,
        num_checkpoints=len(checkpoint_steps(plan)),
        num_tokens=int(samples.lengths.sum()),
        num_samples=len(samples.lengths),
    )


# -- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """Of the steps: their seconds, the least and the most that they may take; and by what factors all else may be
    off."""

    steps_s: float
    low_s: float
    high_s: float
    around: tuple[float, float]
    startup_s: float | None
    basis: Basis
    why: Reason


def forecast_time(
    plan: JobPlan, work: Work, device: Device, host: str | None, history: Sequence[PastRun]
) -> TimeForecast:
    """`device` stands for each of the job's; `host` is the likeliest to take it, by its id."""
    likeness = likeness_of(plan, device)
    pace = _measured(plan, work, likeness, host, history) or _by_formula(plan, work, device)
    if isinstance(pace, Reason):
        return TimeForecast(seconds=None, why=pace)
    startup_s = pace.startup_s if pace.startup_s is not None else STARTUP_S + work.model_bytes / READ_BYTES_PER_S
    by_clock = 0.0 if work.minutes_between is None else pace.steps_s // (60 * work.minutes_between)
    save_s = SAVE_S + work.checkpoint_bytes / SAVE_BYTES_PER_S
    result_s = RESULT_S + work.result_bytes / SAVE_BYTES_PER_S
    around_s = startup_s + (work.num_checkpoints + by_clock) * save_s + result_s
    factor, corrected = learn(history, pace.basis, likeness)
    if pace.basis == "formula" and corrected is not None:
        pace = _within(FACTOR_OF_CORRECTED, pace.steps_s, pace.why)

    def whole(steps_s: float, around: float) -> float:
        return factor * (steps_s * (1 + work.evaluation_share) + around * around_s)

    return TimeForecast(
        seconds=whole(pace.steps_s, 1.0),
        low_s=whole(pace.low_s, pace.around[0]),
        high_s=whole(pace.high_s, pace.around[1]),
        steps_s=pace.steps_s,
        basis=pace.basis,
        why=pace.why,
        correction=factor,
        corrected=corrected,
    )


def _measured(
    plan: JobPlan, work: Work, likeness: Likeness, host: str | None, history: Sequence[PastRun]
) -> Pace | None:
    in_flops = work.flops is not None
    amount = work.amount(in_flops=in_flops)
    assert amount is not None
    alike = [
        run
        for run in history
        if run.likeness == likeness and run.tells_pace and (run.flops is not None or not in_flops)
    ]
    found = _best(alike, plan.spec.packing.mode, host)
    if not found:
        return None
    paces = [(run.flops if in_flops else run.slots) / run.step_s for run in found]  # type: ignore[operator]  # above
    steps_s = median(amount / pace for pace in paces)
    is_trial = found[0].is_trial
    margin = MARGIN_OF_TRIAL if is_trial else MARGIN_OF_ONE if len(found) == 1 else MARGIN_OF_SEVERAL
    starts = [run.startup_s for run in found if run.startup_s is not None]
    told: dict[str, str | int | float] = {
        "device": likeness.device,
        "num_jobs": len(found),
        "steps": found[0].steps,
    }
    told["pace"] = _flops_text(amount / steps_s) if in_flops else f"{amount / steps_s:,.0f} positions/s"
    code = "trial" if is_trial else "one_job" if len(found) == 1 else "jobs"
    return Pace(
        steps_s=steps_s,
        low_s=min(steps_s * (1 - margin), amount / max(paces)),
        high_s=max(steps_s * (1 + margin), amount / min(paces)),
        around=(1 - margin, 1 + margin),
        startup_s=median(starts) if starts else None,
        basis="trial" if is_trial else "history",
        why=Reason(f"forecast.{code}", told),
    )


def _flops_text(pace: float) -> str:
    unit, factor = next((each for each in (("P", 1e15), ("T", 1e12), ("G", 1e9)) if pace >= each[1]), ("M", 1e6))
    return f"{pace / factor:.3g} {unit}FLOP/s"


def _best(alike: Sequence[PastRun], packing: str, host: str | None) -> list[PastRun]:
    """The newest of one kind: jobs before dry runs and what is packed alike before what is not; those of this host
    where it has some."""
    for same_packing in (True, False):
        for is_trial in (False, True):
            found = [run for run in alike if run.is_trial == is_trial and (run.packing == packing) == same_packing]
            here = [run for run in found if run.host == host]
            if found:
                return (here or found)[:LAST_RUNS]
    return []


def _by_formula(plan: JobPlan, work: Work, device: Device) -> Pace | Reason:
    if work.flops is None:
        return Reason("forecast.no_sizes", {"device": device.name})
    num_ranks, dtype = plan.spec.parallel.devices, plan.spec.compute.dtype
    peak = peak_flops(device, dtype)
    if device.kind == "gpu" and peak is None:
        return Reason("forecast.no_peak", {"device": device.name})
    told: dict[str, str | int | float] = {"device": device.name, "factor": f"{FACTOR_OF_FORMULA:g}", "ranks": num_ranks}
    if peak is None:
        reached = CPU_FLOPS
        told |= {"pace": _flops_text(CPU_FLOPS)}
    else:
        reached = SHARE_OF_PEAK * peak
        told |= {"peak": _flops_text(peak), "dtype": dtype, "percent": round(100 * SHARE_OF_PEAK)}
    # Recomputed activations are a forward pass more.
    again = 1.0
    if plan.spec.compute.gradient_checkpointing:
        again = 3 / 2 if isinstance(plan.spec.method, Adapter) else 4 / 3
    steps_s = again * work.flops / (num_ranks * reached)
    return _within(FACTOR_OF_FORMULA, steps_s, Reason(f"forecast.formula_{device.kind}", told))


def _within(factor: float, steps_s: float, why: Reason) -> Pace:
    return Pace(steps_s, steps_s / factor, steps_s * factor, (1 / factor, factor), None, "formula", why)


# -- what was learned ------------------------------------------------------------------------------------------------


def learn(history: Sequence[PastRun], basis: Basis, likeness: Likeness) -> tuple[float, Reason | None]:
    """By what to multiply a forecast of this basis, and how that is known. A pace that was measured holds for jobs like
    these alone; a formula is as far off for all jobs of a device."""
    ratios = [
        run.seconds / run.planned_s
        for run in history
        if run.basis == basis
        and run.seconds is not None
        and run.planned_s
        and (run.likeness == likeness if basis != "formula" else run.likeness.device == likeness.device)
    ][:LAST_RUNS]
    if not ratios:
        return 1.0, None
    told: dict[str, str | int | float] = {"num_jobs": len(ratios), "ratio": f"{median(ratios):.2g}"}
    code = "forecast.learned" if len(ratios) > 1 else "forecast.learned_one"
    return median(ratios), Reason(code, told)


def memory_seen(history: Sequence[PastRun], likeness: Likeness) -> tuple[float, Reason] | None:
    """How far the memory plan was off for the last jobs like this; the plan itself stays as it is."""
    ratios = [run.memory_ratio for run in history if run.likeness == likeness and run.memory_ratio is not None]
    ratios = ratios[:LAST_RUNS]
    if not ratios:
        return None
    told: dict[str, str | int | float] = {"num_jobs": len(ratios), "percent": f"{100 * median(ratios):.0f}"}
    code = "forecast.memory" if len(ratios) > 1 else "forecast.memory_one"
    return median(ratios), Reason(code, told)
