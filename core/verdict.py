"""What a person should know before they launch a job that can run: each remark with its number, and what mends it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from core.errors import Parameter, Reason
from core.fix import WARMUPS, Fix, default_warmup, longer_samples
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
    yield from _of_overlap(plan)
    yield from _of_warmup(plan)
    device = plan.device
    if device.kind == "gpu" and plan.spec.compute.dtype == "bf16" and not device.has_bf16:
        said = Reason("verdict.no_bf16", {"device": device.name})
        yield Remark("warning", "compute.dtype", said, ({"compute.dtype": "auto"},))
    saved = saved_by_whole(counts)
    if saved is not None:
        yield Remark("info", "data.multi_turn", saved)


def saved_by_whole(counts: Mapping[str, int]) -> Reason | None:
    """What whole conversations spare, where that is known and something."""
    whole, split = counts.get("tokens_if_whole", 0), counts.get("tokens_if_split", 0)
    if split <= whole:
        return None
    return Reason("verdict.whole_saves", {"whole": whole, "split": split, "ratio": f"{split / whole:.2f}"})


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
    """A limit that every sample is within, where the model has one."""
    selection = plan.selection
    longest = int(selection.samples.lengths[selection.teaching].max())
    if longest > plan.model.context_length:
        return ()
    return (longer_samples(longest, plan.settings.row_length if plan.has_own_row_length else None),)


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
