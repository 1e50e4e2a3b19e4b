"""Values for fields of a spec that mend what is wrong with it, so that a button can set them.

Only what is certain: with a fix its fault is gone, whatever else may then be found. Where a person has to choose what
they want, there is a fix for each choice or none. null gives a field up: for its default, or for another field that
says the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from core.errors import UserError
from core.schedule import resolve_warmup_steps
from core.spec import JobSpec

# As JSON has it.
Value = str | int | float | bool | None | Sequence[Any] | Mapping[str, Any]
Fix = Mapping[str, Value]  # by field of the spec; "method" as a whole where its type changes

DURATIONS = ("schedule.epochs", "schedule.max_steps")
WARMUPS = ("schedule.warmup_ratio", "schedule.warmup_steps", "schedule.warmup_epochs")
BATCHES = ("batch.samples_per_step", "batch.tokens_per_step", "batch.rows_per_step")
ALTERNATIVES = frozenset((*DURATIONS, *WARMUPS, *BATCHES))


def one_of(alternatives: Sequence[str], chosen: str, value: Value, given: str | None) -> Fix:
    """Of fields that exclude each other one gets a value, and the one that has one loses it."""
    assert chosen in alternatives
    return {chosen: value} if given in (None, chosen) else {chosen: value, str(given): None}


def longer_samples(max_length: int, row_length: int | None) -> Fix:
    """`row_length` as it was given: it takes the longest sample or has to grow too."""
    fix: dict[str, Value] = {"data.max_length": max_length}
    return fix if row_length is None or row_length >= max_length else fix | {"packing.row_length": max_length}


def default_warmup(total_steps: int, given: str | None) -> Fix:
    """The number of steps that nothing given would mean, in place of the field `given`."""
    # Of this number steps_per_epoch decides nothing.
    return one_of(WARMUPS, "schedule.warmup_steps", resolve_warmup_steps(total_steps, 1).steps, given)


# What does not depend on the numbers of a fault.
_MENDED_BY: Mapping[str, tuple[Fix, ...]] = {
    "spec.algorithm_needs_packed": ({"packing.algorithm": "best_fit"},),
    "spec.wrapped_needs_rows": ({"packing.algorithm": "best_fit"},),
    "spec.offload_needs_adamw": ({"optimizer.name": "adamw"}, {"parallel.offload": "none"}),
    "spec.adapter_needs_method": ({"model.adapter": None},),
    "plan.wrapped_to_nothing": ({"packing.algorithm": "best_fit"},),
    "plan.overlong_context": ({"data.overlong": "split"},),
    "plan.overlong_memory": ({"data.overlong": "split"},),
    "plan.compile_on_cpu": ({"compute.compile": False},),
    "plan.flex_on_cpu": ({"compute.attention": "auto"},),
    "plan.offload_on_cpu": ({"parallel.offload": "none"},),
    "host.no_compiler": ({"parallel.offload": "none"},),
    "host.no_deepspeed": ({"parallel.zero_stage": 0, "parallel.offload": "none"},),
    "zero.cpu_adam": ({"parallel.offload": "none"},),
    "zero.offload_stage": ({"parallel.zero_stage": "auto"}, {"parallel.offload": "none"}),
    "zero.offload_params": ({"parallel.offload": "optimizer"}, {"parallel.zero_stage": 3}),
    "zero.fp16": ({"compute.dtype": "auto"}, {"compute.dtype": "bf16"}),
    **dict.fromkeys(
        ("zero.qlora", "zero.experts", "zero.expert_modules", "zero.vision", "zero.new_tokens"),
        ({"parallel.zero_stage": 2}, {"parallel.zero_stage": "auto", "parallel.offload": "auto"}),
    ),
    "engine.attention_refused": ({"compute.attention": "auto"},),
    "engine.compile_sharded": ({"compute.compile": False},),
    "engine.no_layers": ({"compute.compile": False},),
    "engine.no_targets": ({"method.exclude_modules": []},),
    "engine.too_few_quantised": ({"method.type": "lora"},),
    "engine.leak": ({"packing.mode": "padded", "packing.algorithm": "best_fit"},),
}
# These lists may name what cannot be adapted; all-linear never does.
_OF_TARGETS = frozenset({"engine.unknown_module", "engine.not_adaptable", "engine.tied_target"})


def fixes_of(error: UserError) -> tuple[Fix, ...]:  # noqa: PLR0911 - a table
    """None where a person has to think."""
    said: Any = error.parameters
    match error.code:
        case "spec.at_least" | "spec.at_most":
            return ({error.field: said["limit"]},)
        case "spec.row_shorter_than_sample":
            return ({"packing.row_length": said["max_length"]},)
        case "spec.warmup_longer_than_run":
            return (default_warmup(said["total_steps"], error.field),)
        case "plan.above_context":
            return ({"data.max_length": said["context_length"]},)
        case "plan.overlong" if said["longest"] <= said["context_length"]:
            return (longer_samples(said["longest"], said["row_length"] or None), {"data.overlong": "split"})
        case "plan.overlong":
            return ({"data.overlong": "split"},)
        case "host.too_few_gpus" | "host.too_few_cpus":
            return ({"parallel.devices": said["most"]},)
        case "host.no_bitsandbytes":
            return ({"method.type": "lora"} if error.field == "method.type" else {"optimizer.name": "adamw"},)
        case "engine.fused_experts":
            return ({error.field: 0.0 if error.field == "method.dropout" else False},)
        case code if code in _OF_TARGETS and error.field == "method.target_modules":
            return ({"method.target_modules": "all-linear"},)
    return _MENDED_BY.get(error.code, ())


def applied(spec: JobSpec, fix: Fix) -> dict[str, Any]:
    """The spec with these fields, as a mapping to parse."""
    changed: dict[str, Any] = spec.model_dump(mode="json")
    for field, value in fix.items():
        part: Any = changed
        *parents, leaf = field.split(".")
        for name in parents:
            part = part[int(name)] if isinstance(part, list) else part[name]
        part[leaf] = value
    return changed


def told(fix: Fix) -> str:
    """Fields with their values, as a sentence names them."""
    return ", ".join(
        f"{field} {value_text(value)}" for field, value in fix.items() if value is not None or field not in ALTERNATIVES
    )


def value_text(value: Value) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case str() | int():
            return str(value)
        case Mapping():
            return "{" + ", ".join(f"{name}: {value_text(each)}" for name, each in value.items()) + "}"
    return "[" + ", ".join(map(value_text, value)) + "]"
