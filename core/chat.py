"""A conversation -> token ids and which of them are trained, as the model will be served.

What is trained is decided on the rendered text and carried over to the tokens by their character offsets: a token is
trained when it starts within a trained span, so one that straddles the beginning isn't (in service it belongs to the
prompt). The spans come from the template's generation marks where it has one for each assistant turn. Elsewhere they
are the borders of the turn: it begins where the rendering up to it, with the generation prompt, ends, and ends where
the rendering with it ends. Some templates write a turn otherwise than their generation prompt announces it (a prompt
that opens a reasoning block); then the turn begins where the two renderings part, and a token across that place is the
turn's, since in service another one stands there.

Many templates rewrite history: they drop the reasoning of earlier turns, or mark the last turn. Then no single text
holds every turn in the context in which the model will see it, and the conversation is trained as one sample for each
assistant turn (`split`). Nothing is trained with a guessed mask: a conversation for which `whole` was asked and whose
history doesn't stand is split, and its samples say so (`fell_back`).

The end-of-turn token is trained, so that the model learns to stop. White space that the template writes after it is
not: in service nothing is generated there.

Texts of many conversations go to the tokenizer in one batch; what is built is the same as one by one.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, NamedTuple, Protocol

from core.conversation import Conversation, Parsed, PromptCompletion, RawText, ToolCall, to_template_messages
from core.errors import UserError

TrainOn = Literal["assistant", "last", "all"]
MultiTurn = Literal["whole", "split"]


class Span(NamedTuple):
    """Characters start..end-1 of a text."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Rendering:
    text: str
    generated: tuple[tuple[int, int], ...] = ()  # what stands in {% generation %} blocks; () where there are none


class Encoding(Protocol):
    """The tokens of a text. Only a few of them are ever asked where they stand, so a tokenizer need not say it of all.

    A token's leading space belongs to it."""

    @property
    def ids(self) -> Sequence[int]: ...

    def first_from(self, character: int) -> int:
        """Index of the first token that begins at this character or behind it."""

    def end_of(self, index: int) -> int:
        """The character behind the token."""

    def is_special(self, index: int) -> bool:
        """One of the tokenizer's special tokens, such as an end of turn."""


class ChatTokenizer(Protocol):
    """A tokenizer with its chat template. It is the engine's to implement; no method adds special tokens."""

    @property
    def has_template(self) -> bool: ...

    @property
    def has_generation_marks(self) -> bool: ...

    @property
    def bos_id(self) -> int | None:
        """What the tokenizer itself puts before a plain text; None where it puts nothing."""

    @property
    def eos_id(self) -> int | None: ...

    @property
    def added_ids(self) -> Sequence[int]:
        """Tokens that its template needs and its model was not saved with."""

    def render(
        self, messages: list[dict[str, object]], tools: list[dict[str, object]] | None, add_generation_prompt: bool
    ) -> Rendering:
        """UserError chat.template_refused where the template raises."""

    def encode(self, text: str) -> Encoding: ...

    def encode_batch(self, texts: list[str]) -> Sequence[Encoding]: ...


@dataclass(frozen=True, slots=True)
class Sample:
    token_ids: tuple[int, ...]
    runs: tuple[Span, ...]  # the trained tokens, in order and apart; the first token is never a target, so in none
    num_turns: int  # assistant turns trained
    fell_back: bool = False  # `whole` was asked, but the template rewrites this conversation's history
    num_tokens_if_split: int = 0  # of all the samples that `split` would have made of the conversation

    @property
    def trained(self) -> tuple[bool, ...]:
        """Of each token."""
        mask = [False] * len(self.token_ids)
        for start, end in self.runs:
            mask[start:end] = [True] * (end - start)
        return tuple(mask)

    @property
    def num_trained(self) -> int:
        """Targets. 0 is a reason for the caller to refuse the row."""
        return sum(end - start for start, end in self.runs)


# -- conversation -> samples ----------------------------------------------------------------------------------------


def build_samples(
    conversation: Parsed, tokenizer: ChatTokenizer, *, train_on: TrainOn, multi_turn: MultiTurn
) -> list[Sample]:
    """The samples of one row, in the order of its turns; none where `split` has no turn to train."""
    drafts = _draft(conversation, tokenizer, train_on, multi_turn)
    return [_finish(draft, tokenizer.encode(draft.text), tokenizer) for draft in drafts]


def build_samples_many(
    conversations: Iterable[Parsed], tokenizer: ChatTokenizer, *, train_on: TrainOn, multi_turn: MultiTurn
) -> list[list[Sample] | UserError]:
    """`build_samples` of each, encoded in one batch; a refused conversation gives its error in its place."""
    drafts = Drafts(conversations, tokenizer, train_on=train_on, multi_turn=multi_turn)
    return drafts.finish(tokenizer.encode_batch(drafts.texts))


class Drafts:
    """Conversations that are rendered and wait for their tokens: encoding is another thread's work, if it likes."""

    def __init__(
        self, conversations: Iterable[Parsed], tokenizer: ChatTokenizer, *, train_on: TrainOn, multi_turn: MultiTurn
    ) -> None:
        self._tokenizer = tokenizer
        self._drafted: list[list[_Draft] | UserError] = []
        for conversation in conversations:
            try:
                self._drafted.append(_draft(conversation, tokenizer, train_on, multi_turn))
            except UserError as error:
                self._drafted.append(error)

    @property
    def texts(self) -> list[str]:
        return [draft.text for drafts in self._drafted if not isinstance(drafts, UserError) for draft in drafts]

    def finish(self, encodings: Iterable[Encoding]) -> list[list[Sample] | UserError]:
        """The samples of each conversation, given the encodings of `texts`."""
        source = iter(encodings)
        return [
            drafts
            if isinstance(drafts, UserError)
            else [
                _finish(draft, encoding, self._tokenizer)
                for draft, encoding in zip(drafts, islice(source, len(drafts)), strict=True)
            ]
            for drafts in self._drafted
        ]


@dataclass(frozen=True, slots=True)
class _Draft:
    """A sample before it is encoded."""

    text: str
    spans: tuple[Span, ...]
    num_turns: int
    are_turns: bool = True  # the spans are assistant turns, so their ends are set by the end-of-turn token
    parted: frozenset[int] = frozenset()  # starts of spans where the served context parts from this text
    ends_if_split: tuple[int, ...] = ()  # of `whole`: where the text of each turn's own sample would end
    are_marked: bool = False
    is_plain: bool = False  # no template wrote this text, so it gets the tokenizer's own begin and end
    fell_back: bool = False


def _draft(conversation: Parsed, tokenizer: ChatTokenizer, train_on: TrainOn, multi_turn: MultiTurn) -> list[_Draft]:
    match conversation:
        case RawText(text):
            return [_Draft(text, (Span(0, len(text)),), num_turns=0, are_turns=False, is_plain=True)]
        case PromptCompletion(prompt, completion):
            text = prompt + completion
            start = 0 if train_on == "all" else len(prompt)
            return [_Draft(text, (Span(start, len(text)),), num_turns=1, are_turns=False, is_plain=True)]
    if not tokenizer.has_template:
        raise UserError("chat.no_template", "model.chat_template")
    renderer = _Renderer(conversation, tokenizer)
    if multi_turn == "split":
        return _draft_split(renderer, train_on)
    draft = _draft_whole(renderer, train_on)
    return [draft] if draft is not None else _draft_split(renderer, train_on, fell_back=True)


class _Renderer:
    """One conversation's renderings, each made once."""

    def __init__(self, conversation: Conversation, tokenizer: ChatTokenizer) -> None:
        self.messages = conversation.messages
        self.turns = [number for number, message in enumerate(self.messages) if message.role == "assistant"]
        self.has_marks = tokenizer.has_generation_marks
        self._template_messages, self._tools = to_template_messages(conversation)
        self._tokenizer = tokenizer
        self._renderings: dict[tuple[int, bool], Rendering] = {}
        self.parted: set[int] = set()

    def up_to(self, num_messages: int, *, with_prompt: bool = False) -> Rendering:
        key = (num_messages, with_prompt)
        if key not in self._renderings:
            messages = self._template_messages[:num_messages]
            self._renderings[key] = self._tokenizer.render(messages, self._tools, with_prompt)
        return self._renderings[key]

    def whole(self) -> Rendering:
        return self.up_to(len(self.messages))

    def marks(self, num_messages: int) -> list[Span] | None:
        """The marked span of each assistant turn so far; None where the template marks more or fewer than these."""
        if not self.has_marks:
            return None
        generated = self.up_to(num_messages).generated
        return [Span(*span) for span in generated] if len(generated) == bisect_left(self.turns, num_messages) else None

    def border(self, turn: int) -> Span | None:
        """Where a turn stands in `up_to(turn + 1)`; None where adding it rewrites what stands before it. Notes in
        `parted` a turn that the template writes otherwise than its generation prompt announces."""
        before = self.up_to(turn, with_prompt=True).text
        text = self.up_to(turn + 1).text
        start = _common_length(before, text)
        if start < len(before):
            if start < _common_length(before, self.up_to(turn).text):
                return None
            self.parted.add(start)
        return Span(start, len(text))

    def served(self, turn: int) -> tuple[str, Span] | None:
        """A turn in the context that the model sees, where adding the turn rewrites that context: the turn is what
        stands behind the last message and the generation prompt, which are found again. None where they are not."""
        before = self.up_to(turn, with_prompt=True).text
        text = self.up_to(turn + 1).text
        behind_last = before[_common_length(before, self.up_to(turn - 1).text) :]
        place = text.rfind(behind_last)
        if turn == 0 or place < 0:
            return None
        whole = before + text[place + len(behind_last) :]
        return whole, Span(len(before), len(whole))

    def trained_turns(self, train_on: TrainOn) -> list[int]:
        turns = self.turns[-1:] if train_on == "last" else self.turns
        return [turn for turn in turns if self.messages[turn].weight != 0]


def _draft_whole(renderer: _Renderer, train_on: TrainOn) -> _Draft | None:
    """One sample of the conversation; None where borders show that its history doesn't stand."""
    text = renderer.whole().text
    trained = renderer.trained_turns(train_on)
    # With `all`, what needs a mask are the turns that are left out.
    masked = [turn for turn in renderer.turns if turn not in trained] if train_on == "all" else trained
    marks = renderer.marks(len(renderer.messages))
    if marks is not None:
        span_of = dict(zip(renderer.turns, marks, strict=True))
        spans = [span_of[turn] for turn in masked]
    else:
        borders = [_standing_border(renderer, turn) for turn in masked]
        spans = [border for border in borders if border is not None]
        if len(spans) < len(masked):
            return None
    ends = _ends_if_split(renderer, trained, marks)
    if train_on == "all":
        spans_all = _complement(spans, len(text))
        return _Draft(text, spans_all, len(trained), are_turns=False, ends_if_split=ends)
    parted = frozenset(renderer.parted)
    return _Draft(text, tuple(spans), len(trained), are_marked=marks is not None, parted=parted, ends_if_split=ends)


def _ends_if_split(renderer: _Renderer, trained: Sequence[int], marks: Sequence[Span] | None) -> tuple[int, ...]:
    """Behind a turn's marks stands what the template writes after every turn; the last one shows how much that is."""
    text = renderer.whole().text
    if marks is None:
        return tuple(len(renderer.up_to(turn + 1).text) for turn in trained)
    is_last = bool(renderer.turns) and renderer.turns[-1] == len(renderer.messages) - 1
    behind = len(text) - marks[-1].end if is_last else 0
    end_of = dict(zip(renderer.turns, marks, strict=True))
    return tuple(end_of[turn].end + behind for turn in trained)


def _draft_split(renderer: _Renderer, train_on: TrainOn, *, fell_back: bool = False) -> list[_Draft]:
    """One sample for each trained turn, which ends with it: the context is what the model sees when it is served."""
    drafts = []
    previous = ""
    for turn in renderer.trained_turns(train_on):
        text = renderer.up_to(turn + 1).text
        if train_on == "all":
            # Each token once: what stands in the sample before is context here.
            span = Span(_common_length(previous, text), len(text))
            drafts.append(_Draft(text, (span,), num_turns=1, are_turns=False, fell_back=fell_back))
            previous = text
            continue
        renderer.parted.clear()
        border, marks = renderer.border(turn), renderer.marks(turn + 1)
        if border is None:
            served, marks = renderer.served(turn), None
            if served is None:
                raise UserError("chat.no_border", turn=turn + 1)
            text, border = served
        if marks is not None:
            border = marks[-1]
        parted = frozenset(renderer.parted)
        drafts.append(
            _Draft(text, (border,), num_turns=1, are_marked=marks is not None, parted=parted, fell_back=fell_back)
        )
    return drafts


def _standing_border(renderer: _Renderer, turn: int) -> Span | None:
    """The turn's border, if it stands at the same place in the whole conversation."""
    return renderer.border(turn) if renderer.whole().text.startswith(renderer.up_to(turn + 1).text) else None


def _complement(spans: Sequence[Span], length: int) -> tuple[Span, ...]:
    starts = [0, *(span.end for span in spans)]
    ends = [*(span.start for span in spans), length]
    return tuple(Span(start, end) for start, end in zip(starts, ends, strict=True))


def _common_length(first: str, second: str) -> int:
    """How many characters both begin with, by bisection: slices compare at the speed of memory."""
    if second.startswith(first):
        return len(first)
    known, limit = 0, min(len(first), len(second))
    while known < limit:
        middle = (known + limit + 1) // 2
        if first[known:middle] == second[known:middle]:
            known = middle
        else:
            limit = middle - 1
    return known


# -- text -> tokens -------------------------------------------------------------------------------------------------


def _finish(draft: _Draft, encoding: Encoding, tokenizer: ChatTokenizer) -> Sample:
    token_ids = tuple(encoding.ids)
    runs: list[Span] = []
    for span in draft.spans:
        first = encoding.first_from(span.start)
        if span.start in draft.parted and first > 0 and encoding.end_of(first - 1) > span.start:
            first -= 1
        end = encoding.first_from(span.end) if span.end < len(draft.text) else len(token_ids)
        if draft.are_turns:
            end = _end_of_turn(draft, encoding, span, first, end)
        _add_run(runs, first, end)
    if draft.is_plain:
        if tokenizer.bos_id is not None and token_ids[:1] != (tokenizer.bos_id,):
            token_ids = (tokenizer.bos_id, *token_ids)
            runs = [Span(start + 1, end + 1) for start, end in runs]
        if tokenizer.eos_id is not None and token_ids[-1:] != (tokenizer.eos_id,):
            _add_run(runs, len(token_ids), len(token_ids) + 1)
            token_ids = (*token_ids, tokenizer.eos_id)
    if runs and runs[0].start == 0:
        first_run = Span(1, runs[0].end)
        runs[:1] = [first_run] if first_run.end > 1 else []
    num_if_split = sum(
        encoding.first_from(end) if end < len(draft.text) else len(token_ids) for end in draft.ends_if_split
    )
    return Sample(token_ids, tuple(runs), draft.num_turns, draft.fell_back, num_if_split or len(token_ids))


def _add_run(runs: list[Span], start: int, end: int) -> None:
    """One that begins where the last ends, or before, goes on with it."""
    if runs and start <= runs[-1].end:
        start = runs.pop().start
    if end > start:
        runs.append(Span(start, end))


def _end_of_turn(draft: _Draft, encoding: Encoding, span: Span, first: int, end: int) -> int:
    """Where the trained tokens of a turn end, by index: behind its end-of-turn token, before white space after it."""
    last_special = next((index for index in range(end - 1, first - 1, -1) if encoding.is_special(index)), None)
    if last_special is not None:
        behind = draft.text[encoding.end_of(last_special) : span.end]
        return last_special + 1 if not behind or behind.isspace() else end
    # Marks around the content alone leave out the end of turn that the template writes right behind them.
    if draft.are_marked and end < len(encoding.ids) and encoding.is_special(end):
        return end + 1
    return end


# -- whole or split -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MultiTurnChoice:
    mode: MultiTurn
    num_checked: int  # conversations with more than one assistant turn that were looked at
    rewritten: int | None = None  # which of the given ones the template rewrites, from 0

    @property
    def reason(self) -> str:
        if self.rewritten is not None:
            return (
                f"the chat template rewrites earlier turns (first in conversation {self.rewritten + 1}), so each "
                "assistant turn is a sample of its own, in the context that the model will see"
            )
        if self.num_checked == 0:
            return "no conversation has a second assistant turn, so each is one sample"
        return f"the chat template leaves earlier turns as they were in all {self.num_checked} conversations checked"


def history_stands(conversation: Conversation, tokenizer: ChatTokenizer) -> bool:
    """Whether the whole rendering holds every assistant turn in the context that the model sees when it is served."""
    if not tokenizer.has_template:
        raise UserError("chat.no_template", "model.chat_template")
    renderer = _Renderer(conversation, tokenizer)
    return all(_standing_border(renderer, turn) is not None for turn in renderer.turns)


def choose_multi_turn(conversations: Iterable[Parsed], tokenizer: ChatTokenizer) -> MultiTurnChoice:
    """What `auto` means: `whole` where history stands in all of these, else `split`. Ends at the first that fails.

    A conversation that the template refuses says nothing about history; it is refused when it is built.
    """
    num_checked = 0
    for number, conversation in enumerate(conversations):
        if not isinstance(conversation, Conversation):
            continue
        if sum(message.role == "assistant" for message in conversation.messages) < 2:
            continue
        try:
            stands = history_stands(conversation, tokenizer)
        except UserError as error:
            if error.code != "chat.template_refused":
                raise
            continue
        num_checked += 1
        if not stands:
            return MultiTurnChoice("split", num_checked, rewritten=number)
    return MultiTurnChoice("whole", num_checked)


# -- tool calls -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CallsSeen:
    """What became of tool calls in the conversations that were looked at."""

    num_conversations: int  # with calls, and not refused by the template
    num_dropped: int  # of them, those in whose text no call is to be seen


def look_for_calls(conversations: Iterable[Parsed], tokenizer: ChatTokenizer) -> CallsSeen:
    """A template that has no place for calls leaves them out without a word: it writes the same whatever was called."""
    num_conversations = num_dropped = 0
    for conversation in conversations:
        if not isinstance(conversation, Conversation) or not tokenizer.has_template:
            continue
        if not any(message.tool_calls for message in conversation.messages):
            continue
        try:
            texts = [
                tokenizer.render(*to_template_messages(each), False).text
                for each in (conversation, _with_other_calls(conversation))
            ]
        except UserError as error:
            if error.code != "chat.template_refused":
                raise
            continue
        num_conversations += 1
        num_dropped += texts[0] == texts[1]
    return CallsSeen(num_conversations, num_dropped)


def _with_other_calls(conversation: Conversation) -> Conversation:
    """As many, of other functions and without arguments. A conversation with none is no test: a template may write
    something where there are calls, and still not what was called."""
    messages = (
        replace(message, tool_calls=tuple(ToolCall(f"not_{call.name}", {}, call.id) for call in message.tool_calls))
        for message in conversation.messages
    )
    return replace(conversation, messages=tuple(messages))


# -- built-in templates ---------------------------------------------------------------------------------------------

# ChatML, with marks around what the model writes. Reasoning stays in every turn, so that history stands.
CHATML = """\
{%- set first = 1 if messages and messages[0].role == 'system' else 0 %}
{%- if tools or first %}
    {{- '<|im_start|>system\\n' }}
    {%- if first %}
        {{- messages[0].content }}
        {%- if tools %}
            {{- '\\n\\n' }}
        {%- endif %}
    {%- endif %}
    {%- if tools %}
        {{- 'These functions can be called, one JSON description a line:\\n' }}
        {%- for tool in tools %}
            {{- tool | tojson + '\\n' }}
        {%- endfor %}
        {{- 'A call is written as <tool_call>{"name": ..., "arguments": {...}}</tool_call>.' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages[first:] %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {%- if message.reasoning_content %}
                {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
            {%- endif %}
            {{- message.content }}
            {%- for call in message.tool_calls or [] %}
                {%- if message.content or not loop.first %}
                    {{- '\\n' }}
                {%- endif %}
                {{- '<tool_call>{"name": ' + call.function.name | tojson + ', "arguments": ' }}
                {{- call.function.arguments | tojson + '}</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

BUILT_IN_TEMPLATES = {"chatml": CHATML}
