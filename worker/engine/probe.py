"""Does a packed sample see its neighbour? Asked of the loaded model itself, before the first step.

Masks, positions and cuts are a recipe, and there are models on which the recipe fails: state-space and linear
attention layers carry a state over the border, convolutions reach over it, and nothing complains. So two segments
share a row, the tokens of the first are replaced, and what the model makes of the second, right before its head, has
to stay as it was. Only the first one's tokens differ, so the second is computed by the same operations in the same
shapes: where nothing leaks, nothing moves, to the last bit on most devices.
"""

import random

import torch
from torch import Tensor

from worker.engine.batches import of_tokens
from worker.engine.model import LanguageModel, relative_difference

SEGMENT_TOKENS = 24
# Relative to the largest value. The smallest leak seen in a model was 1.7e-3; experts that get another number of tokens
# may round differently, which is why it is not zero.
LARGEST_HARMLESS = {torch.float32: 1e-5, torch.bfloat16: 5e-4, torch.float16: 5e-4}


def measure_leak(model: LanguageModel, seed: int) -> float:
    """How far the second segment's last hidden states move when the first one changes, as a share of their scale."""
    draw = random.Random(seed)
    first, other, second = ([draw.randrange(1, model.vocabulary) for _ in range(SEGMENT_TOKENS)] for _ in range(3))
    was_training = model.model.training
    model.model.eval()
    before, after = (_features(model, [neighbour, second]) for neighbour in (first, other))
    model.model.train(was_training)
    num_first = SEGMENT_TOKENS - 1  # a segment's last position has no target, so its features are not asked for
    moved = relative_difference(before[:num_first], after[:num_first])
    assert moved > LARGEST_HARMLESS[model.dtype], "the first segment's own have to move, or nothing was asked"
    return relative_difference(before[num_first:], after[num_first:])


@torch.no_grad()
def _features(model: LanguageModel, row: list[list[int]]) -> Tensor:
    with model.autocast():
        features_TD: Tensor = model.enter(model.features, of_tokens([row]).to(model.device))
    return features_TD.float()


def leaks(model: LanguageModel, leak: float) -> bool:
    return not leak <= LARGEST_HARMLESS[model.dtype]
