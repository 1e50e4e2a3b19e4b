"""One optimizer step in memory: its samples in rows, micro-batches and ranks; and what each way of doing it costs.

Neither loss nor gradient may notice any of it. Four modes:

  packed        samples side by side in rows of at most `row_length` tokens, rows of like width in one micro-batch
  padding_free  the samples of a micro-batch side by side in one row, however long it gets: no pad and no capacity
  padded        a sample a row; each micro-batch is as wide as its longest
  grouped       likewise, but of samples sorted by length, so that neighbours are about equally long

Every rank runs the same number of micro-batches, since at the end of each (or of each layer) it may have to wait for
the others. So work is dealt evenly, the heaviest first, and what costs nothing is split before a rank is left without:
a rank that has run out after all runs a dummy row without a trained token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TypeVar

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
    as_lengths,
    best_fit,
    fill,
    lower_bound,
    next_fit,
    plan_epoch,
)

MicroBatch = tuple[Row, ...]
Item = TypeVar("Item")

BASELINE_BATCH = 8  # samples in a batch of the padded baseline that charts compare with
DUMMY_WIDTH = 1  # slots of the row without a trained token that a rank runs when it has nothing left to do

# In a layer of hidden size h a sample of l tokens costs 24 h^2 l FLOPs in matrix products and 2 h l^2 in causal
# attention: in proportion l (12 h + l). Work only balances ranks, so one h serves for all: that of a 1 B model.
LINEAR_WORK_PER_TOKEN = 12 * 2048

# What is laid out of an epoch at most to know all of it; more is estimated from steps spread evenly.
MOST_STEPS = 1000
MOST_SAMPLES = 1 << 16
SHARE_OF_OTHERS = 8  # the ways that a job does not go get an eighth of that each


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
    num_ranks, size = settings.num_ranks, settings.micro_batch_size
    match settings.mode:
        case "packed":
            per_rank = [_cut_rows(rows, size) for rows in _packed_rows(step, settings)]
        case "padding_free":
            passes: list[MicroBatch] = [(part,) for part in _in_turn(step.segments, settings)]
            per_rank = _deal_evenly(passes, num_ranks, lambda micro_batch: _work(micro_batch[0]))
        case "padded":
            passes = [_one_a_row(part) for part in _in_turn(step.segments, settings)]
            per_rank = _deal_evenly(passes, num_ranks, _padded_work)
        case "grouped":
            by_length = sorted(step.segments, key=lambda segment: -segment.length)
            passes = [_one_a_row(part) for part in _in_turn(by_length, settings)]
            per_rank = _deal_evenly(passes, num_ranks, _padded_work)
    num_passes = max(len(micro_batches) for micro_batches in per_rank)
    dummy: MicroBatch = ((),)
    ranks = tuple((*micro_batches, *[dummy] * (num_passes - len(micro_batches))) for micro_batches in per_rank)
    return StepLayout(
        ranks,
        tokens=_tokens(step.segments),
        slots=sum(num_slots(micro_batch) for micro_batches in ranks for micro_batch in micro_batches),
        rows=sum(len(micro_batch) for micro_batches in per_rank for micro_batch in micro_batches),
    )


def lay_out_alone(step: Step) -> StepLayout:
    """Each segment in a row and a pass of its own, on one rank: what every other layout promises to equal."""
    passes = tuple(((segment,),) for segment in step.segments)
    tokens = _tokens(step.segments)
    return StepLayout((passes,), tokens=tokens, slots=tokens, rows=len(passes))


def lay_out_padded(step: Step) -> StepLayout:
    """The baseline: the samples in their order on one rank, BASELINE_BATCH to a pass."""
    borders = range(0, len(step.segments), BASELINE_BATCH)
    passes = tuple(_one_a_row(step.segments[at : at + BASELINE_BATCH]) for at in borders)
    slots = padded_slots(step.segments)
    return StepLayout((passes,), tokens=_tokens(step.segments), slots=slots, rows=len(step.segments))


def pad_pieces(num_slots: int, longest: int) -> list[int]:
    """A row's pad as segments of its own, none longer than the micro-batch's longest, so that it costs attention no
    more than samples do."""
    pieces = [longest] * (num_slots // longest)
    return [*pieces, num_slots % longest] if num_slots % longest else pieces


def num_slots(micro_batch: MicroBatch) -> int:
    """Positions that a forward pass computes."""
    return len(micro_batch) * max(_tokens(row) if row else DUMMY_WIDTH for row in micro_batch)


def _in_turn(segments: Sequence[Segment], settings: PlanSettings) -> list[Row]:
    """The segments in their order, at most micro_batch_size to a pass, and as many passes for every rank as there are
    segments for."""
    rounds = -(-len(segments) // (settings.micro_batch_size * settings.num_ranks))
    num_passes = min(len(segments), rounds * settings.num_ranks)
    borders = [-(-len(segments) * number // num_passes) for number in range(num_passes + 1)]
    return [tuple(segments[start:end]) for start, end in pairwise(borders)]


def _one_a_row(segments: Row) -> MicroBatch:
    return tuple((segment,) for segment in segments)


def _cut_rows(rows: Sequence[Row], size: int) -> list[MicroBatch]:
    """Rows of like width share a micro-batch."""
    by_width = sorted(rows, key=_tokens, reverse=True)
    return [tuple(by_width[at : at + size]) for at in range(0, len(by_width), size)]


def _packed_rows(step: Step, settings: PlanSettings) -> list[list[Row]]:
    """The rows of each rank: as few as packing the whole step needs. Samples are dealt by their work and packed rank by
    rank; where that takes a row more, whole rows are dealt. Then the heaviest rows are split until all ranks have
    equally many: that costs nothing, for attention never crossed their samples, and a dummy row would."""
    num_ranks = settings.num_ranks
    if step.rows is not None:
        return _deal_evenly(step.rows, num_ranks, _work)
    rows = _pack(step.segments, settings)
    if num_ranks == 1:
        return [rows]
    fewest = -(-len(rows) // num_ranks)
    places = range(len(step.segments))
    dealt = _deal_evenly(places, num_ranks, lambda place: _work((step.segments[place],)), most=len(places))
    per_rank = [_pack([step.segments[place] for place in sorted(part)], settings) for part in dealt]
    if max(len(part) for part in per_rank) > fewest:
        per_rank = _deal_evenly(rows, num_ranks, _work)
    most = max(len(part) for part in per_rank)
    return [_split_rows(part, most) for part in per_rank]


def _pack(segments: Sequence[Segment], settings: PlanSettings) -> list[Row]:
    pack = next_fit if settings.algorithm == "sequential" else best_fit
    packs = pack(as_lengths(segment.length for segment in segments), settings.row_length)
    return [tuple(segments[position] for position in row.tolist()) for row in packs]


def _deal_evenly(
    items: Sequence[Item], num_ranks: int, work: Callable[[Item], int], most: int | None = None
) -> list[list[Item]]:
    """The heaviest first, each to the rank with the least work, of those that hold fewer than `most` items (none given:
    as few as it takes). One rank gets all in their order."""
    if num_ranks == 1:
        return [list(items)]
    most = most or -(-len(items) // num_ranks)
    per_rank: list[list[Item]] = [[] for _ in range(num_ranks)]
    done = [0] * num_ranks
    for item in sorted(items, key=work, reverse=True):
        rank = min((rank for rank in range(num_ranks) if len(per_rank[rank]) < most), key=done.__getitem__)
        per_rank[rank].append(item)
        done[rank] += work(item)
    return per_rank


def _split_rows(rows: list[Row], num_rows: int) -> list[Row]:
    """Halves the heaviest row until there are `num_rows`, or only rows of one sample."""
    rows = list(rows)
    while len(rows) < num_rows and any(len(row) > 1 for row in rows):
        heaviest = max((row for row in rows if len(row) > 1), key=_work)
        rows.remove(heaviest)
        rows += map(tuple, _deal_evenly(heaviest, 2, lambda segment: _work((segment,)), most=len(heaviest) - 1))
    return rows


def _tokens(row: Sequence[Segment]) -> int:
    return sum(end - start for _, start, end in row)


def _work(row: Sequence[Segment]) -> int:
    return sum((end - start) * (LINEAR_WORK_PER_TOKEN + end - start) for _, start, end in row)


def _padded_work(micro_batch: MicroBatch) -> int:
    slots = num_slots(micro_batch)
    return slots * (LINEAR_WORK_PER_TOKEN + slots // len(micro_batch))


# -- what it saves ---------------------------------------------------------------------------------------------------


def padded_slots(segments: Sequence[Segment]) -> int:
    """Slots of the baseline: the same samples in their order, BASELINE_BATCH to a batch, each padded to the longest."""
    lengths = [end - start for _, start, end in segments]
    batches = (lengths[at : at + BASELINE_BATCH] for at in range(0, len(lengths), BASELINE_BATCH))
    return sum(len(batch) * max(batch) for batch in batches)


def padded_efficiency(segments: Sequence[Segment]) -> float:
    return _tokens(segments) / padded_slots(segments)


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
    count_flops: Callable[[StepLayout], int] | None = None,
    most_steps: int = MOST_STEPS,
    most_samples: int = MOST_SAMPLES,
) -> PackingReport:
    """Lays the first epoch out in every way, as the trainer would. Wrapped rows are left out where they can't be:
    without `count_targets`, or by anything but rows."""
    ways: list[tuple[Mode, Algorithm]] = [("packed", "best_fit"), ("packed", "sequential")]
    if settings.batch_by == "rows" and count_targets is not None:
        ways.append(("packed", "wrapped"))
    ways += [("padding_free", "best_fit"), ("grouped", "best_fit"), ("padded", "best_fit")]
    own = (settings.mode, settings.algorithm)
    assert own in ways
    plans: dict[Algorithm | None, EpochPlan] = {}
    reports: dict[tuple[Mode, Algorithm], WayReport] = {}
    for mode, algorithm in ways:
        way = replace(settings, mode=mode, algorithm=algorithm)
        key = algorithm if way.rows_are_planned else None
        plan = plans.get(key) or plans.setdefault(key, plan_epoch(lengths, way, seed, 1, count_targets))
        share = 1 if (mode, algorithm) == own else SHARE_OF_OTHERS
        indices = spread(plan, most_steps // share, most_samples // share)
        reports[mode, algorithm] = _report_way(plan, way, indices, partial(lay_out, settings=way), count_flops)
    whole = plans[None]
    few = spread(whole, most_steps // SHARE_OF_OTHERS, most_samples // SHARE_OF_OTHERS)
    padded = replace(settings, mode="padded", algorithm="best_fit")
    return PackingReport(
        mine=reports.pop(own),
        others=tuple(reports.values()),
        baseline=_report_way(whole, padded, few, lay_out_padded, count_flops),
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
    lay_out_step: Callable[[Step], StepLayout],
    count_flops: Callable[[StepLayout], int] | None,
) -> WayReport:
    rows = passes = tokens = slots = baseline = flops = 0
    for index in indices:
        step = plan.step(index)
        layout = lay_out_step(step)
        if count_flops is not None:
            flops += count_flops(layout)
        rows += layout.rows
        passes += len(layout.ranks[0])
        tokens += layout.tokens
        slots += layout.slots
        baseline += padded_slots(step.segments)

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
