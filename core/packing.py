"""Lengths in, layout out: which samples an optimizer step learns from, and how they lie in rows.

Two questions are kept apart. *Which samples make a step* is the optimisation: `plan_run` and `plan_epoch` answer it
from the seed alone. *How they lie in memory* is only cost: `lay_out` puts one step's samples into rows, micro-batches
and ranks, and neither loss nor gradient may notice. By samples or by tokens, the steps are therefore equal for every
mode, row length, micro-batch and number of ranks. By rows, the classic, a step is so many rows of an epoch that was
packed as a whole, and then the layout does decide which samples meet in a step; that is its nature, and why it is not
the default.

Packing is decreasing best fit, but decided on the histogram of lengths. Bins that hold the same lengths stay one group
with a count; a length that occurs n times is placed into groups in one stroke. What is decided depends on how many
lengths differ, not on how many samples there are; numpy then deals the samples out. The result is what
decreasing best fit gives sample by sample: a bin chosen as the fullest that still takes the length keeps being the
fullest until it can take no more of that length.

Everything here is pure. Draws come from PCG64 seeded by (seed, epoch), as raw 64-bit words whose stream numpy
guarantees for ever (it does not for `Generator.permutation`), so a job that resumes under a newer numpy finds its order
again. The preview in the form, the report and the trainer call these same functions.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from core.schedule import ceil_share

IntArray = npt.NDArray[np.int64]
Mode = Literal["packed", "padded"]
BatchBy = Literal["samples", "tokens", "rows"]
Row = tuple[int, ...]  # sample ids; () is a dummy row
MicroBatch = tuple[Row, ...]

BASELINE_BATCH = 8  # samples in a batch of the padded baseline that charts compare with
DUMMY_WIDTH = 1  # slots of the row without a trained token that a rank runs when it has nothing left to do

# In a layer of hidden size h a sample of l tokens costs 24 h^2 l FLOPs in matrix products and 2 h l^2 in causal
# attention: in proportion l (12 h + l). Work only balances ranks, so one h serves for all: that of a 1 B model.
LINEAR_WORK_PER_TOKEN = 12 * 2048


def as_lengths(lengths: Iterable[int]) -> IntArray:
    """Lengths in tokens, for callers that know no numpy."""
    return np.fromiter(lengths, dtype=np.int64)


# -- packing a set of lengths into rows ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Packs:
    """Rows side by side: row r holds the positions indices[offsets[r]:offsets[r + 1]] of the lengths given."""

    offsets: IntArray
    indices: IntArray
    capacity: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[IntArray]:
        for start, end in pairwise(self.offsets.tolist()):
            yield self.indices[start:end]

    def in_order(self, row_order: IntArray) -> "Packs":
        """The same rows, row_order[0] first."""
        sizes = np.diff(self.offsets)[row_order]
        offsets = _offsets(sizes)
        positions = np.arange(len(self.indices)) + np.repeat(self.offsets[:-1][row_order] - offsets[:-1], sizes)
        return replace(self, offsets=offsets, indices=self.indices[positions])


def best_fit(lengths: IntArray, capacity: int) -> Packs:
    """Decreasing best fit of samples into rows of `capacity` tokens. Samples of one length are dealt in the order in
    which they come, so a caller that shuffles them gets other neighbours.

    Raises UserError plan.sample_longer_than_row.
    """
    if len(lengths) == 0:
        return Packs(np.zeros(1, np.int64), np.zeros(0, np.int64), capacity)
    _refuse_longer(lengths, capacity)
    counts = np.bincount(lengths)
    values = np.flatnonzero(counts)
    groups = _pack_histogram(values.tolist(), counts[values].tolist(), capacity)
    return _deal(groups, _by_length(lengths, capacity), counts[values], capacity)


# The lengths in a group's bins, the last placed first: (index of the length, how many of it a bin takes, the rest).
_Content: TypeAlias = "tuple[int, int, _Content] | None"
_Group: TypeAlias = tuple[int, _Content]  # so many bins, each with this content


def _pack_histogram(values: list[int], counts: list[int], capacity: int) -> list[_Group]:
    """Groups of identical bins for lengths `values` (rising) that occur `counts` times."""
    full: list[_Group] = []
    open_by_space: dict[int, list[_Group]] = {}
    spaces: list[int] = []  # the keys of open_by_space, rising
    shortest = values[0]

    def put(space: int, num_bins: int, content: _Content) -> None:
        if space < shortest:
            full.append((num_bins, content))
        elif space in open_by_space:
            open_by_space[space].append((num_bins, content))
        else:
            open_by_space[space] = [(num_bins, content)]
            insort(spaces, space)

    for value_index in range(len(values) - 1, -1, -1):
        length, left = values[value_index], counts[value_index]
        while left:
            tightest = bisect_left(spaces, length)
            if tightest < len(spaces):
                space = spaces[tightest]
                num_bins, content = open_by_space[space].pop()
                if not open_by_space[space]:
                    del open_by_space[space], spaces[tightest]
                per_bin = space // length
            else:
                space, content = capacity, None
                per_bin = capacity // length
                num_bins = -(-left // per_bin)
            filled = min(num_bins, left // per_bin)
            if filled:
                put(space - per_bin * length, filled, (value_index, per_bin, content))
                num_bins -= filled
                left -= filled * per_bin
            if num_bins and left:  # the last of this length, too few to fill one more bin
                put(space - left * length, 1, (value_index, left, content))
                num_bins -= 1
                left = 0
            if num_bins:
                put(space, num_bins, content)
    return full + [group for groups in open_by_space.values() for group in groups]


def _deal(groups: list[_Group], samples: IntArray, counts: IntArray, capacity: int) -> Packs:
    """Hands out `samples` (sorted by length, counts[i] of the i-th) to the bins. One entry = the samples of one length
    in one group; all entries are dealt out at once."""
    next_of_value = _offsets(counts).tolist()
    entries: list[tuple[int, int, int, int, int]] = []  # samples, first sample, first place, per bin, stride
    bins_of_group, size_of_group = [], []
    base = 0
    for num_bins, content in groups:
        parts: list[tuple[int, int]] = []
        node = content
        while node is not None:
            value_index, per_bin, node = node
            parts.append((value_index, per_bin))
        parts.reverse()  # longest first in the row
        size = sum(per_bin for _, per_bin in parts)
        place = base
        for value_index, per_bin in parts:
            num_samples = num_bins * per_bin
            entries.append((num_samples, next_of_value[value_index], place, per_bin, size - per_bin))
            next_of_value[value_index] += num_samples
            place += per_bin
        bins_of_group.append(num_bins)
        size_of_group.append(size)
        base += num_bins * size
    assert base == len(samples), "every sample has one place"

    num_samples, first, place, per_bin, stride = np.array(entries, dtype=np.int64).T
    start = _offsets(num_samples)[:-1]
    running = np.arange(len(samples))
    nth = running - np.repeat(start, num_samples)  # the how manieth of its entry
    places = (
        np.repeat(place, num_samples) + nth + nth // np.repeat(per_bin, num_samples) * np.repeat(stride, num_samples)
    )
    indices = np.empty(len(samples), dtype=np.int64)
    indices[places] = samples[np.repeat(first - start, num_samples) + running]
    return Packs(_offsets(np.repeat(size_of_group, bins_of_group)), indices, capacity)


def _by_length(lengths: IntArray, capacity: int) -> IntArray:
    """Positions sorted by length, equal ones in their order. numpy sorts 16 bits by radix, about 8x faster than 64."""
    return np.argsort(lengths.astype(np.uint16) if capacity <= 0xFFFF else lengths, kind="stable")


def _offsets(sizes: npt.ArrayLike) -> IntArray:
    return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))


def _refuse_longer(lengths: IntArray, capacity: int) -> None:
    assert lengths.min(initial=1) >= 1, "a sample has at least one token"
    longest = int(lengths.max(initial=0))
    if longest > capacity:
        raise UserError("plan.sample_longer_than_row", "packing.row_length", length=longest, row_length=capacity)


def lower_bound(lengths: IntArray, capacity: int) -> int:
    """No packing needs fewer rows than this: L2 of Martello and Toth (1990). For each threshold k up to half a row:
    lengths over capacity - k share their row with none that is at least k; lengths over half a row don't share one
    with each other; what lies between k and half a row fills what those leave, and rows of its own after that."""
    _refuse_longer(lengths, capacity)
    histogram = np.bincount(lengths, minlength=capacity + 1)
    up_to = np.cumsum(histogram)
    tokens_up_to = np.cumsum(histogram * np.arange(capacity + 1))
    half = capacity // 2
    k = np.arange(half + 1)
    num_alone = up_to[capacity] - up_to[capacity - k]
    num_large = up_to[capacity - k] - up_to[half]
    large_tokens = tokens_up_to[capacity - k] - tokens_up_to[half]
    small_tokens = tokens_up_to[half] - np.where(k > 0, tokens_up_to[k - 1], 0)
    unplaced = small_tokens - (num_large * capacity - large_tokens)
    return int(np.max(num_alone + num_large + np.maximum(0, -(-unplaced // capacity))))


# -- which samples make a step ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleSet:
    """A data set's share of the samples: its ids follow those of the set before it. An epoch takes each of its
    samples floor(weight) times, and a fresh draw for the fraction, rounded up so that no set vanishes."""

    num_samples: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        assert self.num_samples >= 0 and self.weight > 0


@dataclass(frozen=True)
class PlanSettings:
    """What of a job decides its steps and their layout. `per_step` counts what `batch_by` names; lengths are tokens.
    Without `sets` every sample comes once an epoch."""

    mode: Mode
    row_length: int
    batch_by: BatchBy
    per_step: int
    micro_batch_size: int = 1
    num_ranks: int = 1
    sets: tuple[SampleSet, ...] = ()

    def __post_init__(self) -> None:
        assert min(self.row_length, self.per_step, self.micro_batch_size, self.num_ranks) >= 1

    @property
    def rows_are_planned(self) -> bool:
        """Whether an epoch's plan already says which samples share a row."""
        return self.mode == "packed" and self.batch_by == "rows"

    @property
    def redraws_sets(self) -> bool:
        """Whether two epochs may hold different samples."""
        return any(sample_set.weight % 1 for sample_set in self.sets)


@dataclass(frozen=True)
class Step:
    """One optimizer step: its samples in their order, and their rows where the plan fixes them (rows_per_step)."""

    epoch: int  # from 1
    index: int  # in its epoch, from 0
    steps_in_epoch: int
    sample_ids: tuple[int, ...]
    rows: tuple[Row, ...] | None = None

    @property
    def epochs_done(self) -> float:
        """Epochs that are behind once this step is done."""
        return self.epoch - 1 + (self.index + 1) / self.steps_in_epoch

    @property
    def ends_epoch(self) -> bool:
        return self.index + 1 == self.steps_in_epoch


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The steps of one epoch: step i holds order[step_offsets[i]:step_offsets[i + 1]]. `row_offsets` cuts the same
    order into rows where the plan fixes them; every step ends at the end of a row."""

    epoch: int
    order: IntArray
    step_offsets: IntArray
    row_offsets: IntArray | None = None

    def __len__(self) -> int:
        return len(self.step_offsets) - 1

    def __iter__(self) -> Iterator[Step]:
        return (self.step(index) for index in range(len(self)))

    def step(self, index: int) -> Step:
        start, end = int(self.step_offsets[index]), int(self.step_offsets[index + 1])
        sample_ids = tuple(self.order[start:end].tolist())
        rows: tuple[Row, ...] | None = None
        if self.row_offsets is not None:
            first, last = np.searchsorted(self.row_offsets, (start, end))
            cuts = (self.row_offsets[first : last + 1] - start).tolist()
            rows = tuple(sample_ids[a:b] for a, b in pairwise(cuts))
        return Step(self.epoch, index, len(self), sample_ids, rows)


def plan_epoch(lengths: IntArray, settings: PlanSettings, seed: int, epoch: int) -> EpochPlan:
    """The steps of epoch `epoch` (from 1), drawn from (seed, epoch) alone.

    Raises UserError plan.sample_longer_than_row.
    """
    assert seed >= 0 and epoch >= 1 and len(lengths) >= 1
    assert not settings.sets or sum(part.num_samples for part in settings.sets) == len(lengths)
    _refuse_longer(lengths, settings.row_length)
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch)))
    samples = _epoch_samples(len(lengths), settings, bits)
    order = samples[_shuffle(len(samples), bits)]
    if settings.rows_are_planned:
        packs = best_fit(lengths[order], settings.row_length)
        packs = packs.in_order(_shuffle(len(packs), bits))
        step_offsets = packs.offsets[_every(settings.per_step, len(packs))]
        return EpochPlan(epoch, order[packs.indices], step_offsets, packs.offsets)
    if settings.batch_by == "tokens":
        return EpochPlan(epoch, order, _cut_by_tokens(lengths[order], settings.per_step))
    return EpochPlan(epoch, order, _every(settings.per_step, len(order)))


def _epoch_samples(num_samples: int, settings: PlanSettings, bits: np.random.PCG64) -> IntArray:
    if not settings.sets:
        return np.arange(num_samples)
    drawn: list[IntArray] = []
    first = 0
    for part in settings.sets:
        members = np.arange(first, first + part.num_samples)
        drawn.extend([members] * int(part.weight))
        num_extra = ceil_share(part.weight, len(members)) - int(part.weight) * len(members)
        if num_extra:
            drawn.append(members[_shuffle(len(members), bits)[:num_extra]])
        first += part.num_samples
    return np.concatenate(drawn)


def _shuffle(count: int, bits: np.random.PCG64) -> IntArray:
    return np.argsort(bits.random_raw(count), kind="stable")


def _every(size: int, count: int) -> IntArray:
    """0, size, 2 size, ..., count: the borders of pieces of `size`, the last of which may be short."""
    return np.append(np.arange(0, count, size), count)


def _cut_by_tokens(lengths: IntArray, tokens_per_step: int) -> IntArray:
    """A step closes with the sample that brings it to tokens_per_step."""
    tokens_before = _offsets(lengths)
    borders = [0]
    while borders[-1] < len(lengths):
        reached = np.searchsorted(tokens_before, tokens_before[borders[-1]] + tokens_per_step)
        borders.append(min(int(reached), len(lengths)))
    return np.array(borders)


class RunPlan:
    """All optimizer steps of a run, counted from 1, and each of them on demand: a resumed run opens at its step
    without walking there. `epoch_plan` holds the epochs last asked for, never all."""

    def __init__(self, epoch_plan: Callable[[int], EpochPlan], steps_of_epoch: tuple[int, ...]) -> None:
        self.epoch_plan = epoch_plan
        self.steps_of_epoch = steps_of_epoch  # steps this run makes in each epoch; the last may be cut
        self.total_steps = sum(steps_of_epoch)
        self._first_step = [1, *(1 + np.cumsum(steps_of_epoch)).tolist()]

    @property
    def steps_per_epoch(self) -> int:
        """The whole first epoch's, also where the run ends within it."""
        return len(self.epoch_plan(1))

    def step_at(self, number: int) -> Step:
        """Optimizer step `number`, 1 to total_steps."""
        assert 1 <= number <= self.total_steps
        epoch = int(np.searchsorted(self._first_step, number, side="right"))
        return self.epoch_plan(epoch).step(number - self._first_step[epoch - 1])


def plan_run(
    lengths: IntArray, settings: PlanSettings, seed: int, epochs: float | None = None, max_steps: int | None = None
) -> RunPlan:
    """The run's steps, counted. Part of an epoch is that part of its steps, rounded up: 2.5 epochs end after
    ceil(half) of the third one's.

    Raises UserError plan.sample_longer_than_row.
    """
    assert (epochs is None) != (max_steps is None), "the spec keeps exactly one"
    epochs_differ = settings.batch_by == "tokens" or (settings.rows_are_planned and settings.redraws_sets)
    epoch_plan = lru_cache(maxsize=2)(partial(plan_epoch, lengths, settings, seed))
    first_count = len(epoch_plan(1))
    steps_of_epoch: list[int] = []
    num_steps = 0
    while True:
        epoch = len(steps_of_epoch) + 1
        count = len(epoch_plan(epoch)) if epochs_differ else first_count
        if max_steps is not None:
            left = max_steps - num_steps
            is_last = count >= left
            count = min(count, left)
        else:
            assert epochs is not None
            is_last = epochs <= epoch
            if is_last:
                count = ceil_share(epochs, count) - (epoch - 1) * count
        steps_of_epoch.append(count)
        num_steps += count
        if is_last:
            return RunPlan(epoch_plan, tuple(steps_of_epoch))


def sample_hash(sample_ids: Iterable[int]) -> str:
    """A step's samples in their order, in 16 hex digits: equal where a resumed run does what the first one did."""
    return hashlib.sha256(np.fromiter(sample_ids, dtype="<i8").tobytes()).hexdigest()[:16]


# -- how a step lies in memory ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepLayout:
    """What each rank runs: ranks[r] is a tuple of micro-batches, one forward pass each, of rows of sample ids. Every
    rank has equally many; () is the dummy row of a rank that has run out. `slots` are the positions that the passes
    compute: in a micro-batch every row is as wide as its longest."""

    ranks: tuple[tuple[MicroBatch, ...], ...]
    tokens: int
    slots: int
    rows: int  # without dummies

    @property
    def padding_efficiency(self) -> float:
        return self.tokens / self.slots


def lay_out(step: Step, lengths: IntArray, settings: PlanSettings) -> StepLayout:
    """Rows, micro-batches and ranks for one step. Packed by samples or tokens, the step's own samples are packed."""
    length_of = dict(zip(step.sample_ids, lengths[np.array(step.sample_ids)].tolist(), strict=True))
    if settings.mode == "padded":
        per_rank = _in_turn([(sample,) for sample in step.sample_ids], settings)
    elif step.rows is not None:
        per_rank = _deal_evenly(step.rows, length_of, settings.num_ranks, -(-len(step.rows) // settings.num_ranks))
    else:
        per_rank = _pack_over_ranks(step.sample_ids, length_of, settings)
    if settings.mode == "packed":  # rows of like width share a micro-batch
        per_rank = [sorted(rows, key=lambda row: -_tokens(row, length_of)) for rows in per_rank]
    size = settings.micro_batch_size
    cut = [[tuple(rows[at : at + size]) for at in range(0, len(rows), size)] for rows in per_rank]
    num_micro_batches = max(len(micro_batches) for micro_batches in cut)
    dummy: MicroBatch = ((),)
    ranks = tuple(tuple(passes + [dummy] * (num_micro_batches - len(passes))) for passes in cut)
    slots = sum(
        len(micro_batch) * max(_tokens(row, length_of) if row else DUMMY_WIDTH for row in micro_batch)
        for micro_batches in ranks
        for micro_batch in micro_batches
    )
    return StepLayout(ranks, _tokens(step.sample_ids, length_of), slots, sum(len(rows) for rows in per_rank))


def _in_turn(rows: Sequence[Row], settings: PlanSettings) -> list[list[Row]]:
    """Whole micro-batches in their order, to one rank after the other."""
    size = settings.micro_batch_size
    per_rank: list[list[Row]] = [[] for _ in range(settings.num_ranks)]
    for number, at in enumerate(range(0, len(rows), size)):
        per_rank[number % settings.num_ranks].extend(rows[at : at + size])
    return per_rank


def _pack_over_ranks(
    sample_ids: Sequence[int], length_of: Mapping[int, int], settings: PlanSettings
) -> list[list[Row]]:
    """As few rows a rank as packing the whole step needs. Samples are dealt by their work and packed rank by rank;
    where that takes a row more, whole rows are dealt. Then the heaviest rows are split until all ranks have equally
    many: that costs nothing, for attention never crossed their samples, and a dummy row would."""
    num_ranks = settings.num_ranks
    rows = _pack_rows(sample_ids, length_of, settings.row_length)
    if num_ranks == 1:
        return [rows]
    fewest = -(-len(rows) // num_ranks)
    dealt = _deal_evenly([(sample,) for sample in sample_ids], length_of, num_ranks, len(sample_ids))
    per_rank = [_pack_rows([sample for (sample,) in part], length_of, settings.row_length) for part in dealt]
    if max(len(part) for part in per_rank) > fewest:
        per_rank = _deal_evenly(rows, length_of, num_ranks, fewest)
    most = max(len(part) for part in per_rank)
    return [_split_rows(part, most, length_of) for part in per_rank]


def _pack_rows(sample_ids: Sequence[int], length_of: Mapping[int, int], row_length: int) -> list[Row]:
    packs = best_fit(np.array([length_of[sample] for sample in sample_ids], dtype=np.int64), row_length)
    return [tuple(sample_ids[position] for position in pack.tolist()) for pack in packs]


def _deal_evenly(rows: Sequence[Row], length_of: Mapping[int, int], num_ranks: int, most_rows: int) -> list[list[Row]]:
    """The heaviest row first, each to the rank with the least work, of those that hold fewer than `most_rows`."""
    per_rank: list[list[Row]] = [[] for _ in range(num_ranks)]
    work = [0] * num_ranks
    for row in sorted(rows, key=lambda row: -_work(row, length_of)):
        rank = min((rank for rank in range(num_ranks) if len(per_rank[rank]) < most_rows), key=lambda rank: work[rank])
        per_rank[rank].append(row)
        work[rank] += _work(row, length_of)
    return per_rank


def _split_rows(rows: list[Row], num_rows: int, length_of: Mapping[int, int]) -> list[Row]:
    """Halves the heaviest row until there are `num_rows`, or only rows of one sample."""
    rows = list(rows)
    while len(rows) < num_rows and any(len(row) > 1 for row in rows):
        heaviest = max((row for row in rows if len(row) > 1), key=lambda row: _work(row, length_of))
        rows.remove(heaviest)
        halves = _deal_evenly([(sample,) for sample in heaviest], length_of, 2, len(heaviest) - 1)
        rows += [tuple(sample for (sample,) in half) for half in halves]
    return rows


def _tokens(row: Row, length_of: Mapping[int, int]) -> int:
    return sum(length_of[sample] for sample in row)


def _work(row: Row, length_of: Mapping[int, int]) -> int:
    return sum(length_of[sample] * (LINEAR_WORK_PER_TOKEN + length_of[sample]) for sample in row)


# -- what it saves ---------------------------------------------------------------------------------------------------


def fill(tokens: int, rows: int, row_length: int) -> float:
    """How full the rows are. Dummies are no rows."""
    return tokens / (rows * row_length)


def padded_slots(sample_ids: Sequence[int], lengths: IntArray) -> int:
    """Slots of the baseline: the same samples in their order, BASELINE_BATCH to a batch, each padded to the longest."""
    step_lengths = lengths[np.array(sample_ids)]
    starts = np.arange(0, len(step_lengths), BASELINE_BATCH)
    sizes = np.diff(np.append(starts, len(step_lengths)))
    return int(np.maximum.reduceat(step_lengths, starts) @ sizes)


def padded_efficiency(sample_ids: Sequence[int], lengths: IntArray) -> float:
    return int(lengths[np.array(sample_ids)].sum()) / padded_slots(sample_ids, lengths)


@dataclass(frozen=True)
class ModeReport:
    """One mode's first epoch, summed over the steps that were laid out."""

    mode: Mode
    steps_per_epoch: int
    steps_laid_out: int  # fewer than steps_per_epoch: the figures below are an estimate from steps spread evenly
    rows: int
    tokens: int
    slots: int
    padded_slots: int  # of the baseline
    row_length: int

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
    """What packing saves on these samples, beside plain padding with everything else as it is."""

    packed: ModeReport
    padded: ModeReport
    all_padded_efficiency: float  # every sample of the epoch padded to max_length
    fewest_rows: int  # the lower bound of rows that the epoch's samples need, packed as one


def report(
    lengths: IntArray, settings: PlanSettings, seed: int, max_length: int, most_steps: int | None = None
) -> PackingReport:
    """Lays the first epoch out in both modes, as the trainer will; `most_steps` bounds the time this may take."""
    plan = plan_epoch(lengths, settings, seed, 1)
    epoch_lengths = lengths[plan.order]
    return PackingReport(
        packed=_report_mode("packed", lengths, settings, seed, most_steps),
        padded=_report_mode("padded", lengths, settings, seed, most_steps),
        all_padded_efficiency=int(epoch_lengths.sum()) / (len(epoch_lengths) * max_length),
        fewest_rows=lower_bound(epoch_lengths, settings.row_length),
    )


def _report_mode(
    mode: Mode, lengths: IntArray, settings: PlanSettings, seed: int, most_steps: int | None
) -> ModeReport:
    settings = replace(settings, mode=mode)
    plan = plan_epoch(lengths, settings, seed, 1)
    indices = range(len(plan))
    if most_steps is not None and most_steps < len(plan):
        indices = np.linspace(0, len(plan) - 1, most_steps).astype(int).tolist()
    rows = tokens = slots = baseline = 0
    for index in indices:
        step = plan.step(index)
        layout = lay_out(step, lengths, settings)
        rows += layout.rows
        tokens += layout.tokens
        slots += layout.slots
        baseline += padded_slots(step.sample_ids, lengths)
    return ModeReport(mode, len(plan), len(indices), rows, tokens, slots, baseline, settings.row_length)
