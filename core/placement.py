"""Where a job's numbers lie: ZeRO stage, offload and gradient checkpointing, where they were left to `auto`.

The memory plan of each way is held against the device, in the order of what a way costs, and the first that fits is
taken. Sharding comes before offload (the interconnect is faster than the way to the host), and recomputing activations
before sharding more: a third more compute against half again as much communication. Values that a person gave stand;
only the others are chosen.

An estimate refuses nothing. Where no way fits, the one that needs least is taken and the reason says so.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from core.architecture import Architecture
from core.bounds import LargestPass, StepBounds
from core.errors import Reason, UserError
from core.memory import Load, MemoryPlan, Offload, estimate_memory
from core.spec import Adapter, JobSpec
from core.wire import Device
from core.zero import Loaded, fault

Stage = Literal[0, 1, 2, 3]
Way = tuple[Stage, Offload, bool, MemoryPlan]  # the third: whether activations are recomputed

# What is decided here, by field of the spec.
PLACED_FIELDS = ("parallel.zero_stage", "parallel.offload", "compute.gradient_checkpointing")

# Of a device's memory; the rest is for what an estimate misses and an allocator cannot use.
USABLE_SHARE = 0.9

_ONE_DEVICE: tuple[tuple[Stage, Offload], ...] = ((0, "none"), (2, "optimizer"), (3, "optimizer_and_params"))
_ADAPTERS: tuple[tuple[Stage, Offload], ...] = ((0, "none"), (3, "none"), (3, "optimizer_and_params"))
_FULL: tuple[tuple[Stage, Offload], ...] = (
    (2, "none"),
    (3, "none"),
    (3, "optimizer"),
    (3, "optimizer_and_params"),
)
# What `auto` would not choose by itself, but completes where a person gave one half.
_OTHERS: tuple[tuple[Stage, Offload], ...] = ((0, "none"), (1, "none"), (1, "optimizer"), (2, "none"), (2, "optimizer"))


@dataclass(frozen=True)
class Placement:
    zero_stage: Stage
    offload: Offload
    gradient_checkpointing: bool
    plan: MemoryPlan | None  # None where the model's sizes are not known
    reasons: Mapping[str, Reason]  # by field of the spec, of all three


def place(
    spec: JobSpec,
    shape: Architecture | None,
    device: Device,
    largest: LargestPass,
    *,
    dtype: str,
    attention: str,
    loaded: Loaded | None = None,
) -> Placement:
    """`device` stands for each of the job's devices; on a CPU they share its memory. `loaded` is what `shape` tells,
    where no more is known."""
    if shape is None or shape.missing:
        return _without_a_plan(spec, shape, device)
    available = available_bytes(spec, device)
    asked = spec.compute.gradient_checkpointing
    recomputes = (False, True) if asked == "auto" else (asked,)
    ways: list[Way] = []
    for stage, offload in _pairs(spec, loaded or Loaded.of(shape), device):
        for recompute in recomputes:
            way = (stage, offload, recompute)
            load = load_of(spec, shape, device, largest, way, dtype=dtype, attention=attention)
            ways.append((stage, offload, recompute, estimate_memory(load)))
    fitting = [way for way in ways if way[3].total <= USABLE_SHARE * available]
    stage, offload, recompute, plan = fitting[0] if fitting else min(ways, key=lambda way: way[3].total)
    return Placement(stage, offload, recompute, plan, _reasons(spec, ways, fitting, available))


def has_room_for(
    spec: JobSpec, shape: Architecture | None, device: Device, bounds: StepBounds, length: int, *, loaded: Loaded
) -> bool:
    """The same of samples of so many tokens, each filling its row, as many as a pass takes."""
    largest = bounds.of_length(length, spec.batch.micro_batch_size, is_one_row=spec.packing.mode == "padding_free")
    return fits_somehow(spec, shape, device, largest, loaded=loaded)


def fits_somehow(
    spec: JobSpec, shape: Architecture | None, device: Device, largest: LargestPass, *, loaded: Loaded
) -> bool:
    """Whether this pass fits in some way that `spec`, whose dtype and attention are resolved, leaves open; True where
    there is no estimate."""
    compute = spec.compute
    placed = place(spec, shape, device, largest, dtype=compute.dtype, attention=compute.attention, loaded=loaded)
    return placed.plan is None or placed.plan.total <= USABLE_SHARE * available_bytes(spec, device)


def load_of(
    spec: JobSpec,
    shape: Architecture,
    device: Device,
    largest: LargestPass,
    way: tuple[Stage, Offload, bool],
    *,
    dtype: str,
    attention: str,
) -> Load:
    """What one device has to hold of `spec` with this stage, offload and checkpointing, whatever it says of them."""
    stage, offload, recompute = way
    return Load(
        shape=shape,
        method=spec.method,
        dtype=dtype,  # type: ignore[arg-type]  # resolved by the caller
        attention="flash" if attention == "auto" else attention,  # type: ignore[arg-type]
        optimizer=spec.optimizer.name,
        gradient_checkpointing=recompute,
        num_ranks=spec.parallel.devices,
        zero_stage=stage,
        offload=offload,
        tokens=largest.tokens,
        longest_row=largest.longest_row,
        longest_sample=largest.longest_sample,
        on_gpu=device.kind == "gpu",
    )


def standing_for_all(devices: Sequence[Device]) -> Device:
    """What a plan that is one for all of a job's devices may count on: the least that any of them has. In all else the
    first stands for them."""
    least = {
        "memory_bytes": min(device.memory_bytes for device in devices),
        "has_bf16": all(device.has_bf16 for device in devices),
    }
    return devices[0].model_copy(update=least)


def available_bytes(spec: JobSpec, device: Device) -> int:
    """Of `device`, for one rank: those on a CPU share its memory."""
    return device.memory_bytes // spec.parallel.devices if device.kind == "cpu" else device.memory_bytes


def can_offload(spec: JobSpec, device: Device) -> bool:
    """A CPU has nowhere to offload to, and only 32-bit AdamW steps on the host."""
    return device.kind == "gpu" and spec.optimizer.name == "adamw"


def impossible(spec: JobSpec, loaded: Loaded) -> UserError | None:
    """Why no stage with any offload that agrees with what was given can run on a GPU; None where one can."""
    ways = {*_ONE_DEVICE, *_ADAPTERS, *_FULL, *_OTHERS}
    if any(_agrees(spec, *way) and fault(spec, *way, loaded) is None for way in ways):
        return None
    stage, offload = spec.parallel.zero_stage, spec.parallel.offload
    if offload == "auto":
        offload = "none"
    if stage == "auto":  # then it is offload that cannot be had
        stage = 3 if offload == "optimizer_and_params" else 2
    return fault(spec, stage, offload, loaded)


def _pairs(spec: JobSpec, loaded: Loaded, device: Device) -> list[tuple[Stage, Offload]]:
    """Stage and offload, the cheapest first: those that can run and that agree with what was given."""
    preferred = _ONE_DEVICE if spec.parallel.devices == 1 else _ADAPTERS if _has_adapters(spec) else _FULL
    for pool in (preferred, _OTHERS):
        pairs = [pair for pair in pool if _agrees(spec, *pair) and _runs(spec, loaded, device, *pair)]
        if pairs:
            return pairs
    raise AssertionError("core.refusals has refused what cannot run")


def _has_adapters(spec: JobSpec) -> bool:
    return isinstance(spec.method, Adapter)


def _agrees(spec: JobSpec, stage: Stage, offload: Offload) -> bool:
    return spec.parallel.zero_stage in ("auto", stage) and spec.parallel.offload in ("auto", offload)


def _runs(spec: JobSpec, loaded: Loaded, device: Device, stage: Stage, offload: Offload) -> bool:
    if fault(spec, stage, offload, loaded) is not None:
        return False
    return offload == "none" or can_offload(spec, device)


def _reasons(
    spec: JobSpec,
    ways: list[Way],
    fitting: list[Way],
    available: int,
) -> dict[str, Reason]:
    if not fitting:
        least = min(way[3].total for way in ways)
        short = Reason("auto.memory_short", {"needed": size(least), "available": size(available)})
        return dict.fromkeys(PLACED_FIELDS, short)
    stage, offload, recompute, plan = fitting[0]
    numbers: dict[str, str | int | float] = {"needed": size(plan.total), "available": size(available)}

    def least_of(others: Iterable[Way]) -> dict[str, str | int | float]:
        return numbers | {"otherwise": size(min(way[3].total for way in others))}

    before = ways[: ways.index(fitting[0])]
    other_stages = [way for way in before if way[0] != stage]
    without_offload = [way for way in before if way[1] == "none"]
    if spec.parallel.devices == 1 and stage == 0:
        zero = Reason("auto.zero_one_device", {})
    elif other_stages:
        zero = Reason("auto.zero_needed", least_of(other_stages) | {"stage": stage})
    else:
        zero = Reason("auto.zero_fits", numbers | {"stage": stage})
    if offload != "none" and without_offload:
        off = Reason("auto.offload_needed", least_of(without_offload))
    else:
        off = Reason("auto.offload_none", numbers)
    if recompute:
        without = [way for way in before if way[:2] == (stage, offload)]
        again = Reason("auto.checkpointing_needed", least_of(without) if without else numbers)
    else:
        again = Reason("auto.checkpointing_none", numbers)
    return dict(zip(PLACED_FIELDS, (zero, off, again), strict=True))


def _without_a_plan(spec: JobSpec, shape: Architecture | None, device: Device) -> Placement:
    """No sizes, no estimate: nothing is sharded, and a GPU recomputes, since there memory runs out first."""
    reason = unknown_sizes(shape)
    stage = 0 if spec.parallel.zero_stage == "auto" else spec.parallel.zero_stage
    offload = "none" if spec.parallel.offload == "auto" else spec.parallel.offload
    asked = spec.compute.gradient_checkpointing
    recompute = device.kind == "gpu" if asked == "auto" else asked
    return Placement(stage, offload, recompute, None, dict.fromkeys(PLACED_FIELDS, reason))


def unknown_sizes(shape: Architecture | None) -> Reason:
    """Why there is no plan."""
    return Reason("auto.memory_unknown", {"missing": ", ".join(shape.missing) if shape else "all"})


def size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"
