"""The built-in text is the same for everyone, right, and as uneven as real data."""

import hashlib
import json
import re
from collections import Counter
from datetime import date
from itertools import islice

import pytest

from core.conversation import Conversation, detect_format, parse_row
from core.demo_data import (
    CONJUGATED,
    LONG_TOPICS,
    MONTHS,
    NOUNS,
    SHORT_TOPICS,
    VERBAL_NOUNS,
    WEEKDAYS,
    Draw,
    dialogues,
    number_in_words,
    plural,
    prose,
    roman,
)
from core.rows import Row, read_rows


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def test_the_same_text_comes_out_on_every_machine() -> None:
    # Changed on purpose? Then demo/tiny-llama and demo-dialogues are other ones from now on: say so in the CHANGELOG.
    assert digest([json.dumps(row) for row in dialogues()]) == "05a80449f16512be"
    assert digest(list(islice(prose(1), 1000))) == "e87f974cb09618d7"


def test_another_seed_gives_other_text() -> None:
    assert list(dialogues(1, 20)) != list(dialogues(2, 20))
    assert next(prose(1)) != next(prose(2))


def test_every_row_is_a_conversation_that_ends_with_an_answer() -> None:
    lines = "".join(json.dumps(row) + "\n" for row in dialogues())
    rows = [row for row in read_rows([lines.encode()]) if isinstance(row, Row)]
    assert len(rows) == 600
    assert detect_format(row.value for row in rows) == "messages"
    for row in rows:
        conversation = parse_row(row.value, "messages")
        assert isinstance(conversation, Conversation)
        roles = [message.role for message in conversation.messages if message.role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message.content.strip() == message.content != "" for message in conversation.messages)


def test_conversations_are_of_very_unequal_length() -> None:
    rows = list(dialogues())
    turns = Counter(sum(message["role"] == "assistant" for message in row["messages"]) for row in rows)
    assert min(turns) == 1
    assert max(turns) == 12
    assert turns[1] > turns[2] > turns[3] > 0
    sizes = sorted(len(json.dumps(row)) for row in rows)
    assert sizes[-1] > 10 * sizes[len(sizes) // 2] > 20 * sizes[0] / 2


def test_prose_uses_many_words_and_every_form_of_sentence() -> None:
    text = " ".join(islice(prose(3), 2000))
    assert len(set(text.split())) > 3000
    assert not set("<>{}") & set(text)
    assert not re.search(r"\b(a [aei]\w|an [^aeiouh]|an us[eu])", text)
    assert re.search(r"\b(an [aei]\w+)", text)


@pytest.mark.parametrize("topic", [*SHORT_TOPICS, *LONG_TOPICS], ids=lambda topic: topic.__name__.strip("_"))
def test_a_topic_asks_and_answers(topic) -> None:
    for seed in range(50):
        exchange = topic(Draw(seed))
        assert exchange.question.endswith(("?", ".", ":"))
        assert exchange.answer
        assert "{" not in exchange.question + exchange.answer


def test_sums_and_weekdays_are_right() -> None:
    checked = Counter[str]()
    for row in dialogues(count=600):
        for message in row["messages"]:
            words = message["content"].rstrip(".").split()
            match words:
                case [first, "plus", second, "is", total] if message["role"] == "assistant":
                    assert int(first) + int(second) == int(total)
                    checked["sum"] += 1
                case [day, month, year, "is", "a", weekday]:
                    assert date(int(year), MONTHS.index(month) + 1, int(day)).weekday() == WEEKDAYS.index(weekday)
                    checked["weekday"] += 1
    assert checked["sum"] > 10
    assert checked["weekday"] > 10


def test_english_forms() -> None:
    assert [number_in_words(number) for number in (0, 13, 40, 99, 100, 342)] == [
        "zero", "thirteen", "forty", "ninety-nine", "one hundred", "three hundred and forty-two",
    ]  # fmt: skip
    assert [roman(number) for number in (4, 9, 48, 99)] == ["IV", "IX", "XLVIII", "XCIX"]
    assert [plural(noun) for noun in ("box", "city", "boy", "child")] == ["boxes", "cities", "boys", "children"]
    verbs = {verb.base: verb for verb in CONJUGATED}
    assert (verbs["carry"].past, verbs["stop"].gerund, verbs["use"].gerund) == ("carried", "stopping", "using")
    assert (verbs["be"].third_person, verbs["go"].third_person) == ("is", "goes")
    assert len(verbs) == len(CONJUGATED)
    assert len({*NOUNS}) == len(NOUNS)
    assert VERBAL_NOUNS


def test_a_draw_reaches_both_ends() -> None:
    draw = Draw(0)
    drawn = Counter(draw.number(1, 3) for _ in range(300))
    assert set(drawn) == {1, 2, 3}
    assert sorted(draw.several_of(range(5), 5)) == [0, 1, 2, 3, 4]
