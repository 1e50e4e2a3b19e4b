"""What share of its GPUs' peak (core.peaks) a step reaches: model FLOP/s utilisation."""

from dataclasses import dataclass

from core.architecture import Architecture
from core.flops import step_flops
from core.preflight import StepWork


@dataclass(frozen=True)
class Utilisation:
    shape: Architecture | None
    num_adapter_parameters: int | None  # None in a full fine-tune
    peak: float | None  # FLOP/s of one device
    num_ranks: int

    def of(self, work: StepWork, seconds: float) -> float | None:
        """0 to 1; None where sizes or peak are not known."""
        if self.peak is None or self.shape is None:
            return None
        flops = step_flops(
            self.shape,
            [segment.length for segment in work.segments],
            work.num_targets,
            num_adapter_parameters=self.num_adapter_parameters,
        )
        return None if flops is None else flops / (seconds * self.num_ranks * self.peak)
