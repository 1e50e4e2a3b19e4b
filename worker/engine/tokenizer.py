"""A model's own tokenizer and chat template, as core.chat asks for them.

Text is rendered by the same function of transformers that serves a model (`apply_chat_template` calls it), so what is
trained is what will be served; it also records where {% generation %} blocks stand. Tokens come from the Rust
tokenizer itself, in batches, on a copy of it without its post-processor: that part would put a second BOS before a
text whose template wrote one, and would cut leading spaces off the tokens' offsets.

What is known to differ between families:
- Llama 3.x templates write the day's date unless they are given one, so a sample's tokens change at midnight.
- A generation block inside a macro or a {% set %} block is reported where it was called, not where its text ends up.
- Templates of models that also see take a text as a list of parts; given a plain one, some of them write nothing, and
  others fail. A few concatenate a call's arguments as text, where most write an object as JSON. Both are asked once.
- Where a tokenizer doesn't flag its end-of-turn token as special, what generation_config.json names as an end counts.
- A built-in template's turn marks are ordinary text to a tokenizer that has no such tokens, a handful of them for each
  mark, none of which says "the end" and nothing else. So they are added, as special tokens, and the model gets rows for
  them (worker.engine.loading). A template of the model's own is taken as it is.
"""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Self

import jinja2
import tokenizers
import transformers
from tokenizers import Encoding as RustEncoding
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from core.chat import BUILT_IN_TEMPLATES, Rendering
from core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Guard = Callable[[], AbstractContextManager[None]]

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
TURN_MARK = re.compile(r"<\|\w+\|>")
# What a template's own operations may raise, beside jinja's errors: "a" + None, messages[9], x / 0 and the like.
TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
# What a template is asked when it is loaded, to see whether it writes what it is given.
PROBE_QUESTION: dict[str, object] = {"role": "user", "content": "Pegbox"}
PROBE_CALL: dict[str, object] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "probe0001", "type": "function", "function": {"name": "probe", "arguments": {"of": "scroll"}}}
    ],
}
PROBE_TOOLS: list[dict[str, object]] = [
    {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object"}}}
]
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoding gives for a character whose bytes are not all there
MAX_GENERATION_CONFIG_BYTES = 1_000_000


class HfChatTokenizer:
    """A fast tokenizer of transformers; implements `core.chat.ChatTokenizer`."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        chat_template: str | None = None,
        end_ids: Iterable[int] = (),
        guard: Guard = nullcontext,
    ) -> None:
        """`chat_template` names a built-in one; None takes the tokenizer's own, if it has one. Whatever runs a
        template, runs within a `guard`."""
        if not tokenizer.is_fast:
            raise UserError("model.slow_tokenizer", "model.base", kind=type(tokenizer).__name__)
        self.tokenizer = tokenizer
        self._template, self._template_with_tools = _choose_templates(tokenizer.chat_template, chat_template)
        self.added_ids = () if chat_template is None else add_turn_marks(tokenizer, BUILT_IN_TEMPLATES[chat_template])
        self._guard = guard
        for template in (self._template, self._template_with_tools):
            if template is not None:
                with guard():
                    _check_syntax(template)
        rust = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._bos_id = _prepended_id(rust)
        rust.post_processor = None
        rust.no_truncation()
        rust.no_padding()
        self._rust = rust
        self._wants_parts = self._wants_argument_text = False
        if self.has_template:
            self._wants_parts = not self._writes("Pegbox", [PROBE_QUESTION]) and self._writes(
                "Pegbox", [_with_parts(PROBE_QUESTION)]
            )
            self._wants_argument_text = not self._writes("scroll", [PROBE_QUESTION, PROBE_CALL]) and self._writes(
                "scroll", [PROBE_QUESTION, _with_argument_text(PROBE_CALL)]
            )
        flagged = (number for number, token in rust.get_added_tokens_decoder().items() if token.special)
        self._special_ids = frozenset([*flagged, *end_ids, *([] if self.eos_id is None else [self.eos_id])])

    @classmethod
    def load(cls, model_path: Path, chat_template: str | None = None, guard: Guard = nullcontext) -> Self:
        """From a folder, never from the network, and without running code that comes with it."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError("model.no_tokenizer", "model.base", problem=str(error).split("\n")[0]) from error
        return cls(tokenizer, chat_template, _end_ids(model_path), guard)

    @property
    def fingerprint(self) -> str:
        """Of all that decides about the tokens of a conversation: files and libraries. (The day's date, which some
        templates write, is the day's on which the data was tokenised.)"""
        facts = [
            self._rust.to_str(),
            self._template,
            self._template_with_tools,
            sorted(self._special_ids),
            [self.bos_id, self.eos_id],
            {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()},
            [transformers.__version__, tokenizers.__version__, jinja2.__version__],
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def has_template(self) -> bool:
        return self._template is not None

    @property
    def has_generation_marks(self) -> bool:
        return all(_is_marked(template) for template in (self._template, self._template_with_tools))

    @property
    def bos_id(self) -> int | None:
        return self._bos_id

    @property
    def eos_id(self) -> int | None:
        number: int | None = self.tokenizer.eos_token_id
        return number

    def _shape(self, messages: list[dict[str, object]]) -> list[dict[str, object]]:
        """As this template reads them."""
        if self._wants_parts:
            messages = [_with_parts(message) for message in messages]
        if self._wants_argument_text:
            messages = [_with_argument_text(message) for message in messages]
        return messages

    def _writes(self, needle: str, messages: list[dict[str, object]]) -> bool:
        try:
            return needle in self.render(messages, PROBE_TOOLS if len(messages) > 1 else None, False).text
        except UserError as error:
            if error.code != "chat.template_refused":
                raise
            return False

    def render(
        self, messages: list[dict[str, object]], tools: list[dict[str, object]] | None, add_generation_prompt: bool
    ) -> Rendering:
        template = self._template_with_tools if tools else self._template
        assert template is not None, "has_template is asked first"
        is_marked = _is_marked(template)
        try:
            with self._guard():
                (text,), marks = render_jinja_template(
                    [self._shape(messages)],
                    tools=tools or None,
                    chat_template=template,
                    return_assistant_tokens_mask=is_marked,
                    add_generation_prompt=add_generation_prompt,
                    **self.tokenizer.special_tokens_map,
                )
        except TEMPLATE_FAULTS as error:
            raise UserError("chat.template_refused", problem=_first_line(error)) from error
        return Rendering(text, tuple(marks[0]) if is_marked else ())

    def encode(self, text: str) -> "HfEncoding":
        return HfEncoding(self._rust.encode(text, add_special_tokens=False), self._special_ids)

    def encode_batch(self, texts: list[str]) -> list["HfEncoding"]:
        return [
            HfEncoding(encoding, self._special_ids)
            for encoding in self._rust.encode_batch(texts, add_special_tokens=False)
        ]

    def pieces(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Each token as the text that it adds, one piece a token; joined they are the whole text.

        A character whose bytes are spread over several tokens stands whole in the piece of the last, the others are
        empty. Decoding looks at the token before, since some tokenizers write a space differently at the beginning."""
        pieces = []
        context, begin = 0, 0  # tokens context..begin are shown already and give the decoder its context
        for end in range(1, len(token_ids) + 1):
            known = self._decode(token_ids[context:begin])
            text = self._decode(token_ids[context:end])
            if end < len(token_ids) and (text.endswith(UNFINISHED) or len(text) <= len(known)):
                pieces.append("")
                continue
            pieces.append(text[len(known) :])
            context, begin = begin, end
        return tuple(pieces)

    def are_special(self, token_ids: Sequence[int]) -> tuple[bool, ...]:
        return tuple(token in self._special_ids for token in token_ids)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._rust.decode(token_ids, skip_special_tokens=False)


def add_turn_marks(tokenizer: "PreTrainedTokenizerBase", template: str) -> tuple[int, ...]:
    """Adds those of the template's marks that are no token yet, and returns their ids."""
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    lacking = [mark for mark in dict.fromkeys(TURN_MARK.findall(template)) if mark not in known]
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in lacking], special_tokens=True)
    return tuple(tokenizer.convert_tokens_to_ids(mark) for mark in lacking)


class HfEncoding:
    """Tokens that stay in Rust: handing the offsets of all of them over takes longer than rendering the text."""

    __slots__ = ("_rust", "_special_ids", "ids")

    def __init__(self, rust: RustEncoding, special_ids: frozenset[int]) -> None:
        self.ids: list[int] = rust.ids
        self._rust = rust
        self._special_ids = special_ids

    def first_from(self, character: int) -> int:
        # One that holds the character; there may be none where a normalizer took it away.
        index = self._rust.char_to_token(character)
        if index is None:
            return bisect_left(self._rust.offsets, character, key=itemgetter(0))
        # Bytes of one character are several tokens that begin alike, and a token may hold no character at all.
        while index > 0 and self._start_of(index - 1) >= character:
            index -= 1
        while index < len(self.ids) and self._start_of(index) < character:
            index += 1
        return index

    def _start_of(self, index: int) -> int:
        return self._characters(index)[0]

    def end_of(self, index: int) -> int:
        return self._characters(index)[1]

    def _characters(self, index: int) -> tuple[int, int]:
        characters: tuple[int, int] | None = self._rust.token_to_chars(index)
        assert characters is not None
        return characters

    def is_special(self, index: int) -> bool:
        return self.ids[index] in self._special_ids


@lru_cache(maxsize=8)  # asked for each rendering
def _is_marked(template: str | None) -> bool:
    return template is not None and GENERATION_MARK.search(template) is not None


def _with_parts(message: dict[str, object]) -> dict[str, object]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _with_argument_text(message: dict[str, object]) -> dict[str, object]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    functions = [call["function"] for call in calls]
    texts = [
        arguments if isinstance(arguments := function["arguments"], str) else json.dumps(arguments, ensure_ascii=False)
        for function in functions
    ]
    return {
        **message,
        "tool_calls": [
            {**call, "function": {**function, "arguments": text}}
            for call, function, text in zip(calls, functions, texts, strict=True)
        ],
    }


def _choose_templates(own: str | dict[str, str] | None, name: str | None) -> tuple[str | None, str | None]:
    """The template without tools and the one with them; older models bring a separate one for tools."""
    if name is not None:
        if name not in BUILT_IN_TEMPLATES:
            choices = ", ".join(sorted(BUILT_IN_TEMPLATES))
            raise UserError("model.unknown_template", "model.chat_template", name=name, choices=choices)
        return BUILT_IN_TEMPLATES[name], BUILT_IN_TEMPLATES[name]
    if isinstance(own, dict):
        default = own.get("default")
        return default, own.get("tool_use", default)
    return own, own


def _check_syntax(template: str) -> None:
    """Compiles it; transformers keeps the compiled one for the renderings that follow."""
    try:
        render_jinja_template([], chat_template=template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            "model.template_broken", "model.chat_template", problem=_first_line(error), line=error.lineno
        ) from error


def _prepended_id(rust: Tokenizer) -> int | None:
    """The one token that the tokenizer itself puts before a text."""
    with_special = rust.encode("a", add_special_tokens=True)
    first = with_special.ids[:1]
    return first[0] if first and with_special.special_tokens_mask[0] else None


def _end_ids(model_path: Path) -> list[int]:
    """The tokens at which the model stops when it is served, by its generation_config.json."""
    path = model_path / "generation_config.json"
    if not path.is_file() or path.stat().st_size > MAX_GENERATION_CONFIG_BYTES:
        return []
    config = json.loads(path.read_bytes())
    end = config.get("eos_token_id") if isinstance(config, dict) else None
    ends = end if isinstance(end, list) else [end]
    return [number for number in ends if isinstance(number, int)]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:300]
