"""The packing report, for programs: ways, first row, lengths and balance of a preflight, and the cuts of a profile."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from core.layout import PackingReport, WayReport
from core.packing import Algorithm, Mode
from core.packing_report import LengthReport, RowReport


class Way(BaseModel):
    """One way to lay the first epoch out. Where it is not exact, rows, passes, slots and cost of a long epoch are
    estimated from steps spread evenly."""

    mode: Mode
    algorithm: Algorithm  # of packed rows
    steps_per_epoch: int
    rows: int
    passes: int  # forward passes of each rank
    tokens: int
    slots: int
    padding_efficiency: float
    padded_efficiency: float
    fill: float
    cuts: int
    targets_lost: int
    relative_cost: float  # of the baseline's, which is 1; `cost_basis` says in what
    is_exact: bool


CostBasis = Literal["flops", "slots"]


class RowSegment(BaseModel):
    """Tokens `start` to `end` of a sample, `targets` of which are learnt."""

    sample: int
    start: int
    end: int
    targets: int


class FirstRow(BaseModel):
    """Of step 1, on rank 0: segments side by side from position 0, then pads up to `width`."""

    width: int  # positions
    row_length: int | None  # its capacity; null where rows have none
    seen_share: float  # pairs of positions of one sample, of those that one sample as long as the row would have
    segments: list[RowSegment]
    pads: list[int]  # positions


class LengthBin(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    start: int  # tokens
    below: int
    samples: int
    trained_tokens: int


class Lengths(BaseModel):
    """The samples that have something to teach, before max_length drops, truncates or splits any."""

    model_config = ConfigDict(from_attributes=True)

    max_length: int  # tokens
    longest: int
    samples: int
    samples_beyond: int
    trained_tokens: int
    trained_tokens_beyond: int  # of the samples beyond, all theirs
    bins: list[LengthBin]


class Cut(BaseModel):
    """What is longer than max_length dropped, what is left packed by best fit into rows of that length."""

    model_config = ConfigDict(from_attributes=True)

    max_length: int  # tokens
    samples_beyond: int
    tokens_beyond: int
    trained_tokens_beyond: int
    kept_share: float  # of the trained tokens
    rows: int
    fill: float
    all_padded_efficiency: float  # were each padded to max_length instead


def ways_of(packing: PackingReport) -> list[Way]:
    return [way_of(packing, way) for way in packing.ways]


def way_of(packing: PackingReport, way: WayReport) -> Way:
    return Way(
        mode=way.mode,
        algorithm=way.algorithm,
        steps_per_epoch=way.steps_per_epoch,
        rows=way.rows,
        passes=way.passes,
        tokens=way.tokens,
        slots=way.slots,
        padding_efficiency=way.padding_efficiency,
        padded_efficiency=way.padded_efficiency,
        fill=way.fill,
        cuts=way.num_cuts,
        targets_lost=way.targets_lost,
        relative_cost=packing.relative_cost(way),
        is_exact=way.is_exact,
    )


def cost_basis(packing: PackingReport) -> CostBasis:
    return "slots" if packing.baseline.flops is None else "flops"


def row_of(row: RowReport) -> FirstRow:
    return FirstRow(
        width=row.width,
        row_length=row.row_length,
        seen_share=row.seen_share,
        segments=[
            RowSegment(sample=sample, start=start, end=end, targets=targets)
            for (sample, start, end), targets in zip(row.segments, row.targets, strict=True)
        ],
        pads=list(row.pads),
    )


def lengths_of(report: LengthReport) -> Lengths:
    return Lengths.model_validate(report)
