"""A job that ran, as far as it says something of the next one; and how far forecasts of such were off."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict

Basis = Literal["history", "trial", "formula"]

STEPS_NEEDED = 20  # of a run that did not end well: fewer say more of its start than of its pace


class Likeness(BaseModel):
    """What two runs have in common where work per second may be compared."""

    model_config = ConfigDict(frozen=True)

    device: str  # by its name
    num_ranks: int
    model: str
    method: str
    attention: str  # dense | by_sample
    dtype: str
    recomputes: bool
    zero_stage: int
    offload: str


def attention_class(attention: str) -> str:
    return "dense" if attention in ("sdpa", "eager") else "by_sample"


class PastRun(BaseModel):
    """What a job that ended, or runs, says of the next one."""

    model_config = ConfigDict(frozen=True)

    job: str
    host: str
    likeness: Likeness
    packing: str  # its mode
    is_trial: bool
    has_succeeded: bool
    steps: int
    step_s: float  # in all of them
    slots: int
    flops: float | None
    startup_s: float | None
    seconds: float | None  # from start to end, of one that succeeded in one go
    # As it was forecast; None where it was not.
    basis: Basis | None = None
    planned_s: float | None = None
    told_s: float | None = None  # with what had been learned
    memory_ratio: float | None = None  # the peak over its plan

    @property
    def tells_pace(self) -> bool:
        return self.step_s > 0 and (self.is_trial or self.has_succeeded or self.steps >= STEPS_NEEDED)

    @property
    def time_ratio(self) -> float | None:
        """What it took over what was told."""
        return None if not self.told_s or self.seconds is None else self.seconds / self.told_s


@dataclass(frozen=True)
class Accuracy:
    """How far forecasts of a host were off: what came over what was told."""

    num_jobs: int
    usual: float  # the median
    worst: float  # the one that is farthest off, to either side


def accuracy(ratios: Sequence[float]) -> Accuracy | None:
    """None without any."""
    if not ratios:
        return None
    return Accuracy(len(ratios), median(ratios), max(ratios, key=lambda ratio: max(ratio, 1 / ratio)))
