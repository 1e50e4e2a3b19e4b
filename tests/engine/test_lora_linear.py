"""The fused layer against PEFT's own, which it takes the place of."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from worker.engine.lora_linear import FusedLinear, fuse

INPUTS, OUTPUTS = 24, 40


class TwoLayers(nn.Module):
    """One with a bias, one without; the first reads what needs no gradient, as behind a frozen embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(INPUTS, OUTPUTS)
        self.down = nn.Linear(OUTPUTS, INPUTS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down(torch.tanh(self.up(x)))
        return hidden


def adapted(dtype: torch.dtype = torch.float32, **parts: object) -> PeftModel:
    torch.manual_seed(0)
    named = {"target_modules": ["up", "down"], **parts}
    config = LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, **named)
    return get_peft_model(TwoLayers().to(dtype), config)


def gradients(model: PeftModel, x: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of all adapters and of the output."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        output = model(x)
    weighting = torch.linspace(-1, 1, output.numel()).view_as(output)
    (output.float() * weighting).sum().backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(found) == 4
    assert all(gradient is not None and gradient.dtype is torch.float32 for gradient in found.values())
    return {**found, "output": output.detach()}


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max(float((a - second[name]).abs().max() / a.abs().max()) for name, a in first.items())


def test_outputs_and_gradients_are_pefts() -> None:
    x = torch.randn(2, 7, INPUTS)
    fused = adapted()
    assert fuse(fused) == 2
    assert difference(gradients(adapted(), x), gradients(fused, x)) < 1e-6


def test_a_gradient_reaches_what_lies_before() -> None:
    first, second = (torch.linspace(-1, 1, 3 * INPUTS).view(3, INPUTS).requires_grad_() for _ in range(2))
    fused = adapted()
    fuse(fused)
    gradients(adapted(), first)
    gradients(fused, second)
    assert first.grad is not None and second.grad is not None
    assert float((first.grad - second.grad).abs().max() / first.grad.abs().max()) < 1e-6


def test_in_bf16_it_is_no_farther_from_fp32_than_peft() -> None:
    x = torch.randn(64, INPUTS)
    exact = gradients(adapted(), x)
    of_peft = gradients(adapted(torch.bfloat16), x.bfloat16(), torch.bfloat16)
    fused = adapted(torch.bfloat16)
    assert fuse(fused) == 2
    of_fused = gradients(fused, x.bfloat16(), torch.bfloat16)
    assert 0 < difference(exact, of_fused) < 1.2 * difference(exact, of_peft)


def test_the_input_is_kept_once_whoever_reads_it() -> None:
    """PEFT keeps a copy in bf16 for each layer that reads it."""
    x = torch.randn(64, INPUTS).bfloat16()

    def kept(model: PeftModel) -> set[int]:
        places: set[int] = set()

        def pack(tensor: Tensor) -> Tensor:
            if tensor.shape == x.shape:
                places.add(tensor.data_ptr())
            return tensor

        layer = model.base_model.model.up
        watched = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with watched, torch.autocast("cpu", dtype=torch.bfloat16):
            held = [layer(x), layer(x)]
        assert len(held) == 2
        return places

    fused = adapted(torch.bfloat16)
    assert len(kept(fused)) > 1
    fuse(fused)
    assert kept(fused) == {x.data_ptr()}


def test_what_is_switched_off_or_merged_is_pefts() -> None:
    x = torch.randn(5, INPUTS)
    plain, fused = adapted(), adapted()
    fuse(fused)
    applied = fused(x)
    with plain.disable_adapter(), fused.disable_adapter():
        assert torch.equal(plain(x), fused(x))
        assert not torch.allclose(fused(x), applied)
    merged = fused.merge_and_unload()
    assert type(merged.up) is nn.Linear
    torch.testing.assert_close(merged(x), applied)


def test_a_copy_has_its_own_weights() -> None:
    x = torch.randn(5, INPUTS)
    fused = adapted()
    fuse(fused)
    other = copy.deepcopy(fused)
    with torch.no_grad():
        for weight in fused.parameters():
            weight.zero_()
    assert isinstance(other.base_model.model.up, FusedLinear)
    torch.testing.assert_close(other(x), adapted()(x))


@pytest.mark.parametrize(
    "parts",
    [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["up"]}],
    ids=["dropout", "dora", "bias"],
)
def test_what_is_not_plain_stays_pefts(parts: dict[str, object]) -> None:
    model = adapted(**parts)
    assert fuse(model) == 0
    assert type(model.base_model.model.up) is Linear
