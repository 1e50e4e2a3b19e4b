"""Where the samples of one optimizer step lie, decided by their lengths alone: rows, micro-batches and ranks of places,
a *place* being the how manieth sample of the step. core.layout gives them their samples.

Every rank runs the same number of micro-batches, since at the end of each (or of each layer) it may have to wait for
the others. So work is dealt evenly, the heaviest first, and what costs nothing is split before a rank is left without:
a rank that has run out after all runs a dummy row without a trained token.

A page lays out a thousand steps between two keystrokes, so everything here is small lists of whole numbers.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from core.packing import PlanSettings, best_fit, next_fit

Places = Sequence[int]  # of a row; none: the row of a dummy
Rows = Sequence[Places]  # of a micro-batch
DUMMY: Rows = ((),)
DUMMY_WIDTH = 1  # slots of the row without a trained token that a rank runs when it has nothing left to do

# In a layer of hidden size h a sample of l tokens costs 24 h^2 l FLOPs in matrix products and 2 h l^2 in causal
# attention: in proportion l (12 h + l). Work only balances ranks, so one h serves for all: that of a 1 B model.
LINEAR_WORK_PER_TOKEN = 12 * 2048

# Up to so many samples are packed one by one. Of instruction data that is 13 times as fast as by their histogram at 32
# samples, 4 times at 512 and as fast at 2,000.
FEW = 512


@dataclass(frozen=True)
class Arrangement:
    """`ranks[r]` are the micro-batches of rank r, one forward pass each; every rank has equally many."""

    ranks: Sequence[Sequence[Rows]]
    lengths: Sequence[int]  # tokens, of each place
    num_rows: int  # without dummies
    slots: int  # positions that the passes compute: in a micro-batch every row is as wide as its widest

    def passes(self) -> Iterator[list[list[int]]]:
        """Of all ranks: the lengths side by side in each row."""
        length_of = self.lengths.__getitem__
        for passes in self.ranks:
            for rows in passes:
                yield [list(map(length_of, row)) for row in rows]

    @property
    def has_pads(self) -> bool:
        """Or dummies."""
        return self.slots > sum(self.lengths)


def slots_of(rows: Sequence[Sequence[int]]) -> int:
    """Of a micro-batch, by the lengths in its rows."""
    return len(rows) * max(sum(row) if row else DUMMY_WIDTH for row in rows)


def arrange(lengths: Sequence[int], settings: PlanSettings, rows: Rows | None = None) -> Arrangement:
    """`rows` where an epoch's plan fixed them, in places. Packed by samples or tokens, the step's own are packed."""
    return _Step(lengths, settings).arrange(rows)


def arrange_padded(lengths: Sequence[int], batch: int) -> Arrangement:
    """The samples in their order on one rank, a row each, `batch` to a pass."""
    parts = [range(len(lengths))[at : at + batch] for at in range(0, len(lengths), batch)]
    ranks = ([[(place,) for place in part] for part in parts],)
    return Arrangement(ranks, lengths, len(lengths), padded_slots(lengths, batch))


def padded_slots(lengths: Sequence[int], batch: int) -> int:
    """Of these passes, each as wide as its longest sample."""
    parts = (lengths[at : at + batch] for at in range(0, len(lengths), batch))
    return sum(len(part) * max(part) for part in parts)


class _Step:
    def __init__(self, lengths: Sequence[int], settings: PlanSettings) -> None:
        self._lengths = lengths
        self._settings = settings
        self._work = [length * (LINEAR_WORK_PER_TOKEN + length) for length in lengths]

    def arrange(self, rows: Rows | None) -> Arrangement:
        per_rank, slots = self._passes_of_ranks(rows)
        num_passes = max(map(len, per_rank))
        num_dummies = sum(num_passes - len(passes) for passes in per_rank)
        return Arrangement(
            [[*passes, *[DUMMY] * (num_passes - len(passes))] for passes in per_rank],
            self._lengths,
            num_rows=sum(len(rows) for passes in per_rank for rows in passes),
            slots=slots + num_dummies * DUMMY_WIDTH,
        )

    def _passes_of_ranks(self, rows: Rows | None) -> tuple[list[list[Rows]], int]:
        """And their slots."""
        settings, places = self._settings, range(len(self._lengths))
        match settings.mode:
            case "packed":
                cut = [self._cut_rows(part) for part in self._packed_rows(rows)]
                return [passes for passes, _ in cut], sum(slots for _, slots in cut)
            case "padding_free":
                in_turn = self._in_turn(places)
                parts = deal_evenly([self._work_of(part) for part in in_turn], settings.num_ranks)
                return [[(in_turn[nth],) for nth in part] for part in parts], sum(self._lengths)
            case "grouped":
                places_by_length = sorted(places, key=self._lengths.__getitem__, reverse=True)
                return self._one_a_row(self._in_turn(places_by_length))
            case "padded":
                return self._one_a_row(self._in_turn(places))

    # -- a sample a row ----------------------------------------------------------------------------------------------
    def _in_turn(self, places: Places) -> list[Places]:
        """In their order, at most micro_batch_size to a pass, and as many passes for every rank as there are samples
        for."""
        settings = self._settings
        rounds = -(-len(places) // (settings.micro_batch_size * settings.num_ranks))
        num_passes = min(len(places), rounds * settings.num_ranks)
        borders = [-(-len(places) * number // num_passes) for number in range(num_passes + 1)]
        return [places[start:end] for start, end in pairwise(borders)]

    def _one_a_row(self, in_turn: list[Places]) -> tuple[list[list[Rows]], int]:
        passes: list[Rows] = [[(place,) for place in part] for part in in_turn]
        widths = [max(map(self._lengths.__getitem__, part)) for part in in_turn]
        slots = [len(part) * width for part, width in zip(in_turn, widths, strict=True)]
        work = [number * (LINEAR_WORK_PER_TOKEN + width) for number, width in zip(slots, widths, strict=True)]
        per_rank = [[passes[nth] for nth in part] for part in deal_evenly(work, self._settings.num_ranks)]
        return per_rank, sum(slots)

    # -- packed ------------------------------------------------------------------------------------------------------
    def _packed_rows(self, planned: Rows | None) -> list[list[Places]]:
        """The rows of each rank: as few as packing the whole step needs. Samples are dealt by their work and packed
        rank by rank; where that takes a row more, whole rows are dealt. Then the heaviest rows are split until all
        ranks have equally many: that costs nothing, for attention never crossed their samples, and a dummy row
        would."""
        num_ranks = self._settings.num_ranks
        if planned is not None:
            return self._deal_rows(planned)
        rows = self._pack(range(len(self._lengths)))
        if num_ranks == 1:
            return [rows]
        fewest = -(-len(rows) // num_ranks)
        dealt = deal_evenly(self._work, num_ranks, most=len(self._lengths))
        per_rank = [self._pack(sorted(part)) for part in dealt]
        if max(map(len, per_rank)) > fewest:
            per_rank = self._deal_rows(rows)
        most = max(map(len, per_rank))
        return [self._split_rows(part, most) for part in per_rank]

    def _pack(self, places: Places) -> list[Places]:
        lengths = [self._lengths[place] for place in places]
        packed = pack(lengths, self._settings.row_length, is_sequential=self._settings.algorithm == "sequential")
        return [[places[nth] for nth in row] for row in packed]

    def _deal_rows(self, rows: Rows) -> list[list[Places]]:
        parts = deal_evenly([self._work_of(row) for row in rows], self._settings.num_ranks)
        return [[rows[nth] for nth in part] for part in parts]

    def _split_rows(self, rows: list[Places], num_rows: int) -> list[Places]:
        """Halves the heaviest row until there are `num_rows`, or only rows of one sample."""
        rows = list(rows)
        while len(rows) < num_rows and any(len(row) > 1 for row in rows):
            heaviest = max((row for row in rows if len(row) > 1), key=self._work_of)
            rows.remove(heaviest)
            halves = deal_evenly([self._work[place] for place in heaviest], 2, most=len(heaviest) - 1)
            rows += [[heaviest[nth] for nth in half] for half in halves]
        return rows

    def _cut_rows(self, rows: Rows) -> tuple[list[Rows], int]:
        """Rows of like width share a micro-batch, whose first is its widest. And their slots."""
        size, length_of = self._settings.micro_batch_size, self._lengths.__getitem__
        widths = [sum(map(length_of, row)) for row in rows]
        order = sorted(range(len(rows)), key=widths.__getitem__, reverse=True)
        parts = [order[at : at + size] for at in range(0, len(order), size)]
        return [[rows[nth] for nth in part] for part in parts], sum(len(part) * widths[part[0]] for part in parts)

    def _work_of(self, places: Places) -> int:
        return sum(map(self._work.__getitem__, places))


def deal_evenly(work: Sequence[int], num_ranks: int, most: int | None = None) -> list[list[int]]:
    """Items by number. The heaviest first, each to the rank with the least work, of those that hold fewer than `most`
    items (none given: as few as it takes). One rank gets all in their order."""
    if num_ranks == 1:
        return [list(range(len(work)))]
    most = most or -(-len(work) // num_ranks)
    per_rank: list[list[int]] = [[] for _ in range(num_ranks)]
    open_ranks = [(0, rank) for rank in range(num_ranks)]  # a heap: of equal work the first
    for item in sorted(range(len(work)), key=work.__getitem__, reverse=True):
        done, rank = open_ranks[0]
        per_rank[rank].append(item)
        if len(per_rank[rank]) < most:
            heapq.heapreplace(open_ranks, (done + work[item], rank))
        else:
            heapq.heappop(open_ranks)
    return per_rank


def pack(lengths: Sequence[int], capacity: int, *, is_sequential: bool = False) -> list[list[int]]:
    """Rows of at most `capacity` tokens, by number: decreasing best fit, or one after another in their order.

    Raises UserError plan.sample_longer_than_row."""
    if len(lengths) <= FEW and max(lengths, default=0) <= capacity:
        return (_next_fit_of_few if is_sequential else _best_fit_of_few)(lengths, capacity)
    pack_many = next_fit if is_sequential else best_fit
    return [row.tolist() for row in pack_many(np.array(lengths, dtype=np.int64), capacity)]


def _next_fit_of_few(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """As core.packing.next_fit."""
    rows: list[list[int]] = []
    space = 0
    for number, length in enumerate(lengths):
        if length > space or not rows:
            rows.append([])
            space = capacity
        rows[-1].append(number)
        space -= length
    return rows


def _best_fit_of_few(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """As core.packing.best_fit, sample by sample: rows of the same widths."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # what is free in which row, the tightest first
    for number in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[number]
        tightest = bisect_left(spaces, (length, 0))
        if tightest < len(spaces):
            space, row = spaces.pop(tightest)
            rows[row].append(number)
        else:
            space, row = capacity, len(rows)
            rows.append([number])
        if space > length:
            insort(spaces, (space - length, row))
    return rows
