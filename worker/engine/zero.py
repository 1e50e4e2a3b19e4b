"""Stages 1 to 3: DeepSpeed shards optimizer states, gradients and weights over the ranks.

What is asked of it is less than it offers. Precision stays ours (fp32 weights, autocast), so does accumulation (each
micro-batch is told whether it is the step's last), so do checkpoints; it divides every gradient by the number of ranks,
which is undone by multiplying the loss by it. What remains is the sharding.

A checkpoint does not know how it was sharded. Every rank writes the pieces of each trained tensor, and of its two
moments, that it owns, flat, with the place in the whole at which they begin; whoever reads puts together what it needs
from all files. So a run goes on under another stage or with another number of ranks, which DeepSpeed's own format can
only do between some of them.

Under stage 3 no rank holds the whole model at any time. Weights are cut as they are read; a pass gathers each layer as
it gets there, by hooks that hang on modules, so every pass has to enter at the root and all ranks have to make the same
passes. The head is gathered once around all chunks of the loss (see worker.engine.model.Head).
"""

import contextlib
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import UserError
from core.memory import optimizer_state_bytes
from core.spec import JobSpec
from core.zero import deepspeed_config, loading_config
from worker.engine import checkpoint
from worker.engine.batches import Batch
from worker.engine.libraries import tame_deepspeed
from worker.engine.loss import training_loss
from worker.engine.model import LanguageModel
from worker.engine.pieces import Piece, open_saved, write_pieces
from worker.engine.ranks import Ranks, open_group_of_one

OWN_LINEAR = F.linear  # before stage 3 puts its own in its place, which saves no copy of a weight for the backward pass


def import_deepspeed() -> Any:
    """DeepSpeed, told to speak to stderr (on stdout commands print JSON), and not to compile collectives of its own for
    CPUs, which takes minutes and is of use to inference alone."""
    tame_deepspeed()
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It calls some of torch 2.13's collectives by their older names.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    for handler in deepspeed.utils.logger.handlers:
        if type(handler) is logging.StreamHandler:  # its own, not one of a kind that somebody else has hung there
            handler.setStream(sys.stderr)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


@contextlib.contextmanager
def cut_as_read(spec: JobSpec, device: torch.device) -> Iterator[None]:
    """Around loading under stage 3: transformers cuts every weight as it reads it, as long as this config lives."""
    if spec.parallel.zero_stage != 3:
        yield
        return
    import_deepspeed()
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(loading_config(spec, _kind(device)))
    yield
    del alive


def _kind(device: torch.device) -> Any:
    return "gpu" if device.type == "cuda" else "cpu"


def shape_of(weight: nn.Parameter) -> tuple[int, ...]:
    """Also of one that is cut up, which torch takes for empty."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def stepping_on_the_cpu(optimizer: torch.optim.Optimizer, spec: JobSpec) -> torch.optim.Optimizer:
    """The same AdamW where moments are offloaded: DeepSpeed's own, compiled at its first use, which takes minutes.

    Raises UserError zero.cpu_adam where that fails."""
    import_deepspeed()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in optimizer.param_groups]
    try:
        stepping: torch.optim.Optimizer = DeepSpeedCPUAdam(
            groups, lr=0.0, betas=spec.optimizer.betas, eps=spec.optimizer.eps, adamw_mode=True
        )
    except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
        problem = str(error).strip().split("\n")[0][:300]
        raise UserError("zero.cpu_adam", "parallel.offload", offload=spec.parallel.offload, problem=problem) from error
    return stepping


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Around what DeepSpeed warns of and is meant."""
    logger = import_deepspeed().utils.logger
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(logging.WARNING)


def _is_list_of_experts(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and name.endswith("experts")


class _Root(nn.Module):
    """Where every pass begins, so that hooks on a root see it begin and end."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model.model
        self.head_scope = _HeadScope(model.base.get_output_embeddings())

    def forward(self, task: Callable[..., Any], *arguments: Any) -> Any:
        return task(*arguments)


class _HeadScope(nn.Module):
    """Names the head's weights as its own, so that they are gathered before whatever is done with them here, and once
    more when the backward pass comes to it."""

    def __init__(self, head: nn.Module | None) -> None:
        super().__init__()
        for number, weight in enumerate(head.parameters() if head is not None else ()):
            self.register_parameter(f"head_{number}", weight)

    def forward(self, task: Callable[..., Any], features_TD: Tensor, *arguments: Any) -> Any:
        return task(features_TD, *arguments)


class Shards:
    """A model that DeepSpeed has cut up, as a worker.engine.learner.Learner."""

    def __init__(
        self,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        spec: JobSpec,
        ranks: Ranks,
        directory: Path,
    ) -> None:
        deepspeed = import_deepspeed()
        self.model = model
        self._spec = spec
        self._ranks = ranks
        self._stage = int(spec.parallel.zero_stage)
        self._weights = model.trainable()
        config = deepspeed_config(spec, _kind(model.device))
        if ranks.is_first:
            (directory / "deepspeed.json").write_text(json.dumps(config, indent=1) + "\n")
        names = {id(weight): name for name, weight in self._weights.items()}
        self._order = [names[id(weight)] for group in optimizer.param_groups for weight in group["params"]]
        self._shapes = {name: shape_of(weight) for name, weight in self._weights.items()}
        if self._stage == 3 and any(_is_list_of_experts(*each) for each in model.base.named_modules()):
            # Ranks whose tokens meet other experts would gather other weights, and wait for each other for ever.
            raise UserError("zero.expert_modules", "parallel.zero_stage")
        if not dist.is_initialized():  # a rank alone, which cuts nothing up but may offload
            open_group_of_one(model.device)
        root = _Root(model)
        with _hushed():  # of optimizers that it has not tested, which ours is
            self._engine, *_ = deepspeed.initialize(
                model=root, optimizer=optimizer, config=config, dist_init_required=False
            )
        if self._stage == 3:
            model.enter, model.enter_head = root, root.head_scope
            # An adapter on the head is a module in a module, with gathers of its own.
            model.scores_in_one_piece = not isinstance(model.base.get_output_embeddings(), nn.Linear)

    @property
    def _optimizer(self) -> Any:
        return self._engine.optimizer

    def close(self) -> None:
        """Gives back what DeepSpeed has put in the place of torch's own."""
        self._engine.destroy()
        F.linear = OWN_LINEAR

    @property
    def checkpoint_bytes(self) -> int:
        return 3 * 4 * sum(getattr(weight, "ds_numel", weight.numel()) for weight in self._weights.values())

    # -- steps ---------------------------------------------------------------------------------------------------------

    def backward(self, batch: Batch, num_targets: int, *, is_last: bool) -> Tensor:
        return self._backward(batch, self._ranks.size / num_targets, is_last=is_last)

    def _backward(self, batch: Batch, scale: float, *, is_last: bool) -> Tensor:
        self._engine.set_gradient_accumulation_boundary(is_last)
        losses_T: Tensor
        part, losses_T = self._engine(training_loss, self.model, batch, scale)
        self._engine.backward(part, scale_wrt_gas=False)
        return losses_T

    def update(self, learning_rate: float) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        if self._optimizer.overflow:  # the step was left out, and the norm is that of an earlier one
            return torch.tensor(torch.nan)
        return torch.as_tensor(self._engine.get_global_grad_norm())

    def try_batch(self, batch: Batch) -> None:
        """With NaN for gradients: then DeepSpeed leaves the step out and clears away what it had summed up."""
        held = None if self._optimizer.optimizer.state else self._hold_moments()
        self._backward(batch, torch.nan, is_last=True)
        with _hushed():
            assert not torch.isfinite(self.update(0.0))
        del held

    def _hold_moments(self) -> Tensor:
        owned = sum(piece.count for piece in self._pieces())
        device = "cpu" if self._spec.parallel.offload != "none" else self.model.device
        num_bytes = optimizer_state_bytes(owned, self._spec.optimizer.name)
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _pieces(self) -> list[Piece]:
        return [piece for name, weight in self._weights.items() if (piece := self._piece(name, weight)) is not None]

    def _piece(self, name: str, weight: Any) -> Piece | None:
        optimizer = self._optimizer
        if self._stage == 3:
            group, at, size = optimizer.grad_position[optimizer.get_param_id(weight)]
            start = self._ranks.rank * size
            count = min(size, weight.ds_numel - start)
            flat = optimizer.fp32_partitioned_groups_flat[group]
        elif weight._hp_mapping is None:
            return None
        else:
            whole, own = weight._hp_mapping.lp_fragment_address, weight._hp_mapping.hp_fragment_address
            start, count, at = whole.start, whole.numel, own.start
            flat = optimizer.single_partition_of_fp32_groups[weight._hp_mapping.param_group_index]
        return Piece(name, self._shapes[name], start, count, flat, at) if count > 0 else None

    def write(self, folder: Path) -> list[Path]:
        state = self._optimizer.optimizer.state
        path = folder / checkpoint.shard_name(self._ranks.rank)
        write_pieces(path, self._pieces(), state)
        if self._steps_by_element:
            return [path]
        # Moments in 8 bits share a scale by blocks of a rank's own part: they are of use to the same parts alone.
        own = folder / checkpoint.moments_name(self._ranks.rank)
        torch.save([state.get(flat, {}) for flat in self._flats()], own)
        return [path, own]

    def _flats(self) -> list[Tensor]:
        """What the optimizer takes for weights: this rank's part of all of them, end to end, by group."""
        is_cut = self._stage == 3
        flats: list[Tensor] = (
            self._optimizer.fp32_partitioned_groups_flat if is_cut else self._optimizer.single_partition_of_fp32_groups
        )
        return flats

    @property
    def _steps_by_element(self) -> bool:
        return self._spec.optimizer.name == "adamw"

    def read(self, folder: Path, manifest: checkpoint.Manifest) -> None:
        is_same_cut = (manifest.zero_stage, manifest.world) == (self._stage, self._ranks.size)
        if not self._steps_by_element and not is_same_cut:
            raise UserError(
                "zero.other_cut",
                "optimizer.name",
                name=self._spec.optimizer.name,
                was=f"stage {manifest.zero_stage} on {manifest.world}",
                now=f"stage {self._stage} on {self._ranks.size}",
            )
        self._take(folder, manifest, with_moments=self._steps_by_element)
        if not self._steps_by_element:
            saved = torch.load(
                folder / checkpoint.moments_name(self._ranks.rank), map_location="cpu", weights_only=True
            )
            for flat, state in zip(self._flats(), saved, strict=True):
                self._optimizer.optimizer.state[flat] = {
                    key: _moved(value, flat.device) for key, value in state.items()
                }

    def read_weights(self, folder: Path, manifest: checkpoint.Manifest) -> None:
        self._take(folder, manifest, with_moments=False)

    def _take(self, folder: Path, manifest: checkpoint.Manifest, *, with_moments: bool) -> None:
        state = self._optimizer.optimizer.state
        with contextlib.ExitStack() as stack, torch.no_grad():
            saved = open_saved(folder, manifest, self._order, stack)
            checkpoint.refuse_other_shapes(saved.shapes, self._shapes, manifest.step)
            for name, weight in self._weights.items():
                whole = saved.weight(name)
                self._put(weight, whole)
                piece = self._piece(name, weight)
                if piece is None:
                    continue
                piece.of(piece.flat).copy_(whole.flatten()[piece.start : piece.start + piece.count])
                if not with_moments:
                    continue
                moments = saved.moments(name)
                if not moments:  # of before the first step
                    state.pop(piece.flat, None)
                    continue
                own = state.setdefault(piece.flat, {})
                for key, moment in moments.items():
                    into = own.setdefault(key, torch.zeros_like(piece.flat))
                    piece.of(into).copy_(moment.flatten()[piece.start : piece.start + piece.count])
                own["step"] = self._as_step(saved.step(name))

    def _put(self, weight: Any, whole: Tensor) -> None:
        """Into the model itself, which computes with a second copy of what the optimizer owns."""
        if self._stage < 3:
            weight.data.copy_(whole)
            return
        if weight.data.numel() == whole.numel():  # small ones stay gathered
            weight.data.copy_(whole)
        size = weight.ds_tensor.ds_numel
        own = whole.flatten()[self._ranks.rank * size : (self._ranks.rank + 1) * size]
        weight.ds_tensor.data[: own.numel()].copy_(own)

    def _as_step(self, step: float) -> Tensor | int:
        """AdamW counts in a tensor on its own device, DeepSpeed's CPU Adam in an int."""
        if self._spec.parallel.offload != "none":
            return int(step)
        return torch.tensor(step, device=self.model.device)

    # -- the result ----------------------------------------------------------------------------------------------------

    def whole(self, load: Callable[[], LanguageModel]) -> LanguageModel | None:
        """The trained model as one that DeepSpeed knows nothing of: under stage 3 put together on the first rank from
        what all have, into one that `load` makes there; None on the others, which hold nothing whole."""
        if self._stage < 3:
            self.close()
            return self.model if self._ranks.is_first else None
        deepspeed = import_deepspeed()
        trained: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            with deepspeed.zero.GatheredParameters([weight]):
                if self._ranks.is_first:
                    trained[name] = weight.detach().cpu().clone()
        self.close()
        if not self._ranks.is_first:
            return None
        model = load()
        with torch.no_grad():
            for name, weight in model.trainable().items():
                weight.copy_(trained[name])
        return model
