"""The chat templates of today's models, as TRL collects them: each is trained as it is served, token for token.

For every assistant turn that a sample trains, what stands before it is what a server would feed the model (the
rendering up to the turn, with the generation prompt), and what is trained is what the template writes for the turn.
Where a template writes a turn otherwise than its generation prompt announces, the two have the longest beginning in
common that tokens can have. One tokenizer serves all of them; the marks of all templates are special tokens of it.
"""

import re
from functools import cache
from pathlib import Path

import pytest
import trl
from transformers import AddedToken, PreTrainedTokenizerFast

from core.chat import CallsSeen, Sample, Span, build_samples, choose_multi_turn, look_for_calls
from core.conversation import Conversation, parse_row, to_template_messages
from core.errors import UserError
from tests.engine.test_tokenizer import byte_level
from worker.engine.tokenizer import HfChatTokenizer

TEMPLATES = {
    path.stem: path.read_text()
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    if not path.stem.endswith("_training")
}
MARK = re.compile(r"<[|｜][^<>{}'\"\s]{1,40}[|｜]>|</?think>|<(?:start|end)_of_turn>|<end_of_utterance>|\[/?INST\]")

CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"first": 1, "second": 2}}}
PARAMETERS = {"type": "object", "properties": {"first": {"type": "integer", "description": "One of the two."}}}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS}}


def asked(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


def said(text: str, thought: str | None = None, call: dict[str, object] | None = None) -> dict[str, object]:
    turn: dict[str, object] = {"role": "assistant", "content": text}
    return turn | ({"reasoning_content": thought} if thought else {}) | ({"tool_calls": [call]} if call else {})


RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "add", "content": "3"}
BRIEF = {"role": "system", "content": "Be brief."}
TALKS: dict[str, list[dict[str, object]]] = {
    "one turn": [asked("1+2?"), said("three")],
    "system": [BRIEF, asked("1+2?"), said("three")],
    "three turns": [asked("1+2?"), said("three"), asked("and 3?"), said("six"), asked("and 4?"), said("ten")],
    "reasoning": [asked("1+2?"), said("three", "count up"), asked("and 3?"), said("six", "count on")],
    "tools": [asked("1+2?"), said("", None, CALL), RESULT, said("three")],
    "reasoning with tools": [
        *(asked("1+2?"), said("", "call it", CALL), RESULT, said("three", "got it")),
        *(asked("and 3?"), said("", "once more", CALL), RESULT, said("six", "done")),
    ],
}
REFUSED = {
    "system": {"gemma"},
    "tools": {"cohere", "cohere2", "gemma", "gemma3", "llava_next"},
    "reasoning with tools": {"cohere", "cohere2", "gemma", "gemma3", "llava_next"},
}
# What is known of them: with three plain turns these rewrite earlier ones, these write less than their prompt opens.
REWRITE = {"gptoss", "phi3", "phi3_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"}
# These have no place for tool calls.
DROP_CALLS = {"deepseek_r1_distill", "idefics3", "lfm2", "llama3", "phi3", "phi3_5", "qwen2_5_vl", "smolvlm"}
OPEN_REASONING = {"deepseek_r1_distill", "deepseekv3"} | {name for name in TEMPLATES if name.startswith("nemotron")}


@cache
def marked_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    marks = sorted({mark for template in TEMPLATES.values() for mark in MARK.findall(template)})
    assert len(marks) > 50
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks], special_tokens=True)
    return tokenizer


@cache
def tokenizer_of(name: str) -> HfChatTokenizer:
    tokenizer = marked_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    return HfChatTokenizer(tokenizer)


class Served:
    """What a server makes of a conversation, as tokens."""

    def __init__(self, conversation: Conversation, tokenizer: HfChatTokenizer) -> None:
        self._messages, self._tools = to_template_messages(conversation)
        self._tokenizer = tokenizer

    def fed(self, turn: int, *, has_prompt: bool = True) -> list[int]:
        return self._ids(turn, has_prompt)

    def written(self, turn: int) -> list[int]:
        return self._ids(turn + 1, False)

    def _ids(self, num_messages: int, has_prompt: bool) -> list[int]:
        text = self._tokenizer.render(self._messages[:num_messages], self._tools, has_prompt).text
        return self._tokenizer.encode(text).ids


def common(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def talk_of(name: str) -> Conversation:
    row = {"messages": TALKS[name]} | ({"tools": [ADD]} if "tools" in name else {})
    parsed = parse_row(row, "messages")
    assert isinstance(parsed, Conversation)
    return parsed


def assert_served(served: Served, turn: int, sample: Sample, run: Span, tokenizer: HfChatTokenizer) -> bool:
    """That the turn is trained as it is served; returns whether the template writes it as its prompt announces it."""
    context, trained = list(sample.token_ids[: run.start]), list(sample.token_ids[run.start : run.end])
    fed, written = served.fed(turn), served.written(turn)
    is_announced = context == fed
    if not is_announced:
        # Only the generation prompt differs, and every token that both have in common is context.
        assert len(context) == common(fed, written) >= common(fed, served.fed(turn, has_prompt=False))
        assert context == fed[: len(context)]
    behind = tokenizer.tokenizer.decode(written).rstrip()
    assert behind.endswith(tokenizer.tokenizer.decode(trained).rstrip())
    # The same tokens, and behind them nothing but white space that nobody generates.
    places = [p for p in range(len(written) - len(trained) + 1) if written[p : p + len(trained)] == trained]
    assert places
    assert not tokenizer.tokenizer.decode(written[places[-1] + len(trained) :]).strip()
    return is_announced


def test_the_corpus_is_whole() -> None:
    assert len(TEMPLATES) == 41
    assert set.union(REWRITE, DROP_CALLS, OPEN_REASONING, *REFUSED.values()) <= set(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_trained_as_it_is_served(name: str) -> None:
    tokenizer = tokenizer_of(name)
    num_turns = 0
    for talk, messages in TALKS.items():
        conversation = talk_of(talk)
        try:
            choice = choose_multi_turn([conversation], tokenizer)
            samples = build_samples(conversation, tokenizer, train_on="assistant", multi_turn=choice.mode)
        except UserError as error:
            # The template's own words: such a conversation can't be served either.
            assert (error.code, name in REFUSED.get(talk, set())) == ("chat.template_refused", True), talk
            continue
        assert name not in REFUSED.get(talk, set())
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        runs = [(sample, run) for sample in samples for run in sample.runs]
        assert len(runs) == len(turns)
        assert len(samples) == (1 if choice.mode == "whole" else len(turns))
        assert not any(sample.fell_back for sample in samples)
        served = Served(conversation, tokenizer)
        announced = [
            assert_served(served, turn, sample, run, tokenizer) for turn, (sample, run) in zip(turns, runs, strict=True)
        ]
        for turn, (sample, run) in zip(turns, runs, strict=True):
            text = tokenizer.tokenizer.decode(sample.token_ids[run.start : run.end])
            assert str(messages[turn]["content"]) in text
        num_turns += len(turns)
        if talk == "three turns":
            assert choice.mode == ("split" if name in REWRITE else "whole")
            assert all(announced) == (name not in OPEN_REASONING) and any(announced) == all(announced)
    assert num_turns >= 6


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_leaves_tool_calls_out_is_found(name: str) -> None:
    tokenizer = tokenizer_of(name)
    plain, *called = (talk_of(talk) for talk in ("three turns", "tools", "reasoning with tools"))
    assert look_for_calls([plain], tokenizer) == CallsSeen(0, 0)
    num_refused = sum(name in REFUSED[talk] for talk in ("tools", "reasoning with tools"))
    seen = look_for_calls([plain, *called], tokenizer)
    assert seen == CallsSeen(2 - num_refused, 2 if name in DROP_CALLS else 0)
    messages, _ = to_template_messages(called[0])
    if num_refused == 0:
        text = tokenizer.render(messages, None, False).text
        assert ("add" in text) == (name not in DROP_CALLS), "without its tools only a call has the name"
    in_chatml = HfChatTokenizer(tokenizer.tokenizer, "chatml")
    assert look_for_calls(called, in_chatml) == CallsSeen(2, 0), "what the warning offers writes them"


def test_a_turn_that_begins_otherwise_than_announced_keeps_its_first_token() -> None:
    """The prompt opens <think>, the turn is a call: both begin with <, and the call's first token is none of both."""
    tokenizer = tokenizer_of("deepseekv3")
    conversation = talk_of("tools")
    (sample,) = build_samples(conversation, tokenizer, train_on="assistant", multi_turn="whole")
    first = tokenizer.tokenizer.decode([sample.token_ids[sample.runs[0].start]])
    assert first == "<｜tool▁calls▁begin｜>"
    # Its arguments are concatenated as text, so they are given as text.
    assert '{"first": 1, "second": 2}' in tokenizer.tokenizer.decode(sample.token_ids)


@pytest.mark.parametrize("name", ["llava_next", "idefics3", "smolvlm"])
def test_a_template_that_reads_parts_writes_what_was_said(name: str) -> None:
    """Given a plain text, these fail or write an empty turn."""
    (sample,) = build_samples(talk_of("one turn"), tokenizer_of(name), train_on="assistant", multi_turn="whole")
    text = tokenizer_of(name).tokenizer.decode(sample.token_ids)
    assert "1+2?" in text and "three" in text


def test_a_context_that_the_turn_would_rewrite_is_trained_as_it_was() -> None:
    """gpt-oss forgets the analysis behind a call as soon as the answer stands; when it answers, it still sees it."""
    tokenizer = tokenizer_of("gptoss")
    samples = build_samples(talk_of("reasoning with tools"), tokenizer, train_on="assistant", multi_turn="split")
    answer = samples[1]
    context = tokenizer.tokenizer.decode(answer.token_ids[: answer.runs[0].start])
    turn = tokenizer.tokenizer.decode(answer.token_ids[answer.runs[0].start :])
    assert "call it" in context and "got it" in turn and "three" in turn
    served = Served(talk_of("reasoning with tools"), tokenizer)
    assert list(answer.token_ids[: answer.runs[0].start]) == served.fed(3)
    assert "call it" not in tokenizer.tokenizer.decode(served.written(3))
