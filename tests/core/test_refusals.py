"""What is refused before launch: the same as the trainer refuses, with a fix that mends it or a reason why none can."""

import ast
from pathlib import Path
from string import Formatter
from typing import Any

import pytest

from core.architecture import Architecture
from core.errors import TEXTS, USER_FAULTS, UserError
from core.fix import applied, fixes_of
from core.preflight import plan_job
from core.profile import DataProfile, ModelProfile
from core.spec import parse_spec
from core.wire import Device
from core.zero import Loaded, fault
from tests.core.shapes import LLAMA_7B, llama
from tests.core.test_preflight import CPU, MODEL
from tests.core.test_verdict import cut_anywhere

GPU = Device(id="gpu0", kind="gpu", name="G", memory_bytes=80 * 10**9, has_bf16=True)
SMALL_GPU = GPU.model_copy(update={"name": "S", "memory_bytes": 3 * 10**9})
FACTS = cut_anywhere([100] * 30 + [400] * 3)
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DENSE = LLAMA_7B.model_copy(
    update={
        "linear": NAMES,
        "modules": ("embed_tokens", "input_layernorm", "layers", "lm_head", "mlp", "model", "self_attn", *NAMES),
    }
)
EXPERTS = LLAMA_7B.model_copy(
    update={
        "num_experts": 16,
        "experts_per_token": 2,
        "expert_size": 1024,
        "parameters": LLAMA_7B.parameters.model_copy(update={"mlp": 10**6, "experts": 4 * 10**9}),
    }
)
TOWER = LLAMA_7B.model_copy(update={"parameters": LLAMA_7B.parameters.model_copy(update={"other": 10**8})})
TIED = DENSE.model_copy(update={"has_tied_head": True})
LARGE = llama(hidden=2048, layers=16, heads=32, key_value_heads=8, intermediate=8192)
ADDS_TOKENS = FACTS.model_copy(update={"num_new_tokens": 2})


def model(shape: Architecture = DENSE, **more: Any) -> ModelProfile:
    return MODEL.model_copy(update={"shape": shape, **more})


def spec_of(parts: dict[str, Any]) -> dict[str, Any]:
    data = {"train": [{"dataset": "d"}], **parts.get("data", {})}
    return {**parts, "data": data}


def faults_of(
    spec: dict[str, Any], model: ModelProfile, device: Device = GPU, facts: DataProfile = FACTS
) -> tuple[UserError, ...]:
    try:
        plan_job(parse_spec(spec), {"d": facts}, model, device)
    except USER_FAULTS as found:
        return found.errors
    return ()


def zero(stage: int | str = "auto", offload: str = "auto", devices: int = 2) -> dict[str, Any]:
    return {"devices": devices, "zero_stage": stage, "offload": offload}


QLORA: dict[str, Any] = {"type": "qlora"}
FULL: dict[str, Any] = {"type": "full"}


# code, parts of a spec, model, device, facts
KNOWABLE: list[tuple[str, dict[str, Any], ModelProfile, Device, DataProfile]] = [
    ("zero.qlora", {"method": QLORA, "parallel": zero(3)}, model(), GPU, FACTS),
    ("zero.qlora", {"method": QLORA, "parallel": zero(offload="optimizer_and_params")}, model(), GPU, FACTS),
    ("zero.experts", {"parallel": zero(3)}, model(EXPERTS), GPU, FACTS),
    ("zero.vision", {"method": FULL, "parallel": zero(3)}, model(TOWER), GPU, FACTS),
    ("zero.new_tokens", {"method": FULL, "parallel": zero(3)}, model(), GPU, ADDS_TOKENS),
    ("zero.fp16", {"compute": {"dtype": "fp16"}, "parallel": zero(1)}, model(), GPU, FACTS),
    ("zero.fp16", {"compute": {"dtype": "fp16"}, "parallel": zero(offload="optimizer")}, model(), GPU, FACTS),
    ("zero.offload_stage", {"parallel": zero(0, "optimizer")}, model(), GPU, FACTS),
    ("zero.offload_params", {"method": FULL, "parallel": zero(2, "optimizer_and_params")}, model(), GPU, FACTS),
    ("engine.compile_sharded", {"compute": {"compile": True}, "parallel": zero(3)}, model(), GPU, FACTS),
    ("plan.offload_on_cpu", {"parallel": zero(2, "optimizer")}, model(), CPU, FACTS),
    ("plan.offload_on_cpu", {"parallel": zero(offload="optimizer_and_params")}, model(), CPU, FACTS),
    ("plan.flex_on_cpu", {"compute": {"attention": "flex"}}, model(), CPU, FACTS),
    ("plan.compile_on_cpu", {"compute": {"compile": True}}, model(), CPU, FACTS),
    ("engine.too_few_quantised", {"method": QLORA}, model(EXPERTS), GPU, FACTS),
    ("engine.fused_experts", {"method": {"type": "lora", "dropout": 0.1}}, model(EXPERTS), GPU, FACTS),
    ("engine.fused_experts", {"method": {"type": "lora", "use_dora": True}}, model(EXPERTS), GPU, FACTS),
    ("engine.unknown_module", {"method": {"target_modules": ["q_prj"]}}, model(), GPU, FACTS),
    ("engine.tied_target", {"method": {"target_modules": ["q_proj", "lm_head"]}}, model(TIED), GPU, FACTS),
    ("engine.no_targets", {"method": {"exclude_modules": list(NAMES)}}, model(), GPU, FACTS),
    ("plan.overlong_memory", {"data": {"max_length": 128}, "batch": {"micro_batch_size": 16},
                              "method": FULL, "optimizer": {"name": "adamw_8bit"}}, model(LARGE), SMALL_GPU, FACTS),
]  # fmt: skip


@pytest.mark.parametrize(("code", "parts", "model", "device", "facts"), KNOWABLE)
def test_what_cannot_run_is_refused_by_the_plan_and_each_fix_mends_it(
    code: str, parts: dict[str, Any], model: ModelProfile, device: Device, facts: DataProfile
) -> None:
    spec = spec_of(parts)
    found = {error.code: error for error in faults_of(spec, model, device, facts)}
    assert list(found) == [code]
    fixes = fixes_of(found[code])
    assert fixes
    for fix in fixes:
        mended = applied(parse_spec(spec), fix)
        assert code not in {error.code for error in faults_of(mended, model, device, facts)}, fix


def test_a_quantised_base_is_refused_and_a_person_has_to_choose_another() -> None:
    (error,) = faults_of(spec_of({}), model(quantisation="gptq"))
    assert (error.code, error.field) == ("engine.quantised_base", "model.base")
    assert "gptq" in error.text() and not fixes_of(error)


def test_all_that_is_wrong_is_told_at_once() -> None:
    parts = {
        "method": {"type": "qlora", "target_modules": ["q_prj", "vproj"]},
        "compute": {"compile": True, "attention": "flex"},
        "parallel": zero(3),
    }
    assert sorted(error.code for error in faults_of(spec_of(parts), model(), CPU)) == [
        "engine.unknown_module",
        "engine.unknown_module",
        "plan.compile_on_cpu",
        "plan.flex_on_cpu",
        "zero.qlora",
    ]


@pytest.mark.parametrize(
    ("parts", "shape"),
    [
        ({"method": {"exclude_modules": ["q_proj"], "modules_to_save": ["lm_head"]}}, TIED),
        ({"method": {"target_modules": ["self_attn.q_proj", "model.layers.3.mlp.up_proj"]}}, DENSE),
        ({"method": {"exclude_modules": ["layers.3"]}}, DENSE),
        ({"method": {"type": "lora", "dropout": 0.1, "exclude_modules": ["experts"]}}, EXPERTS),
        ({"method": {"type": "lora", "dropout": 0.1, "target_modules": ["q_proj"]}}, EXPERTS),
        ({"method": {"target_modules": ["whatever"]}}, EXPERTS),  # a mixture's names are the loaded model's
        ({"method": {"target_modules": ["whatever"]}}, LLAMA_7B),  # measured before names were noted
        ({"method": FULL, "parallel": zero(3, "optimizer_and_params")}, DENSE),
        ({"compute": {"dtype": "fp16"}, "method": FULL, "parallel": zero()}, DENSE),
    ],
)
def test_what_may_run_is_not_refused(parts: dict[str, Any], shape: Architecture) -> None:
    assert faults_of(spec_of(parts), model(shape)) == ()


@pytest.mark.parametrize(
    ("parts", "shape", "facts"),
    [
        ({"method": FULL}, DENSE, ADDS_TOKENS),
        ({"method": FULL, "compute": {"compile": True}}, DENSE, FACTS),
        ({"method": FULL}, TOWER, FACTS),
        ({"method": QLORA}, DENSE, FACTS),
        ({}, EXPERTS, FACTS),
        ({"method": FULL, "compute": {"dtype": "fp16"}}, DENSE, FACTS),
    ],
)
def test_auto_never_takes_a_way_that_is_refused(parts: dict[str, Any], shape: Architecture, facts: DataProfile) -> None:
    """On a device where memory alone would ask for stage 3."""
    spec = parse_spec(spec_of({**parts, "parallel": zero()}))
    plan = plan_job(spec, {"d": facts}, model(shape), SMALL_GPU)
    parallel = plan.spec.parallel
    assert parallel.zero_stage != "auto" and parallel.offload != "auto" and parallel.zero_stage < 3
    loaded = Loaded.of(shape, facts.num_new_tokens)
    assert fault(plan.spec, parallel.zero_stage, parallel.offload, loaded) is None


# -- every refusal has a fix, or a reason why a person has to think --------------------------------------------------

ROOT = Path(__file__).parents[2]
OF_A_SPEC = ("core/zero.py", "core/needs.py", "core/refusals.py", "core/prospects.py", "core/presets.py",
             "worker/engine/loading.py", "worker/engine/adapters.py", "worker/engine/quantisation.py",
             "worker/engine/model.py", "worker/engine/zero.py", "worker/engine/train.py")  # fmt: skip
A_PERSON_THINKS = {
    "engine.adapter_missing": "which adapter to start from is theirs to say",
    "engine.adapter_tokens": "the template of the adapter is not known here",
    "engine.adapter_unfit": "which adapter to start from is theirs to say",
    "engine.no_checkpoint": "starting over gives steps away",
    "engine.other_data": "starting over gives steps away",
    "engine.other_model": "starting over gives steps away",
    "engine.past_the_end": "how long to train is theirs to say",
    "engine.quantised_base": "another model has to be fetched",
    "engine.ranks": "the command that started it has to change, not the spec",
    "engine.untied": "which of the two layers was meant is theirs to say",
    "host.together": "what to do without is theirs to say",
    "host.unknown_device": "it is no part of the spec",
    "plan.above_context": "",
    "profile.no_device": "the host has to be mended, not the spec",
    "zero.other_cut": "the checkpoint asks for the devices that wrote it",
}
IN_ALL_CASES = {"engine.unknown_module": "method.target_modules", "engine.not_adaptable": "method.target_modules",
                "engine.tied_target": "method.target_modules", "engine.fused_experts": "method.dropout",
                "host.no_bitsandbytes": "optimizer.name"}  # fmt: skip


def codes_raised(path: str) -> set[str]:
    calls = (node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Call))
    names = {
        value.value
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "UserError"
        for value in ast.walk(call.args[0])
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    }
    return names & TEXTS.keys()


def test_every_refusal_of_a_spec_has_a_fix_or_a_stated_reason_why_a_person_must_think() -> None:
    raised = set().union(*map(codes_raised, OF_A_SPEC))
    assert len(raised) > 25, "the table reads the sources"
    for code in sorted(raised):
        numbers: dict[str, Any] = {
            name: 1 for _, name, _, _ in Formatter().parse(TEXTS[code]) if name and name != "field"
        }
        fixes = fixes_of(UserError(code, IN_ALL_CASES.get(code, ""), **numbers))
        assert bool(fixes) != (bool(A_PERSON_THINKS.get(code))), code
