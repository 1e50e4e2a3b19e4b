"""The memory plan against the engine itself: PEFT's adapters counted, and the engine's passes without memory."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from bench.memory import LLAMA, plan_of, simulate
from core.memory import count_adapter_parameters
from core.spec import Adapter, parse_spec
from tests.engine import tiny
from worker.engine.models import profile_model

SAMPLES = [96, 160]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2"])
def test_adapters_are_counted_as_peft_makes_them(family: str, tmp_path: Path) -> None:
    shape = profile_model(tiny.save_base(tmp_path, family), "it").shape
    assert shape is not None
    for parts in ({}, {"target_modules": ["q_proj", "v_proj"]}, {"exclude_modules": ["down_proj"]}):
        method = {"type": "lora", "rank": 4, **parts}
        model = tiny.load(tmp_path, method=method)
        spec = tiny.spec_of(method=method)
        assert isinstance(spec.method, Adapter)
        trained = sum(weight.numel() for weight in model.trainable().values())
        assert count_adapter_parameters(shape, spec.method) == trained


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_simulated_step_takes_what_was_planned(checkpointing: bool) -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=3, **LLAMA | {"vocab_size": 1024})
    compute = {"dtype": "bf16", "gradient_checkpointing": checkpointing}
    spec = parse_spec({"data": {"train": [{"dataset": "d"}]}, "method": {"type": "full"}, "compute": compute})
    simulated, shape = simulate(config, spec, SAMPLES)
    plan = plan_of(shape, spec, SAMPLES)
    # Beside the weights lie a few buffers, beside the moments the counts of steps.
    assert simulated.weights == pytest.approx(plan.terms["weights"], rel=1e-5)
    assert simulated.moments == pytest.approx(plan.terms["moments"], rel=1e-5)
    assert simulated.passing > 0
    assert plan.total - plan.terms["process"] == pytest.approx(simulated.total, rel=0.1)


@pytest.mark.filterwarnings("ignore:Module is None")  # of the tracker, which knows no hook for an expert
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_experts_with_adapters_are_planned_with_the_copies_that_the_graph_keeps(checkpointing: bool) -> None:
    """Without these the plan of this mixture was a fifth too low."""
    sizes = LLAMA | {"vocab_size": 1024, "moe_intermediate_size": 768, "num_experts": 16, "num_experts_per_tok": 4}
    config = AutoConfig.for_model("qwen3_moe", num_hidden_layers=2, **sizes)
    compute = {"dtype": "bf16", "gradient_checkpointing": checkpointing}
    spec = parse_spec({"data": {"train": [{"dataset": "d"}]}, "method": {"type": "lora"}, "compute": compute})
    simulated, shape = simulate(config, spec, SAMPLES)
    plan = plan_of(shape, spec, SAMPLES)
    layers = 1 if checkpointing else 2
    assert plan.terms["casts"] == 2 * layers * 16 * 3 * 768 * 2048 > 0.15 * simulated.total
    assert plan.total - plan.terms["process"] == pytest.approx(simulated.total, rel=0.1)
