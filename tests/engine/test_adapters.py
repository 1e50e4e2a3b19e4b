"""What gets an adapter, in models whose layers are not all alike."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from core.errors import UserError
from tests.engine import tiny
from worker.engine import result
from worker.engine.adapters import is_tied
from worker.engine.batches import Batch
from worker.engine.loading import open_model, read_config
from worker.engine.loss import logits_of
from worker.engine.model import LanguageModel, quiet_libraries, relative_difference

NUM_EXPERTS, PER_TOKEN = 4, 2
# Of the first two the first layer is dense, and its layers bear the names that experts had in older releases.
MIXTURES: dict[str, dict] = {
    "qwen3_moe": {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 24, "mlp_only_layers": [0]},
    "deepseek_v3": {"n_routed_experts": NUM_EXPERTS, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
    | {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
    | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    "mixtral": {"num_local_experts": NUM_EXPERTS},
    "olmoe": {"num_experts": NUM_EXPERTS},
    "gpt_oss": {"num_local_experts": NUM_EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtures")
    for family, changes in MIXTURES.items():
        tiny.save_base(folder / family, family, num_experts_per_tok=PER_TOKEN, **changes)
    return folder


def batch() -> Batch:
    return tiny.step_of(tiny.some_samples()).batches[0]


def ranks(model: LanguageModel) -> dict[str, set[int]]:
    """Of the adapters by the layer's own name; an expert's is its part of the shared tensor's."""
    found: dict[str, set[int]] = {}
    for name, layer in model.base.named_modules():
        if "default" in getattr(layer, "lora_A", {}):
            kind = name.replace(".base_layer", "").rsplit(".", 1)[-1]
            rows = layer.lora_A["default"].weight.shape[0]
            found.setdefault(kind, set()).add(rows // getattr(layer, "num_experts", 1))
    return found


@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_gets_its_share_of_the_rank_and_routers_get_nothing(mixtures: Path, family: str) -> None:
    model = tiny.load(mixtures / family, method={"type": "lora", "rank": 8})
    found = ranks(model)
    assert found.pop("experts") == {8 // PER_TOKEN}
    assert found and all(rank == {8} for rank in found.values()), found
    if "mlp_only_layers" in MIXTURES[family] or "first_k_dense_replace" in MIXTURES[family]:
        assert {"gate_proj", "up_proj", "down_proj"} <= found.keys(), "a dense layer is no expert"
    assert not any("lora_" not in name or "router" in name or ".gate." in name for name in model.trainable())
    ((code, text),) = model.warnings
    assert code == "experts" and f"{NUM_EXPERTS} experts" in text and "rank 4" in text
    # The same gradient whatever the layout, in the experts too.
    _, packed = tiny.gradients(tiny.moved(model), tiny.step_of(tiny.some_samples()))
    _, padded = tiny.gradients(model, tiny.step_of(tiny.some_samples(), "padded", 60, 4))
    assert any("experts" in name and grad.any() for name, grad in packed.items())
    assert tiny.difference(packed, padded) < 1e-5


@pytest.mark.parametrize(("family", "dtype"), [(family, "fp32") for family in MIXTURES] + [("qwen3_moe", "bf16")])
def test_an_adapter_on_experts_is_read_back_by_anyone_and_merges(
    mixtures: Path, tmp_path: Path, family: str, dtype: str
) -> None:
    method = {"type": "lora", "rank": 8}
    model = tiny.moved(tiny.load(mixtures / family, method=method, compute={"dtype": dtype}))
    model.model.save_pretrained(tmp_path / "result", save_embedding_layers=False)
    result.verify_adapter(tmp_path / "result", model, mixtures / family, tiny.spec_of(method=method).method)
    if dtype == "fp32":
        base = open_model(mixtures / family, read_config(mixtures / family), dtype=torch.float32)
        before = logits_of(result.as_trained(base, model), batch())
        with quiet_libraries():
            fresh = PeftModel.from_pretrained(base, tmp_path / "result")
        again = logits_of(result.as_trained(fresh, model), batch())
        applied = logits_of(model, batch())
        assert relative_difference(before, applied) > 0.05
        assert relative_difference(applied, again) < 1e-5


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_checkpointed_layers_give_the_same_gradient_in_the_experts_too(mixtures: Path, dtype: str) -> None:
    def gradient(checkpointing: bool) -> dict[str, torch.Tensor]:
        compute = {"dtype": dtype, "gradient_checkpointing": checkpointing}
        model = tiny.load(mixtures / "qwen3_moe", method={"type": "lora", "rank": 8}, compute=compute)
        for weight in model.trainable().values():
            weight.data = weight.data + 0.1
        return tiny.gradients(model, tiny.step_of(tiny.some_samples()))[1]

    kept, made_again = gradient(False), gradient(True)
    assert all(grad.any() for name, grad in kept.items() if "experts" in name)
    assert tiny.difference(kept, made_again) == 0


def test_what_cannot_act_on_experts_is_refused_and_experts_can_be_left_out(mixtures: Path) -> None:
    folder = mixtures / "qwen3_moe"
    for change in ({"dropout": 0.1}, {"use_dora": True}):
        with pytest.raises(UserError, match="cannot act on experts") as error:
            tiny.load(folder, method={"type": "lora", "rank": 4, **change})
        assert error.value.field == f"method.{next(iter(change))}"
    attention_alone = ["experts", "gate_proj", "up_proj", "down_proj"]
    model = tiny.load(folder, method={"type": "lora", "rank": 4, "dropout": 0.1, "exclude_modules": attention_alone})
    assert ranks(model).keys() == {"q_proj", "k_proj", "v_proj", "o_proj"} and model.warnings == []
    model = tiny.load(folder, method={"type": "lora", "rank": 4, "target_modules": ["experts.gate_up_proj"]})
    assert ranks(model) == {"experts": {2}}


def test_full_fine_tuning_of_a_mixture_says_what_is_not_in_its_loss(mixtures: Path, tmp_path: Path) -> None:
    model = tiny.load(mixtures / "mixtral", method={"type": "full"})
    ((code, text),) = model.warnings
    assert code == "routers" and "without a balancing loss" in text
    assert any(".gate." in name or "router" in name for name in model.trainable())
    tiny.moved(model)
    model.base.save_pretrained(tmp_path / "result")
    result.verify_model(tmp_path / "result", model)
    names = load_file(tmp_path / "result/model.safetensors").keys()
    assert names == load_file(mixtures / "mixtral/model.safetensors").keys(), "as it came: expert by expert"
    assert any("experts.0." in name for name in names)


@pytest.mark.parametrize("saved", ["wte", "lm_head"])
def test_a_tied_head_stays_one_with_its_embedding_though_peft_does_not_know_its_name(
    tmp_path: Path, saved: str
) -> None:
    folder = tiny.save_base(tmp_path / "base", "gpt2")
    model = tiny.moved(tiny.load(folder, method={"type": "lora", "rank": 4, "modules_to_save": [saved]}))
    assert is_tied(model.base)
    (whole,) = [weight for name, weight in model.trainable().items() if "lora_" not in name]
    assert whole.shape == (tiny.VOCABULARY, 32)
    model.model.save_pretrained(tmp_path / "result", save_embedding_layers=False)
    result.verify_adapter(tmp_path / "result", model, folder, tiny.spec_of().method)


def test_an_adapter_on_one_of_two_tied_layers_is_refused(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path / "base", "gpt2")
    with pytest.raises(UserError, match="shares its weight"):
        tiny.load(folder, method={"type": "lora", "target_modules": ["wte", "c_attn"]})


def test_a_layer_that_is_no_matrix_bears_no_adapter(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path / "base")
    with pytest.raises(UserError, match=r"model\.norm is a LlamaRMSNorm, which can bear no adapter"):
        tiny.load(folder, method={"type": "lora", "target_modules": ["model.norm", "q_proj"]})


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    first = tiny.load(tiny.save_base(tmp_path / "first"), method={"type": "lora", "rank": 4})
    first.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    others = {"wider": {"hidden_size": 64}, "shallower": {"num_hidden_layers": 1}}
    for name, changes in others.items():
        with pytest.raises(UserError) as error:
            tiny.load(tiny.save_base(tmp_path / name, **changes), model={"adapter": str(tmp_path / "adapter")})
        assert error.value.code == "engine.adapter_unfit", name
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": [1]}))
    with pytest.raises(UserError) as error:
        tiny.load(tmp_path / "first", model={"adapter": str(tmp_path / "adapter")})
    assert error.value.code == "engine.adapter_tokens" and error.value.field == "model.chat_template"
