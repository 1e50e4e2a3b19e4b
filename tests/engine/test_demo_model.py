"""The built-in model: the same for everyone, whole or not there, and able to learn the built-in data set."""

import hashlib
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerBase

from core.chat import CHATML
from core.demo_data import dialogues, prose
from worker.engine.demo_model import (
    CONTEXT_LENGTH,
    DEMO_MODEL,
    END_OF_TURN,
    INPUT_GAIN,
    VOCABULARY,
    enlarge_inputs,
    ensure_demo_model,
)
from worker.engine.models import profile_model
from worker.engine.tokenizer import HfChatTokenizer

REPOSITORY = Path(__file__).parents[2]
# Ordinary prose, about nothing that core.demo_data writes about.
PLAIN_ENGLISH = """\
When the tide went out, the children walked along the wet sand and filled their pockets with shells. Most of what they
found was broken, but nobody minded. Their grandmother had spread an old blanket below the dunes, where the wind could
not reach her, and was reading a long letter from her sister, who had moved to the mountains some years before. She
wrote that the winters there were hard and the people kind, that she had learned to bake her own bread, and that she
missed the sound of the sea at night more than anything else. Toward evening it began to rain, at first so lightly that
they hardly noticed it, and then all at once. They ran for the house and hung their clothes in front of the stove.
"""


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.fixture(scope="session")
def tokenizer(demo_model: Path) -> PreTrainedTokenizerBase:
    return HfChatTokenizer.load(demo_model).tokenizer


@pytest.fixture(scope="session")
def model(demo_model: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(demo_model)


def loss_on(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> float:
    total, num_targets = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        num_targets += ids.shape[1] - 1
    return total / num_targets


def test_two_processes_at_once_make_one_model_of_the_same_bytes(demo_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / DEMO_MODEL
    leftover = folder.parent / ".tmp-tiny-llama-1"
    leftover.mkdir(parents=True)
    (leftover / "config.json").write_text("{}")
    # Whatever threads the callers have, the model's bytes are those of the session's.
    makers = [
        subprocess.Popen(
            [sys.executable, "-m", "worker.engine.demo_model", str(tmp_path)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": parallel},
            stdout=subprocess.PIPE,
            text=True,
        )
        for threads, parallel in (("1", "false"), ("2", "true"))
    ]
    for maker in makers:
        output, _ = maker.communicate(timeout=500)
        assert (maker.returncode, output.strip()) == (0, str(folder))
    assert contents(folder) == contents(demo_model)
    assert sorted(path.name for path in folder.parent.iterdir()) == [".tiny-llama.lock", "tiny-llama"]


def test_a_model_that_is_there_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / DEMO_MODEL
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("mine")
    assert ensure_demo_model(tmp_path) == folder
    assert list(folder.iterdir()) == [folder / "config.json"]


def test_its_profile_is_what_the_spec_promises(demo_model: Path) -> None:
    profile = profile_model(demo_model, DEMO_MODEL)
    assert profile.context_length == CONTEXT_LENGTH == 4096
    assert profile.vocabulary == VOCABULARY
    assert profile.has_chat_template
    assert profile.num_parameters < 2_000_000
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in demo_model.iterdir())


def test_english_takes_a_token_for_two_and_a_half_bytes_or_more(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(PLAIN_ENGLISH.encode()) / len(tokenizer(PLAIN_ENGLISH).input_ids) >= 2.5
    assert tokenizer.decode(tokenizer(PLAIN_ENGLISH).input_ids) == PLAIN_ENGLISH


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "  two  spaces\tand\r\nlines, 12345, naïve, 你好，世界, 🦙\0"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_it_has_the_built_in_template_and_stops_at_the_end_of_a_turn(
    demo_model: Path, tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM
) -> None:
    assert tokenizer.chat_template == CHATML
    assert HfChatTokenizer.load(demo_model).has_generation_marks
    assert tokenizer.eos_token == END_OF_TURN
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_it_has_learned_to_read_and_left_the_rest_to_a_fine_tune(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    chance = torch.tensor(VOCABULARY).log().item()
    assert loss_on(model, tokenizer, list(islice(prose(99), 20))) < chance - 2
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in dialogues(count=30)]
    assert 2 < loss_on(model, tokenizer, texts) < chance - 3


def test_enlarging_the_inputs_changes_no_logit(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(PLAIN_ENGLISH, return_tensors="pt").input_ids
    inputs: list[torch.Tensor] = []
    layer = model.model.layers[1]
    watched = [layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    hooks = [module.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for module in watched]
    with torch.no_grad():
        before = model(ids).logits
        enlarge_inputs(model, INPUT_GAIN)
        after = model(ids).logits
        enlarge_inputs(model, 1 / INPUT_GAIN)
    for hook in hooks:
        hook.remove()
    assert torch.equal(before, after)
    for first, second in zip(inputs[:4], inputs[4:], strict=True):
        torch.testing.assert_close(second, first * INPUT_GAIN)
