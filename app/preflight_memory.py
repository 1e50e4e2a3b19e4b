"""The memory plan, for programs: the `memory` of a preflight."""

from pydantic import BaseModel

from core.memory import Offload, Term
from core.memory_report import AttentionPath, MemoryReport, Way
from core.placement import Stage


class MemoryWay(BaseModel):
    """One way to lay the job out. Bytes are of one device; those of `host_bytes` lie in CPU memory, for each rank."""

    zero_stage: Stage
    offload: Offload
    gradient_checkpointing: bool
    is_chosen: bool
    fits: bool
    why_not: str | None  # the job cannot run in this way; then there are no bytes
    total_bytes: int | None
    host_bytes: int | None
    terms: dict[Term, int] | None  # bytes; they add up to the total


class Memory(BaseModel):
    """An estimate of each device's peak: docs/memory.md."""

    device: str
    device_bytes: int  # for one rank: those on a CPU share its memory
    usable_bytes: int  # what fits stays under this
    ranks: int
    unknown: str | None  # why there is no plan; then all that follows is empty or null
    planned_peak_bytes: int | None  # to hold against the steps' memory_peak_bytes
    fits_from: Stage | None  # the lowest ZeRO stage that fits without offload, with the chosen checkpointing
    largest_micro_batch_size: int | None  # that fits in the chosen way; 0: not even 1
    most_rows: int | None  # that a step can have on a device: no larger micro-batch was tried
    largest_max_length: int | None  # likewise, of samples and rows, in tokens; 0: not even 64
    context_length: int | None  # tokens, the model's: no longer one was tried
    attention_bytes: dict[AttentionPath, int]  # in all, of the chosen way by each path that attention may take
    ways: list[MemoryWay]


def memory_of(report: MemoryReport) -> Memory:
    chosen = report.chosen
    limits = None if chosen is None or chosen.plan is None else report
    return Memory(
        device=report.device.name,
        device_bytes=report.available_bytes,
        usable_bytes=report.usable_bytes,
        ranks=report.num_ranks,
        unknown=None if report.unknown is None else report.unknown.text(),
        planned_peak_bytes=report.planned_peak_bytes,
        fits_from=None if chosen is None else report.fits_from,
        largest_micro_batch_size=limits and limits.largest_micro_batch_size,
        most_rows=limits and limits.most_rows,
        largest_max_length=limits and limits.largest_max_length,
        context_length=limits and limits.context_length,
        attention_bytes={path: plan.total for path, plan in report.by_attention.items()},
        ways=[_way(way) for way in report.ways],
    )


def _way(way: Way) -> MemoryWay:
    plan = way.plan
    return MemoryWay(
        zero_stage=way.zero_stage,
        offload=way.offload,
        gradient_checkpointing=way.gradient_checkpointing,
        is_chosen=way.is_chosen,
        fits=way.fits,
        why_not=None if way.why_not is None else way.why_not.text(),
        total_bytes=None if plan is None else plan.total,
        host_bytes=None if plan is None else plan.host_bytes,
        terms=None if plan is None else plan.terms,
    )
