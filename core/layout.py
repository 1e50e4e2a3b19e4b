"""One optimizer step in memory: its samples in rows, micro-batches and ranks; and what each way of doing it costs.

Neither loss nor gradient may notice any of it. Four modes:

  packed        samples side by side in rows of at most `row_length` tokens, rows of like width in one micro-batch
  padding_free  the samples of a micro-batch side by side in one row, however long it gets: no pad and no capacity
  padded        a sample a row; each micro-batch is as wide as its longest
  grouped       likewise, but of samples sorted by length, so that neighbours are about equally long

Where each lies is decided by core.arrangement.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from core.arrangement import DUMMY_WIDTH, Arrangement, arrange, arrange_padded, padded_slots
from core.packing import (
    Algorithm,
    CountTargets,
    EpochPlan,
    IntArray,
    Mode,
    PlanSettings,
    Row,
    Segment,
    Step,
    fill,
    lower_bound,
    plan_epoch,
)

MicroBatch = tuple[Row, ...]
# What the passes of a step compute.
CountFlops = Callable[[Arrangement], int]

BASELINE_BATCH = 8  # samples in a batch of the padded baseline that charts compare with

# Up to so many steps and samples all of an epoch is laid out. Of a longer one it is an eighth of that, spread evenly,
# and scaled by its tokens: within 3 % of the whole on 100,000 samples of instruction data.
MOST_STEPS = 1000
MOST_SAMPLES = 1 << 16
SHARE_OF_LONG_EPOCHS = 8
SHARE_OF_OTHERS = 16  # what each of the ways that a job does not go gets of the first


@dataclass(frozen=True)
class StepLayout:
    """What each rank runs: ranks[r] is a tuple of micro-batches, one forward pass each, of rows of segments. Every rank
    has equally many; () is the dummy row of a rank that has run out. `slots` are the positions that the passes
    compute: in a micro-batch every row is as wide as its longest."""

    ranks: tuple[tuple[MicroBatch, ...], ...]
    tokens: int
    slots: int
    rows: int  # without dummies

    @property
    def padding_efficiency(self) -> float:
        return self.tokens / self.slots

    @property
    def slots_of_ranks(self) -> tuple[int, ...]:
        return tuple(sum(map(num_slots, passes)) for passes in self.ranks)


def lay_out(step: Step, settings: PlanSettings) -> StepLayout:
    """Rows, micro-batches and ranks for one step. Packed by samples or tokens, the step's own samples are packed."""
    rows = None
    if step.rows is not None:
        borders = accumulate(map(len, step.rows), initial=0)
        rows = [range(start, end) for start, end in pairwise(borders)]
    return _of_segments(arrange([segment.length for segment in step.segments], settings, rows), step.segments)


def lay_out_alone(step: Step) -> StepLayout:
    """Each segment in a row and a pass of its own, on one rank: what every other layout promises to equal."""
    return _of_segments(arrange_padded([segment.length for segment in step.segments], 1), step.segments)


def _of_segments(arrangement: Arrangement, segments: Sequence[Segment]) -> StepLayout:
    def row_of(places: Sequence[int]) -> Row:
        return tuple(map(segments.__getitem__, places))

    return StepLayout(
        ranks=tuple(tuple(tuple(map(row_of, rows)) for rows in passes) for passes in arrangement.ranks),
        tokens=sum(arrangement.lengths),
        slots=arrangement.slots,
        rows=arrangement.num_rows,
    )


def pad_pieces(num_slots: int, longest: int) -> list[int]:
    """A row's pad as segments of its own, none longer than the micro-batch's longest, so that it costs attention no
    more than samples do."""
    pieces = [longest] * (num_slots // longest)
    return [*pieces, num_slots % longest] if num_slots % longest else pieces


def num_slots(micro_batch: MicroBatch) -> int:
    """Positions that a forward pass computes."""
    return len(micro_batch) * max(_tokens(row) if row else DUMMY_WIDTH for row in micro_batch)


def _tokens(row: Sequence[Segment]) -> int:
    return sum(end - start for _, start, end in row)


# -- what it saves ---------------------------------------------------------------------------------------------------


def padded_efficiency(segments: Sequence[Segment]) -> float:
    return _tokens(segments) / padded_slots([segment.length for segment in segments], BASELINE_BATCH)


@dataclass(frozen=True)
class WayReport:
    """One way to lay out the first epoch: a mode and, of packed rows, an algorithm."""

    mode: Mode
    algorithm: Algorithm
    steps_per_epoch: int
    steps_laid_out: int  # fewer than steps_per_epoch: rows, passes, slots, FLOPs are estimates from steps spread evenly
    rows: int
    passes: int  # forward passes of each rank
    tokens: int
    slots: int
    padded_slots: int  # of the baseline
    row_length: int
    num_cuts: int
    targets_lost: int
    rows_without_targets: int
    flops: int | None  # that the passes compute, pads included; None where the model's sizes are not known

    @property
    def is_exact(self) -> bool:
        return self.steps_laid_out == self.steps_per_epoch

    @property
    def padding_efficiency(self) -> float:
        return self.tokens / self.slots

    @property
    def padded_efficiency(self) -> float:
        return self.tokens / self.padded_slots

    @property
    def fill(self) -> float:
        return fill(self.tokens, self.rows, self.row_length)


@dataclass(frozen=True)
class PackingReport:
    """What each way to lay these samples out costs, with everything else as it is."""

    mine: WayReport
    others: tuple[WayReport, ...]
    baseline: WayReport  # plain padding, BASELINE_BATCH to a pass on one device, that all are compared with
    all_padded_efficiency: float  # every sample of the epoch padded to max_length
    fewest_rows: int  # the lower bound of rows that the epoch's samples need, packed as one

    @property
    def ways(self) -> tuple[WayReport, ...]:
        return (self.mine, *self.others)

    def with_matrices(self, flops_of_slot: int, flops_of_token: float) -> "PackingReport":
        """Where `flops` are those of attention alone: all of them. What a position takes in the matrices, pads too, and
        what each token takes in the head, depend on what is trained; where samples lie, and so what attention
        computes, does not."""

        def whole(way: WayReport) -> WayReport:
            assert way.flops is not None
            return replace(way, flops=way.flops + way.slots * flops_of_slot + round(way.tokens * flops_of_token))

        return replace(
            self, mine=whole(self.mine), others=tuple(map(whole, self.others)), baseline=whole(self.baseline)
        )

    def of(self, mode: Mode, algorithm: Algorithm = "best_fit") -> WayReport:
        return next(way for way in self.ways if (way.mode, way.algorithm) == (mode, algorithm))

    def relative_cost(self, way: WayReport) -> float:
        """Of an epoch, the baseline being 1: in FLOPs, or in slots where those are not known."""
        if way.flops is None or self.baseline.flops is None:
            return way.slots / self.baseline.slots
        return way.flops / self.baseline.flops


def report(
    lengths: IntArray,
    settings: PlanSettings,
    seed: int,
    max_length: int,
    count_targets: CountTargets | None = None,
    *,
    count_flops: CountFlops | None = None,
    own_plan: EpochPlan | None = None,
    most_steps: int = MOST_STEPS,
    most_samples: int = MOST_SAMPLES,
) -> PackingReport:
    """Lays the first epoch out in every way, as the trainer would. Wrapped rows are left out where they can't be:
    without `count_targets`, or by anything but rows. `own_plan` is the first epoch's by these settings, where that is
    known already."""
    ways: list[tuple[Mode, Algorithm]] = [("packed", "best_fit"), ("packed", "sequential")]
    if settings.batch_by == "rows" and count_targets is not None:
        ways.append(("packed", "wrapped"))
    ways += [("padding_free", "best_fit"), ("grouped", "best_fit"), ("padded", "best_fit")]
    own = (settings.mode, settings.algorithm)
    assert own in ways
    plans: dict[Algorithm | None, EpochPlan] = {}
    if own_plan is not None:
        plans[settings.algorithm if settings.rows_are_planned else None] = own_plan
    reports: dict[tuple[Mode, Algorithm], WayReport] = {}
    for mode, algorithm in ways:
        way = replace(settings, mode=mode, algorithm=algorithm)
        key = algorithm if way.rows_are_planned else None
        plan = plans.get(key) or plans.setdefault(key, plan_epoch(lengths, way, seed, 1, count_targets))
        share = SHARE_OF_OTHERS
        if (mode, algorithm) == own:
            is_long = len(plan) > most_steps or len(plan.order) > most_samples
            share = SHARE_OF_LONG_EPOCHS if is_long else 1
        indices = spread(plan, most_steps // share, most_samples // share)
        reports[mode, algorithm] = _report_way(plan, way, indices, count_flops)
    whole = plans[None]
    few = spread(whole, most_steps // SHARE_OF_OTHERS, most_samples // SHARE_OF_OTHERS)
    padded = replace(settings, mode="padded", algorithm="best_fit")
    return PackingReport(
        mine=reports.pop(own),
        others=tuple(reports.values()),
        baseline=_report_way(whole, padded, few, count_flops, is_baseline=True),
        all_padded_efficiency=whole.tokens / (len(whole.order) * max_length),
        fewest_rows=lower_bound(whole.ends, settings.row_length),
    )


def spread(plan: EpochPlan, most_steps: int = MOST_STEPS, most_samples: int = MOST_SAMPLES) -> list[int]:
    """So many of an epoch's steps, by index and evenly: all, where that is within the bounds."""
    num_steps = max(1, min(len(plan), most_steps, most_samples * len(plan) // len(plan.order)))
    return [number * (len(plan) - 1) // max(1, num_steps - 1) for number in range(num_steps)]


def _report_way(
    plan: EpochPlan,
    settings: PlanSettings,
    indices: Sequence[int],
    count_flops: CountFlops | None,
    *,
    is_baseline: bool = False,
) -> WayReport:
    rows = passes = tokens = slots = baseline = flops = 0
    for index in indices:
        lengths = plan.lengths_of(index)
        if is_baseline:
            arrangement = arrange_padded(lengths, BASELINE_BATCH)
        else:
            arrangement = arrange(lengths, settings, plan.rows_of(index))
        if count_flops is not None:
            flops += count_flops(arrangement)
        slots += arrangement.slots
        rows += arrangement.num_rows
        passes += len(arrangement.ranks[0])
        tokens += sum(lengths)
        baseline += padded_slots(lengths, BASELINE_BATCH)

    def of_epoch(laid_out: int) -> int:
        return round(laid_out * plan.tokens / tokens)

    return WayReport(
        mode=settings.mode,
        algorithm=settings.algorithm,
        steps_per_epoch=len(plan),
        steps_laid_out=len(indices),
        rows=of_epoch(rows) if plan.row_offsets is None else len(plan.row_offsets) - 1,
        passes=of_epoch(passes),
        tokens=plan.tokens,
        slots=of_epoch(slots),
        padded_slots=of_epoch(baseline),
        row_length=settings.row_length,
        num_cuts=plan.num_cuts,
        targets_lost=plan.targets_lost,
        rows_without_targets=plan.rows_without_targets,
        flops=None if count_flops is None else of_epoch(flops),
    )
