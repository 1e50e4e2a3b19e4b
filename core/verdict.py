"""What a person should know before they launch a job that can run: each remark with its number, and what mends it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from core.errors import Parameter, Reason
from core.fix import WARMUPS, Fix, Value, default_warmup, longer_samples
from core.memory_report import LENGTH_STEP
from core.placement import PLACED_FIELDS, fits_somehow, size
from core.preflight import JobPlan

Level = Literal["warning", "info"]

# A warm-up of more than this share of a run leaves most of it below the peak.
MOST_WARMUP = 0.5

# what is counted, of what, the field that decides it
_COUNTED: tuple[tuple[Level, str, str, str], ...] = (
    ("warning", "rows_refused", "rows", "data.train"),
    ("warning", "samples_too_long", "samples", "data.max_length"),
    ("warning", "samples_without_trained_tokens", "samples", "data.train_on"),
    ("warning", "samples_cut_to_nothing", "samples", "data.overlong"),
    ("warning", "samples_truncated", "samples", "data.overlong"),
    ("info", "samples_split", "samples", "data.overlong"),
    ("warning", "targets_lost", "targets", "data.overlong"),
    ("warning", "targets_lost_at_row_ends", "targets", "packing.algorithm"),
    ("info", "rows_beyond_max_samples", "rows", "data.max_samples"),
    ("info", "rows_held_out", "rows", "data.validation"),
)


@dataclass(frozen=True)
class Remark:
    level: Level
    field: str
    said: Reason
    fixes: tuple[Fix, ...] = ()  # any one of them


def verdict(plan: JobPlan) -> Iterator[Remark]:
    """Empty: nothing to remark."""
    counts = plan.all_counts
    for level, key, total, field in _COUNTED:
        if counts.get(key):
            said = Reason(f"verdict.{key}", {"count": counts[key], "total": counts[total]})
            yield Remark(level, field, said, _fixes(plan, key))
    dropped = dropped_calls(counts)
    if dropped is not None:
        yield Remark("warning", "model.chat_template", dropped, ({"model.chat_template": "chatml"},))
    yield from _of_overlap(plan)
    yield from _of_room_for_longer(plan)
    yield from _of_warmup(plan)
    yield from _of_device(plan)
    yield from _of_memory(plan)
    saved = saved_by_whole(counts)
    if saved is not None:
        yield Remark("info", "data.multi_turn", saved)


def saved_by_whole(counts: Mapping[str, int]) -> Reason | None:
    """What whole conversations spare, where that is known and something."""
    whole, split = counts.get("tokens_if_whole", 0), counts.get("tokens_if_split", 0)
    if split <= whole:
        return None
    return Reason("verdict.whole_saves", {"whole": whole, "split": split, "ratio": f"{split / whole:.2f}"})


def dropped_calls(counts: Mapping[str, int]) -> Reason | None:
    """That the model learns no call, where the chat template leaves some out."""
    if not counts.get("calls_dropped"):
        return None
    return Reason("verdict.calls_dropped", {"count": counts["calls_dropped"], "total": counts["calls_looked_at"]})


def _fixes(plan: JobPlan, key: str) -> tuple[Fix, ...]:
    match key:
        case "samples_too_long" if plan.selection.samples.know_their_runs:
            return (*_whole(plan), {"data.overlong": "split"})
        case "samples_too_long" | "samples_truncated" | "samples_cut_to_nothing" | "targets_lost":
            return _whole(plan)
        case "targets_lost_at_row_ends":
            return ({"packing.algorithm": "best_fit"},)
    return ()


def _whole(plan: JobPlan) -> tuple[Fix, ...]:
    """A limit that every sample is within, where model and memory have room for one."""
    longest = _longest(plan)
    if longest > plan.model.context_length or not plan.has_room_for(longest):
        return ()
    return (longer_samples(longest, plan.settings.row_length if plan.has_own_row_length else None),)


def _longest(plan: JobPlan) -> int:
    """Of the samples that have something to teach, before any limit; in tokens."""
    return int(plan.selection.samples.lengths[plan.selection.teaching].max())


def _of_room_for_longer(plan: JobPlan) -> Iterator[Remark]:
    """Why no longer limit is offered, where the model has one and memory has not."""
    longest = _longest(plan)
    is_cut = plan.selection.max_length < longest <= plan.model.context_length
    if is_cut and not plan.has_room_for(longest):
        said: dict[str, Parameter] = {
            "longest": longest,
            "fits": plan.memory.largest_max_length,
            "device": plan.device.name,
        }
        yield Remark("warning", "data.max_length", Reason("verdict.no_room_for_longer", said))


def _of_device(plan: JobPlan) -> Iterator[Remark]:
    device, dtype = plan.device, plan.spec.compute.dtype
    told: dict[str, Parameter] = {"device": device.name, "dtype": dtype}
    mended: tuple[Fix, ...] = ({"compute.dtype": "auto"},)
    if device.kind == "gpu" and dtype == "bf16" and not device.has_bf16:
        yield Remark("warning", "compute.dtype", Reason("verdict.no_bf16", told), mended)
    if device.kind == "cpu" and dtype in ("bf16", "fp16"):
        yield Remark("warning", "compute.dtype", Reason("verdict.half_on_cpu", told), mended)
    if device.kind == "cpu" and plan.spec.optimizer.name == "paged_adamw_8bit":
        fix: Fix = {"optimizer.name": "adamw_8bit"}
        yield Remark("warning", "optimizer.name", Reason("verdict.paged_on_cpu", {}), (fix,))


def _of_memory(plan: JobPlan) -> Iterator[Remark]:
    """An estimate refuses nothing; the first pass of the run will tell."""
    report = plan.memory
    chosen = report.chosen
    if chosen is None or chosen.plan is None or chosen.fits:
        return
    said: dict[str, Parameter] = {
        "needed": size(chosen.plan.total),
        "available": size(report.available_bytes),
        "device": report.device.name,
    }
    fixes = tuple(_smaller(plan))
    field = next(iter(fixes[0])) if fixes else "model.base"
    yield Remark("warning", field, Reason("verdict.memory_short", said), fixes)


def _smaller(plan: JobPlan) -> Iterator[Fix]:
    """What fits by the same estimate: another way to lay the job out, fewer rows at a time, or shorter samples."""
    report, batch = plan.memory, plan.spec.batch
    given = [field for field in PLACED_FIELDS if field not in plan.auto_fields]
    spec = plan.spec_with_auto(PLACED_FIELDS)
    way = next((way for way in report.ways if way.fits), None)
    if given and fits_somehow(spec, plan.model.shape, plan.device, plan.largest, loaded=plan.loaded):
        yield dict.fromkeys(given, "auto")
    elif way is not None:
        values: Fix = {
            "parallel.zero_stage": way.zero_stage,
            "parallel.offload": way.offload,
            "compute.gradient_checkpointing": way.gradient_checkpointing,
        }
        yield values
    if 1 <= report.largest_micro_batch_size < batch.micro_batch_size:
        yield {"batch.micro_batch_size": report.largest_micro_batch_size}
    shorter = report.largest_max_length
    if LENGTH_STEP <= shorter < plan.selection.max_length and plan.selection.samples.know_their_runs:
        fix: dict[str, Value] = {"data.max_length": shorter, "data.overlong": "split"}
        yield fix | {"packing.row_length": shorter} if plan.has_own_row_length else fix


def _of_overlap(plan: JobPlan) -> Iterator[Remark]:
    """Equal rows are counted, nearly equal ones estimated."""
    overlap = plan.overlap
    if overlap.count:
        code = "verdict.validation_overlap" if overlap.num_alike else "verdict.validation_equal"
        said: dict[str, Parameter] = {
            "count": overlap.count,
            "total": overlap.num_rows,
            "equal": overlap.num_equal,
            "alike": overlap.num_alike,
        }
        yield Remark("warning", "data.validation", Reason(code, said))


def _of_warmup(plan: JobPlan) -> Iterator[Remark]:
    """Of one that was asked for."""
    given = next((field for field in WARMUPS if getattr(plan.spec.schedule, field.split(".")[1])), None)
    if given is None:
        return
    fix = default_warmup(plan.total_steps, given)
    default = fix["schedule.warmup_steps"]
    assert isinstance(default, int)
    said: dict[str, Parameter] = {
        "warmup_steps": plan.schedule.warmup_steps,
        "total_steps": plan.total_steps,
        "default": default,
    }
    if plan.schedule.warmup_steps == 1 < default:
        yield Remark("warning", given, Reason("verdict.warmup_one_step", said), (fix,))
    elif plan.schedule.warmup_steps > MOST_WARMUP * plan.total_steps:
        yield Remark("warning", given, Reason("verdict.warmup_most_of_run", said), (fix,))
