"""What a person is shown of a job's learning rate beside the curve, from the steps that the trainer makes."""

from dataclasses import dataclass

import numpy as np

from core.borders import certain_checkpoint_steps, evaluation_steps
from core.preflight import JobPlan
from core.schedule import lr_at


@dataclass(frozen=True)
class CurveReport:
    warmup_steps: int
    warmup_tokens: int
    warmup_trained_tokens: int
    peak: float
    floor: float  # that the decay ends at, if the run is long enough; the peak of `constant`
    last: float  # of the last step
    decay_start: int  # the last step at the peak
    total_steps: int
    evaluation_steps: tuple[int, ...]
    checkpoint_steps: tuple[int, ...]  # those that are certain; a best loss and the clock may add some
    checkpoint_minutes: float | None  # of the clock


def report_curve(plan: JobPlan) -> CurveReport:
    schedule = plan.schedule
    tokens, trained_tokens = tokens_up_to(plan, schedule.warmup_steps)
    return CurveReport(
        warmup_steps=schedule.warmup_steps,
        warmup_tokens=tokens,
        warmup_trained_tokens=trained_tokens,
        peak=schedule.peak,
        floor=schedule.peak * (1.0 if schedule.decay == "constant" else schedule.min_lr_ratio),
        last=lr_at(schedule, schedule.total_steps),
        decay_start=schedule.decay_start,
        total_steps=schedule.total_steps,
        evaluation_steps=tuple(evaluation_steps(plan)),
        checkpoint_steps=tuple(certain_checkpoint_steps(plan)),
        checkpoint_minutes=plan.spec.checkpoint.every_minutes,
    )


def tokens_up_to(plan: JobPlan, step: int) -> tuple[int, int]:
    """Of steps 1 to `step`: all tokens, and those that are trained."""
    tokens = trained_tokens = 0
    for epoch, num_steps in enumerate(plan.run.steps_of_epoch, start=1):
        if step <= 0:
            break
        epoch_plan = plan.run.epoch_plan(epoch)
        end = int(epoch_plan.step_offsets[min(step, num_steps)])
        order, starts, ends = epoch_plan.order[:end], epoch_plan.starts[:end], epoch_plan.ends[:end]
        tokens += int(np.sum(ends - starts))
        trained_tokens += int(plan.selection.count_targets(order, starts, ends).sum())
        step -= num_steps
    return tokens, trained_tokens
