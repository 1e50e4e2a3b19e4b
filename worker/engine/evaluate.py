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


def evaluate(model: LanguageModel, batches: Iterable[Batch], should_stop: Callable[[], bool]) -> Evaluation | None:
    """None where it was told to stop before the end."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=model.device)
    num_hits = torch.zeros((), dtype=torch.int64, device=model.device)
    num_targets = 0
    with _in_eval_mode(model):
        for batch in batches:
            if should_stop():
                return None
            losses_T, hits_T = score(model, batch.to(model.device))
            loss_sum += losses_T.double().sum()
            num_hits += hits_T.sum()
            num_targets += batch.num_targets
    assert num_targets > 0, "held-out samples without a trained token were left out before"
    return Evaluation(float(loss_sum) / num_targets, int(num_hits) / num_targets)


def answer(model: LanguageModel, prompt_ids: list[int], stop_ids: frozenset[int], context_length: int) -> list[int]:
    """What the model writes after the prompt: the likeliest token each time, up to ANSWER_TOKENS or a stop token."""
    written: list[int] = []
    with _in_eval_mode(model):
        while len(written) < ANSWER_TOKENS and len(prompt_ids) + len(written) < context_length:
            # The token behind is only there to give the last position a target.
            batch = of_tokens([[[*prompt_ids, *written, 0]]]).last_target_only()
            token = int(logits_of(model, batch.to(model.device)).argmax())
            if token in stop_ids:
                break
            written.append(token)
    return written
