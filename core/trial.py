"""Trials: a few real steps of a job, made for what they tell. Nothing of them is kept but their numbers.

A *dry run* makes the job's first steps as the job itself would: it costs a minute and says whether the job fits into
memory, how long a step takes, and so how long all of them. No evaluation: a pass over held-out data can take longer
than ten steps, and needs less memory than the largest batch, which was tried before the first step.

A *probe* of learning rates makes the same few steps from the same state once for each rate. It is a range test (Smith
2015, arXiv 1506.01186, section 3.3) with a fresh start for each rate, so that no rate pays for what the one before it
did to the weights. All rates see the same samples in the same steps, none of them twice, so the losses are of unseen
data and may be compared step by step. Each rate is reached by a warm-up of WARMUP_SHARE of the steps: as a share, since
a probe's steps are few and the job's own warm-up would be all of them; without one, Adam's first steps, whose second
moment is noise, would throw out rates that the job itself would live with. Then it stays, since the peak is what is
asked for.

A *certificate* makes the first steps of the job in every layout that could compute them (core.certify).

What says *whether* a rate goes is `has_diverged`, what says *which* one is `suggest`. Both are pure, and asked by the
trainer and the pages alike.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, ValidationError

from core.errors import Reason, UserError, UserErrors
from core.schedule import Schedule, ceil_share, rate_text
from core.spec import LARGEST_LEARNING_RATE, Count, LearningRate, Number, Part, faults_of

# Times the rate that the spec comes to: half a decade apart, a decade to each side.
PROBED_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
WARMUP_SHARE = 0.15  # 3 of 20 steps
# Of a rate's first loss, which no update has touched; fast.ai's finder stops at the same factor, of its best loss.
DIVERGED_FACTOR = 4.0
LAST_SHARE = 0.25  # of the steps, whose mean loss is compared
# Differences of two rates within so many standard errors are taken for noise.
NOISE_ERRORS = 2.0
UNSETTLED_STEPS = 2  # at first kernels are chosen, memory is reserved and caches are filled
MOST_NAME_CHARACTERS = 200  # a job's
LOWERED_FACTOR = 0.1  # where no rate that was tried stayed sound


class DryRun(Part):
    """The job's first steps."""

    kind: Literal["dry_run"] = "dry_run"
    steps: Annotated[Count, Field(le=100)] = 10


class RateProbe(Part):
    """The same first steps at each of `rates`."""

    kind: Literal["lr_probe"] = "lr_probe"
    # Empty: around the rate that the spec comes to; a stored one holds them.
    rates: Annotated[tuple[LearningRate, ...], Field(max_length=12)] = ()
    steps: Annotated[int, Number, Field(ge=4, le=200)] = 20


class Certify(Part):
    """The same first steps in every layout."""

    kind: Literal["certify"] = "certify"
    # Further on, Adam turns the rounding of a gradient near 0 into a step of full size.
    steps: Annotated[Count, Field(le=5)] = 3


AnyTrial = DryRun | RateProbe | Certify
Trial = Annotated[AnyTrial, Discriminator("kind")]
KINDS: dict[str, type[DryRun] | type[RateProbe] | type[Certify]] = {
    "dry_run": DryRun,
    "lr_probe": RateProbe,
    "certify": Certify,
}
NAMES = {"dry_run": "dry run", "lr_probe": "rate probe", "certify": "certificate"}


def parse_trial(data: object, field: str = "trial") -> AnyTrial:
    """A mapping as JSON gives it. Raises UserError or UserErrors, whose fields stand below `field`."""
    if not isinstance(data, Mapping):
        raise UserError("spec.kind", field, value=type(data).__name__, expected="a mapping")
    kind = data.get("kind")
    model = KINDS.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise UserError("spec.choice", f"{field}.kind", value=str(kind)[:80], choices=", ".join(KINDS))
    unknown = next((str(key) for key in data if key not in model.model_fields), None)
    if unknown is not None:
        known = ", ".join(model.model_fields)
        raise UserError("trial.unknown_key", f"{field}.{unknown}", key=unknown, kind=str(kind), known=known)
    try:
        trial = model.model_validate(data)
    except ValidationError as error:
        faults = faults_of(error, model.model_fields)
        raise UserErrors(
            [UserError(each.code, f"{field}.{each.field}", **each.parameters) for each in faults]
        ) from error
    if isinstance(trial, RateProbe):
        twice = next((rate for rate in trial.rates if trial.rates.count(rate) > 1), None)
        if twice is not None:
            raise UserError("trial.rate_twice", f"{field}.rates", rate=rate_text(twice))
    return trial


def trial_name(trial: AnyTrial, job_name: str) -> str:
    return f"{NAMES[trial.kind]} of {job_name}"[:MOST_NAME_CHARACTERS]


def rates_around(learning_rate: float) -> tuple[float, ...]:
    """The rates to probe, to two digits, rising."""
    rates = (float(f"{learning_rate * factor:.1e}") for factor in PROBED_FACTORS)
    return tuple(sorted({min(LARGEST_LEARNING_RATE, rate) for rate in rates}))


def probe_schedule(learning_rate: float, steps: int) -> Schedule:
    """Up to the rate, and on at it."""
    warmup_steps = min(ceil_share(WARMUP_SHARE, steps), steps - 1)
    return Schedule(learning_rate, steps, warmup_steps, decay="constant", min_lr_ratio=0.0)


def has_diverged(first_loss: float, loss: float, grad_norm: float) -> bool:
    """Whether a rate has nothing more to tell. `first_loss` is that of its first step."""
    sound = math.isfinite(loss) and math.isfinite(grad_norm)
    return not sound or loss > DIVERGED_FACTOR * first_loss


# -- what a dry run says ---------------------------------------------------------------------------------------------


class DryStep(BaseModel):
    """A step of a dry run."""

    model_config = ConfigDict(frozen=True)

    loss: float | None
    step_s: float
    tokens: float
    memory_peak_bytes: float | None = None


class DryRunReport(BaseModel):
    """What the steps that were made say of the whole job."""

    model_config = ConfigDict(frozen=True)

    steps: int
    total_steps: int  # of the whole job
    seconds_per_step: float  # the median
    tokens_per_s: float
    seconds_in_all: float  # all steps of the job at this pace, without evaluations and checkpoints
    memory_peak_bytes: int | None
    planned_peak_bytes: int | None
    first_loss: float | None
    last_loss: float | None


def report_dry_run(made: Sequence[DryStep], total_steps: int, planned_peak_bytes: int | None) -> DryRunReport:
    """Times are of the steps behind the first UNSETTLED_STEPS, where there are any."""
    assert made
    settled = made[UNSETTLED_STEPS:] or made
    seconds_per_step = statistics.median(step.step_s for step in settled)
    peaks = [step.memory_peak_bytes for step in made if step.memory_peak_bytes is not None]
    return DryRunReport(
        steps=len(made),
        total_steps=total_steps,
        seconds_per_step=seconds_per_step,
        tokens_per_s=sum(step.tokens for step in settled) / sum(step.step_s for step in settled),
        seconds_in_all=total_steps * seconds_per_step,
        memory_peak_bytes=int(max(peaks)) if peaks else None,
        planned_peak_bytes=planned_peak_bytes,
        first_loss=made[0].loss,
        last_loss=made[-1].loss,
    )


# -- what a probe says -----------------------------------------------------------------------------------------------


class RateCurve(BaseModel):
    """What became of one rate."""

    model_config = ConfigDict(frozen=True)

    learning_rate: float
    losses: tuple[float | None, ...]  # of steps 1, 2, ...
    grad_norms: tuple[float | None, ...]
    has_diverged: bool = False  # at its last step

    def is_through(self, steps: int) -> bool:
        return self.has_diverged or len(self.losses) >= steps

    def last_losses(self) -> list[float]:
        """Those that are compared, of a rate that did not diverge."""
        losses = [loss for loss in self.losses if loss is not None]
        return losses[-ceil_share(LAST_SHARE, len(losses)) :]

    @property
    def last_loss(self) -> float | None:
        """Smoothed: the mean over the last LAST_SHARE of the steps. None where there is nothing to compare."""
        if self.has_diverged or not self.losses:
            return None
        return statistics.fmean(self.last_losses())


class Suggestion(BaseModel):
    model_config = ConfigDict(frozen=True)

    learning_rate: float
    is_settled: bool  # False: the best lies at or beyond what was tried, so probe again around `learning_rate`
    code: str
    parameters: dict[str, str | int | float]

    @property
    def why(self) -> Reason:
        return Reason(self.code, self.parameters)


def suggest(curves: Sequence[RateCurve]) -> Suggestion:
    """The rate with the lowest smoothed last loss among those that did not diverge; the smallest whose difference from
    it is within the noise, for a long run punishes a rate that is too large later than a few steps can show.

    All curves are through, and of equally many steps where they did not diverge."""
    tried = sorted(curves, key=lambda curve: curve.learning_rate)
    sound = [curve for curve in tried if not curve.has_diverged]
    smallest, largest = tried[0].learning_rate, tried[-1].learning_rate
    if not sound:
        lower = float(f"{smallest * LOWERED_FACTOR:.1e}")
        told: dict[str, str | int | float] = {"smallest": rate_text(smallest), "lower": rate_text(lower)}
        return Suggestion(learning_rate=lower, is_settled=False, code="trial.all_diverged", parameters=told)
    place = min(range(len(sound)), key=lambda number: statistics.fmean(sound[number].last_losses()))
    best = sound[place]
    while place > 0 and _are_alike(sound[place - 1], best):
        place -= 1
    taken = sound[place]
    if taken is not best:
        code = "trial.smaller_within_noise"
    elif best.learning_rate == largest:
        code = "trial.best_is_largest"
    elif best.learning_rate == smallest:
        code = "trial.best_is_smallest"
    else:
        code = "trial.best_lies_between"
    told = {
        "rate": rate_text(taken.learning_rate),
        "best": rate_text(best.learning_rate),
        "loss": f"{taken.last_loss:.4g}",
        "steps": len(best.last_losses()),
    }
    is_settled = code not in ("trial.best_is_largest", "trial.best_is_smallest")
    return Suggestion(learning_rate=taken.learning_rate, is_settled=is_settled, code=code, parameters=told)


def _are_alike(smaller: RateCurve, best: RateCurve) -> bool:
    """Pairwise, since both have seen the same samples in each step: what makes a step easy or hard falls out."""
    worse = [one - other for one, other in zip(smaller.last_losses(), best.last_losses(), strict=True)]
    if len(worse) < 2:
        return False
    return statistics.fmean(worse) <= NOISE_ERRORS * statistics.stdev(worse) / math.sqrt(len(worse))


def as_trial(stored: Mapping[str, Any] | None) -> AnyTrial | None:
    """As it stands with a job."""
    return None if stored is None else KINDS[stored["kind"]].model_validate(stored)
