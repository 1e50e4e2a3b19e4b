"""What a knob means for the job at hand: the figures that stand above its page, all taken from the job's plan."""

from collections.abc import Iterator

from core.curve_report import report_curve
from core.errors import Parameter, Reason
from core.memory import MemoryPlan, count_adapter_parameters, estimate_memory
from core.placement import load_of, size
from core.preflight import JobPlan
from core.spec import Adapter, AnyMethod, Full, Lora, Qlora
from core.verdict import saved_by_whole

# Of a textbook's data parallelism, each stage's communication.
COMMUNICATION = {0: "1.0", 1: "1.0", 2: "1.0", 3: "1.5"}


def figures(knob: str, plan: JobPlan) -> tuple[Reason, ...]:
    """None where the plan has nothing to say of it: a model whose sizes are not known."""
    match knob:
        case "packing":
            return tuple(_of_packing(plan))
        case "zero":
            return tuple(_of_stages(plan))
        case "warmup":
            return tuple(_of_warmup(plan))
        case "lora" | "qlora" | "full":
            return tuple(_of_methods(plan))
        case "attention":
            return tuple(_of_attention(plan))
        case "optimizer":
            return tuple(_of_moments(plan))
    raise AssertionError(f"{knob} is no knob")


def _of_packing(plan: JobPlan) -> Iterator[Reason]:
    mine = plan.packing.mine
    said: dict[str, Parameter] = {
        "slots": mine.slots,
        "padded_slots": mine.padded_slots,
        "efficiency": f"{mine.padding_efficiency:.1%}",
        "padded_efficiency": f"{mine.padded_efficiency:.1%}",
    }
    yield Reason("knob.packing", said)
    saved = saved_by_whole(plan.all_counts)
    if saved is not None:
        yield saved


def _of_stages(plan: JobPlan) -> Iterator[Reason]:
    memory = plan.memory
    if memory.num_ranks == 1:
        yield Reason("knob.zero_one_device", {})
        return
    if memory.chosen is None:
        return
    recompute = memory.chosen.gradient_checkpointing
    for way in memory.ways:
        if way.offload != "none" or way.gradient_checkpointing != recompute or way.plan is None:
            continue
        code = "knob.zero_fits" if way.fits else "knob.zero_too_large"
        said: dict[str, Parameter] = {
            "stage": way.zero_stage,
            "size": size(way.plan.total),
            "device": size(memory.available_bytes),
            "communication": COMMUNICATION[way.zero_stage],
        }
        yield Reason(code, said)


def _of_warmup(plan: JobPlan) -> Iterator[Reason]:
    curve = report_curve(plan)
    if curve.warmup_steps:
        said: dict[str, Parameter] = {
            "warmup_steps": curve.warmup_steps,
            "total_steps": curve.total_steps,
            "peak": f"{curve.peak:g}",
            "tokens": curve.warmup_tokens,
        }
        yield Reason("knob.warmup", said)


def _of_methods(plan: JobPlan) -> Iterator[Reason]:
    shape, method = plan.known_shape, plan.spec.method
    if shape is None:
        return
    adapter = method if isinstance(method, Adapter) else Lora()
    trained = count_adapter_parameters(shape, adapter)
    said: dict[str, Parameter] = {
        "rank": adapter.rank,
        "trained": trained,
        "total": shape.parameters.total,
        "share": f"{trained / shape.parameters.total:.2%}",
    }
    yield Reason("knob.adapter", said)
    sizes: dict[str, Parameter] = {each.type: size(_with_method(plan, each).total) for each in _ways_to_train(adapter)}
    yield Reason("knob.methods", {**sizes, "stage": plan.spec.parallel.zero_stage})


def _ways_to_train(adapter: Lora | Qlora) -> tuple[AnyMethod, ...]:
    shared = adapter.model_dump(exclude={"type"})
    return Full(), Lora.model_validate(shared), Qlora.model_validate(shared)


def _with_method(plan: JobPlan, method: AnyMethod) -> MemoryPlan:
    """Of one device, everything else as it is planned."""
    shape, spec, chosen = plan.known_shape, plan.spec, plan.memory.chosen
    assert shape is not None and chosen is not None
    way = (chosen.zero_stage, chosen.offload, chosen.gradient_checkpointing)
    compute = spec.compute
    return estimate_memory(
        load_of(
            spec.model_copy(update={"method": method}),
            shape,
            plan.device,
            plan.largest,
            way,
            dtype=compute.dtype,
            attention=compute.attention,
        )
    )


def _of_attention(plan: JobPlan) -> Iterator[Reason]:
    sizes: dict[str, Parameter] = {path: size(memory.total) for path, memory in plan.memory.by_attention.items()}
    if sizes:
        yield Reason("knob.attention", {"tokens": plan.largest.longest_row, **sizes})


def _of_moments(plan: JobPlan) -> Iterator[Reason]:
    chosen = plan.memory.chosen
    if chosen is not None and chosen.plan is not None:
        terms = chosen.plan.terms
        said: dict[str, Parameter] = {"moments": size(terms["moments"]), "total": size(chosen.plan.total)}
        yield Reason("knob.moments", said)
