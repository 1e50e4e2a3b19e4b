"""The memory plan as a person reads it: what each way to lay a job out would need, and how far the chosen one could go.

core.placement tries ways until one fits and takes it. Here all of them are worked out, by the same estimate of the same
load, so that the chosen one's bytes are those that it was chosen for. With one rank a stage shards nothing, so the ways
are those that differ: everything on the device, and each kind of offload.

What fits is what `auto` would take: a plan under USABLE_SHARE of the device.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from core.architecture import Architecture
from core.bounds import LargestPass, StepBounds
from core.errors import Reason
from core.memory import MemoryPlan, Offload, estimate_memory
from core.placement import (
    USABLE_SHARE,
    Stage,
    available_bytes,
    can_offload,
    load_of,
    unknown_sizes,
)
from core.spec import JobSpec
from core.wire import Device
from core.zero import Loaded, fault

# Of a row's length: `auto` rounds data.max_length to such steps.
LENGTH_STEP = 64  # tokens

# Paths whose memory differs: `flex` keeps what `flash` keeps.
AttentionPath = Literal["flash", "sdpa", "eager"]
ATTENTION_PATHS: tuple[AttentionPath, ...] = get_args(AttentionPath)

_ONE_RANK: tuple[tuple[Stage, Offload], ...] = ((0, "none"), (2, "optimizer"), (3, "optimizer_and_params"))
_STAGES: tuple[tuple[Stage, Offload], ...] = ((0, "none"), (1, "none"), (2, "none"), (3, "none"))
_OFFLOADED: tuple[tuple[Stage, Offload], ...] = (
    (1, "optimizer"),
    (2, "optimizer"),
    (3, "optimizer"),
    (3, "optimizer_and_params"),
)


@dataclass(frozen=True)
class Way:
    zero_stage: Stage
    offload: Offload
    gradient_checkpointing: bool
    is_chosen: bool
    plan: MemoryPlan | None  # of one device; None where the job cannot run in this way
    fits: bool
    why_not: Reason | None = None  # it cannot run


@dataclass(frozen=True)
class MemoryReport:
    device: Device
    num_ranks: int
    available_bytes: int  # of the device, for one rank
    usable_bytes: int
    ways: tuple[Way, ...] = ()  # those with the chosen checkpointing first; none where sizes are unknown
    largest_micro_batch_size: int = 0  # that fits in the chosen way; 0: not even one row
    most_rows: int = 0  # that a step can have on a device: more in a pass is of no use
    largest_max_length: int = 0  # tokens, of a sample and its row; 0: not even LENGTH_STEP
    context_length: int = 0  # tokens, the model's
    # The chosen way by the paths that attention may take; what it is held to is the path of the spec.
    by_attention: Mapping[AttentionPath, MemoryPlan] = field(default_factory=dict)
    largest: LargestPass | None = None  # that is planned for
    attention: str = ""  # the path that the plan counts: flex keeps what flash keeps
    unknown: Reason | None = None  # which sizes of the model are missing

    @property
    def chosen(self) -> Way | None:
        return next((way for way in self.ways if way.is_chosen), None)

    @property
    def fits_from(self) -> Stage | None:
        """The lowest stage that fits without offload, with the chosen checkpointing."""
        assert self.chosen is not None, "there is nothing to fit"
        recompute = self.chosen.gradient_checkpointing
        fitting = (
            way.zero_stage
            for way in self.ways
            if way.fits and way.offload == "none" and way.gradient_checkpointing == recompute
        )
        return min(fitting, default=None)

    @property
    def planned_peak_bytes(self) -> int | None:
        """What a step's `memory_peak_bytes` is expected to be: on a GPU torch counts what it allocates, on a CPU the
        whole process is counted."""
        plan = self.chosen.plan if self.chosen else None
        if plan is None:
            return None
        return plan.total - (plan.terms["process"] if self.device.kind == "gpu" else 0)


def report_memory(
    spec: JobSpec,
    shape: Architecture | None,
    device: Device,
    bounds: StepBounds,
    *,
    context_length: int,
    most_rows: int,
    loaded: Loaded | None = None,
) -> MemoryReport:
    """`spec` has every `auto` resolved. `device` stands for each of the job's; `most_rows` is what a step can have on
    one of them; `loaded` is what `shape` tells, where no more is known."""
    available = available_bytes(spec, device)
    usable = int(USABLE_SHARE * available)
    if shape is None or shape.missing:
        return MemoryReport(device, spec.parallel.devices, available, usable, unknown=unknown_sizes(shape))
    stage, offload, recompute = spec.parallel.zero_stage, spec.parallel.offload, spec.compute.gradient_checkpointing
    assert stage != "auto" and offload != "auto" and recompute != "auto"
    chosen = (stage, offload, recompute)

    micro_batch_size = spec.batch.micro_batch_size
    largest = bounds.largest_pass(micro_batch_size)

    def plan_of(way: tuple[Stage, Offload, bool], largest: LargestPass, attention: str = "") -> MemoryPlan:
        attention = attention or spec.compute.attention
        return estimate_memory(
            load_of(spec, shape, device, largest, way, dtype=spec.compute.dtype, attention=attention)
        )

    def fits_as_chosen(largest: LargestPass) -> bool:
        return plan_of(chosen, largest).total <= usable

    def of_length(length: int) -> LargestPass:
        return bounds.of_length(length, micro_batch_size, is_one_row=spec.packing.mode == "padding_free")

    def by_attention() -> Iterator[tuple[AttentionPath, MemoryPlan]]:
        for path in ATTENTION_PATHS:
            yield path, plan_of(chosen, largest, path)

    ways: list[Way] = []
    model = loaded or Loaded.of(shape)
    for again in (recompute, not recompute):
        for pair in _pairs(spec, model, device):
            is_chosen = (*pair, again) == chosen
            found = fault(spec, *pair, model)
            if found is not None:
                ways.append(Way(*pair, again, is_chosen, None, False, Reason(found.code, found.parameters)))
                continue
            plan = plan_of((*pair, again), largest)
            ways.append(Way(*pair, again, is_chosen, plan, plan.total <= usable))
    if fits_as_chosen(of_length(context_length)):
        longest = context_length
    else:
        longest = LENGTH_STEP * _largest(
            lambda units: fits_as_chosen(of_length(units * LENGTH_STEP)), context_length // LENGTH_STEP
        )
    return MemoryReport(
        device,
        spec.parallel.devices,
        available,
        usable,
        tuple(ways),
        largest_micro_batch_size=_largest(lambda rows: fits_as_chosen(bounds.largest_pass(rows)), most_rows),
        most_rows=most_rows,
        largest_max_length=longest,
        context_length=context_length,
        largest=largest,
        attention="flash" if spec.compute.attention in ("auto", "flex") else spec.compute.attention,
        by_attention={} if fault(spec, stage, offload, model) else dict(by_attention()),
    )


def _pairs(spec: JobSpec, model: Loaded, device: Device) -> Iterator[tuple[Stage, Offload]]:
    """Stage and offload of the ways to show. A stage that cannot run is among them, with its reason; an offload that
    cannot is not, unless it was asked for."""
    stage, offload = spec.parallel.zero_stage, spec.parallel.offload
    assert stage != "auto" and offload != "auto"
    shown = _ONE_RANK if spec.parallel.devices == 1 else _STAGES + _OFFLOADED
    pairs = [
        pair for pair in shown if pair[1] == "none" or (can_offload(spec, device) and fault(spec, *pair, model) is None)
    ]
    yield from pairs
    if (stage, offload) not in pairs:
        yield stage, offload


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest of 1 to `most` that fits; 0 where none does. What is smaller than what fits, fits."""
    fitting, too_large = 0, most + 1
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        if fits(middle):
            fitting = middle
        else:
            too_large = middle
    return fitting
