"""What turns gradients into steps."""

from collections.abc import Mapping

import torch
from torch import nn

from core.spec import JobSpec


def make_optimizer(trained: Mapping[str, nn.Parameter], spec: JobSpec, device: torch.device) -> torch.optim.AdamW:
    """AdamW, whose decay pulls at matrices alone: a norm's gain or a bias near 0 is no simpler model."""
    weights = list(trained.values())
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": spec.optimizer.weight_decay},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=spec.optimizer.betas, eps=spec.optimizer.eps, fused=True)
