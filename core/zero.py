"""ZeRO: what stages 1 to 3 shard over the ranks, and the DeepSpeed configuration that makes them so.

The configuration is a pure function of the resolved spec, so a page can show it before launch; the trainer writes the
one that it used to deepspeed.json. docs/zero.md explains each of its lines.

DeepSpeed is told nothing about precision. Weights that are trained are fp32 under every stage and autocast does the
arithmetic, exactly as without DeepSpeed, so a stage changes where numbers lie and no number. Accumulation is not its
business either: micro-batches of a step differ in number, and each is already divided by the step's tokens.
"""

from dataclasses import dataclass
from typing import Any, Literal

from core.architecture import Architecture
from core.errors import UserError
from core.spec import JobSpec

DeviceKind = Literal["gpu", "cpu"]
Stage = Literal[0, 1, 2, 3]
Offload = Literal["none", "optimizer", "optimizer_and_params"]

# Elements of a bucket, fp32: 64 MiB. DeepSpeed's 500 million allocate 2 GB before the first gradient.
BUCKET_ELEMENTS = 1 << 24


def uses_deepspeed(spec: JobSpec) -> bool:
    return spec.parallel.zero_stage in (1, 2, 3)


def deepspeed_config(spec: JobSpec, device_kind: DeviceKind) -> dict[str, Any]:
    """For a spec whose stage and offload are resolved."""
    stage, offload = spec.parallel.zero_stage, spec.parallel.offload
    assert stage in (1, 2, 3) and offload != "auto"
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": device_kind == "gpu",
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET_ELEMENTS,
    }
    if stage < 3:
        zero["allgather_bucket_size"] = BUCKET_ELEMENTS
        # Each gradient to the rank that owns it, instead of every gradient to all. Over NCCL, where many small sends
        # may cost more than one large one, DeepSpeed's own default stays until it is timed.
        zero["use_multi_rank_bucket_allreduce"] = device_kind == "gpu"
    else:
        zero["stage3_prefetch_bucket_size"] = BUCKET_ELEMENTS
        zero["stage3_param_persistence_threshold"] = 100_000
        zero["stage3_max_live_parameters"] = 1_000_000_000
        zero["stage3_max_reuse_distance"] = 1_000_000_000
        zero["memory_efficient_linear"] = True
    place = {"device": "cpu", "pin_memory": device_kind == "gpu"}
    if offload != "none":
        zero["offload_optimizer"] = place
    if offload == "optimizer_and_params":
        zero["offload_param"] = place
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": spec.optimizer.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": zero,
    }


def loading_config(spec: JobSpec, device_kind: DeviceKind) -> dict[str, Any]:
    """The same for the time of loading under stage 3, when weights are cut as they are read. The type in which frozen
    weights are kept can only be said in this way."""
    is_frozen = spec.method.type != "full"
    return deepspeed_config(spec, device_kind) | {
        "bf16": {"enabled": is_frozen and spec.compute.dtype == "bf16"},
    }


@dataclass(frozen=True)
class Loaded:
    """What of a model decides whether it can be cut up."""

    has_tower: bool = False  # parts that are not text
    has_experts: bool = False
    num_new_tokens: int = 0  # rows that it was not saved with

    @classmethod
    def of(cls, shape: Architecture | None, num_new_tokens: int = 0) -> "Loaded":
        if shape is None:
            return cls(num_new_tokens=num_new_tokens)
        return cls(shape.parameters.other > 0, shape.num_experts > 0, num_new_tokens)


def fault(spec: JobSpec, stage: Stage, offload: Offload, model: Loaded) -> UserError | None:  # noqa: PLR0911 (a list)
    """Why `spec` cannot run in this way, or has not been shown to be exact there; None where it can."""
    if stage == 0:
        return None if offload == "none" else UserError("zero.offload_stage", "parallel.offload", offload=offload)
    if spec.compute.dtype == "fp16":
        return UserError("zero.fp16", "compute.dtype", stage=stage)
    if stage < 3:
        is_possible = offload != "optimizer_and_params"
        return None if is_possible else UserError("zero.offload_params", "parallel.offload", stage=stage)
    if spec.method.type == "qlora":
        return UserError("zero.qlora", "parallel.zero_stage")
    if spec.method.type == "lora" and model.has_experts:
        return UserError("zero.experts", "parallel.zero_stage")
    if model.has_tower:
        return UserError("zero.vision", "parallel.zero_stage")
    if model.num_new_tokens:
        return UserError("zero.new_tokens", "parallel.zero_stage", num_tokens=model.num_new_tokens)
    if spec.compute.compile:
        return UserError("engine.compile_sharded", "compute.compile")
    return None


def refuse_unproven(spec: JobSpec, model: Loaded) -> None:
    """For a spec whose stage and offload are resolved. Raises what `fault` finds."""
    assert spec.parallel.zero_stage != "auto" and spec.parallel.offload != "auto"
    found = fault(spec, spec.parallel.zero_stage, spec.parallel.offload, model)
    if found is not None:
        raise found
