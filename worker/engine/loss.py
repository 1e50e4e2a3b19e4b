"""The loss of trained tokens, computed where they are and nowhere else.

The decoder runs over whole rows, the head only over rows of the hidden state that have a target, a chunk at a time:
logits of a chunk are made, scored and at once turned into the gradients of the chunk's features and of the head's own
weights, before the next chunk is made. No more than one chunk of logits exists at a time, where the whole row in fp32
is what fills memory first with today's vocabularies. All chunks together are one node of autograd's graph, which hands
the gradients on when its turn comes: so a micro-batch has one backward pass, in which every weight's gradient is
completed once, and whoever listens for that (the all-reduce of worker.engine.learner, DeepSpeed) hears it once.

A step's loss is the sum over its trained tokens divided by their number, over all of its micro-batches and ranks. The
divisor is known before the first pass, so that every gradient is scaled rightly where it is made and none is rescaled
later.

Shapes: T targets of a micro-batch, C of a chunk, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.memory import chunk_rows
from worker.engine.batches import Batch
from worker.engine.model import LanguageModel


def backward(model: LanguageModel, batch: Batch, num_targets_of_step: int) -> Tensor:
    """Adds this micro-batch's part of the step's gradient and returns its losses, one a target, without the divisor.
    Nothing here waits for the device."""
    part, losses_T = training_loss(model, batch, 1.0 / num_targets_of_step)
    torch.autograd.backward(part)
    return losses_T


def training_loss(model: LanguageModel, batch: Batch, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """The micro-batch's part of the loss, times `scale`, ready for its backward pass; and its losses, one a target."""
    with model.autocast():
        features_TD = model.features(batch)
    if model.scores_in_one_piece:
        losses_T = model.enter_head(_losses, features_TD, model, batch.targets_T)
        return losses_T.sum() * scale, losses_T.detach()
    part, losses_T = model.enter_head(_in_chunks, features_TD, model, batch.targets_T, scale)
    return part, losses_T


def _in_chunks(
    features_TD: Tensor, model: LanguageModel, targets_T: Tensor, scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    weights = [weight for weight in model.head_parameters() if weight.requires_grad]
    part, losses_T = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]  # torch
        model, targets_T, scale, features_TD, *weights
    )
    return part, losses_T


def _losses(features_CD: Tensor, model: LanguageModel, targets_C: Tensor) -> Tensor:
    with model.autocast():
        logits_CV = model.logits(features_CD)
    return F.cross_entropy(logits_CV.float(), targets_C, reduction="none")


class _ChunkedLoss(torch.autograd.Function):
    """(scaled sum of losses, losses_T) of features; the gradients are made in the forward pass, see above."""

    @staticmethod
    def forward(
        ctx: Any,
        model: LanguageModel,
        targets_T: Tensor,
        scale: Tensor | float,
        features_TD: Tensor,
        *weights: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        losses: list[Tensor] = []
        wants_features = ctx.needs_input_grad[3]  # not where the head alone is trained
        gradient_TD = torch.empty_like(features_TD) if wants_features else None
        gradients: list[Tensor | None] = [None] * len(weights)
        start = 0
        for features_CD, targets_C in _chunks(model, features_TD, targets_T):
            leaf_CD = features_CD.detach().requires_grad_(wants_features)
            with torch.enable_grad(), model.autocast():
                logits_CV = model.logits(leaf_CD)
            losses_C, gradient_CV = _losses_and_gradient(logits_CV.detach(), targets_C, scale)
            inputs = [leaf_CD, *weights] if wants_features else list(weights)
            found = list(torch.autograd.grad(logits_CV, inputs, gradient_CV.to(logits_CV.dtype), allow_unused=True))
            losses.append(losses_C)
            if gradient_TD is not None:
                gradient_TD[start : start + len(targets_C)] = found.pop(0)
            for place, gradient in enumerate(found):
                if gradient is not None:
                    total = gradients[place]
                    gradients[place] = gradient if total is None else total.add_(gradient)
            start += len(targets_C)
        ctx.gradients = (gradient_TD, *gradients)
        losses_T = torch.cat(losses)
        ctx.mark_non_differentiable(losses_T)
        return losses_T.sum() * scale, losses_T

    @staticmethod
    def backward(ctx: Any, grad_of_part: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # handed on, not kept until the decoder's pass is through
        scaled = (None if gradient is None else gradient.mul_(grad_of_part) for gradient in gradients)
        return None, None, None, *scaled


def _losses_and_gradient(logits_CV: Tensor, targets_C: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """Cross entropies in fp32, and the gradient of their sum times `scale`: (softmax - one-hot) scale.

    One tensor beside the logits, changed where it lies: autograd would make four, and a pass over memory is what a
    chunk's time goes to. The logits stay whole, since the way back through a soft cap may need them."""
    highest_C1 = logits_CV.amax(dim=-1, keepdim=True).float()
    places_C1 = targets_C[:, None]
    at_target_C1 = logits_CV.gather(-1, places_C1).float() - highest_C1
    work_CV = torch.sub(logits_CV.float(), highest_C1).exp_()
    sums_C1 = work_CV.sum(dim=-1, keepdim=True)
    losses_C = (sums_C1.log() - at_target_C1).squeeze(-1)
    work_CV.mul_(scale / sums_C1)
    work_CV.scatter_(-1, places_C1, work_CV.gather(-1, places_C1) - scale)
    return losses_C, work_CV


def _chunks(model: LanguageModel, features_TD: Tensor, targets_T: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = chunk_rows(model.vocabulary, on_gpu=features_TD.device.type == "cuda")
    return zip(torch.split(features_TD, rows), torch.split(targets_T, rows), strict=True)


@torch.no_grad()
def score(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """The losses of a micro-batch's targets, and which of them the model would have written itself."""
    losses_T, hits_T = model.enter(_score, model, batch)
    return losses_T, hits_T


def _score(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    with model.autocast():
        features_TD = model.features(batch)
    losses_T, hits_T = model.enter_head(_score_chunks, features_TD, model, batch.targets_T)
    return losses_T, hits_T


def _score_chunks(features_TD: Tensor, model: LanguageModel, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    losses, hits = [], []
    for features_CD, targets_C in _chunks(model, features_TD, targets_T):
        with model.autocast():
            logits_CV = model.logits(features_CD)
        losses.append(F.cross_entropy(logits_CV.float(), targets_C, reduction="none"))
        hits.append(logits_CV.argmax(dim=-1) == targets_C)
    return torch.cat(losses), torch.cat(hits)


@torch.no_grad()
def logits_of(model: LanguageModel, batch: Batch) -> Tensor:
    """All logits at a small batch's targets, T x V in fp32: for probes and sample prompts."""
    logits_TV: Tensor = model.enter(_logits, model, batch)
    return logits_TV


def _logits(model: LanguageModel, batch: Batch) -> Tensor:
    with model.autocast():
        logits_TV: Tensor = model.enter_head(model.logits, model.features(batch))
    return logits_TV.float()
