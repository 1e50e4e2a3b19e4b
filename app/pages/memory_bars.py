"""The memory plan as stacked bars: one for each way to lay the job out, against the size of its device.

All bars share one scale, in thousandths of its width. It ends at twice the device at most: past that a bar only says
that it is far too large, which its number says better, and the others would shrink to nothing beside it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from app.pages import format
from app.pages.environment import translate
from core.errors import N_, Reason
from core.memory import TERM_FORMULAS, TERM_TITLES, MemoryPlan, Offload, Term
from core.memory_report import AttentionPath, MemoryReport, Way
from core.placement import USABLE_SHARE

WIDTH = 1000
MOST_DEVICES = 2.0  # of the scale
ROOM = 1.04  # so that the device's line does not lie on the edge
GAP = 3  # between pieces that are wide enough to spare it

OFFLOAD_TITLES: dict[Offload, str] = {
    "optimizer": N_("optimizer states in CPU memory"),
    "optimizer_and_params": N_("optimizer states and weights in CPU memory"),
}


@dataclass(frozen=True)
class Piece:
    term: Term
    x: float
    width: float
    title: str


@dataclass(frozen=True)
class Bar:
    title: str
    note: str  # of offload
    recomputes: bool
    is_chosen: bool
    fits: bool
    why_not: Reason | None  # it cannot run: then there is nothing below
    total: int
    host_bytes: int
    terms: dict[Term, int]
    pieces: tuple[Piece, ...]
    label: str  # as it is read aloud


@dataclass(frozen=True)
class AttentionBar:
    """The chosen way with another path of attention."""

    path: AttentionPath
    is_planned: bool
    total: int
    fits: bool
    ratio: float  # to the least of them


@dataclass(frozen=True)
class Chart:
    report: MemoryReport
    recomputes: bool
    bars: tuple[Bar, ...]  # with the chosen checkpointing
    others: tuple[Bar, ...]  # with the other one
    terms: tuple[tuple[Term, str], ...]  # that any bar has, in the order of the stack
    formulas: tuple[tuple[str, str], ...]  # of every term there is: its title, how it is worked out
    paths: tuple[AttentionBar, ...]  # of the chosen way
    device_x: float
    usable_x: float
    is_cut: bool  # a bar is longer than the scale
    width: int = WIDTH

    @property
    def usable_percent(self) -> int:
        return round(100 * USABLE_SHARE)


def draw_memory(report: MemoryReport) -> Chart | None:
    """None where the model's sizes are not known."""
    if report.chosen is None:
        return None
    plans = [way.plan for way in report.ways if way.plan is not None]
    largest = max((plan.total for plan in plans), default=0)
    scale = ROOM * min(max(largest, report.available_bytes), MOST_DEVICES * report.available_bytes)
    recomputes = report.chosen.gradient_checkpointing

    def bars(recomputes: bool) -> tuple[Bar, ...]:
        return tuple(_bar(report, way, scale) for way in report.ways if way.gradient_checkpointing == recomputes)

    return Chart(
        report=report,
        recomputes=recomputes,
        bars=bars(recomputes),
        others=bars(not recomputes),
        terms=tuple(_titles(plans)),
        formulas=tuple((translate(TERM_TITLES[term]), translate(said)) for term, said in TERM_FORMULAS.items()),
        paths=tuple(_paths(report)),
        device_x=_x(report.available_bytes, scale),
        usable_x=_x(report.usable_bytes, scale),
        is_cut=largest > scale,
    )


def _paths(report: MemoryReport) -> Iterator[AttentionBar]:
    least = min((plan.total for plan in report.by_attention.values()), default=0)
    for path, plan in report.by_attention.items():
        fits = plan.total <= report.usable_bytes
        yield AttentionBar(path, path == report.attention, plan.total, fits, plan.total / least)


def _titles(plans: list[MemoryPlan]) -> Iterable[tuple[Term, str]]:
    return ((term, translate(title)) for term, title in TERM_TITLES.items() if any(plan.terms[term] for plan in plans))


def _x(num_bytes: float, scale: float) -> float:
    return round(WIDTH * min(1.0, num_bytes / scale), 1)


def _bar(report: MemoryReport, way: Way, scale: float) -> Bar:
    if report.num_ranks > 1:
        title = f"ZeRO-{way.zero_stage}"
    else:
        title = translate(N_("no offload") if way.offload == "none" else N_("offload"))
    note = translate(OFFLOAD_TITLES[way.offload]) if way.offload != "none" else ""
    if way.plan is None:
        return Bar(title, note, way.gradient_checkpointing, way.is_chosen, False, way.why_not, 0, 0, {}, (), "")
    pieces: list[Piece] = []
    begin = 0
    for term, num_bytes in way.plan.terms.items():
        x, end = _x(begin, scale), _x(begin + num_bytes, scale)
        if end > x:
            said = f"{translate(TERM_TITLES[term])}: {format.size(num_bytes)}"
            width = end - x
            pieces.append(Piece(term, x, round(width - GAP if width > 3 * GAP else width, 1), said))
        begin += num_bytes
    parts = "; ".join(piece.title for piece in pieces)
    return Bar(
        title=title,
        note=note,
        recomputes=way.gradient_checkpointing,
        is_chosen=way.is_chosen,
        fits=way.fits,
        why_not=None,
        total=way.plan.total,
        host_bytes=way.plan.host_bytes,
        terms=way.plan.terms,
        pieces=tuple(pieces),
        label=f"{title}: {format.size(way.plan.total)} / {format.size(report.available_bytes)}. {parts}",
    )
