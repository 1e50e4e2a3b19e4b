"""That a layout is only a layout, as a claim that a job's owner can have tried on the job itself.

The first steps of the job are made again and again from the same beginning: each of its samples alone in a row with
plain attention on one device, which is what packing promises to equal, then in every other layout. A step is a set of
samples (docs/adr/0002), so all have to give the same losses and the same gradients. What counts as the same:

  fp32          a relative difference of at most 1e-5, of losses and of the gradient's norms
  bf16, fp16    no further from the fp32 curve than twice what the same arithmetic is with each sample alone

Dropout draws noise where a layout puts it, so it is off in all runs, and said. Where steps are made of rows, which
samples meet in a step is the layout's own doing: there the same steps are computed with each of their pieces alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from core.spec import JobSpec, batch_key, parse_spec

FP32_TOLERANCE = 1e-5
ROUNDED_FACTOR = 2.0  # a rounded layout may lie so much further from fp32 than rounded samples alone do
# Below this, twice nothing would refuse the last bit.
ROUNDED_FLOOR = 1e-4

ALONE = "each sample alone"


@dataclass(frozen=True)
class Layout:
    """A way to compute the job's steps: what it changes of the spec, by dotted key."""

    name: str
    changes: Mapping[str, object] = field(default_factory=dict)
    is_alone: bool = False  # every segment of a step gets a row of its own

    def apply(self, spec: JobSpec) -> JobSpec:
        """Raises UserErrors where the spec can't be so."""
        return with_changes(spec, self.changes)


class Curve(BaseModel):
    """The first steps as a layout made them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]  # before clipping
    slots: int
    most_segments_in_a_row: int  # 1 = nothing was packed
    ranks: int
    attention: str  # what `auto` came to
    seconds: float


@dataclass(frozen=True)
class Finding:
    """A layout beside the reference."""

    name: str
    loss_deviation: float  # relative, the largest of the steps
    norm_deviation: float
    allowed: float
    curve: Curve

    @property
    def holds(self) -> bool:
        return max(self.loss_deviation, self.norm_deviation) <= self.allowed


def with_changes(spec: JobSpec, changes: Mapping[str, object]) -> JobSpec:
    data = spec.model_dump(mode="json")
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        place = data
        for parent in parents:
            place = place[parent]
        place[leaf] = value
    return parse_spec(data)


def certified(spec: JobSpec, dtype: str) -> JobSpec:
    """The job as it is tried: without dropout, in the arithmetic that `auto` became."""
    changes: dict[str, object] = {"compute.dtype": dtype}
    if spec.method.type != "full":
        changes["method.dropout"] = 0.0
    return with_changes(spec, changes)


def references(dtype: str) -> Iterator[Layout]:
    """What the others are held against; fp32 first, then the job's own arithmetic if that is another."""
    plain = {
        "compute.attention": "eager",
        "compute.gradient_checkpointing": False,
        "compute.compile": False,
        "parallel.devices": 1,
        "parallel.zero_stage": 0,
        "parallel.offload": "none",
    }
    yield Layout(f"{ALONE}, fp32", {**plain, "compute.dtype": "fp32"}, is_alone=True)
    if dtype != "fp32":
        yield Layout(f"{ALONE}, {dtype}", plain, is_alone=True)


def layouts(spec: JobSpec, most_ranks: int) -> Iterator[Layout]:
    """The job as it is, then what else could have computed its steps on up to `most_ranks` devices."""
    yield Layout("the job as it is")
    one = {"parallel.devices": 1, "parallel.zero_stage": 0, "parallel.offload": "none"}
    # By rows a step is what the layout of the whole epoch makes it, so its mode and algorithm stay.
    is_by_rows = batch_key(spec.batch) == "rows_per_step"
    own = spec.packing.algorithm if is_by_rows else "best_fit"
    packed = {**one, "packing.mode": "packed", "packing.algorithm": own, "batch.micro_batch_size": 1}
    yield Layout(f"packed, {own}", packed)
    yield Layout(f"packed, {own}, 2 rows a pass", {**packed, "batch.micro_batch_size": 2})
    if not is_by_rows:
        yield Layout("packed, sequential", {**packed, "packing.algorithm": "sequential"})
        for mode in ("padding_free", "grouped", "padded"):
            changes = {**packed, "packing.mode": mode, "packing.algorithm": "best_fit", "batch.micro_batch_size": 4}
            yield Layout(f"{mode}, 4 samples a pass", changes)
    for attention in ("flash", "flex", "sdpa", "eager"):
        yield Layout(f"packed, attention {attention}", {**packed, "compute.attention": attention})
    yield Layout("packed, gradient checkpointing", {**packed, "compute.gradient_checkpointing": True})
    if most_ranks > 1:
        for stage in (0, 1, 2, 3):
            if stage == 3 and spec.method.type == "qlora":
                continue
            changes = {**packed, "parallel.devices": most_ranks, "parallel.zero_stage": stage}
            yield Layout(f"packed, {most_ranks} ranks, ZeRO {stage}", changes)


def compare(name: str, curve: Curve, fp32: Curve, rounded: Curve | None) -> Finding:
    """`rounded` is the job's own arithmetic with each sample alone, None where that is fp32."""
    allowed = FP32_TOLERANCE
    if rounded is not None:
        alone = max(_deviation(rounded.losses, fp32.losses), _deviation(rounded.grad_norms, fp32.grad_norms))
        allowed = max(ROUNDED_FACTOR * alone, ROUNDED_FLOOR)
    return Finding(
        name,
        _deviation(curve.losses, fp32.losses),
        _deviation(curve.grad_norms, fp32.grad_norms),
        allowed,
        curve,
    )


def _deviation(values: Sequence[float], reference: Sequence[float]) -> float:
    assert len(values) == len(reference) > 0
    return max(abs(value - true) / abs(true) for value, true in zip(values, reference, strict=True))
