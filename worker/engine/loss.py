"""The loss of trained tokens, computed where they are and nowhere else.

The decoder runs over whole rows, the head only over rows of the hidden state that have a target, a chunk at a time:
logits of a chunk are made, scored and sent back through the head before the next chunk is made. No more than one
chunk of logits exists at a time, where the whole row in fp32 is what fills memory first with today's vocabularies.

A step's loss is the sum over its trained tokens divided by their number, over all of its micro-batches. The divisor
is known before the first pass, so that every gradient is scaled rightly where it is made and none is rescaled later.

Shapes: T targets of a micro-batch, C of a chunk, D hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.engine.batches import Batch
from worker.engine.model import LanguageModel

# Measured on one CPU thread with a vocabulary of 32,000: 256 rows (32 MiB) are fastest, forward and backward; 2,048
# take 1.3x as long, 32 take 1.6x. A GPU wants larger matrices to be busy.
CHUNK_LOGITS_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    return max(1, CHUNK_LOGITS_BYTES[device.type] // (4 * vocabulary))


def backward(model: LanguageModel, batch: Batch, num_targets_of_step: int) -> Tensor:
    """Adds this micro-batch's part of the step's gradient and returns its losses, one a target, without the divisor.
    Nothing here waits for the device."""
    with model.autocast():
        features_TD = model.features(batch)
    rows = chunk_rows(model.vocabulary, features_TD.device)
    losses, gradients = [], []
    for features_CD, targets_C in zip(torch.split(features_TD, rows), torch.split(batch.targets_T, rows), strict=True):
        leaf_CD = features_CD.detach().requires_grad_()
        with model.autocast():
            logits_CV = model.logits(leaf_CD)
        losses_C = F.cross_entropy(logits_CV.float(), targets_C, reduction="none")
        torch.autograd.backward(losses_C.sum() / num_targets_of_step)
        losses.append(losses_C.detach())
        assert leaf_CD.grad is not None
        gradients.append(leaf_CD.grad)
    if features_TD.requires_grad:  # not where the head alone is trained
        torch.autograd.backward(features_TD, torch.cat(gradients))
    return torch.cat(losses)


@torch.no_grad()
def score(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """The losses of a micro-batch's targets, and which of them the model would have written itself."""
    with model.autocast():
        features_TD = model.features(batch)
    rows = chunk_rows(model.vocabulary, features_TD.device)
    losses, hits = [], []
    for features_CD, targets_C in zip(torch.split(features_TD, rows), torch.split(batch.targets_T, rows), strict=True):
        with model.autocast():
            logits_CV = model.logits(features_CD)
        losses.append(F.cross_entropy(logits_CV.float(), targets_C, reduction="none"))
        hits.append(logits_CV.argmax(dim=-1) == targets_C)
    return torch.cat(losses), torch.cat(hits)


@torch.no_grad()
def logits_of(model: LanguageModel, batch: Batch) -> Tensor:
    """All logits at a small batch's targets, T x V in fp32: for probes and sample prompts."""
    with model.autocast():
        return model.logits(model.features(batch)).float()
