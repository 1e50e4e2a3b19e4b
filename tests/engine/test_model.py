from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from core.errors import UserError
from tests.engine import tiny
from worker.engine.adapters import linear_layers
from worker.engine.loss import logits_of

ALL_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("llama"))


def adapted(model: object) -> set[str]:
    """Last names of the layers that have an adapter."""
    return {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name in model.trainable() if ".lora_A" in name}


def test_all_linear_means_all_but_the_head(folder: Path) -> None:
    model = tiny.load(folder, method={"type": "lora", "rank": 4})
    assert adapted(model) == ALL_LINEAR
    assert all("lora_" in name for name in model.trainable())
    assert len(model.trainable()) == 2 * len(linear_layers(model.base.__class__(model.base.config)))


def test_gpt2s_layers_are_found_though_they_are_no_linear_ones(tmp_path: Path) -> None:
    model = tiny.load(tiny.save_base(tmp_path, "gpt2"), method={"type": "lora", "rank": 4})
    assert adapted(model) == {"c_attn", "c_proj", "c_fc"}
    _, gradient = tiny.gradients(model, tiny.step_of(tiny.some_samples()))
    assert tiny.norm(gradient) > 0


def test_routers_of_experts_get_no_adapter(tmp_path: Path) -> None:
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = tiny.load(tiny.save_base(tmp_path, "mixtral", **changes), method={"type": "lora", "rank": 4})
    assert adapted(model) and not {"gate", "router"} & adapted(model)


def test_targets_and_exclusions_are_taken_by_name(folder: Path) -> None:
    method = {"type": "lora", "rank": 4, "target_modules": ["q_proj", "layers.0.mlp.up_proj"]}
    names = [name for name in tiny.load(folder, method=method).trainable() if "lora_A" in name]
    assert len(names) == 3 and sum("up_proj" in name for name in names) == 1
    method = {"type": "lora", "rank": 4, "exclude_modules": ["mlp.up_proj", "v_proj"]}
    assert adapted(tiny.load(folder, method=method)) == ALL_LINEAR - {"up_proj", "v_proj"}


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save"])
def test_a_name_that_no_layer_bears_is_refused_with_those_there_are(folder: Path, field: str) -> None:
    with pytest.raises(UserError) as error:
        tiny.load(folder, method={"type": "lora", "rank": 4, field: ["q_proj", "vproj"]})
    assert error.value.field == f"method.{field}" and "vproj" in str(error.value) and "v_proj" in str(error.value)


def test_excluding_everything_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="no layer is left"):
        tiny.load(folder, method={"type": "lora", "target_modules": ["q_proj"], "exclude_modules": ["q_proj"]})


def test_modules_to_save_are_trained_in_full_beside_the_adapters(folder: Path) -> None:
    model = tiny.load(folder, method={"type": "lora", "rank": 4, "modules_to_save": ["lm_head", "embed_tokens"]})
    whole = {name: weight.shape for name, weight in model.trainable().items() if "lora_" not in name}
    assert sorted(whole.values()) == [(tiny.VOCABULARY, 32)] * 2
    _, gradient = tiny.gradients(model, tiny.step_of(tiny.some_samples()))
    assert all(gradient[name].any() for name in whole)


def test_rank_alpha_and_rslora_scale_the_adapter(folder: Path) -> None:
    def scaling(**method: object) -> float:
        model = tiny.load(folder, method={"type": "lora", "rank": 16, "alpha": 8, **method})
        return next(module.scaling["default"] for module in model.base.modules() if hasattr(module, "lora_A"))

    assert scaling() == 0.5
    assert scaling(use_rslora=True) == 2.0


def test_dora_trains_a_magnitude_too(folder: Path) -> None:
    model = tiny.load(folder, method={"type": "lora", "rank": 4, "use_dora": True})
    assert any("magnitude" in name for name in model.trainable())


def test_training_goes_on_from_an_adapter_and_says_whose_rank_counts(folder: Path, tmp_path: Path) -> None:
    first = tiny.load(folder, method={"type": "lora", "rank": 4, "alpha": 8})
    with torch.no_grad():
        for name, weight in first.trainable().items():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    first.model.save_pretrained(tmp_path, save_embedding_layers=False)
    batch = tiny.step_of(tiny.some_samples()).batches[0]
    second = tiny.load(folder, method={"type": "lora", "rank": 16}, model={"adapter": str(tmp_path)})
    torch.testing.assert_close(logits_of(first, batch), logits_of(second, batch), rtol=0, atol=0)
    assert second.trainable().keys() == first.trainable().keys()
    ((code, text),) = second.warnings
    assert code == "adapter" and "rank 4" in text and "method.rank 16" in text
    with pytest.raises(UserError) as error:
        tiny.load(folder, model={"adapter": str(tmp_path / "nowhere")})
    assert error.value.code == "engine.adapter_missing"


def test_a_head_that_is_more_than_config_says_falls_back_to_the_models_own_forward(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    plain = tiny.load(folder, method={"type": "full"})
    real = LlamaForCausalLM.forward

    def doubled(self: nn.Module, *args: object, **named: object) -> object:
        output = real(self, *args, **named)
        output.logits = 2 * output.logits  # a scale that no key of the config tells of
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    model = tiny.load(folder, method={"type": "full"})
    assert not model.computes_head_apart and [code for code, _ in model.warnings] == ["head"]
    batch = tiny.step_of(tiny.some_samples()).batches[0]
    torch.testing.assert_close(logits_of(model, batch), 2 * logits_of(plain, batch))
    loss, gradient = tiny.gradients(model, tiny.step_of(tiny.some_samples()))
    split_loss, split = tiny.gradients(model, tiny.step_of(tiny.some_samples(), "padded", 60, 4))
    assert loss == pytest.approx(split_loss, rel=1e-5) and tiny.difference(gradient, split) < 1e-5


# Dynamo looks at it to see whether it is there, and means to hide what that says.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_compute_the_same(tmp_path: Path) -> None:
    # (Dropout, if next to none: else its layers would be fused already, which a job that is compiled leaves to torch.)
    method, compute = {"type": "lora", "rank": 4, "dropout": 1e-9}, {"gradient_checkpointing": True}
    model = tiny.load(tiny.save_base(tmp_path, num_hidden_layers=1), method=method, compute=compute)
    steps = [tiny.step_of(tiny.some_samples(count), "packed", 80, rows) for count, rows in ((5, 1), (8, 2))]
    plain = [tiny.gradients(model, step) for step in steps]
    counters.clear()
    # Traced, cut and differentiated as on a GPU, but run by torch: what g++ would make takes minutes to make.
    model.compile_layers(lambda code, text: None, backend="aot_eager")
    for (loss, gradient), step in zip(plain, steps, strict=True):
        compiled_loss, compiled = tiny.gradients(model, step)
        assert compiled_loss == pytest.approx(loss, rel=1e-5) and tiny.difference(gradient, compiled) < 1e-5
    assert counters["stats"]["unique_graphs"] >= 4, "compiled under checkpointing too"
    (outside,) = counters["graph_break"]
    assert "segmented_attention" in outside, "and nothing else"


def test_a_model_whose_layers_cannot_be_told_apart_is_not_compiled(folder: Path) -> None:
    model = tiny.load(folder, method={"type": "full"})
    model.base._no_split_modules = None
    with pytest.raises(UserError) as error:
        model.compile_layers(lambda code, text: None, backend="aot_eager")
    assert error.value.code == "engine.no_layers" and error.value.field == "compute.compile"
