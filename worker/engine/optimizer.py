# mypy: disable-error-code="no-untyped-call"
# (bitsandbytes calls itself typed, and none of its functions is)
"""What turns gradients into steps: AdamW, with its two moments in 32 bits or, by bitsandbytes, in 8.

Eight bits (Dettmers et al. 2021, arXiv 2110.02861) keep a quarter of the moments' bytes: blocks of 256 values share a
scale. Tensors below 4,096 values, such as norms and small adapters, stay in 32 bits. *Paged* moments lie in memory that
the CUDA driver moves to the host when the GPU is full; there is no such thing on a CPU, where plain 8 bits serve.
"""

from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit
from torch import Tensor, nn

from core.memory import optimizer_state_bytes
from core.spec import JobSpec
from worker.engine.model import Warn


def make_optimizer(
    trained: Mapping[str, nn.Parameter], spec: JobSpec, device: torch.device, warn: Warn
) -> torch.optim.Optimizer:
    """AdamW, whose decay pulls at matrices alone: a norm's gain or a bias near 0 is no simpler model.

    The loop sets `lr` of every group before each step. Decay is decoupled: a weight shrinks by lr x weight_decay."""
    weights = list(trained.values())
    groups = [
        {"params": [each for each in weights if _ndim(each) >= 2], "weight_decay": spec.optimizer.weight_decay},
        {"params": [each for each in weights if _ndim(each) < 2], "weight_decay": 0.0},
    ]
    numbers: dict[str, Any] = {"lr": 0.0, "betas": spec.optimizer.betas, "eps": spec.optimizer.eps}
    match spec.optimizer.name:
        case "adamw":
            return torch.optim.AdamW(groups, fused=True, **numbers)
        case "paged_adamw_8bit" if device.type == "cuda":
            return StillPaged(groups, **numbers)
        case "paged_adamw_8bit":
            warn("optimizer", "a CPU has no memory to page out to, so paged_adamw_8bit runs as adamw_8bit")
    eight_bit: torch.optim.Optimizer = AdamW8bit(groups, **numbers)
    return eight_bit


def _ndim(weight: nn.Parameter) -> int:
    """Also of one that ZeRO-3 has cut up, which torch takes for empty."""
    return len(getattr(weight, "ds_shape", weight.shape))


class StillPaged(PagedAdamW8bit):
    """bitsandbytes' own, but still paged after a resume: it reads a state into ordinary GPU memory, so that a run which
    lived from paging would run out of memory at its first step back."""

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        super().load_state_dict(state_dict, move_to_device=False)
        if not move_to_device:
            return
        for weight, state in self.state.items():
            for key, value in state.items():
                if key in ("state1", "state2"):
                    buffer = self.get_state_buffer(weight, dtype=value.dtype)  # paged, if it is large enough
                    buffer.copy_(value)
                    state[key] = buffer
                elif isinstance(value, Tensor):
                    state[key] = value.to(weight.device)


def hold_states(trained: Mapping[str, nn.Parameter], spec: JobSpec, device: torch.device) -> Tensor:
    """As many bytes as the first step will allocate for moments, to be held while a trial looks for out-of-memory."""
    num_bytes = sum(optimizer_state_bytes(weight.numel(), spec.optimizer.name) for weight in trained.values())
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)
