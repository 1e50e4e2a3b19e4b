"""Named starting points, and what `auto` means: functions with their reasons and sources.

A preset is a part of a spec, as a person would write it; what it leaves out keeps its default. A function for `auto`
returns the value and the reason, which is shown before launch and stored with the job.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.demo_data import DEMO_DATASET, DEMO_MODEL
from core.errors import N_, Reason, UserError
from core.spec import AnyMethod
from core.wire import Device

BILLION = 1_000_000_000

# A sample is lost when it is longer than max_length; so many of the trained tokens may be lost that way in silence.
LOSS_TOLERATED = 0.005
# max_length is rounded up to a multiple of this many tokens: kernels like it, and near-equal sets get equal limits.
LENGTH_MULTIPLE = 64


@dataclass(frozen=True)
class Preset:
    key: str
    title: str
    help: str
    spec: Mapping[str, Any] = field(default_factory=dict)


PRESETS: tuple[Preset, ...] = (
    Preset(
        "demo",
        N_("Tiny demo"),
        N_("The built-in model learns short dialogues in less than a minute, on a CPU too."),
        {
            "name": "tiny demo",
            "model": {"base": DEMO_MODEL},
            "data": {"train": [{"dataset": DEMO_DATASET}]},
            "method": {"type": "lora", "rank": 16, "alpha": 32},
            # A model of 2 M parameters takes, and needs, larger steps than a model of billions.
            "schedule": {"learning_rate": 3e-3, "epochs": 1.5},
        },
    ),
    Preset(
        "lora",
        N_("LoRA on one GPU"),
        N_("The usual start: adapters on all linear layers, packed, 32 samples a step."),
        {"method": {"type": "lora", "rank": 16, "alpha": 32}},
    ),
    Preset(
        "qlora",
        N_("QLoRA on one GPU"),
        N_("Adapters over a base in 4 bits: for a model that does not fit otherwise. Slower than LoRA."),
        {"method": {"type": "qlora", "rank": 16, "alpha": 32}},
    ),
    Preset(
        "full",
        N_("Full fine-tune"),
        N_("Every weight is trained: needs about 16 bytes a parameter of memory before activations."),
        {"method": {"type": "full"}, "schedule": {"learning_rate": "auto"}},
    ),
)


def auto_learning_rate(method: AnyMethod, num_parameters: int) -> tuple[float, Reason]:
    """Adapters: 2e-4 up to 13 B parameters, 1e-4 above, as QLoRA's paper chose (arXiv 2305.14314, appendix B).
    Full: 2e-5 up to 3 B (Alpaca's recipe), 1e-5 to 8 B, falling to 2e-6 at 70 B in equal ratios of size."""
    size = num_parameters / BILLION
    shown = f"{size:.3g} B" if size >= 1 else f"{size * 1000:.3g} M"
    parameters: dict[str, str | int | float] = {"size": shown}
    if method.type != "full":
        return (2e-4 if size <= 13 else 1e-4), Reason("auto.learning_rate_adapter", parameters)
    if size <= 3:
        rate = 2e-5
    elif size <= 8:
        rate = 1e-5
    else:
        # One significant digit is all that such a rule knows.
        rate = float(f"{1e-5 * (2e-6 / 1e-5) ** min(1.0, _log_share(size, 8, 70)):.1e}")
    return rate, Reason("auto.learning_rate_full", parameters)


def _log_share(value: float, low: float, high: float) -> float:
    return math.log(value / low) / math.log(high / low)


def auto_dtype(device: Device) -> tuple[str, Reason]:
    if device.kind == "gpu" and device.has_bf16:
        return "bf16", Reason("auto.dtype_gpu", {"device": device.name})
    if device.kind == "gpu":
        return "fp32", Reason("auto.dtype_old_gpu", {"device": device.name})
    return "fp32", Reason("auto.dtype_cpu", {})


def auto_attention(device: Device, dtype: str) -> tuple[str, Reason]:
    """As far as it can be known before the model is there, which tries it when the job starts."""
    if device.kind == "cpu":
        return "flash", Reason("auto.attention_cpu", {})
    # The GPUs that have bf16 are those that have flash kernels: from sm_80 on.
    if dtype == "fp32" or not device.has_bf16:
        return "flash", Reason("auto.attention_gpu_one_by_one", {"device": device.name, "dtype": dtype})
    return "flash", Reason("auto.attention_gpu", {})


def auto_max_length(
    lengths: Sequence[int], trained: Sequence[int], context_length: int, row_length: int | None
) -> tuple[int, Reason]:
    """The shortest limit that loses at most LOSS_TOLERATED of the trained tokens, in tokens. `lengths` and `trained`
    run parallel, one entry a sample."""
    assert len(lengths) == len(trained) > 0
    may_lose = sum(trained) * LOSS_TOLERATED
    lost = 0
    limit = LENGTH_MULTIPLE
    for length, targets in sorted(zip(lengths, trained, strict=True), reverse=True):
        lost += targets
        if lost > may_lose:
            limit = length
            break
    limit = -(-limit // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    if row_length is not None and row_length < min(limit, context_length):
        return row_length, Reason("auto.max_length_row", {"row_length": row_length})
    if context_length < limit:
        return context_length, Reason("auto.max_length_context", {"context_length": context_length})
    return limit, Reason("auto.max_length", {"longest": max(lengths)})


def auto_num_validation_rows(num_rows: int) -> tuple[int, Reason]:
    if num_rows < 500:
        return 0, Reason("auto.validation_none", {"num_rows": num_rows})
    held_out = min(500, max(50, round(num_rows * 0.02)))
    return held_out, Reason("auto.validation", {"held_out": held_out, "num_rows": num_rows})


def refuse_above_context(max_length: int, context_length: int) -> None:
    if max_length > context_length:
        raise UserError("plan.above_context", "data.max_length", max_length=max_length, context_length=context_length)
