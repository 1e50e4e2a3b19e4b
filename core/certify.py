"""That a layout is only a layout, as a claim that a job's owner can have tried on the job itself.

The first steps of the job are made again and again from the same beginning: each of its samples alone in a row with
plain attention on one device, which is what packing promises to equal, then in every other layout. A step is a set of
samples (docs/adr/0002), so all have to give the same losses and the same gradients. What counts as the same:

  fp32          a relative difference of at most 1e-5, of losses and of the gradient's norms
  bf16, fp16    no further from the fp32 curve than twice what the same arithmetic is with each sample alone

Dropout draws noise where a layout puts it, so it is off in all runs, and said. Where steps are made of rows, which
samples meet in a step is the layout's own doing: there the same steps are computed with each of their pieces alone.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from core import events
from core.errors import Parameter, Reason
from core.events import FailureReason, finite
from core.spec import JobSpec, batch_key, parse_spec

FP32_TOLERANCE = 1e-5
ROUNDED_FACTOR = 2.0  # a rounded layout may lie so much further from fp32 than rounded samples alone do
# Below this, twice nothing would refuse the last bit.
ROUNDED_FLOOR = 1e-4

ALONE = "each sample alone"
# A model or a machine that can't compute a layout refutes nothing.
RULED_OUT: frozenset[FailureReason] = frozenset(("bad_spec", "oom"))


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
class Reference:
    """What the others are held against."""

    name: str
    curve: Curve


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


@dataclass(frozen=True)
class NotRun:
    """A layout that has made no steps."""

    name: str
    reason: str
    cause: FailureReason

    @property
    def is_fault(self) -> bool:
        """Of ours or the host's: neither the model nor the machine rules it out."""
        return self.cause not in RULED_OUT


Tried = Reference | Finding | NotRun


@dataclass(frozen=True)
class Certificate:
    """What has been tried so far."""

    dtype: str  # the job's own arithmetic
    references: tuple[Reference, ...]
    findings: tuple[Finding, ...]
    not_run: tuple[NotRun, ...]

    @classmethod
    def of(cls, dtype: str, tried: Iterable[Tried]) -> "Certificate":
        all_tried = tuple(tried)
        return cls(
            dtype,
            tuple(each for each in all_tried if isinstance(each, Reference)),
            tuple(each for each in all_tried if isinstance(each, Finding)),
            tuple(each for each in all_tried if isinstance(each, NotRun)),
        )

    @property
    def steps(self) -> int:
        return len(self.references[0].curve.losses) if self.references else 0

    @property
    def holds(self) -> bool:
        return not self.differing and not self.faults

    @property
    def is_telling(self) -> bool:
        """Whether any layout put several samples into a row: without, packing was not tried."""
        return any(finding.curve.most_segments_in_a_row > 1 for finding in self.findings)

    @property
    def differing(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.holds]

    @property
    def faults(self) -> list[NotRun]:
        return [run for run in self.not_run if run.is_fault]

    @property
    def loss_deviation(self) -> float:
        """The largest of all layouts; so `norm_deviation`."""
        return max((finding.loss_deviation for finding in self.findings), default=0.0)

    @property
    def norm_deviation(self) -> float:
        return max((finding.norm_deviation for finding in self.findings), default=0.0)

    @property
    def verdict(self) -> Reason:
        """In one sentence, once there are findings."""
        said: dict[str, Parameter] = {
            "count": len(self.findings),
            "loss": deviation_text(self.loss_deviation),
            "norm": deviation_text(self.norm_deviation),
            "allowed": deviation_text(self.findings[0].allowed),
        }
        if self.differing:
            names = "; ".join(finding.name for finding in self.differing)
            return Reason("certify.differs", {**said, "num_differing": len(self.differing), "names": names})
        if self.faults:
            return Reason("certify.fault", {**said, "names": "; ".join(run.name for run in self.faults)})
        return Reason("certify.equal" if self.is_telling else "certify.nothing_packed", said)


def deviation_text(deviation: float) -> str:
    """1.2e-7, as short as two digits allow."""
    if deviation == 0 or math.isinf(deviation):
        return f"{deviation:g}"
    digits, exponent = f"{deviation:.1e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


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


def left_out(spec: JobSpec, most_ranks: int) -> Iterator[NotRun]:
    """What `layouts` has no place for, and why."""
    if batch_key(spec.batch) == "rows_per_step":
        yield NotRun("other modes and algorithms of packing", Reason("certify.by_rows", {}).text(), "bad_spec")
    if most_ranks < 2:
        yield NotRun("several ranks, ZeRO 0 to 3", Reason("certify.one_device", {}).text(), "bad_spec")


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
    """Infinite where a value is no number."""
    assert len(values) == len(reference) > 0
    if not all(map(math.isfinite, (*values, *reference))):
        return math.inf
    return max(
        0.0 if value == true else abs(value - true) / abs(true) if true else math.inf
        for value, true in zip(values, reference, strict=True)
    )


# -- as events -------------------------------------------------------------------------------------------------------


def told(tried: Tried, dtype: str) -> dict[str, object]:
    """The fields of its `layout` event."""
    fields: dict[str, object] = {"name": tried.name, "dtype": dtype}
    if isinstance(tried, NotRun):
        return {**fields, "reason": tried.reason, "cause": tried.cause}
    curve = tried.curve
    fields |= {
        **curve.model_dump(),
        "losses": tuple(map(finite, curve.losses)),
        "grad_norms": tuple(map(finite, curve.grad_norms)),
    }
    if isinstance(tried, Reference):
        return fields | {"is_reference": True}
    return fields | {
        "loss_deviation": tried.loss_deviation,
        "norm_deviation": tried.norm_deviation,
        "allowed": tried.allowed,
        "is_equal": tried.holds,
    }


def read_certificate(layouts: Sequence[events.Layout]) -> Certificate | None:
    """What `told` has made of it; None before the first."""
    return Certificate.of(layouts[0].dtype, map(_heard, layouts)) if layouts else None


def _heard(event: events.Layout) -> Tried:
    if event.cause is not None:
        return NotRun(event.name, event.reason, event.cause)
    curve = Curve(
        losses=tuple(math.nan if loss is None else loss for loss in event.losses),
        grad_norms=tuple(math.nan if norm is None else norm for norm in event.grad_norms),
        **event.model_dump(include=Curve.model_fields.keys() - {"losses", "grad_norms"}),
    )
    if event.is_reference:
        return Reference(event.name, curve)
    return Finding(
        event.name, _or_infinite(event.loss_deviation), _or_infinite(event.norm_deviation), event.allowed or 0.0, curve
    )


def _or_infinite(deviation: float | None) -> float:
    return math.inf if deviation is None else deviation
