"""Real byte-level BPE tokenizers, trained on the spot, with templates that behave as those in use do."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.utils.chat_template_utils import render_jinja_template

from core.chat import (
    BUILT_IN_TEMPLATES,
    Rendering,
    Sample,
    build_samples,
    build_samples_many,
    choose_multi_turn,
    history_stands,
)
from core.conversation import Conversation, Message, PromptCompletion, RawText, ToolCall, detect_format, parse_row
from core.errors import UserError

DATA_PAGE = Path(__file__).parents[2] / "docs" / "data.md"

# -- the tokenizer


def train_backend(text: str) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(name, special=True) for name in names],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text], trainer)
    return backend


@dataclass(frozen=True)
class Listed:
    """An encoding with everything at hand."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    special: list[bool]

    def first_from(self, character: int) -> int:
        return sum(start < character for start, _ in self.offsets)

    def end_of(self, index: int) -> int:
        return self.offsets[index][1]

    def is_special(self, index: int) -> bool:
        return self.special[index]


BACKEND = train_backend("the user asks and the assistant answers with a system of words and numbers " * 3)


@dataclass
class SmallTokenizer:
    template: str | None
    backend: Tokenizer = BACKEND
    bos_id: int | None = None
    eos_id: int | None = BACKEND.token_to_id("<|endoftext|>")
    num_batches: int = 0
    num_renderings: int = 0

    @property
    def has_template(self) -> bool:
        return self.template is not None

    @property
    def has_generation_marks(self) -> bool:
        return self.template is not None and re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None

    def render(self, messages, tools, add_generation_prompt) -> Rendering:
        self.num_renderings += 1
        try:
            texts, generated = render_jinja_template(
                [messages],
                tools,
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=self.has_generation_marks,
                bos_token="",
                eos_token="<|endoftext|>",
            )
        except jinja2.TemplateError as error:
            raise UserError("chat.template_refused", problem=str(error)) from error
        return Rendering(texts[0], tuple(generated[0]) if self.has_generation_marks else ())

    def _encoding(self, encoded) -> Listed:
        added = self.backend.get_added_tokens_decoder()
        special = [token in added for token in encoded.ids]
        return Listed(encoded.ids, encoded.offsets, special)

    def encode(self, text: str) -> Listed:
        return self._encoding(self.backend.encode(text, add_special_tokens=False))

    def encode_batch(self, texts: list[str]) -> list[Listed]:
        self.num_batches += 1
        return [self._encoding(encoded) for encoded in self.backend.encode_batch(texts, add_special_tokens=False)]

    def decode(self, token_ids) -> str:
        return self.backend.decode(list(token_ids), skip_special_tokens=False)

    def trained_texts(self, sample: Sample) -> list[str]:
        """Each run of trained tokens, decoded."""
        runs: list[list[int]] = []
        before = False
        for token, is_trained in zip(sample.token_ids, sample.trained, strict=True):
            if is_trained and not before:
                runs.append([])
            if is_trained:
                runs[-1].append(token)
            before = is_trained
        return [self.decode(run) for run in runs]


# -- templates

CHATML = BUILT_IN_TEMPLATES["chatml"]


def without_marks(template: str) -> str:
    bare = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    assert bare != template
    return bare


# What is in use: a loop over turns, with these differences.
LOOP = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}BODY{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\nPROMPT' }}{% endif %}"
)
PLAIN = LOOP.replace("BODY", "{{ message.content }}").replace("PROMPT", "")
MARKS_AROUND_CONTENT = LOOP.replace("PROMPT", "").replace(
    "BODY",
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}",
)
DROPS_EARLIER_REASONING = LOOP.replace("PROMPT", "").replace(
    "BODY",
    "{% if message.reasoning_content and loop.last %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}"
    "{{ message.content }}",
)
PROMPT_OPENS_REASONING = LOOP.replace("PROMPT", "<think>\n").replace("BODY", "{{ message.content }}")
ENDS_WITH_EOS = (
    LOOP.replace("PROMPT", "").replace("BODY", "{{ message.content }}")
    + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)
COUNTS_TURNS = "{{ messages | length }} turns\n" + PLAIN
MARKS_TWICE = LOOP.replace("PROMPT", "").replace(
    "BODY",
    "{% if message.role == 'assistant' %}{% generation %}{{ message.reasoning_content or '' }}{% endgeneration %}"
    "{% generation %}{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}",
)


# -- conversations


def talk(*contents: str, **fields: object) -> Conversation:
    """Turns of user and assistant in alternation; `fields` stand in each of the assistant's."""
    messages = tuple(
        Message("assistant", content, **fields) if number % 2 else Message("user", content)
        for number, content in enumerate(contents)
    )
    return Conversation(messages, (), "messages")


texts = st.text(max_size=12)
conversations = st.builds(
    lambda system, pairs, weights: Conversation(
        (
            *([Message("system", system)] if system else []),
            *(
                message
                for (asked, answered), weight in zip(pairs, weights, strict=False)
                for message in (Message("user", asked), Message("assistant", answered, weight=weight))
            ),
        ),
        (),
        "messages",
    ),
    texts,
    st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
    st.lists(st.sampled_from([None, 0, 1]), min_size=4, max_size=4),
)


def trained_answers(conversation: Conversation) -> list[str]:
    return [
        message.content + "<|im_end|>"
        for message in conversation.messages
        if message.role == "assistant" and message.weight != 0
    ]


def the_whole(conversation, tokenizer, train_on="assistant") -> Sample:
    samples = build_samples(conversation, tokenizer, train_on=train_on, multi_turn="whole")
    assert len(samples) == 1
    assert not samples[0].fell_back
    return samples[0]


# -- whole


@pytest.mark.parametrize("template", [CHATML, without_marks(CHATML), PLAIN, MARKS_AROUND_CONTENT])
@given(conversation=conversations)
def test_trained_tokens_are_the_assistants_turns_and_their_ends(template, conversation):
    tokenizer = SmallTokenizer(template)
    sample = the_whole(conversation, tokenizer)
    expected = trained_answers(conversation)
    assert tokenizer.trained_texts(sample) == expected
    assert sample.num_turns == len(expected)
    assert (sample.num_trained == 0) == (not expected)
    rendering = tokenizer.render([{"role": m.role, "content": m.content} for m in conversation.messages], None, False)
    assert sample.token_ids == tuple(tokenizer.encode(rendering.text).ids)


@given(conversation=conversations, train_on=st.sampled_from(["assistant", "last", "all"]))
def test_marks_and_borders_agree(conversation, train_on):
    marked, bare = SmallTokenizer(CHATML), SmallTokenizer(without_marks(CHATML))
    assert marked.has_generation_marks
    assert not bare.has_generation_marks
    for multi_turn in ("whole", "split"):
        by_marks = build_samples(conversation, marked, train_on=train_on, multi_turn=multi_turn)
        by_borders = build_samples(conversation, bare, train_on=train_on, multi_turn=multi_turn)
        if train_on == "all":  # the end of a turn that is left out differs by the white space behind it
            assert [sample.token_ids for sample in by_marks] == [sample.token_ids for sample in by_borders]
        else:
            assert by_marks == by_borders


def test_marks_need_one_rendering_of_a_whole_conversation():
    tokenizer = SmallTokenizer(CHATML)
    the_whole(talk("a", "b", "c", "d"), tokenizer)
    assert tokenizer.num_renderings == 1


def test_a_character_of_many_tokens_is_trained_whole():
    content = "星期三 \U0001f600é"
    tokenizer = SmallTokenizer(CHATML)
    sample = the_whole(talk("数", content), tokenizer)
    assert len(tokenizer.encode("星").ids) > 1
    assert tokenizer.trained_texts(sample) == [content + "<|im_end|>"]
    assert sample.num_trained == len(tokenizer.encode(content).ids) + 1


def test_a_token_that_straddles_the_beginning_of_a_turn_is_not_trained():
    backend = train_backend("one\n\ntwo\n\nthree\n\nfour\n\n" * 5)
    tokenizer = SmallTokenizer(CHATML, backend)
    assert len(backend.encode("\n\n").ids) == 1
    sample = the_whole(talk("a", "\n\nb"), tokenizer)
    straddling = backend.encode("<|im_start|>assistant\n\n\nb").tokens
    assert "ĊĊ" in straddling
    assert tokenizer.trained_texts(sample) == ["\nb<|im_end|>"]


def test_several_marks_in_a_turn_fall_back_to_borders():
    tokenizer = SmallTokenizer(MARKS_TWICE)
    conversation = talk("a", "b", "c", "d", reasoning_content="hm")
    assert len(tokenizer.render([{"role": "assistant", "content": "b"}], None, False).generated) == 2
    assert tokenizer.trained_texts(the_whole(conversation, tokenizer)) == ["hmb<|im_end|>", "hmd<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, PLAIN])
def test_last_trains_the_last_turn_alone_and_all_trains_every_token_but_the_first(template):
    tokenizer = SmallTokenizer(template)
    conversation = talk("a", "b", "c", "d")
    last = the_whole(conversation, tokenizer, "last")
    assert tokenizer.trained_texts(last) == ["d<|im_end|>"]
    assert last.num_turns == 1
    everything = the_whole(conversation, tokenizer, "all")
    assert everything.trained == (False,) + (True,) * (len(everything.token_ids) - 1)


@pytest.mark.parametrize("template", [CHATML, PLAIN])
def test_a_turn_of_weight_0_is_context(template):
    tokenizer = SmallTokenizer(template)
    conversation = talk("a", "b", "c", "d")
    first = replace(conversation.messages[1], weight=0)
    conversation = replace(conversation, messages=(conversation.messages[0], first, *conversation.messages[2:]))
    assert tokenizer.trained_texts(the_whole(conversation, tokenizer)) == ["d<|im_end|>"]
    everything = the_whole(conversation, tokenizer, "all")
    assert "b" not in "".join(tokenizer.trained_texts(everything))
    assert "d<|im_end|>" in "".join(tokenizer.trained_texts(everything))
    nothing = talk("a", "b", weight=0)
    assert the_whole(nothing, tokenizer).num_trained == 0
    assert build_samples(nothing, tokenizer, train_on="assistant", multi_turn="split") == []


# -- split


@given(conversation=conversations, train_on=st.sampled_from(["assistant", "last"]))
def test_split_samples_train_together_what_the_whole_trains(conversation, train_on):
    tokenizer = SmallTokenizer(PLAIN)
    assert history_stands(conversation, tokenizer)
    whole = the_whole(conversation, tokenizer, train_on)
    samples = build_samples(conversation, tokenizer, train_on=train_on, multi_turn="split")
    assert len(samples) == whole.num_turns
    trained = [False] * len(whole.token_ids)
    for sample in samples:
        assert sample.token_ids == whole.token_ids[: len(sample.token_ids)]
        for position, is_trained in enumerate(sample.trained):
            assert not (is_trained and trained[position])
            trained[position] |= is_trained
    assert tuple(trained) == whole.trained


def test_split_with_all_trains_every_token_once():
    tokenizer = SmallTokenizer(PLAIN)
    conversation = talk("a", "b", "c", "d")
    samples = build_samples(conversation, tokenizer, train_on="all", multi_turn="split")
    assert len(samples) == 2
    assert sum(sample.num_trained for sample in samples) == the_whole(conversation, tokenizer, "all").num_trained


@pytest.mark.parametrize("template", [DROPS_EARLIER_REASONING, PROMPT_OPENS_REASONING, ENDS_WITH_EOS, CHATML, PLAIN])
def test_a_split_samples_context_is_what_is_served(template):
    tokenizer = SmallTokenizer(template)
    conversation = talk("a", "b", "c", "d", reasoning_content="hm")
    samples = build_samples(conversation, tokenizer, train_on="assistant", multi_turn="split")
    for turn, sample in zip((1, 3), samples, strict=True):
        served = [
            {"role": m.role, "content": m.content, "reasoning_content": m.reasoning_content}
            for m in conversation.messages
        ]
        prompt = tokenizer.render(served[:turn], None, True).text
        context = tokenizer.decode(sample.token_ids[: sample.trained.index(True)])
        assert prompt.startswith(context)
        assert prompt.removeprefix(context) in ("", "<think>\n")
        assert sum(sample.trained) == sample.num_trained > 0
        assert sample.num_turns == 1


def test_a_template_that_drops_earlier_reasoning_is_split():
    tokenizer = SmallTokenizer(DROPS_EARLIER_REASONING)
    conversation = talk("a", "b", "c", "d", reasoning_content="hm")
    plain = talk("a", "b", "c", "d")
    assert not history_stands(conversation, tokenizer)
    assert history_stands(plain, tokenizer)

    samples = build_samples(conversation, tokenizer, train_on="assistant", multi_turn="whole")
    assert [sample.fell_back for sample in samples] == [True, True]
    assert [tokenizer.trained_texts(sample) for sample in samples] == [
        ["<think>hm</think>b<|im_end|>"],
        ["<think>hm</think>d<|im_end|>"],
    ]
    assert samples == [
        replace(sample, fell_back=True)
        for sample in build_samples(conversation, tokenizer, train_on="assistant", multi_turn="split")
    ]

    choice = choose_multi_turn([talk("a", "b"), plain, conversation, plain], tokenizer)
    assert (choice.mode, choice.num_checked, choice.rewritten) == ("split", 2, 2)
    assert "first in conversation 3" in choice.reason


def test_a_template_that_ends_the_last_turn_otherwise_is_split():
    tokenizer = SmallTokenizer(ENDS_WITH_EOS)
    assert choose_multi_turn([talk("a", "b", "c", "d")], tokenizer).mode == "split"
    samples = build_samples(talk("a", "b"), tokenizer, train_on="assistant", multi_turn="whole")
    assert [tokenizer.trained_texts(sample) for sample in samples] == [["b<|im_end|>\n<|endoftext|>"]]


def test_a_prompt_that_opens_reasoning_which_the_turn_has_not_counts_up_to_where_they_part():
    tokenizer = SmallTokenizer(PROMPT_OPENS_REASONING)
    conversation = talk("a", "b", "c", "d")
    assert history_stands(conversation, tokenizer)
    assert tokenizer.trained_texts(the_whole(conversation, tokenizer)) == ["b<|im_end|>", "d<|im_end|>"]


def test_a_template_that_rewrites_the_prompt_itself_is_refused_not_guessed():
    tokenizer = SmallTokenizer(COUNTS_TURNS)
    for multi_turn in ("whole", "split"):
        with pytest.raises(UserError) as caught:
            build_samples(talk("a", "b", "c", "d"), tokenizer, train_on="assistant", multi_turn=multi_turn)
        assert caught.value.code == "chat.no_border"
    assert the_whole(talk("a", "b"), tokenizer, "all").num_trained > 0


def test_auto_is_whole_where_history_stands_in_all_conversations():
    choice = choose_multi_turn([talk("a", "b", "c", "d"), RawText("x")] * 3, SmallTokenizer(CHATML))
    assert (choice.mode, choice.num_checked, choice.rewritten) == ("whole", 3, None)
    assert "in all 3 conversations" in choice.reason
    assert "no conversation has a second" in choose_multi_turn([talk("a", "b")], SmallTokenizer(CHATML)).reason


# -- plain text


def test_plain_text_is_trained_with_the_tokenizers_own_begin_and_end():
    end = BACKEND.token_to_id("<|endoftext|>")
    begin = BACKEND.token_to_id("<|im_start|>")
    tokenizer = SmallTokenizer(None)
    [sample] = build_samples(RawText("some text"), tokenizer, train_on="assistant", multi_turn="whole")
    assert sample.token_ids == (*tokenizer.encode("some text").ids, end)
    assert sample.trained == (False,) + (True,) * (len(sample.token_ids) - 1)
    [sample] = build_samples(RawText("some text<|endoftext|>"), tokenizer, train_on="assistant", multi_turn="split")
    assert sample.token_ids.count(end) == 1

    tokenizer = SmallTokenizer(None, bos_id=begin)
    [sample] = build_samples(RawText("some text"), tokenizer, train_on="assistant", multi_turn="whole")
    assert sample.token_ids == (begin, *tokenizer.encode("some text").ids, end)
    assert sample.num_trained == len(sample.token_ids) - 1
    [nothing] = build_samples(RawText(""), SmallTokenizer(None), train_on="assistant", multi_turn="whole")
    assert nothing.num_trained == 0


@given(prompt=st.text(min_size=1), completion=st.text())
def test_of_a_prompt_and_its_completion_only_the_completion_is_trained(prompt, completion):
    tokenizer = SmallTokenizer(None)
    row = PromptCompletion(prompt + ":", completion)
    [sample] = build_samples(row, tokenizer, train_on="assistant", multi_turn="whole")
    trained = "".join(tokenizer.trained_texts(sample))
    assert trained.endswith("<|endoftext|>")
    assert (completion + "<|endoftext|>").endswith(trained)
    # A punctuation mark and what follows may be one token of this tokenizer only where both are punctuation.
    if completion[:1].isalnum():
        assert trained == completion + "<|endoftext|>"


# -- many at once


@given(rows=st.lists(st.one_of(conversations, st.builds(RawText, texts)), max_size=4), data=st.data())
def test_a_batch_gives_what_one_by_one_gives(rows, data):
    template = data.draw(st.sampled_from([CHATML, PLAIN, DROPS_EARLIER_REASONING]))
    multi_turn = data.draw(st.sampled_from(["whole", "split"]))
    tokenizer = SmallTokenizer(template)
    batch = build_samples_many(rows, tokenizer, train_on="assistant", multi_turn=multi_turn)
    assert tokenizer.num_batches == 1
    assert batch == [build_samples(row, tokenizer, train_on="assistant", multi_turn=multi_turn) for row in rows]


def test_a_refused_conversation_stands_in_its_place_in_the_batch():
    template = "{% if messages | length > 2 %}{{ raise_exception('too many turns') }}{% endif %}" + PLAIN
    batch = build_samples_many(
        [talk("a", "b"), talk("a", "b", "c", "d"), talk("e", "f")],
        SmallTokenizer(template),
        train_on="assistant",
        multi_turn="whole",
    )
    assert [isinstance(outcome, UserError) for outcome in batch] == [False, True, False]
    assert str(batch[1]) == "the chat template refuses this conversation: too many turns"
    assert choose_multi_turn([talk("a", "b", "c", "d")], SmallTokenizer(template)).mode == "whole"


def test_a_conversation_without_a_template_names_the_remedy():
    with pytest.raises(UserError, match=r"set model\.chat_template to chatml") as caught:
        build_samples(talk("a", "b"), SmallTokenizer(None), train_on="assistant", multi_turn="whole")
    assert caught.value.field == "model.chat_template"


# -- tools, through the built-in template


def spellings() -> dict[str, dict[str, object]]:
    """The table in docs/data.md."""
    section = DATA_PAGE.read_text().split("## Tool calls")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!spelling)([^|]+) \| `(\{.*\})` \|$", section, re.MULTILINE)
    return {name: json.loads(row) for name, row in rows}


@pytest.mark.parametrize("name", spellings())
def test_every_spelling_of_a_tool_call_renders_the_same(name):
    assert len(spellings()) >= 6
    row = spellings()[name]
    conversation = parse_row(row, detect_format([row]))
    assert isinstance(conversation, Conversation)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    assert conversation.tools == (tool,)
    tokenizer = SmallTokenizer(CHATML)
    sample = the_whole(conversation, tokenizer)
    assert tokenizer.trained_texts(sample) == [
        '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>\n'
        '<tool_call>{"name": "add", "arguments": {"a": 3, "b": 4}}</tool_call><|im_end|>',
        "3 and 7<|im_end|>",
    ]
    text = tokenizer.decode(sample.token_ids)
    assert json.dumps(tool) in text
    assert "<|im_start|>tool\n3<|im_end|>\n<|im_start|>tool\n7<|im_end|>\n" in text


def test_chatml_keeps_system_reasoning_and_text_beside_calls():
    call = ToolCall("look", {"for": "三"})
    conversation = Conversation(
        (
            Message("system", "be kind"),
            Message("user", "where?"),
            Message("assistant", "let me look", (call,), reasoning_content="hm"),
            Message("tool", "here"),
            Message("assistant", "here"),
        ),
        ({"type": "function", "function": {"name": "look"}},),
        "messages",
    )
    tokenizer = SmallTokenizer(CHATML)
    assert history_stands(conversation, tokenizer)
    sample = the_whole(conversation, tokenizer)
    assert tokenizer.decode(sample.token_ids) == (
        "<|im_start|>system\nbe kind\n\nThese functions can be called, one JSON description a line:\n"
        '{"type": "function", "function": {"name": "look"}}\n'
        'A call is written as <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>\n'
        "<|im_start|>user\nwhere?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nhm\n</think>\n\nlet me look\n"
        '<tool_call>{"name": "look", "arguments": {"for": "三"}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\nhere<|im_end|>\n"
        "<|im_start|>assistant\nhere<|im_end|>\n"
    )
