"""QLoRA: what lies in 4 bits, what is refused, and that it trains as LoRA does over what the 4 bits stand for."""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import bnb
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from core.errors import UserError
from tests.engine import jobs, tiny
from worker.engine import loading, quantisation, result
from worker.engine.loss import logits_of
from worker.engine.model import LanguageModel, relative_difference
from worker.engine.weights import report_weights

METHOD = {"type": "qlora", "rank": 4, "alpha": 8}
# Rows longer than a block of 64, and not a multiple of it.
SIZES = {"hidden_size": 64, "intermediate_size": 176, "head_dim": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("llama"), **SIZES)


def quantised(model: LanguageModel) -> dict[str, Linear4bit]:
    return {name: layer for name, layer in model.base.named_modules() if isinstance(layer, Linear4bit)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_linear_layers_lie_in_4_bits_and_the_rest_in_the_jobs_type(folder: Path, dtype: str) -> None:
    model = tiny.load(folder, method=METHOD | {"modules_to_save": ["layers.0.mlp.up_proj"]}, compute={"dtype": dtype})
    layers = quantised(model)
    assert len(layers) == 2 * 7 - 1 and not any("lm_head" in name or "up_proj.orig" in name for name in layers)
    for layer in layers.values():
        assert layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested
        assert layer.compute_dtype == layer.weight.quant_state.dtype == model.dtype
        assert not layer.support_avx512bf16_for_cpu, "else it stops learning behind the first evaluation"
    report = report_weights(model.model)
    own = str(model.dtype).removeprefix("torch.")
    assert report.weight_bytes.keys() == {"nf4", "float32", own}
    # Half a byte, and a byte of scale for 64 of them; the rest is rounding up.
    assert 0.5 + 1 / 64 <= report.weight_bytes["nf4"] / report.quantised < 0.53
    assert report.quantised == sum(layer.in_features * layer.out_features for layer in layers.values())
    assert report.total - report.trainable == tiny.tiny_base(**SIZES).num_parameters()
    frozen = [weight for weight in model.model.parameters() if not weight.requires_grad and weight.dtype != torch.uint8]
    assert frozen and all(weight.dtype == model.dtype for weight in frozen), "norms and embeddings are not widened"
    assert all(weight.dtype == torch.float32 for weight in model.trainable().values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_it_learns_as_lora_over_what_the_4_bits_stand_for(tmp_path: Path, family: str) -> None:
    """Loss and gradient, packed and padded: the base's numbers are all that quantising may change."""
    folder = tiny.save_base(tmp_path / "base", family)
    model = tiny.load(folder, method=METHOD)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    changed = 0.0
    for name, layer in quantised(model).items():
        stands_for = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        own = plain.get_submodule(name.replace(".base_layer", "")).weight
        stands_for = stands_for.T if family == "gpt2" else stands_for
        changed = max(changed, relative_difference(own.detach(), stands_for))
        own.data = stands_for.contiguous()
    assert 0.02 < changed < 0.2, "4 bits are coarse, and nothing worse"
    plain.save_pretrained(tmp_path / "stands for")
    other = tiny.load(tmp_path / "stands for", method=METHOD | {"type": "lora"})
    for own, same in zip(model.trainable().values(), other.trainable().values(), strict=True):
        same.data = torch.randn_like(own) * 0.1
        own.data = same.data.clone()
    loss, gradient = tiny.gradients(model, tiny.step_of(tiny.some_samples()))
    for mode in ("packed", "padded"):
        other_loss, other_gradient = tiny.gradients(other, tiny.step_of(tiny.some_samples(), mode, 80, 1))
        assert loss == pytest.approx(other_loss, rel=1e-5)
        assert tiny.difference(gradient, other_gradient) < 1e-5


def test_it_still_learns_behind_an_evaluation(folder: Path) -> None:
    model = tiny.load(folder, method=METHOD)
    step = tiny.step_of(tiny.some_samples())
    _, before = tiny.gradients(model, step)
    model.model.eval()
    logits_of(model, step.batches[0])
    model.model.train()
    _, after = tiny.gradients(model, step)
    assert tiny.norm(before) > 0 and tiny.difference(before, after) == 0


def test_a_mixture_that_would_not_shrink_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save_base(tmp_path / "base", "mixtral", num_local_experts=4, num_experts_per_tok=2)
    monkeypatch.setattr(loading, "open_model", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(UserError) as error:
        tiny.load(folder, method=METHOD)
    assert error.value.code == "engine.too_few_quantised" and error.value.field == "method.type"
    share = error.value.parameters["share"]
    assert isinstance(share, float) and share < 0.2
    assert "experts.gate_up_proj" in error.value.text() and "method.type lora" in error.value.text()


def test_a_small_model_is_not_refused_for_its_embeddings() -> None:
    """demo/tiny-llama's sizes: 58 % of all its weights are in linear layers, and all that bitsandbytes can have."""
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 4096}
    config = tiny.tiny_config("llama", **sizes, head_dim=32, tie_word_embeddings=True)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    method = tiny.spec_of(method=METHOD).method
    plan = quantisation.plan_quantisation(skeleton, method, torch.float32)
    assert plan.llm_int8_skip_modules == ["lm_head"]
    linear = sum(weight.numel() for name, weight in skeleton.named_parameters() if "proj" in name)
    assert linear < quantisation.LEAST_QUANTISED * skeleton.num_parameters()


def test_a_base_that_was_quantised_before_is_refused_under_every_method(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    for kind in ("qlora", "lora", "full"):
        with pytest.raises(UserError) as error:
            tiny.load(folder, method={"type": kind})
        assert error.value.code == "engine.quantised_base" and "gptq" in error.value.text()


@pytest.mark.parametrize("method", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_adapter_merges_into_what_the_4_bits_stand_for(
    folder: Path, tmp_path: Path, method: dict, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.load(folder, method=METHOD | method, compute={"dtype": dtype})
    with torch.no_grad():
        for name, weight in model.trainable().items():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    model.model.eval()
    model.model.save_pretrained(tmp_path / "result", save_embedding_layers=False)
    spec_method = tiny.spec_of(method=METHOD).method
    result.verify_adapter(tmp_path / "result", model, folder, spec_method)
    real = bnb.Linear4bit.get_delta_weight
    monkeypatch.setattr(bnb.Linear4bit, "get_delta_weight", lambda *given: real(*given) * 1.05)
    with pytest.raises(result.BrokenResult, match="merged, differs"):
        result.verify_adapter(tmp_path / "result", model, folder, spec_method)


def test_a_job_killed_and_resumed_makes_the_same_adapter_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = jobs.make_model(tmp_path / "model", **SIZES), jobs.make_data(tmp_path / "rows.jsonl")
    parts = {"method": METHOD | {"dropout": 0.1}}
    whole = jobs.make_job(tmp_path / "whole", model, data, **parts)
    assert jobs.run(whole, monkeypatch) == 0
    (plan,) = jobs.events_of(whole, "plan")
    assert plan["quantised_parameters"] > 0.5 * plan["total_parameters"]
    assert plan["weight_bytes"]["nf4"] < plan["quantised_parameters"]
    assert sum(plan["trainable_by_kind"].values()) == plan["trainable_parameters"]
    losses = [event["loss"] for event in jobs.events_of(whole, "step")]
    assert losses[-1] < losses[0]

    broken = jobs.make_job(tmp_path / "broken", model, data, **parts)
    with pytest.raises(jobs.Killed):
        jobs.run(broken, monkeypatch, jobs.kill_before(5))
    (newest, *_) = sorted((broken / "checkpoints").glob("step-*"), reverse=True)
    assert newest.name == "step-4"
    saved = load_file(newest / "weights.safetensors")
    assert saved and all("lora_" in name for name in saved), "the base is quantised again, the same way"
    assert jobs.run(broken, monkeypatch) == 0
    assert [event["loss"] for event in jobs.events_of(broken, "step")][-2:] == losses[-2:]
    first, second = (load_file(job / "result/adapter_model.safetensors") for job in (whole, broken))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert "4 bits" in (whole / "result/README.md").read_text()

    # One that starts from it goes on where it ended.
    on = jobs.make_job(tmp_path / "on", model, data, **parts, model={"adapter": str(whole / "result")})
    inputs = json.loads((on / "inputs.json").read_text()) | {"adapter_path": str(whole / "result")}
    (on / "inputs.json").write_text(json.dumps(inputs))
    assert jobs.run(on, monkeypatch) == 0
    assert jobs.events_of(on, "step")[0]["loss"] < losses[0]
    save_file({"other": torch.zeros(1)}, whole / "result/adapter_model.safetensors")
    (on / "outcome.json").unlink()
    assert jobs.run(on, monkeypatch) == 65
    assert "does not fit" in jobs.outcome_of(on).text
