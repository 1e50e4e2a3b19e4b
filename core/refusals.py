"""What a spec asks for and its model, or every device of that kind, cannot do, whatever the data are.

The trainer finds the same, later: `plan_job` begins with these refusals wherever it runs, so a form, a script and a
dry run hear of them before anything is launched. What only the loaded model tells is left to the trainer: whether a
given attention runs, whether packed samples see each other, whether layers can be told apart to be compiled.
"""

from collections.abc import Iterator, Sequence

from core.architecture import ROUTERS, Architecture
from core.errors import UserError, UserErrors
from core.memory import BYTES
from core.needs import needs_of, on_cpu
from core.placement import impossible
from core.profile import ModelProfile
from core.spec import Adapter, JobSpec
from core.wire import Device
from core.zero import Loaded

# Of a decoder's weights outside of embeddings and head: with fewer in 4 bits QLoRA is refused (why, says
# worker.engine.quantisation).
LEAST_QUANTISED = 0.8


def refuse(spec: JobSpec, model: ModelProfile, device: Device, loaded: Loaded) -> None:
    """Raises UserErrors with everything that can be known of this spec, model and kind of device."""
    faults = [*faults_of_model(spec, model, loaded), *_faults_of_device(spec, device)]
    if faults:
        raise UserErrors(faults)


def faults_of_model(spec: JobSpec, model: ModelProfile, loaded: Loaded) -> Iterator[UserError]:
    """Whatever it runs on."""
    yield from _of_model(spec, model)
    found = impossible(spec, loaded)
    if found is not None:
        yield found


def _faults_of_device(spec: JobSpec, device: Device) -> Iterator[UserError]:
    if device.kind == "cpu":
        yield from (on_cpu(need.field, need.value) for need in needs_of(spec) if need.feature == "gpu")


def _of_model(spec: JobSpec, model: ModelProfile) -> Iterator[UserError]:
    if model.quantisation is not None:
        yield UserError("engine.quantised_base", "model.base", kind=model.quantisation)
        return
    shape, method = model.shape, spec.method
    if shape is None or not isinstance(method, Adapter):
        return
    yield from _of_modules(shape, method)
    if not shape.num_experts:
        return
    if _adapts_experts(method):
        for knob, is_set in (("method.dropout", method.dropout > 0), ("method.use_dora", method.use_dora)):
            if is_set:
                yield UserError("engine.fused_experts", knob, knob=knob)
    if method.type == "qlora":
        yield from _of_quantised_experts(shape, BYTES["bf16" if spec.compute.dtype == "auto" else spec.compute.dtype])


# -- experts ---------------------------------------------------------------------------------------------------------


def _adapts_experts(method: Adapter) -> bool:
    left_out = {*_last(method.exclude_modules), *_last(method.modules_to_save)}
    if method.target_modules == "all-linear":
        return "experts" not in left_out and not left_out >= EXPERTS
    return bool(({"experts", *EXPERTS} & set(_last(method.target_modules))) - left_out)


# As transformers names the tensors that hold all experts of a layer.
EXPERTS = frozenset({"gate_up_proj", "down_proj"})


def _of_quantised_experts(shape: Architecture, bytes_kept: int) -> Iterator[UserError]:
    """Experts that share one tensor stay as they are. Layers of no known kind, which may belong to a tower, count as
    quantised, so that no more is refused than the trainer refuses."""
    parts = shape.parameters
    quantised = parts.attention + parts.mlp + parts.other
    kept = parts.experts + parts.norms
    share = quantised / (quantised + kept)
    if share < LEAST_QUANTISED:
        yield UserError(
            "engine.too_few_quantised",
            "method.type",
            share=share,
            least=LEAST_QUANTISED,
            num_kept=kept,
            kept="experts",
            num_bytes=quantised // 2 + bytes_kept * kept,
        )


# Head and embedding, as families name them.
VOCABULARY = frozenset({"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "lm_head", "embed_out"})


# -- modules by name -------------------------------------------------------------------------------------------------


def _of_modules(shape: Architecture, method: Adapter) -> Iterator[UserError]:
    """By the last part of each name. The files of a mixture name its experts otherwise than the loaded model does, so
    there it is left to the trainer."""
    if not shape.modules or shape.num_experts:
        return
    known = {*shape.modules, "lm_head"}  # a head that is tied has no tensor of its own
    linear = [name for name in shape.linear if name not in ROUTERS]
    asked = () if method.target_modules == "all-linear" else method.target_modules
    fields = (
        ("method.exclude_modules", method.exclude_modules),
        ("method.modules_to_save", method.modules_to_save),
        ("method.target_modules", asked),
    )
    unknown = [
        UserError("engine.unknown_module", field, name=name, known=", ".join(linear))
        for field, names in fields
        for name in names
        if not (last := name.rpartition(".")[2]).isdigit() and last not in known
    ]
    yield from unknown
    if unknown:
        return
    left_out = {*method.exclude_modules, *method.modules_to_save}
    candidates = set(asked) or set(linear)
    if candidates and candidates <= left_out:
        yield UserError("engine.no_targets", "method.exclude_modules")
    tied = [name for name in asked if name.rpartition(".")[2] in VOCABULARY and name not in left_out]
    if shape.has_tied_head and tied:
        yield UserError("engine.tied_target", "method.target_modules", names=", ".join(sorted(tied)))


def _last(names: Sequence[str]) -> list[str]:
    return [name.rpartition(".")[2] for name in names]
