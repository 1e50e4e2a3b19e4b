"""A row of a data set -> a conversation, in whichever of the five formats it is written.

Real data spells the same thing in many ways: roles have a dozen names, a tool call's arguments are an object or its
JSON text, `tools` is a list or its JSON text, parallel calls are one list or several turns. All spellings become the
same `Conversation` here, so that nothing behind this module knows where a row came from (docs/data.md lists what is
accepted). Only the structure is unified: the text of a turn is never stripped, joined or otherwise altered, with two
exceptions that are the formats' own: alpaca's input follows its instruction on a new line, and text parts are
concatenated.

A fault names its field within the row (conversations[3].value), what was found and what is expected.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from core.errors import UserError

Format = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]
Role = Literal["system", "user", "assistant", "tool"]
JsonObject = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: dict[str, object] | str  # a text only where the row gives one that is no JSON object, such as code
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning_content: str | None = None
    name: str | None = None
    tool_call_id: str | None = None
    weight: int | None = None  # 0: this assistant turn is context only; 1 or None: trained


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: tuple[Message, ...]
    tools: tuple[dict[str, object], ...]  # each {"type": "function", "function": {...}}
    kind: Format


@dataclass(frozen=True, slots=True)
class RawText:
    text: str


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    prompt: str
    completion: str


Parsed = Conversation | RawText | PromptCompletion

# How many of a data set's first good rows decide what `auto` is; the upload and the trainer look at the same.
FORMAT_ROWS = 200

EXPECTED_KEYS: dict[Format, str] = {
    "messages": "messages (a list of objects with role and content)",
    "sharegpt": "sharegpt (conversations: a list of objects with from and value)",
    "alpaca": "alpaca (instruction and output, perhaps input, system, history)",
    "prompt_completion": "prompt_completion (prompt and completion)",
    "text": "text (text)",
}

# Some data gives a turn that consists of calls alone a role of its own: "call" here.
ROLES: dict[str, Literal["system", "user", "assistant", "tool", "call"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "tool_calls": "call",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
TURN_KEYS = ("messages", "conversations")


# -- which format ---------------------------------------------------------------------------------------------------


def detect_format(rows: Iterable[JsonObject]) -> Format:
    """The format that most of these rows fit; UserError where none fits, with the keys that were seen."""
    num_fitting: Counter[Format] = Counter()
    num_with_key: Counter[str] = Counter()
    for row in rows:
        num_with_key.update(row.keys())
        fitting = _format_of(row)
        if fitting is not None:
            num_fitting[fitting] += 1
    if num_fitting:
        return num_fitting.most_common(1)[0][0]
    if not num_with_key:
        raise UserError("data.no_rows")
    raise unknown_format(key for key, _ in num_with_key.most_common())


def unknown_format(keys: Iterable[str]) -> UserError:
    shown = ", ".join(islice(keys, 20))
    return UserError("data.format_unknown", "data.format", keys=shown, expected="; ".join(EXPECTED_KEYS.values()))


def _format_of(row: JsonObject) -> Format | None:
    for key in TURN_KEYS:
        turns = row.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            return "sharegpt" if "from" in turns[0] else "messages" if "role" in turns[0] else None
    if "instruction" in row and "output" in row:
        return "alpaca"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    return "text" if "text" in row else None


# -- one row --------------------------------------------------------------------------------------------------------


def parse_row(row: JsonObject, format: Format) -> Parsed:
    """The row in its format. Raises UserError that names the field at fault."""
    match format:
        case "messages":
            return _parse_turns_row(row, format, role_key="role", content_key="content")
        case "sharegpt":
            return _parse_turns_row(row, format, role_key="from", content_key="value")
        case "alpaca":
            return _parse_alpaca(row)
        case "prompt_completion":
            return _parse_prompt_completion(row)
        case "text":
            return RawText(_text(row, "text"))


def _parse_turns_row(row: JsonObject, format: Format, role_key: str, content_key: str) -> Conversation:
    preferred = "messages" if format == "messages" else "conversations"
    key = next((key for key in (preferred, *TURN_KEYS) if key in row), preferred)
    messages = _parse_turns(row.get(key, _MISSING), key, role_key, content_key)
    system = _optional_text(row, "system")
    if system and messages[0].role == "system":
        raise UserError("data.two_systems", "system")
    if system:
        messages = (Message("system", system), *messages)
    return _conversation(messages, _parse_tools(row), format, key)


def _parse_alpaca(row: JsonObject) -> Conversation:
    messages: list[Message] = []
    system = _optional_text(row, "system")
    if system:
        messages.append(Message("system", system))
    for number, pair in enumerate(_list(row.get("history") or [], "history")):
        field = f"history[{number}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise _expected(field, pair, "a pair [instruction, output]")
        messages.append(Message("user", _as_text(pair[0], f"{field}[0]")))
        messages.append(Message("assistant", _as_text(pair[1], f"{field}[1]")))
    instruction = _text(row, "instruction")
    context = _optional_text(row, "input")
    messages.append(Message("user", f"{instruction}\n{context}" if context else instruction))
    messages.append(Message("assistant", _text(row, "output")))
    return _conversation(tuple(messages), _parse_tools(row), "alpaca", "output")


def _parse_prompt_completion(row: JsonObject) -> Conversation | PromptCompletion:
    """Two texts stay raw text without a template; two lists of messages are one conversation, its prompt untrained."""
    prompt = row.get("prompt", _MISSING)
    if not isinstance(prompt, list):
        return PromptCompletion(_text(row, "prompt"), _text(row, "completion"))
    before = _parse_turns(prompt, "prompt", "role", "content")
    completion = _parse_turns(row.get("completion", _MISSING), "completion", "role", "content", is_first=False)
    context = tuple(replace(message, weight=0) if message.role == "assistant" else message for message in before)
    if not any(message.role == "assistant" for message in completion):
        raise UserError("data.no_assistant", "completion")
    return _conversation((*context, *completion), _parse_tools(row), "prompt_completion", "completion")


def _conversation(
    messages: tuple[Message, ...], tools: tuple[dict[str, object], ...], format: Format, field: str
) -> Conversation:
    if not any(message.role == "assistant" for message in messages):
        raise UserError("data.no_assistant", field)
    return Conversation(messages, tools, format)


# -- turns ----------------------------------------------------------------------------------------------------------


def _parse_turns(
    turns: object, field: str, role_key: str, content_key: str, is_first: bool = True
) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise _expected(field, turns, "a list of turns")
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        path = f"{field}[{number}]"
        if not isinstance(turn, dict):
            raise _expected(path, turn, f"an object with {role_key} and {content_key}")
        role_name = turn.get(role_key, _MISSING)
        role = ROLES.get(role_name) if isinstance(role_name, str) else None
        if role is None:
            raise _expected(f"{path}.{role_key}", role_name, f"one of {', '.join(ROLES)}")
        if role == "call":
            _add_calls(messages, _parse_calls(turn.get(content_key, _MISSING), f"{path}.{content_key}"), turn, path)
            continue
        if role == "tool" and is_first and not any(message.role == "assistant" for message in messages):
            raise UserError("data.result_without_call", path)
        messages.append(_parse_turn(turn, role, path, content_key))
    return tuple(messages)


def _parse_turn(turn: JsonObject, role: Role, path: str, content_key: str) -> Message:
    tool_calls = _turn_calls(turn, path) if role == "assistant" else ()
    reasoning = None
    if role == "assistant":
        names = ("reasoning_content", "reasoning", "thinking")
        reasoning = next((text for name in names if (text := _optional_text(turn, name, f"{path}."))), None)
    return Message(
        role=role,
        content=_content(turn, role, f"{path}.{content_key}", content_key, may_be_absent=bool(tool_calls)),
        tool_calls=tool_calls,
        reasoning_content=reasoning,
        name=_optional_text(turn, "name", f"{path}."),
        tool_call_id=_optional_text(turn, "tool_call_id", f"{path}."),
        weight=_weight(turn, path),
    )


def _content(turn: JsonObject, role: Role, path: str, key: str, may_be_absent: bool) -> str:
    content = turn.get(key, _MISSING)
    if isinstance(content, str):
        return content
    if may_be_absent and (content is None or content is _MISSING):
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content):
        return "".join(_text_part(part, f"{path}[{number}]") for number, part in enumerate(content))
    if role == "tool" and isinstance(content, dict | list):
        return json.dumps(content, ensure_ascii=False)
    raise _expected(path, content, "a text or a list of text parts")


def _text_part(part: JsonObject, path: str) -> str:
    if part["type"] not in ("text", "input_text", "output_text"):
        raise _expected(f"{path}.type", part["type"], "text (images and sound are not built yet)")
    return _text(part, "text", f"{path}.")


def _weight(turn: JsonObject, path: str) -> int | None:
    weight = turn.get("weight")
    if weight is None:
        return None
    if isinstance(weight, int | float) and weight in (0, 1):
        return int(weight)
    raise _expected(f"{path}.weight", weight, "0 (context only) or 1 (trained)")


# -- tool calls -----------------------------------------------------------------------------------------------------


def _turn_calls(turn: JsonObject, path: str) -> tuple[ToolCall, ...]:
    """Calls beside the content: `tool_calls`, or `function_call`, OpenAI's older name for a single one."""
    for key in ("tool_calls", "function_call"):
        calls = turn.get(key)
        if calls is not None and calls not in ([], ""):
            return _parse_calls(calls, f"{path}.{key}")
    return ()


def _add_calls(messages: list[Message], calls: tuple[ToolCall, ...], turn: JsonObject, path: str) -> None:
    """A turn of calls; one that follows the assistant's own text or calls belongs to the same turn, as it is served."""
    weight = _weight(turn, path)
    if messages and messages[-1].role == "assistant" and weight in (None, messages[-1].weight):
        messages[-1] = replace(messages[-1], tool_calls=messages[-1].tool_calls + calls)
    else:
        messages.append(Message("assistant", "", tool_calls=calls, weight=weight))


def _parse_calls(value: object, path: str) -> tuple[ToolCall, ...]:
    """One call or a list of them, as JSON or as its text."""
    calls = _parse_json(value, path) if isinstance(value, str) else value
    if isinstance(calls, list) and calls:
        return tuple(_parse_call(call, f"{path}[{number}]") for number, call in enumerate(calls))
    return (_parse_call(calls, path),)


def _parse_call(value: object, path: str) -> ToolCall:
    call = _parse_json(value, path) if isinstance(value, str) else value
    if not isinstance(call, dict):
        raise _expected(path, call, 'a call such as {"name": ..., "arguments": {...}}')
    identity = _optional_text(call, "id", f"{path}.")
    if isinstance(call.get("function"), dict):
        call, path = call["function"], f"{path}.function"
    name = _text(call, "name", f"{path}.")
    if not name:
        raise _expected(f"{path}.name", name, "the function's name")
    key = "parameters" if "arguments" not in call and "parameters" in call else "arguments"
    return ToolCall(name, _parse_arguments(call.get(key), f"{path}.{key}"), identity)


def _parse_arguments(value: object, path: str) -> dict[str, object] | str:
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        # What claims to be an object must be one: a broken one would teach the model to write broken calls.
        if not value.lstrip().startswith("{"):
            return value
        value = _parse_json(value, path)
    if not isinstance(value, dict):
        raise _expected(path, value, "an object, or its JSON text")
    return value


def _parse_tools(row: JsonObject) -> tuple[dict[str, object], ...]:
    """`tools`, or `functions`, OpenAI's older name: a list, one tool, or the JSON text of either."""
    key = "tools" if row.get("tools") else "functions"
    value = row.get(key)
    if value is None or value == "":
        return ()
    tools = _parse_json(value, key) if isinstance(value, str) else value
    tools = [tools] if isinstance(tools, dict) else tools
    return tuple(_parse_tool(tool, f"{key}[{number}]") for number, tool in enumerate(_list(tools, key)))


def _parse_tool(value: object, path: str) -> dict[str, object]:
    tool = _parse_json(value, path) if isinstance(value, str) else value
    if not isinstance(tool, dict):
        raise _expected(path, tool, "a tool with a name and parameters")
    function = tool.get("function")
    if isinstance(function, dict):
        _text(function, "name", f"{path}.function.")
        return {"type": "function", **tool}
    _text(tool, "name", f"{path}.")
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


# -- values and their faults ----------------------------------------------------------------------------------------

_MISSING = object()


def _text(row: JsonObject, key: str, prefix: str = "") -> str:
    return _as_text(row.get(key, _MISSING), f"{prefix}{key}")


def _as_text(value: object, path: str) -> str:
    if not isinstance(value, str):
        raise _expected(path, value, "a text")
    return value


def _optional_text(row: JsonObject, key: str, prefix: str = "") -> str | None:
    value = row.get(key)
    return None if value is None else _as_text(value, f"{prefix}{key}")


def _list(value: object, path: str) -> Sequence[object]:
    if not isinstance(value, list):
        raise _expected(path, value, "a list")
    return value


def _parse_json(text: str, path: str) -> object:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise _expected(path, text, "valid JSON") from None


def _refuse_constant(constant: str) -> object:
    raise ValueError(constant)


def _expected(path: str, value: object, expected: str) -> UserError:
    return UserError("data.expected", path, found=_describe(value), expected=expected)


def _describe(value: object) -> str:  # noqa: PLR0911 - one return for each kind of JSON value
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {value}"
        case "":
            return "an empty text"
        case str():
            return f'the text "{value}"' if len(value) <= 60 else f'the text "{value[:60]}..."'
        case list():
            return f"a list of {len(value)}" if value else "an empty list"
        case dict():
            return f"an object with the keys {', '.join(map(str, list(value)[:10]))}" if value else "an empty object"
    assert value is _MISSING
    return "missing"


# -- for templates --------------------------------------------------------------------------------------------------


def to_template_messages(
    conversation: Conversation,
) -> tuple[list[dict[str, object]], list[dict[str, object]] | None]:
    """Messages and tools as chat templates take them: arguments are objects, what isn't given has no key."""
    return [_template_message(message) for message in conversation.messages], list(conversation.tools) or None


def _template_message(message: Message) -> dict[str, object]:
    result: dict[str, object] = {"role": message.role, "content": message.content}
    if message.reasoning_content:
        result["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        result["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    if message.name is not None:
        result["name"] = message.name
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    return result


def _template_call(call: ToolCall) -> dict[str, object]:
    result: dict[str, object] = {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    if call.id is not None:
        result["id"] = call.id
    return result
