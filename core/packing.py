"""Lengths in, steps out: how samples fill rows, and which of them an optimizer step learns from.

Two questions are kept apart. *Which samples make a step* is the optimisation: `plan_run` and `plan_epoch` answer it
from the seed alone. *How they lie in memory* is only cost (core.layout), and neither loss nor gradient may notice. By
samples or by tokens, the steps are therefore equal for every mode, row length, micro-batch and number of ranks. By
rows, the classic, a step is so many rows of an epoch that was packed as a whole, and then the rows do decide which
samples meet in a step; that is its nature, and why it is not the default.

Rows are filled in one of three ways. `best_fit` is decreasing best fit, but decided on the histogram of lengths. Bins
that hold the same lengths stay one group with a count; a length that occurs n times is placed into groups in one
stroke. What is decided depends on how many lengths differ, not on how many samples there are; numpy then deals the
samples out. The result is what decreasing best fit gives sample by sample: a bin chosen as the fullest that still takes
the length keeps being the fullest until it can take no more of that length. `next_fit` (sequential) keeps the order and
closes a row when the next sample doesn't fit. `wrap` (wrapped) fills every row to the brim and cuts samples to do so.

What is packed here are lengths; a *position* says the how manieth of them. What lies behind a position, a whole sample
or what was left of one, is core.selection's business.

Everything here is pure. Draws come from PCG64 seeded by (seed, epoch), as raw 64-bit words whose stream numpy
guarantees for ever (it does not for `Generator.permutation`), so a job that resumes under a newer numpy finds its order
again. The preview in the form, the report and the trainer call these same functions.
"""

import hashlib
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from core.schedule import ceil_share

IntArray = npt.NDArray[np.int64]
Mode = Literal["packed", "padding_free", "grouped", "padded"]
Algorithm = Literal["best_fit", "wrapped", "sequential"]
BatchBy = Literal["samples", "tokens", "rows"]
# (positions, starts, ends) -> how many targets each of these pieces has
CountTargets = Callable[[IntArray, IntArray, IntArray], IntArray]


class Segment(NamedTuple):
    """What lies in a row: tokens `start` to `end` (exclusive) of a sample, as a rule all of them. Its first token has
    nothing before it and so is never a target."""

    sample: int
    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


Row = tuple[Segment, ...]  # () is a dummy row


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


def count_rows(lengths: IntArray, capacity: int) -> int:
    """How many rows best_fit makes of them, without dealing the samples out."""
    if len(lengths) == 0:
        return 0
    _refuse_longer(lengths, capacity)
    counts = np.bincount(lengths)
    values = np.flatnonzero(counts)
    return sum(num_bins for num_bins, _ in _pack_histogram(values.tolist(), counts[values].tolist(), capacity))


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


def next_fit(lengths: IntArray, capacity: int) -> Packs:
    """Rows in the order of the samples; each closes when the next sample does not fit.

    Raises UserError plan.sample_longer_than_row.
    """
    _refuse_longer(lengths, capacity)
    tokens_before = _offsets(lengths).tolist()  # a list: bisecting an array makes an object at each look
    offsets = [0]
    while offsets[-1] < len(lengths):
        offsets.append(bisect_right(tokens_before, tokens_before[offsets[-1]] + capacity) - 1)
    return Packs(np.array(offsets, dtype=np.int64), np.arange(len(lengths)), capacity)


def wrap(lengths: IntArray, capacity: int) -> tuple[Packs, IntArray, IntArray]:
    """The samples one after another, cut into rows that are all full but the last. Beside the rows, in the order of
    their indices, start and end of each piece within its sample."""
    tokens_before = _offsets(lengths)
    row_borders = _every(capacity, int(tokens_before[-1]))
    # Two runs that rise, which a stable sort only merges.
    borders = np.sort(np.concatenate((tokens_before, row_borders)), kind="stable")
    borders = borders[np.append(True, borders[1:] > borders[:-1])]
    starts, ends = borders[:-1], borders[1:]
    indices = np.searchsorted(tokens_before, starts, side="right") - 1
    packs = Packs(np.searchsorted(borders, row_borders), indices, capacity)
    return packs, starts - tokens_before[indices], ends - tokens_before[indices]


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


def fill(tokens: int, rows: int, row_length: int) -> float:
    """How full the rows are. Dummies are no rows."""
    return tokens / (rows * row_length)


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
    algorithm: Algorithm = "best_fit"  # of packed rows

    def __post_init__(self) -> None:
        assert min(self.row_length, self.per_step, self.micro_batch_size, self.num_ranks) >= 1
        assert self.algorithm != "wrapped" or self.rows_are_planned, "it cuts across steps"

    @property
    def rows_are_planned(self) -> bool:
        """Whether an epoch's plan already says which samples share a row."""
        return self.mode == "packed" and self.batch_by == "rows"

    @property
    def redraws_sets(self) -> bool:
        """Whether two epochs may hold different samples."""
        return any(sample_set.weight % 1 for sample_set in self.sets)

    @property
    def epochs_differ_in_steps(self) -> bool:
        if self.rows_are_planned:  # best fit looks at the lengths alone, whatever their order
            return self.redraws_sets or self.algorithm != "best_fit"
        return self.batch_by == "tokens"


@dataclass(frozen=True)
class Step:
    """One optimizer step: what it learns from in its order, and in rows where the plan fixes them (rows_per_step).
    A segment's `sample` is a position among the lengths that were planned."""

    epoch: int  # from 1
    index: int  # in its epoch, from 0
    steps_in_epoch: int
    segments: tuple[Segment, ...]
    rows: tuple[Row, ...] | None = None

    @property
    def sample_ids(self) -> tuple[int, ...]:
        return tuple(segment.sample for segment in self.segments)

    @property
    def epochs_done(self) -> float:
        """Epochs that are behind once this step is done."""
        return self.epoch - 1 + (self.index + 1) / self.steps_in_epoch

    @property
    def ends_epoch(self) -> bool:
        return self.index + 1 == self.steps_in_epoch


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The steps of one epoch: step i holds order[step_offsets[i]:step_offsets[i + 1]], of each what lies between
    `starts` and `ends`. `row_offsets` cuts the same order into rows where the plan fixes them; every step ends at the
    end of a row."""

    epoch: int
    order: IntArray  # positions
    starts: IntArray
    ends: IntArray
    step_offsets: IntArray
    row_offsets: IntArray | None = None
    # What wrapped rows do to the samples:
    num_cuts: int = 0
    targets_lost: int = 0  # they came first in their piece, where nothing predicts them
    rows_without_targets: int = 0  # left out, for they teach nothing

    def __len__(self) -> int:
        return len(self.step_offsets) - 1

    def __iter__(self) -> Iterator[Step]:
        return (self.step(index) for index in range(len(self)))

    @property
    def tokens(self) -> int:
        return int((self.ends - self.starts).sum())

    def step(self, index: int) -> Step:
        start, end = int(self.step_offsets[index]), int(self.step_offsets[index + 1])
        columns = (column[start:end].tolist() for column in (self.order, self.starts, self.ends))
        segments = tuple(map(Segment, *columns))
        rows = self.rows_of(index)
        return Step(
            self.epoch,
            index,
            len(self),
            segments,
            None if rows is None else tuple(segments[row.start : row.stop] for row in rows),
        )

    def lengths_of(self, index: int) -> list[int]:
        """Of a step's segments, in tokens."""
        start, end = self.step_offsets[index : index + 2]
        lengths: list[int] = (self.ends[start:end] - self.starts[start:end]).tolist()
        return lengths

    def rows_of(self, index: int) -> list[range] | None:
        """Of a step, in numbers of its segments, where the plan fixes them."""
        if self.row_offsets is None:
            return None
        start, end = self.step_offsets[index : index + 2]
        first, last = np.searchsorted(self.row_offsets, (start, end))
        return [range(a, b) for a, b in pairwise((self.row_offsets[first : last + 1] - start).tolist())]


def plan_epoch(
    lengths: IntArray, settings: PlanSettings, seed: int, epoch: int, count_targets: CountTargets | None = None
) -> EpochPlan:
    """The steps of epoch `epoch` (from 1), drawn from (seed, epoch) alone. Wrapped rows need `count_targets`.

    Raises UserError plan.sample_longer_than_row, plan.wrapped_to_nothing.
    """
    assert seed >= 0 and epoch >= 1 and len(lengths) >= 1
    assert not settings.sets or sum(part.num_samples for part in settings.sets) == len(lengths)
    _refuse_longer(lengths, settings.row_length)
    order, state = _epoch_order(len(lengths), settings.sets, seed, epoch)
    in_order = lengths[order]
    if settings.rows_are_planned:
        if settings.algorithm == "wrapped":
            assert count_targets is not None
            return _plan_wrapped(order, in_order, settings, epoch, count_targets)
        if settings.algorithm == "sequential":
            packs = next_fit(in_order, settings.row_length)
        else:
            packs = best_fit(in_order, settings.row_length)
            bits = np.random.PCG64()
            bits.state = state
            packs = packs.in_order(_shuffle(len(packs), bits))
        order, in_order = order[packs.indices], in_order[packs.indices]
        step_offsets = packs.offsets[_every(settings.per_step, len(packs))]
        return EpochPlan(epoch, order, np.zeros_like(order), in_order, step_offsets, packs.offsets)
    if settings.batch_by == "tokens":
        step_offsets = _cut_by_tokens(in_order, settings.per_step)
    else:
        step_offsets = _every(settings.per_step, len(order))
    return EpochPlan(epoch, order, np.zeros_like(order), in_order, step_offsets)


def _plan_wrapped(
    order: IntArray, lengths: IntArray, settings: PlanSettings, epoch: int, count_targets: CountTargets
) -> EpochPlan:
    packs, starts, ends = wrap(lengths, settings.row_length)
    targets = count_targets(order[packs.indices], starts, ends)
    whole = int(count_targets(order, np.zeros_like(order), lengths).sum())
    teaches = np.add.reduceat(targets, packs.offsets[:-1]) > 0
    if not teaches.any():
        raise UserError("plan.wrapped_to_nothing", "packing.algorithm", row_length=settings.row_length)
    sizes = np.diff(packs.offsets)
    is_kept = np.repeat(teaches, sizes)
    row_offsets = _offsets(sizes[teaches])
    return EpochPlan(
        epoch,
        order=order[packs.indices[is_kept]],
        starts=starts[is_kept],
        ends=ends[is_kept],
        step_offsets=row_offsets[_every(settings.per_step, len(row_offsets) - 1)],
        row_offsets=row_offsets,
        num_cuts=len(packs.indices) - len(order),
        targets_lost=whole - int(targets.sum()),
        rows_without_targets=int((~teaches).sum()),
    )


@lru_cache(maxsize=2)  # a report plans one epoch in several ways
def _epoch_order(num_samples: int, sets: tuple[SampleSet, ...], seed: int, epoch: int) -> tuple[IntArray, Any]:
    """An epoch's samples as they are drawn, and the state of the generator behind that."""
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch)))
    samples = _epoch_samples(num_samples, sets, bits)
    order = samples[_shuffle(len(samples), bits)]
    order.setflags(write=False)
    return order, bits.state


def _epoch_samples(num_samples: int, sets: tuple[SampleSet, ...], bits: np.random.PCG64) -> IntArray:
    if not sets:
        return np.arange(num_samples)
    drawn: list[IntArray] = []
    first = 0
    for part in sets:
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
    tokens_before = _offsets(lengths).tolist()
    borders = [0]
    while borders[-1] < len(lengths):
        reached = bisect_left(tokens_before, tokens_before[borders[-1]] + tokens_per_step)
        borders.append(min(reached, len(lengths)))
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
    lengths: IntArray,
    settings: PlanSettings,
    seed: int,
    *,
    epochs: float | None = None,
    max_steps: int | None = None,
    count_targets: CountTargets | None = None,
) -> RunPlan:
    """The run's steps, counted. Part of an epoch is that part of its steps, rounded up: 2.5 epochs end after
    ceil(half) of the third one's. Where epochs differ in their steps each is planned once and only its count kept.

    Raises UserError plan.sample_longer_than_row, plan.wrapped_to_nothing.
    """
    assert (epochs is None) != (max_steps is None), "the spec keeps exactly one"
    epoch_plan = lru_cache(maxsize=2)(partial(plan_epoch, lengths, settings, seed, count_targets=count_targets))
    first_count = len(epoch_plan(1))
    steps_of_epoch: list[int] = []
    num_steps = 0
    while True:
        epoch = len(steps_of_epoch) + 1
        count = len(epoch_plan(epoch)) if settings.epochs_differ_in_steps else first_count
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
