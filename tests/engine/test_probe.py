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


def test_a_model_whose_layers_carry_a_state_over_the_border_is_found(tmp_path: Path) -> None:
    changes = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
    model = tiny.load(tiny.save_base(tmp_path, "lfm2", **changes), method={"type": "full"})
    assert model.attention == "flash"
    assert leaks(model, measure_leak(model, seed=0))


def test_no_number_is_a_leak(tmp_path: Path) -> None:
    model = tiny.load(tiny.save_base(tmp_path), method={"type": "full"})
    assert leaks(model, float("nan"))
