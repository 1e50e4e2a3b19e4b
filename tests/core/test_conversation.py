from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.conversation import (
    ROLES,
    Conversation,
    Message,
    PromptCompletion,
    RawText,
    ToolCall,
    detect_format,
    parse_row,
    to_template_messages,
)
from core.errors import UserError

QUESTION = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}


def parse(row) -> Conversation:
    conversation = parse_row(row, detect_format([row]))
    assert isinstance(conversation, Conversation)
    return conversation


def roles_and_contents(row) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in parse(row).messages]


def fault(row, format) -> UserError:
    with pytest.raises(UserError) as caught:
        parse_row(row, format)
    return caught.value


# -- formats


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": [QUESTION, ANSWER]}, "messages"),
        ({"conversations": [QUESTION, ANSWER]}, "messages"),
        ({"conversations": [{"from": "human", "value": "hi"}]}, "sharegpt"),
        ({"messages": [{"from": "human", "value": "hi"}]}, "sharegpt"),
        ({"instruction": "a", "input": "", "output": "b", "text": "a b"}, "alpaca"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"text": "a", "url": "b"}, "text"),
    ],
)
def test_a_format_is_seen_from_the_keys(row, format):
    assert detect_format([row]) == format


def test_a_bad_first_row_does_not_decide_the_format():
    assert detect_format([{"instruction": "a"}, {"instruction": "a", "output": "b"}]) == "alpaca"


def test_rows_that_fit_no_format_are_refused_with_their_keys_and_what_is_expected():
    with pytest.raises(UserError) as caught:
        detect_format([{"question": "a", "answer": "b"}])
    assert "question, answer" in str(caught.value)
    assert "conversations: a list of objects with from and value" in str(caught.value)
    with pytest.raises(UserError) as caught:
        detect_format([])
    assert caught.value.code == "data.no_rows"


@given(st.text(), st.text(min_size=1), st.text(), st.text(min_size=1), st.lists(st.tuples(st.text(), st.text())))
def test_alpaca_becomes_turns_whose_text_is_untouched(instruction, context, output, system, history):
    row = {
        "instruction": instruction,
        "input": context,
        "output": output,
        "system": system,
        "history": [list(pair) for pair in history],
    }
    past = [turn for asked, answered in history for turn in (("user", asked), ("assistant", answered))]
    expected = [("system", system), *past, ("user", f"{instruction}\n{context}"), ("assistant", output)]
    assert roles_and_contents(row) == expected


@pytest.mark.parametrize("absent", [{}, {"input": ""}, {"input": None, "system": None, "history": None}])
def test_alpaca_without_an_input_is_its_instruction_alone(absent):
    row = {"instruction": "数到三。", "output": " 一二三 ", **absent}
    assert roles_and_contents(row) == [("user", "数到三。"), ("assistant", " 一二三 ")]


def test_a_system_text_beside_the_turns_becomes_the_first_message():
    row = {"system": "be kind", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert roles_and_contents(row) == [("system", "be kind"), ("user", "a"), ("assistant", "b")]
    row["conversations"].insert(0, {"from": "system", "value": "be brief"})
    assert fault(row, "sharegpt").code == "data.two_systems"


def test_every_role_name_becomes_one_of_four():
    contents = {"call": '{"name": "f", "arguments": {}}'}
    for name, role in ROLES.items():
        row = {"messages": [QUESTION, ANSWER, QUESTION, {"role": name, "content": contents.get(role, "x")}]}
        assert parse(row).messages[-1].role == ("assistant" if role == "call" else role)


def test_texts_are_raw_and_lists_of_messages_are_a_conversation_whose_prompt_is_context():
    assert parse_row({"text": " a\n"}, "text") == RawText(" a\n")
    assert parse_row({"prompt": "a ", "completion": "b"}, "prompt_completion") == PromptCompletion("a ", "b")
    row = {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]}
    assert [message.weight for message in parse(row).messages] == [None, 0, None, None]
    assert fault({"prompt": [QUESTION, ANSWER], "completion": [QUESTION]}, "prompt_completion").field == "completion"


def test_text_parts_are_joined_and_other_parts_are_refused():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert roles_and_contents({"messages": [{"role": "user", "content": parts}, ANSWER]})[0] == ("user", "a b")
    parts[1] = {"type": "image_url", "image_url": {}}
    error = fault({"messages": [{"role": "user", "content": parts}, ANSWER]}, "messages")
    assert error.field == "messages[0].content[1].type"
    assert "images and sound are not built yet" in str(error)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name_in_a_conversation(name):
    conversation = parse({"messages": [QUESTION, {**ANSWER, name: "hm"}]})
    assert to_template_messages(conversation)[0][1]["reasoning_content"] == "hm"


@pytest.mark.parametrize(("weight", "parsed"), [(0, 0), (1, 1), (0.0, 0), (True, 1), (None, None)])
def test_a_weight_of_0_or_1_is_kept(weight, parsed):
    assert parse({"messages": [QUESTION, {**ANSWER, "weight": weight}]}).messages[1].weight == parsed


# -- tool calls


def test_a_call_behind_the_assistants_own_text_belongs_to_its_turn():
    row = {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "let me look"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": {"found": "三"}},
            {"from": "gpt", "value": "b"},
        ]
    }
    conversation = parse(row)
    assert conversation.messages[1] == Message("assistant", "let me look", (ToolCall("f", {"x": 1}),))
    assert conversation.messages[2] == Message("tool", '{"found": "三"}')


def test_calls_of_another_weight_are_a_turn_of_their_own():
    calls = {"from": "function_call", "value": {"name": "f", "arguments": {}}, "weight": 0}
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, calls, calls]}
    messages = parse(row).messages
    assert [(message.weight, len(message.tool_calls)) for message in messages[1:]] == [(None, 0), (0, 2)]


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [
        ('{"x": 1}', {"x": 1}),
        ({"x": 1}, {"x": 1}),
        ("print(1)", "print(1)"),
        ("", {}),
        (None, {}),
    ],
)
def test_arguments_are_an_object_or_what_is_none(arguments, parsed):
    call = {"role": "assistant", "function_call": {"name": "f", "arguments": arguments}}
    assert parse({"messages": [QUESTION, call]}).messages[1].tool_calls == (ToolCall("f", parsed),)


def test_templates_get_calls_in_their_own_shape_and_no_key_without_a_value():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
    result = {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "f"}
    row = {"messages": [QUESTION, {"role": "assistant", "tool_calls": [call]}, result, ANSWER]}
    messages, tools = to_template_messages(parse(row))
    assert messages == [
        QUESTION,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": "é"}}, "id": "c1"}],
        },
        result,
        ANSWER,
    ]
    assert tools is None


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools_are_none(tools):
    assert parse({"messages": [QUESTION, ANSWER], "tools": tools}).tools == ()


def test_tools_are_put_into_their_envelope():
    tool = {"name": "f", "parameters": {"type": "object"}}
    envelope = {"type": "function", "function": tool}
    for tools in ([tool], tool, [envelope], [{"function": tool}], ['{"name": "f", "parameters": {"type": "object"}}']):
        assert parse({"messages": [QUESTION, ANSWER], "tools": tools}).tools == (envelope,)


# -- faults


@pytest.mark.parametrize(
    ("format", "row", "field", "found"),
    [
        ("alpaca", {"instruction": "a"}, "output", "missing"),
        ("alpaca", {"instruction": 3, "output": "b"}, "instruction", "the number 3"),
        ("alpaca", {"instruction": "a", "output": "b", "history": ["x"]}, "history[0]", 'the text "x"'),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["x", None]]}, "history[0][1]", "null"),
        ("text", {}, "text", "missing"),
        ("prompt_completion", {"prompt": "a", "completion": []}, "completion", "an empty list"),
        ("prompt_completion", {"prompt": [QUESTION], "completion": "b"}, "completion", 'the text "b"'),
        ("messages", {"text": "a"}, "messages", "missing"),
        ("messages", {"messages": []}, "messages", "an empty list"),
        ("messages", {"messages": [QUESTION, 3]}, "messages[1]", "the number 3"),
        ("messages", {"messages": [{"role": "judge", "content": ""}]}, "messages[0].role", 'the text "judge"'),
        ("messages", {"messages": [{"content": "a"}]}, "messages[0].role", "missing"),
        ("messages", {"messages": [QUESTION, {"role": "assistant"}]}, "messages[1].content", "missing"),
        ("messages", {"messages": [QUESTION, {**ANSWER, "weight": 0.5}]}, "messages[1].weight", "the number 0.5"),
        ("messages", {"messages": [QUESTION, ANSWER], "tools": "[{"}, "tools", 'the text "[{"'),
        ("messages", {"messages": [QUESTION, ANSWER], "tools": [{"a": 1}]}, "tools[0].name", "missing"),
        (
            "messages",
            {"messages": [QUESTION, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}]},
            "messages[1].tool_calls[0].function.arguments",
            'the text "{x"',
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": True}]},
            "conversations[1].value",
            "true",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(x)"}]},
            "conversations[1].value",
            'the text "f(x)"',
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": '[{"x": 1}]'}]},
            "conversations[1].value[0].name",
            "missing",
        ),
    ],
)
def test_a_fault_names_its_field_and_what_was_found(format, row, field, found):
    error = fault(row, format)
    assert error.code == "data.expected"
    assert error.field == field
    assert error.parameters["found"] == found
    assert str(error).startswith(f"{field} is {found}; ")


def test_a_conversation_without_an_assistant_is_refused():
    error = fault({"messages": [QUESTION]}, "messages")
    assert (error.code, error.field) == ("data.no_assistant", "messages")


def test_a_result_before_any_call_is_refused():
    row = {"messages": [QUESTION, {"role": "tool", "content": "3"}, ANSWER]}
    error = fault(row, "messages")
    assert (error.code, error.field) == ("data.result_without_call", "messages[1]")


def test_the_messages_in_the_docs_are_the_real_ones():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
    for row, format in (
        ({"instruction": "a"}, "alpaca"),
        ({"conversations": [*turns, {"from": "gpt", "value": 12}]}, "sharegpt"),
        ({"messages": [QUESTION]}, "messages"),
    ):
        assert f"`{fault(row, format)}`" in page
    for name in ROLES:
        assert name in page
