"""What was predicted of a job beside what it did: one number each."""

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from core.errors import N_
from core.events import RunTotals

Unit = Literal["count", "share", "bytes", "seconds"]

# By the name that report.json and the API give them; pages show the titles in this order.
TITLES: dict[str, tuple[str, Unit]] = {
    "steps": (N_("steps"), "count"),
    "steps_per_epoch": (N_("steps an epoch"), "count"),
    "rows": (N_("rows"), "count"),
    "slots": (N_("computed positions"), "count"),
    "padding_efficiency": (N_("padding efficiency"), "share"),
    "trained_tokens": (N_("trained tokens"), "count"),
    "memory_peak_bytes": (N_("peak memory of a device"), "bytes"),
    "steps_s": (N_("time of the steps"), "seconds"),
    "seconds": (N_("time in all"), "seconds"),
    "checkpoint_bytes": (N_("largest checkpoint"), "bytes"),
    "kept_bytes": (N_("kept checkpoints, at most"), "bytes"),
    "result_bytes": (N_("result"), "bytes"),
}


class Deviation(BaseModel):
    """None where nothing was predicted, or nothing is known yet."""

    model_config = ConfigDict(frozen=True)

    name: str  # of TITLES
    predicted: float | None
    actual: float | None

    @computed_field  # type: ignore[prop-decorator]  # pydantic documents it so
    @property
    def deviation(self) -> float | None:
        """0.02 where it came to 2 % more than was predicted."""
        if self.predicted is None or self.actual is None:
            return None
        if self.predicted == 0:
            return 0.0 if self.actual == 0 else None
        return self.actual / self.predicted - 1

    @property
    def title(self) -> str:
        return TITLES[self.name][0]

    @property
    def unit(self) -> Unit:
        return TITLES[self.name][1]


def of_steps(predicted: RunTotals | None, made: RunTotals) -> Iterator[Deviation]:
    """Of the steps that were made: like with like."""
    like = None if predicted is None else predicted.of_first(made.steps)
    for name in ("rows", "slots", "padding_efficiency", "trained_tokens"):
        yield Deviation(name=name, predicted=getattr(like, name, None), actual=getattr(made, name))
