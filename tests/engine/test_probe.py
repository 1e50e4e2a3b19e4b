from pathlib import Path

import pytest
import torch

from tests.engine import tiny
from worker.engine.probe import leaks, measure_leak


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("attention", ["flash", "eager"])
def test_models_that_keep_samples_apart_pass(tmp_path: Path, family: str, attention: str) -> None:
    model = tiny.load(tiny.save_base(tmp_path, family), attention, method={"type": "full"})
    assert not leaks(model, measure_leak(model, seed=0))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_planted_leak_is_found(tmp_path: Path, dtype: str) -> None:
    model = tiny.load(tiny.save_base(tmp_path), method={"type": "full"}, compute={"dtype": dtype})
    assert not leaks(model, measure_leak(model, seed=0))

    def let_through(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + 0.01 * output.roll(1, dims=1)  # as a convolution over the border would

    handle = model.base.model.layers[0].mlp.register_forward_hook(let_through)
    assert leaks(model, measure_leak(model, seed=0))
    handle.remove()
    assert not leaks(model, measure_leak(model, seed=0))


# One layer that carries a state along the row, and one of attention where the family has both.
SSM = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CARRIES_A_STATE: dict[str, dict] = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "qwen3_next": {**LINEAR, **MOE, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": LINEAR,
    "falcon_h1": {**SSM, "mamba_d_ssm": 32, "mamba_d_head": 8},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "granitemoehybrid": {
        **SSM,
        "layer_types": ["mamba", "attention"],
        "mamba_d_head": 16,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 48,
    },
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
}


@pytest.mark.parametrize("family", CARRIES_A_STATE)
def test_a_model_whose_layers_carry_a_state_over_the_border_is_found(tmp_path: Path, family: str) -> None:
    folder = tiny.save_base(tmp_path, family, **CARRIES_A_STATE[family])
    model = tiny.load(folder, "auto", method={"type": "full"})
    assert model.attention == "flash", "cut by segments as well as attention can be"
    leak = measure_leak(model, seed=0)
    assert leaks(model, leak) and leak > 1e-2, "far from what rounding does"


def test_gpt_oss_leaks_in_eager_and_not_in_flash(tmp_path: Path) -> None:
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": tiny.WINDOW}
    model = tiny.load(tiny.save_base(tmp_path, "gpt_oss", **changes), "eager", method={"type": "full"})
    assert leaks(model, measure_leak(model, seed=0))
    model.choose_attention("flash", lambda code, text: None)
    assert not leaks(model, measure_leak(model, seed=0))


def test_no_number_is_a_leak(tmp_path: Path) -> None:
    model = tiny.load(tiny.save_base(tmp_path), method={"type": "full"})
    assert leaks(model, float("nan"))
