"""What turns a step's micro-batches into a change of the weights, and can be saved and read back.

Two kinds. A `Replica` holds the whole model on every rank and sums gradients over ranks: stage 0. `Shards`
(worker.engine.zero) are DeepSpeed's: stages 1 to 3. The loop knows only the protocol `Learner`; all ranks call the same
methods in the same order.

A Replica's gradients are fp32 and are summed over ranks once an optimizer step (worker.engine.gradient_sum). A weight
that no token of the step has reached (an idle expert) has gradient 0, on one rank as on several: what a step does to it
must not depend on how its samples were laid out.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from core.errors import UserError
from core.spec import JobSpec
from worker.engine import checkpoint
from worker.engine.batches import Batch
from worker.engine.gradient_sum import GradientSum
from worker.engine.loss import training_loss
from worker.engine.model import LanguageModel
from worker.engine.optimizer import hold_states
from worker.engine.pieces import Pieces
from worker.engine.ranks import Ranks


class Learner(Protocol):
    @property
    def checkpoint_bytes(self) -> int:
        """About what `write` puts on disk, over all ranks."""

    def backward(self, batch: Batch, num_targets: int, *, is_last: bool) -> Tensor:
        """Adds a micro-batch's part of the step's gradient; its losses, one a target. `num_targets` are the step's,
        over all ranks; `is_last` marks the rank's last micro-batch of the step. Nothing waits for the device."""

    def update(self, learning_rate: float) -> Tensor:
        """Changes the weights by the step's gradient, which is then forgotten. The gradient's norm before clipping."""

    def try_batch(self, batch: Batch) -> None:
        """Forward and backward, with room held for all that `update` will want; leaves no trace."""

    def write(self, folder: Path) -> list[Path]:
        """This rank's files of a checkpoint."""

    def read(self, folder: Path, manifest: checkpoint.Manifest) -> None:
        """Weights and moments as they were written, by as many ranks or by others. Raises UserError where they can't
        be taken over."""

    def read_weights(self, folder: Path, manifest: checkpoint.Manifest) -> None:
        """The weights alone."""

    def whole(self, load: Callable[[], LanguageModel]) -> LanguageModel | None:
        """The trained model to be saved, on the first rank; None on the others. Training is over then. `load` makes one
        anew, for a learner of which no rank holds the whole."""


class Replica:
    """The whole model on each rank."""

    def __init__(self, model: LanguageModel, optimizer: torch.optim.Optimizer, spec: JobSpec, ranks: Ranks) -> None:
        self.model = model
        self.optimizer = optimizer
        self._spec = spec
        self._ranks = ranks
        self._weights = list(model.trainable().values())
        self._sum = GradientSum(self._weights) if ranks.size > 1 else None
        # Under fp16 gradients are made larger by a factor that grows until one overflows, a step that is then left out.
        self._scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype is torch.float16)
        self._one = torch.ones((), device=model.device)

    @property
    def checkpoint_bytes(self) -> int:
        return 3 * sum(weight.numel() * weight.element_size() for weight in self._weights)  # two moments each

    def backward(self, batch: Batch, num_targets: int, *, is_last: bool) -> Tensor:
        part, losses_T = training_loss(self.model, batch, self._scaler.scale(self._one) / num_targets)
        if is_last and self._sum is not None:
            with self._sum.as_they_come():
                torch.autograd.backward(part)
        else:
            torch.autograd.backward(part)
        return losses_T

    def update(self, learning_rate: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for weight in self._weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        self._scaler.unscale_(self.optimizer)
        norm = clip(self._weights, self._spec.optimizer.max_grad_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def try_batch(self, batch: Batch) -> None:
        held = None if self.optimizer.state else hold_states(self.model.trainable(), self._spec, self.model.device)
        self.backward(batch, max(1, batch.num_targets), is_last=True)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self.optimizer.zero_grad(set_to_none=True)
        del held

    def write(self, folder: Path) -> list[Path]:
        if not self._ranks.is_first:
            return []
        return checkpoint.write_whole(folder, self.model.trainable(), self.optimizer, self._scaler.state_dict())

    def read(self, folder: Path, manifest: checkpoint.Manifest) -> None:
        self.read_weights(folder, manifest)
        if manifest.zero_stage == 0:
            scaling = checkpoint.load_optimizer(folder / checkpoint.OPTIMIZER, self.optimizer)
            if scaling and self._scaler.is_enabled():
                self._scaler.load_state_dict(scaling)
        elif manifest.has_whole_moments:
            with ExitStack() as stack:
                saved = Pieces(folder, manifest, stack)
                for name, weight in self.model.trainable().items():
                    step = torch.tensor(saved.step(name), device=weight.device)
                    moments = {key: moment.to(weight.device) for key, moment in saved.moments(name).items()}
                    self.optimizer.state[weight] = {"step": step, **moments}
        else:
            raise UserError(
                "zero.other_cut",
                "optimizer.name",
                name=self._spec.optimizer.name,
                was=f"stage {manifest.zero_stage} on {manifest.world}",
                now=f"stage 0 on {self._ranks.size}",
            )

    def read_weights(self, folder: Path, manifest: checkpoint.Manifest) -> None:
        if manifest.zero_stage == 0:
            checkpoint.load_weights(folder, manifest.step, self.model.trainable())
            return
        weights = self.model.trainable()
        with ExitStack() as stack, torch.no_grad():
            saved = Pieces(folder, manifest, stack)
            shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
            checkpoint.refuse_other_shapes(saved.shapes, shapes, manifest.step)
            for name, weight in weights.items():
                weight.copy_(saved.weight(name))

    def whole(self, load: Callable[[], LanguageModel]) -> LanguageModel | None:
        return self.model if self._ranks.is_first else None


def clip(weights: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
    """The gradient's norm as it was; it is shortened to `max_norm` where it is longer."""
    if max_norm is None:
        return torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    return torch.nn.utils.clip_grad_norm_(weights, max_norm)
