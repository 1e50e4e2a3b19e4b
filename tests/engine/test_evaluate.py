from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.engine import tiny
from worker.engine.evaluate import ANSWER_TOKENS, Evaluation, answer, evaluate
from worker.engine.segments import Segments


def test_the_held_out_loss_weighs_every_token_and_leaves_no_trace(tmp_path: Path) -> None:
    method = {"type": "lora", "rank": 4, "dropout": 0.5}
    model = tiny.load(tiny.save_base(tmp_path), method=method)
    samples = tiny.some_samples()
    state = torch.get_rng_state()
    results = [
        evaluate(model, tiny.step_of(samples, *layout).batches, lambda: False)
        for layout in (("packed", 80, 1), ("padded", 60, 4))
    ]
    assert torch.equal(torch.get_rng_state(), state) and model.model.training
    model.model.eval()
    losses, hits = [], []
    for token_ids, trained in samples.contents:
        ids = torch.from_numpy(token_ids.astype("int64"))[None]
        logits = model.base(input_ids=ids, use_cache=False, segments=Segments(((ids.shape[1],),), model.device)).logits[
            0, :-1
        ]
        kept = torch.from_numpy(trained[1:])
        losses.append(F.cross_entropy(logits, ids[0, 1:], reduction="none")[kept].detach())
        hits.append((logits.argmax(-1) == ids[0, 1:])[kept])
    for result in results:
        assert result is not None
        assert result.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
        assert result.token_accuracy == pytest.approx(float(torch.cat(hits).float().mean()))


def test_it_can_be_told_to_stop(tmp_path: Path) -> None:
    model = tiny.load(tiny.save_base(tmp_path), method={"type": "full"})
    assert evaluate(model, tiny.step_of(tiny.some_samples()).batches, lambda: True) is None
    assert model.model.training


def test_a_hopeless_loss_has_no_perplexity_rather_than_an_error() -> None:
    assert Evaluation(loss=1000.0, token_accuracy=0.0).perplexity == float("inf")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_answer_is_what_a_server_would_write_greedily(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny.save_base(tmp_path, family)
    model = tiny.load(folder, method={"type": "full"})
    prompt = [5, 9, 17, 4]
    served = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([prompt])
    expected = served.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    written = answer(model, prompt, frozenset(), tiny.CONTEXT)
    assert written == expected and len(written) == ANSWER_TOKENS
    assert answer(model, prompt, frozenset({expected[3]}), tiny.CONTEXT) == expected[: expected.index(expected[3])]
    assert answer(model, prompt, frozenset(), context_length=len(prompt) + 2) == expected[:2]
