"""The learning rate of every optimizer step, as one function of the step's number.

The trainer asks it before each step and the form draws it before launch, so the planned curve and the real one cannot
drift apart. Steps count from 1 to n; 0 is the point at which the drawing begins. In the warm-up the rate rises
in equal parts, lr(s) = peak * s / warmup_steps, and reaches the peak at its last step. Without a warm-up the first step
runs at the peak, so that even a run of a single step learns something. From there:

  - `cosine` and `linear` fall all the way, so that step n runs at the floor, min_lr_ratio * peak.
  - `wsd` (warm-up, stable, decay) stays at the peak and spends the run's last WSD_DECAY_SHARE on falling to the floor.
  - `inverse_sqrt` falls as peak * sqrt(warmup_steps / s), whatever n is, and stops at the floor where it meets it
    (Vaswani et al. 2017, arXiv 1706.03762, section 5.3, which has the same two branches).
  - `constant` stays at the peak; the floor means nothing to it.

Why warm up at all: Adam's estimate of the second moment is noise in its first steps and divides by it, LoRA's B is zero
and has to find a direction, and the data is new to the model.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from core.errors import Reason, UserError

Decay = Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"]

# Of all steps. Hägele et al. 2024 (arXiv 2405.18392) find that a cool-down of 10 to 20 % matches cosine, and 1 - sqrt a
# better shape for it than a line; MiniCPM, which named the schedule (arXiv 2404.06395), spends 10 %. A fine-tune is
# short, so it gets the longer one.
WSD_DECAY_SHARE = 0.2


@dataclass(frozen=True)
class Schedule:
    """`peak` is the learning rate that was asked for; `min_lr_ratio` the share of it that the last step keeps."""

    peak: float
    total_steps: int
    warmup_steps: int
    decay: Decay
    min_lr_ratio: float

    def __post_init__(self) -> None:
        assert self.peak > 0 and self.total_steps >= 1 and 0.0 <= self.min_lr_ratio <= 1.0
        assert 0 <= self.warmup_steps < self.total_steps, "resolve_warmup_steps refuses a longer one with a sentence"

    @property
    def decay_start(self) -> int:
        """The last step at the peak (of `constant`: the first)."""
        peak_step = max(self.warmup_steps, 1)
        if self.decay != "wsd":
            return peak_step
        return max(peak_step, self.total_steps - ceil_share(WSD_DECAY_SHARE, self.total_steps))


def lr_at(schedule: Schedule, step: int) -> float:
    """The rate of optimizer step `step`, 1 to total_steps (0: where the curve is drawn from)."""
    assert 0 <= step <= schedule.total_steps
    if step < schedule.warmup_steps:
        return schedule.peak * step / schedule.warmup_steps
    start = schedule.decay_start
    if step <= start or schedule.decay == "constant":
        return schedule.peak
    floor = schedule.min_lr_ratio * schedule.peak
    if schedule.decay == "inverse_sqrt":
        return max(floor, schedule.peak * math.sqrt(start / step))
    progress = (step - start) / (schedule.total_steps - start)
    return floor + (schedule.peak - floor) * _share_left(schedule.decay, progress)


def _share_left(decay: Literal["cosine", "linear", "wsd"], progress: float) -> float:
    """Of the way from the peak to the floor, 1 at its beginning and 0 at its end."""
    if decay == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - (math.sqrt(progress) if decay == "wsd" else progress)


def curve(schedule: Schedule) -> list[float]:
    """The rates of steps 0 to n; the index is the step."""
    return [lr_at(schedule, step) for step in range(schedule.total_steps + 1)]


@dataclass(frozen=True)
class WarmupChoice:
    steps: int
    reason: Reason


def resolve_warmup_steps(
    total_steps: int,
    steps_per_epoch: int,
    ratio: float | None = None,
    steps: int | None = None,
    epochs: float | None = None,
) -> WarmupChoice:
    """Whole steps of this run's real count, and where they come from. At most one of ratio, steps and epochs is given;
    none means max(3 %, min(10 steps, 10 %)): a long run needs no more than 3 %, a short one at least a few steps.

    Raises UserError spec.warmup_longer_than_run where no step would be left after a warm-up that was asked for.
    """
    assert total_steps >= 1 and steps_per_epoch >= 1
    assert sum(given is not None for given in (ratio, steps, epochs)) <= 1, "the spec refuses two"
    if ratio is not None:
        choice = WarmupChoice(
            ceil_share(ratio, total_steps), Reason("warmup.ratio", {"ratio": ratio, "total_steps": total_steps})
        )
        field = "schedule.warmup_ratio"
    elif steps is not None:
        choice = WarmupChoice(steps, Reason("warmup.steps", {"total_steps": total_steps}))
        field = "schedule.warmup_steps"
    elif epochs is not None:
        choice = WarmupChoice(
            ceil_share(epochs, steps_per_epoch),
            Reason("warmup.epochs", {"epochs": epochs, "steps_per_epoch": steps_per_epoch}),
        )
        field = "schedule.warmup_epochs"
    elif total_steps == 1:
        return WarmupChoice(0, Reason("warmup.single_step", {}))
    else:
        short_run = min(10, ceil_share(0.10, total_steps))
        default = max(ceil_share(0.03, total_steps), short_run)
        code = "warmup.default_short" if default == short_run else "warmup.default"
        choice = WarmupChoice(default, Reason(code, {"total_steps": total_steps}))
        field = "schedule.warmup_ratio"
    if choice.steps >= total_steps:
        raise UserError("spec.warmup_longer_than_run", field, warmup_steps=choice.steps, total_steps=total_steps)
    return choice


def ceil_share(share: float, whole: int) -> int:
    """ceil(share * whole) of the decimal number that a person wrote: in floats 0.07 * 100 is 7.000000000000001, and
    its ceiling 8."""
    return math.ceil(Fraction(repr(share)) * whole)


def rate_text(rate: float) -> str:
    """As people write it: 2e-4, 1.5e-5, 0."""
    if rate == 0:
        return "0"
    mantissa, _, exponent = f"{rate:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
