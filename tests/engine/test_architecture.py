"""What headers and config say of a model is what the loaded model is, for every family that we name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from core.architecture import Architecture, ParametersByKind, TensorHeader, kind_of, num_values, read_architecture
from core.profile import ModelProfile
from worker.engine.models import profile_model

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": SIZES,
    "qwen2": {key: value for key, value in SIZES.items() if key != "head_dim"},
    "qwen3": SIZES,
    "mistral": {**SIZES, "sliding_window": 8},
    "gemma2": {**SIZES, "sliding_window": 8},
    "gemma3_text": {**SIZES, "sliding_window": 8},
    "phi3": {**SIZES, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2},
    "qwen3_moe": {**SIZES, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "num_experts": 4},
    "mixtral": {**SIZES, **MOE},
    "gpt_oss": {**SIZES, **MOE, "sliding_window": 8},
}


def model_of(family: str) -> nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))


def shape_of(folder: Path) -> Architecture:
    shape = profile_model(folder, "it").shape
    assert shape is not None
    return shape


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_and_parameters_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    model.save_pretrained(tmp_path)
    shape = shape_of(tmp_path)
    assert shape.missing == ()
    assert shape.parameters.total == model.num_parameters() and shape.parameters.other == 0
    assert (shape.hidden_size, shape.num_layers, shape.num_heads, shape.vocabulary) == (32, 3, 4, 96)
    has_grouped_keys = family not in ("gpt2",)
    assert shape.num_key_value_heads == (2 if has_grouped_keys else 4)
    assert shape.head_dim == (8 if family in ("qwen2", "phi3", "gpt2") else 16)
    assert shape.is_gated is (family != "gpt2")
    assert shape.has_tied_head is model.config.tie_word_embeddings
    assert (shape.parameters.head == 0) is shape.has_tied_head
    is_moe = family in ("qwen3_moe", "mixtral", "gpt_oss")
    assert bool(shape.parameters.experts) is is_moe and shape.num_experts == (4 if is_moe else 0)
    assert shape.experts_per_token == (2 if is_moe else None)
    if is_moe:
        assert shape.expert_size is not None
        bias = 4 * (2 * shape.expert_size + 32) if family == "gpt_oss" else 0
        assert shape.parameters.experts == 3 * (4 * 3 * 32 * shape.expert_size + bias)
    else:
        assert shape.intermediate_size == (128 if family == "gpt2" else 48)
    windowed = {"mistral": 3, "gemma2": 2, "gemma3_text": 3, "gpt_oss": 2}.get(family, 0)
    assert (shape.num_windowed_layers, shape.num_unlimited_layers) == (windowed, 3 - windowed)
    assert shape.sliding_window == (8 if windowed else None)
    assert shape.norms_per_layer == (4 if family.startswith("gemma") else 2)
    assert shape.has_query_norm is family.startswith(("qwen3", "gemma3"))
    assert shape.has_plain_scores is (family in ("gemma2", "gpt_oss"))


def test_of_a_vision_model_the_language_model_is_described_and_the_tower_counted_apart(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**SIZES, "sliding_window": 8},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
    )
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path)
    shape = shape_of(tmp_path)
    tower = sum(weight.numel() for name, weight in model.named_parameters() if "vision" in name or "projector" in name)
    assert shape.missing == () and shape.model_type == "gemma3_text"
    assert shape.parameters.other == tower > 0
    assert shape.parameters.total == model.num_parameters()
    # What a file leaves out because the class has it as its default: as published, Gemma 3's is as short as this.
    stored = json.loads((tmp_path / "config.json").read_bytes())
    for key in ("num_attention_heads", "head_dim", "vocab_size", "max_position_embeddings"):
        stored["text_config"].pop(key)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    profile = profile_model(tmp_path, "it")
    assert profile.context_length == 131072 and profile.shape is not None and profile.shape.num_heads == 8


def test_what_is_not_known_is_none_and_named(tmp_path: Path) -> None:
    config = {"model_type": "of_tomorrow", "hidden_size": 32, "vocab_size": 96, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"backbone.mixers.0.weight": torch.zeros(32, 32)}, tmp_path / "model.safetensors")
    shape = shape_of(tmp_path)
    assert shape.parameters == ParametersByKind(other=1024)
    assert {"num_layers", "num_heads", "head_dim", "intermediate_size", "is_gated"} <= set(shape.missing)


def test_latent_attention_has_no_head_dim_though_its_config_names_one() -> None:
    config = {"model_type": "deepseek_v3", "head_dim": 64, "kv_lora_rank": 512, "num_attention_heads": 8}
    assert "head_dim" in read_architecture(config, {}).missing


def test_hybrids_count_only_the_layers_that_attend() -> None:
    layers = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    shape = read_architecture({"model_type": "qwen3_next", "num_hidden_layers": 4, "layer_types": layers}, {})
    assert (shape.num_layers, shape.num_unlimited_layers, shape.num_windowed_layers) == (4, 1, 0)


def test_four_bit_experts_and_old_masks_are_counted_as_what_they_stand_for() -> None:
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    assert num_values(f"{experts}_blocks", TensorHeader(dtype="U8", shape=(4, 96, 1, 16))) == 2 * 4 * 96 * 16
    assert num_values(f"{experts}_scales", TensorHeader(dtype="U8", shape=(4, 96, 1))) == 0
    assert num_values("h.0.attn.bias", TensorHeader(dtype="F32", shape=(1, 1, 1024, 1024))) == 0
    assert num_values("h.0.attn.c_attn.bias", TensorHeader(dtype="F32", shape=(96,))) == 96


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.block_sparse_moe.experts.7.w1.weight", "experts"),
        ("model.layers.3.block_sparse_moe.gate.weight", "mlp"),
        ("model.layers.3.mlp.shared_expert.up_proj.weight", "mlp"),
        ("model.layers.3.self_attn.q_norm.weight", "norms"),
        ("language_model.model.embed_tokens.weight", "embedding"),
        ("language_model.lm_head.weight", "head"),
        ("visual.blocks.0.attn.qkv.weight", "other"),
        ("model.layers.3.linear_attn.in_proj.weight", "other"),
    ],
)
def test_a_tensor_is_of_the_kind_that_its_name_says(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_profile_that_was_stored_before_shapes_were_measured_still_loads() -> None:
    stored = {"name": "m", "content_hash": "0", "architecture": "L", "num_parameters": 1, "context_length": 8}
    stored |= {"vocabulary": 9, "dtype": "float32", "has_chat_template": False, "bytes": 4}
    assert ModelProfile.model_validate(stored).shape is None
