"""One pass over a conversation is all its turns: where history stands, `whole` learns what `split` would, for less."""

from pathlib import Path

import numpy as np
import pytest

from core.chat import CHATML, Sample, build_samples_many
from core.conversation import parse_row
from tests.engine import tiny
from tests.engine.test_data import conversation
from tests.engine.test_tokenizer import byte_level
from worker.engine.tokenizer import HfChatTokenizer

BARE = CHATML.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
TALKS = [
    conversation("a", "a much longer answer, of many tokens", "mid one", weight=1),
    conversation("alone"),
    conversation("first", "second second"),
]


def given_of(samples: list[Sample]) -> tiny.Given:
    contents = ((np.array(sample.token_ids, dtype=np.int32), np.array(sample.trained)) for sample in samples)
    return tiny.Given(tuple(contents))


@pytest.mark.parametrize("template", [CHATML, BARE], ids=["marks", "borders"])
@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_a_whole_conversation_is_the_token_weighted_union_of_its_turns(
    template: str, mode: str, tmp_path: Path
) -> None:
    tokenizer = HfChatTokenizer(byte_level(chat_template=template))
    size = len(tokenizer.tokenizer)
    model = tiny.load(tiny.save_base(tmp_path, vocab_size=size), method={"type": "full"})
    parsed = [parse_row(talk, "messages") for talk in TALKS]
    samples: dict[str, list[Sample]] = {}
    for multi_turn in ("whole", "split"):
        built = build_samples_many(parsed, tokenizer, train_on="assistant", multi_turn=multi_turn)
        samples[multi_turn] = [sample for each in built if isinstance(each, list) for sample in each]
    whole, split = samples["whole"], samples["split"]

    # The case is real: several turns of unequal length, each token trained once, more tokens computed when split.
    assert ([sample.num_turns for sample in whole], len(split)) == ([3, 1, 2], 6)
    assert len({sample.num_trained for sample in split[:3]}) == 3
    assert sum(sample.num_trained for sample in whole) == sum(sample.num_trained for sample in split)
    num_tokens = {name: sum(len(sample.token_ids) for sample in each) for name, each in samples.items()}
    assert num_tokens["split"] > 1.4 * num_tokens["whole"]
    assert sum(sample.num_tokens_if_split for sample in whole) == num_tokens["split"]

    longest = max(len(sample.token_ids) for sample in whole)
    results = {
        name: tiny.gradients(model, tiny.step_of(given_of(each), mode, row_length=2 * longest))
        for name, each in samples.items()
    }
    (loss, gradients), (split_loss, split_gradients) = results["whole"], results["split"]
    assert loss > 1
    assert abs(loss - split_loss) / loss < 1e-6
    assert tiny.difference(gradients, split_gradients) < 1e-5


def test_the_mean_of_each_turns_own_mean_is_another_loss(tmp_path: Path) -> None:
    """What the equality above is worth: a turn weighs as much as it has tokens."""
    tokenizer = HfChatTokenizer(byte_level(chat_template=CHATML))
    model = tiny.load(tiny.save_base(tmp_path, vocab_size=len(tokenizer.tokenizer)), method={"type": "full"})
    (samples,) = build_samples_many(
        [parse_row(TALKS[0], "messages")], tokenizer, train_on="assistant", multi_turn="split"
    )
    assert isinstance(samples, list)
    loss, _ = tiny.gradients(model, tiny.step_of(given_of(samples), "padded"))
    each = [tiny.gradients(model, tiny.step_of(given_of([sample]), "padded"))[0] for sample in samples]
    assert abs(sum(each) / len(each) - loss) / loss > 1e-4
    weights = [sample.num_trained for sample in samples]
    assert sum(w * one for w, one in zip(weights, each, strict=True)) / sum(weights) == pytest.approx(loss, rel=1e-5)
