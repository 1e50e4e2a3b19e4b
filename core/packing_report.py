"""What a person is shown of a job's packing beside its numbers, all taken from the plan that the trainer runs: a row as
it will be computed, how evenly ranks share the work, and the lengths that `data.max_length` cuts."""

from dataclasses import dataclass

from core.layout import num_slots, pad_pieces
from core.lengths import LengthBin, bin_lengths
from core.packing import Segment
from core.preflight import JobPlan

STEPS_OF_BALANCE = 10  # the first ones of a run


@dataclass(frozen=True)
class RowReport:
    """A row of a micro-batch: its segments from position 0, then a pad up to `width`."""

    segments: tuple[Segment, ...]
    targets: tuple[int, ...]
    pads: tuple[int, ...]  # the pad in pieces, as attention takes it
    width: int  # positions that are computed
    row_length: int | None  # its capacity; None where rows have none

    @property
    def seen_share(self) -> float:
        """Pairs of positions of one sample, of those that one sample as long as the row would have."""
        pairs = sum(segment.length * (segment.length + 1) for segment in self.segments)
        return pairs / (self.width * (self.width + 1))


def first_row(plan: JobPlan) -> RowReport:
    """The first row of the first pass of step 1, on rank 0."""
    work = plan.step(1)
    micro_batch = work.layout.ranks[0][0]
    row = micro_batch[0]
    assert row, "a rank's first pass is no dummy"
    width = num_slots(micro_batch) // len(micro_batch)
    longest = max(segment.length for other in micro_batch for segment in other)
    return RowReport(
        segments=row,
        targets=tuple(work.targets[segment] for segment in row),
        pads=tuple(pad_pieces(width - sum(segment.length for segment in row), longest)),
        width=width,
        row_length=plan.settings.row_length if plan.settings.mode == "packed" else None,
    )


def busiest_share(plan: JobPlan) -> float | None:
    """The positions that the busiest rank computes in the first steps, of all: each step waits for its own busiest.
    None with a single rank."""
    if plan.settings.num_ranks == 1:
        return None
    layouts = [plan.step(number).layout for number in range(1, min(plan.total_steps, STEPS_OF_BALANCE) + 1)]
    return sum(max(layout.slots_of_ranks) for layout in layouts) / sum(layout.slots for layout in layouts)


@dataclass(frozen=True)
class LengthReport:
    """The samples that have something to teach, before `max_length` drops, truncates or splits any."""

    max_length: int  # tokens
    longest: int
    samples: int
    samples_beyond: int
    trained_tokens: int
    trained_tokens_beyond: int  # of samples that are longer, all theirs
    bins: tuple[LengthBin, ...]


def report_lengths(plan: JobPlan) -> LengthReport:
    selection = plan.selection
    lengths = selection.samples.lengths[selection.teaching]
    trained = selection.samples.trained[selection.teaching]
    is_beyond = lengths > selection.max_length
    return LengthReport(
        max_length=selection.max_length,
        longest=int(lengths.max()),
        samples=len(lengths),
        samples_beyond=int(is_beyond.sum()),
        trained_tokens=int(trained.sum()),
        trained_tokens_beyond=int(trained[is_beyond].sum()),
        bins=bin_lengths(lengths, trained),
    )
