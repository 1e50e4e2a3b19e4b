"""What a job needs of a host beside devices and its model, and which of it a host has.

It is read off the spec in one place. The dispatcher hands a job to no host that lacks something of it, and the verdict
says before launch where no host has it.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from core.errors import UserError
from core.spec import JobSpec
from core.wire import HostReport

Feature = Literal["gpu", "bitsandbytes", "deepspeed", "compiler"]
FEATURES: tuple[Feature, ...] = get_args(Feature)


@dataclass(frozen=True)
class Need:
    feature: Feature
    field: str  # of the spec, whose value asks for it
    value: str


def needs_of(spec: JobSpec) -> tuple[Need, ...]:
    """What the job cannot do without. An `auto` asks for what it becomes in any case and for nothing more."""
    parallel, compute = spec.parallel, spec.compute
    needs: list[Need] = []
    if compute.attention == "flex":
        needs.append(Need("gpu", "compute.attention", "flex"))
    if compute.compile:
        needs.append(Need("gpu", "compute.compile", "true"))
    if parallel.offload not in ("auto", "none"):
        needs.append(Need("gpu", "parallel.offload", parallel.offload))
        needs.append(Need("compiler", "parallel.offload", parallel.offload))
    if spec.method.type == "qlora":
        needs.append(Need("bitsandbytes", "method.type", "qlora"))
    if spec.optimizer.name != "adamw":
        needs.append(Need("bitsandbytes", "optimizer.name", spec.optimizer.name))
    if parallel.zero_stage in (1, 2, 3) or parallel.offload not in ("auto", "none") or _shards_in_any_case(spec):
        needs.append(Need("deepspeed", "parallel.zero_stage", str(parallel.zero_stage)))
    return tuple(needs)


def _shards_in_any_case(spec: JobSpec) -> bool:
    """core.placement begins at stage 2 where every weight is trained on several devices; fp16 runs at stage 0 alone."""
    is_open = spec.parallel.zero_stage == "auto"
    return is_open and spec.parallel.devices > 1 and spec.method.type == "full" and spec.compute.dtype != "fp16"


def features_of(report: HostReport) -> frozenset[Feature]:
    has: dict[Feature, bool] = {
        "gpu": any(device.kind == "gpu" for device in report.devices),
        "bitsandbytes": "bitsandbytes" in report.versions,
        "deepspeed": "deepspeed" in report.versions,
        "compiler": report.has_compiler,
    }
    return frozenset(feature for feature in FEATURES if has[feature])


def lacking(need: Need, hosts: str) -> UserError:
    """What to say where none of `hosts` (names) has it."""
    match need.feature:
        case "gpu":
            return on_cpu(need.field, need.value)
        case "bitsandbytes":
            return UserError("host.no_bitsandbytes", need.field, value=need.value, hosts=hosts)
        case "deepspeed":
            return UserError("host.no_deepspeed", need.field, value=need.value, hosts=hosts)
        case "compiler":
            return UserError("host.no_compiler", need.field, value=need.value, hosts=hosts)


def on_cpu(field: str, value: str) -> UserError:
    """Why only a GPU does it. torch has no gradient for flex_attention on a CPU. Compiled layers were tried there:
    exact, but after minutes of g++ three steps of demo/tiny-llama take 2.98 s, against 2.86 s."""
    match field:
        case "compute.attention":
            return UserError("plan.flex_on_cpu", field)
        case "compute.compile":
            return UserError("plan.compile_on_cpu", field)
    return UserError("plan.offload_on_cpu", field, offload=value)
