"""The packing report as the panel and a data set's page draw it: the table of ways, a row's mask, and lengths under a
limit.

Drawings are SVG in the units of their view boxes. Whatever a page shows of a limit is worked out for all limits on its
slider beforehand and sent along in words, so that its script only has to move a line and put texts in place.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from app.pages import format
from app.pages.environment import translate
from core.errors import N_
from core.layout import WayReport
from core.lengths import Cut, CutReport, LengthBin
from core.packing_report import LengthReport, RowReport, busiest_share, first_row, report_lengths
from core.preflight import JobPlan

WAY_TITLES: dict[tuple[str, str], str] = {
    ("padded", "best_fit"): N_("padded"),
    ("grouped", "best_fit"): N_("padded, grouped by length"),
    ("padding_free", "best_fit"): N_("padding-free"),
    ("packed", "sequential"): N_("packed in the samples' order"),
    ("packed", "best_fit"): N_("packed"),
    ("packed", "wrapped"): N_("packed, samples cut at row ends"),
}

ROW_SIDE = 320
MOST_SEGMENTS = 200  # of a row that are drawn
CHART_WIDTH, CHART_HEIGHT = 360, 120
MOST_TICKS = 6


@dataclass(frozen=True)
class ShownWay:
    title: str
    way: WayReport
    relative_cost: str
    is_mine: bool


@dataclass(frozen=True)
class Triangle:
    """What one segment's positions see: each itself and those before it."""

    path: str
    kind: str  # even | odd | pad
    title: str


@dataclass(frozen=True)
class RowDrawing:
    report: RowReport
    triangles: tuple[Triangle, ...]
    num_left_out: int
    whole: str  # what one sample as long as the row would see
    side: int = ROW_SIDE


@dataclass(frozen=True)
class LengthBar:
    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class LengthChart:
    """Samples by length, and where a limit cuts them. The axis is logarithmic and ends with the longest sample or the
    limit."""

    bars: tuple[LengthBar, ...]
    ticks: tuple[tuple[float, str], ...]
    most: int  # samples in the tallest bar
    start: int  # tokens
    end: int
    width: int = CHART_WIDTH
    height: int = CHART_HEIGHT
    left: int = 16
    right: int = CHART_WIDTH - 16
    top: int = 16
    bottom: int = CHART_HEIGHT - 16

    def x(self, length: int) -> float:
        share = math.log(max(length, self.start) / self.start) / math.log(self.end / self.start)
        return round(self.left + (self.right - self.left) * share, 1)


def packing_context(plan: JobPlan) -> dict[str, Any]:
    """What the panel shows of a job's packing."""
    packing, lengths = plan.packing, report_lengths(plan)
    share = busiest_share(plan)
    return {
        "ways": _ways(plan),
        "baseline": packing.baseline,
        "mine": packing.mine,
        "cost_in_flops": packing.baseline.flops is not None,
        "rows_make_steps": plan.settings.rows_are_planned,
        "share_of_padded": packing.mine.slots / packing.mine.padded_slots,
        "row": _draw_row(first_row(plan)),
        "lengths": lengths,
        "chart": _draw_lengths(lengths.bins, lengths.max_length),
        "beyond": _beyond(lengths),
        "busiest_share": share,
        "num_ranks": plan.settings.num_ranks,
    }


def _ways(plan: JobPlan) -> list[ShownWay]:
    packing = plan.packing
    found = {(way.mode, way.algorithm): way for way in packing.ways}
    return [
        ShownWay(
            translate(title),
            found[key],
            format.significant(packing.relative_cost(found[key]), 2),
            found[key] is packing.mine,
        )
        for key, title in WAY_TITLES.items()
        if key in found
    ]


def _draw_row(row: RowReport) -> RowDrawing:
    unit = ROW_SIDE / row.width
    triangles: list[Triangle] = []
    begin = 0

    def add(length: int, kind: str, title: str) -> None:
        nonlocal begin
        x, end = round(begin * unit, 1), round((begin + length) * unit, 1)
        triangles.append(Triangle(f"M{x:g} {x:g}V{end:g}H{end:g}Z", kind, title))
        begin += length

    shown = list(zip(row.segments, row.targets, strict=True))[:MOST_SEGMENTS]
    for number, (segment, targets) in enumerate(shown):
        said = translate(N_("sample %(sample)s: %(length)s tokens, %(trained)s of them trained")) % {
            "sample": format.exact(segment.sample),
            "length": format.exact(segment.length),
            "trained": format.exact(targets),
        }
        add(segment.length, "odd" if number % 2 else "even", said)
    num_left_out = len(row.segments) - len(shown)
    for length in () if num_left_out else row.pads[: MOST_SEGMENTS - len(shown)]:
        add(length, "pad", translate(N_("pad: %(length)s positions")) % {"length": format.exact(length)})
    return RowDrawing(row, tuple(triangles), num_left_out, f"M0 0V{ROW_SIDE}H{ROW_SIDE}Z")


def _draw_lengths(bins: Sequence[LengthBin], longest_limit: int) -> LengthChart:
    most = max(each.samples for each in bins)
    empty = LengthChart((), (), most, bins[0].start, max(bins[-1].below, longest_limit))
    powers = [2**exponent for exponent in range(empty.end.bit_length()) if empty.start <= 2**exponent]
    ticks = tuple((empty.x(power), format.exact(power)) for power in powers[:: -(-len(powers) // MOST_TICKS) or 1])
    return replace(empty, bars=tuple(_bars(empty, bins)), ticks=ticks)


def _bars(chart: LengthChart, bins: Sequence[LengthBin]) -> Iterator[LengthBar]:
    for each in bins:
        if not each.samples:
            continue
        # A single sample among thousands is still to be seen.
        height = max(1.0, round((chart.bottom - chart.top) * each.samples / chart.most, 1))
        x = chart.x(each.start)
        title = translate(N_("%(start)s to %(last)s tokens: %(samples)s samples, %(trained)s trained tokens")) % {
            "start": format.exact(each.start),
            "last": format.exact(each.below - 1),
            "samples": format.exact(each.samples),
            "trained": format.exact(each.trained_tokens),
        }
        width = max(0.8, round(chart.x(each.below) - x - 0.6, 1))
        yield LengthBar(x, round(chart.bottom - height, 1), width, height, title)


def _beyond(lengths: LengthReport) -> dict[str, str]:
    return {
        "samples": format.exact(lengths.samples_beyond),
        "of": format.exact(lengths.samples),
        "share": format.percent(lengths.samples_beyond / lengths.samples),
        "trained": format.exact(lengths.trained_tokens_beyond),
        "trained_share": format.percent(lengths.trained_tokens_beyond / lengths.trained_tokens),
    }


# -- a data set under one limit after the other ------------------------------------------------------------------------


@dataclass(frozen=True)
class CutTable:
    report: CutReport
    chart: LengthChart
    stops: tuple[dict[str, Any], ...]  # for each limit of the slider, what the page shows of it
    chosen: int  # which of them is shown at first


def draw_cuts(report: CutReport, asked: int | None) -> CutTable | None:
    """None where no sample has anything to teach. Shown first is what was asked for, else what `auto` takes."""
    if report.auto is None:
        return None
    limits = [cut.max_length for cut in report.cuts]
    chart = _draw_lengths(report.bins, limits[-1])
    stops = tuple(_stop(report, chart, cut) for cut in report.cuts)
    return CutTable(report, chart, stops, limits.index(report.auto if asked is None else asked))


def _stop(report: CutReport, chart: LengthChart, cut: Cut) -> dict[str, Any]:
    x = chart.x(cut.max_length)
    length = translate(N_("%(length)s tokens")) % {"length": format.exact(cut.max_length)}
    if cut.max_length == report.auto:
        length = translate(N_("%(length)s, as auto takes")) % {"length": length}
    return {
        "length": cut.max_length,
        "x": x,
        "beyond": round(chart.right - x, 1),
        "texts": {
            "max_length": length,
            "samples_beyond": f"{format.exact(cut.samples_beyond)} ({_share(cut.samples_beyond, report.samples)})",
            "tokens_beyond": f"{format.exact(cut.tokens_beyond)} ({_share(cut.tokens_beyond, report.tokens)})",
            "kept": format.percent(cut.kept_share),
            "rows": format.exact(cut.rows),
            "fill": format.percent(cut.fill) if cut.rows else format.DASH,
            "padded": format.percent(cut.all_padded_efficiency) if cut.samples else format.DASH,
        },
    }


def _share(part: int, whole: int) -> str:
    return format.percent(part / whole)
