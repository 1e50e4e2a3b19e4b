"""The held-out loss, and answers to the sample prompts, in between two steps.

The loss weighs every trained token the same, as training does. Prompts are answered greedily by the same forward pass
that is trained, without a cache: slower a token than a server would be, but no other code path, and no state that a
following step could trip over. Nothing here draws a random number.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from worker.engine.batches import Batch, of_tokens
from worker.engine.loss import logits_of, score
from worker.engine.model import LanguageModel
from worker.engine.ranks import ALONE, Ranks

ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Evaluation:
    loss: float
    token_accuracy: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


@contextmanager
def _in_eval_mode(model: LanguageModel) -> Iterator[None]:
    model.model.eval()
    try:
        yield
    finally:
        model.model.train()


def evaluate(
    model: LanguageModel, batches: Iterable[Batch], should_stop: Callable[[], bool], ranks: Ranks = ALONE
) -> Evaluation | None:
    """None where it was told to stop before the end. Each rank gives its own batches, equally many; the sums are over
    all of them, and `should_stop` has to answer all ranks alike."""
    sums = torch.zeros(3, dtype=torch.float64, device=model.device)  # losses, hits, targets
    with _in_eval_mode(model):
        for batch in batches:
            if should_stop():
                return None
            losses_T, hits_T = score(model, batch.to(model.device))
            sums[0] += losses_T.double().sum()
            sums[1] += hits_T.sum()
            sums[2] += batch.num_targets
    loss_sum, num_hits, num_targets = ranks.sum_(sums).tolist()
    assert num_targets > 0, "held-out samples without a trained token were left out before"
    return Evaluation(loss_sum / num_targets, num_hits / num_targets)


def answer(
    model: LanguageModel, prompt_ids: list[int], stop_ids: frozenset[int], context_length: int, ranks: Ranks = ALONE
) -> list[int]:
    """What the model writes after the prompt: the likeliest token each time, up to ANSWER_TOKENS or a stop token.

    All ranks write the same in step, for under ZeRO-3 each holds a part of every layer. On GPUs two likeliest tokens
    can be so close that ranks differ, so the first one's counts."""
    written: list[int] = []
    with _in_eval_mode(model):
        while len(written) < ANSWER_TOKENS and len(prompt_ids) + len(written) < context_length:
            # The token behind is only there to give the last position a target.
            batch = of_tokens([[[*prompt_ids, *written, 0]]]).last_target_only()
            token = ranks.from_first(int(logits_of(model, batch.to(model.device)).argmax()))
            if token in stop_ids:
                break
            written.append(token)
    return written
