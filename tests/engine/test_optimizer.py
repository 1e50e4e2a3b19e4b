"""Each optimizer learns, goes on to the last bit after a resume, and decays matrices alone."""

import io
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from core.memory import optimizer_state_bytes
from core.spec import JobSpec, parse_spec
from worker.engine.optimizer import StillPaged, hold_states, make_optimizer

CPU = torch.device("cpu")
NAMES = ("adamw", "adamw_8bit", "paged_adamw_8bit")


def spec_of(name: str, **numbers: Any) -> JobSpec:
    return parse_spec({"data": {"train": [{"dataset": "d"}]}, "optimizer": {"name": name, **numbers}})


class Given:
    """A regression with one matrix large enough for 8 bits, one of LoRA's size and two biases, and its optimizer."""

    def __init__(self, name: str, **numbers: Any) -> None:
        torch.manual_seed(0)
        self.spec = spec_of(name, **numbers)
        self.model = nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 8))
        self.weights = dict(self.model.named_parameters())
        self.warnings: list[tuple[str, str]] = []
        self.optimizer = make_optimizer(
            self.weights, self.spec, CPU, lambda code, text: self.warnings.append((code, text))
        )

    def steps(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last + 1):
            for group in self.optimizer.param_groups:
                group["lr"] = 0.01 * min(1.0, step / 5)
            x = torch.randn(32, 96, generator=torch.Generator().manual_seed(step))
            loss = (self.model(x) - x[:, :8]).pow(2).mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return losses

    def state_bytes(self) -> int:
        """Without bitsandbytes' code books, which all tensors share, and the count of steps."""
        return sum(
            value.nbytes
            for state in self.optimizer.state.values()
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and key != "step" and not key.startswith("qmap")
        )

    def saved(self) -> Any:
        """As a checkpoint writes and reads it."""
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_to_the_last_bit_after_a_resume(name: str) -> None:
    whole, half, resumed = Given(name), Given(name), Given(name)
    losses = whole.steps(1, 20)
    assert losses[-1] < 0.7 * losses[0]
    half.steps(1, 10)
    resumed.model.load_state_dict(half.model.state_dict())
    resumed.optimizer.load_state_dict(half.saved())
    assert resumed.steps(11, 20) == losses[10:]
    assert all(torch.equal(whole.weights[key], resumed.weights[key]) for key in whole.weights)


def test_eight_bits_follow_thirty_two_closely_but_not_exactly() -> None:
    plain, small = Given("adamw").steps(1, 30), Given("adamw_8bit").steps(1, 30)
    assert plain != small, "the large matrix has 8-bit moments"
    assert small[-1] == pytest.approx(plain[-1], rel=0.02)


@pytest.mark.parametrize("name", NAMES[:2])
def test_the_bytes_held_for_the_first_step_are_those_that_it_takes(name: str) -> None:
    given = Given(name)
    given.steps(1, 1)
    assert given.state_bytes() == hold_states(given.weights, given.spec, CPU).nbytes
    dtypes = {key: state["state1"].dtype for key, state in _states(given).items() if "state1" in state}
    assert name == "adamw" or (dtypes["0.weight"], dtypes["2.weight"]) == (torch.uint8, torch.float32)


def test_paged_moments_leave_only_their_scales_on_the_device() -> None:
    assert optimizer_state_bytes(1 << 20, "paged_adamw_8bit") == 2 * 4 * (1 << 20) // 256
    assert optimizer_state_bytes(5000, "paged_adamw_8bit") == optimizer_state_bytes(5000, "adamw_8bit")
    assert optimizer_state_bytes(1 << 20, "adamw_8bit") < optimizer_state_bytes(1 << 20, "adamw") / 3.8


def _states(given: Given) -> dict[str, dict[str, Any]]:
    return {key: given.optimizer.state[weight] for key, weight in given.weights.items()}


@pytest.mark.parametrize("name", NAMES)
def test_decay_pulls_at_matrices_alone_by_the_rate_times_itself(name: str) -> None:
    given = Given(name, weight_decay=0.5)
    before = {key: weight.detach().clone() for key, weight in given.weights.items()}
    assert all(weight.abs().max() > 0 for weight in before.values())
    for weight in given.weights.values():
        weight.grad = torch.zeros_like(weight)
    for group in given.optimizer.param_groups:
        group["lr"] = 0.1
    given.optimizer.step()
    for key, weight in given.weights.items():
        torch.testing.assert_close(weight, before[key] * (1 - 0.1 * 0.5) if weight.ndim > 1 else before[key])


def test_on_a_cpu_paged_says_aloud_that_it_is_plain() -> None:
    assert [code for code, _ in Given("paged_adamw_8bit").warnings] == ["optimizer"]
    assert not Given("adamw_8bit").warnings


def test_a_paged_optimizer_puts_what_it_reads_into_buffers_of_its_own() -> None:
    """On a CPU bitsandbytes has no paged buffer to give, and says so; where they come from is the same."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given, resumed = Given("adamw_8bit"), Given("adamw_8bit")
        given.steps(1, 3)
        resumed.optimizer = StillPaged(resumed.weights.values(), lr=0.0)
        given.optimizer = StillPaged(given.weights.values(), lr=0.0)
        given.steps(4, 6)
        state = given.saved()
        resumed.optimizer.load_state_dict(state)
    assert any("not supported on CPU" in str(warning.message) for warning in caught)
    read = _states(resumed)["0.weight"]
    assert torch.equal(read["state1"], _states(given)["0.weight"]["state1"]) and read["state1"].any()
    resumed.model.load_state_dict(given.model.state_dict())
    assert resumed.steps(7, 9) == given.steps(7, 9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_moments_are_still_paged_after_a_resume() -> None:
    def optimizer() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        weight = nn.Parameter(torch.ones(512, 512, device="cuda"))
        spec = spec_of("paged_adamw_8bit")
        return weight, make_optimizer({"w": weight}, spec, torch.device("cuda"), lambda *_: None)

    first, saved_by = optimizer()
    first.grad = torch.ones_like(first)
    saved_by.step()
    assert saved_by.state[first]["state1"].is_paged
    second, read_by = optimizer()
    read_by.load_state_dict(saved_by.state_dict())
    assert read_by.state[second]["state1"].is_paged
    assert torch.equal(read_by.state[second]["state1"], saved_by.state[first]["state1"].cpu())
