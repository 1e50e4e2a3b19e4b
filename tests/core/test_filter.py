"""The language of filters: what it reads, where it points when it can't, and what fits."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from core.errors import UserError
from core.filter import FIELDS, OPERATORS, Comparison, Either, Every, Node, Not, Search, matches, parse_filter

NOW = 1_800_000_000.0
DAY = 86_400.0
JOB: dict[str, Any] = {
    "id": "job_1",
    "name": "Sums, first try",
    "notes": "higher rank than before",
    "state": "running",
    "is": ["stalled"],
    "owner": "alice",
    "host": "ada",
    "model": "Qwen/Qwen2.5-0.5B",
    "method": "lora",
    "dataset": ["sums", "dialogues"],
    "packing": "packed",
    "tag": ["prod", "long run"],
    "zero": 2,
    "devices": 4,
    "priority": 0,
    "attempt": 1,
    "learning_rate": 2e-4,
    "step": 120,
    "steps": 900,
    "epoch": 0.4,
    "loss": 1.25,
    "eval_loss": None,
    "trained_tokens": 64_000,
    "tokens_per_s": 812.5,
    "efficiency": 0.97,
    "created": NOW - 3 * DAY,
    "started": NOW - 2 * DAY,
    "ended": None,
    "duration": 7200.0,
}


def fits(query: str) -> bool:
    return matches(parse_filter(query, NOW), JOB)


def test_a_job_of_the_tests_has_every_field() -> None:
    assert set(JOB) == {*FIELDS, "notes"}


FITTING: tuple[tuple[str, bool], ...] = (
    ("", True),
    ("state:running", True),
    ("STATE:Running", True),
    ("state:queued", False),
    ("state:queued,running", True),
    ("state!=queued", True),
    ("state!=queued,running", False),
    ("model~qwen", True),
    ("model:qwen", False),
    ('model:"qwen/qwen2.5-0.5b"', True),
    ("owner:alice tag:prod", True),
    ('tag:"long run"', True),
    ("tag!=prod", False),
    ("is:stalled", True),
    ("dataset:dialogues", True),
    ("learning_rate>=1e-4", True),
    ("learning_rate=2e-4", True),
    ("learning_rate<2e-4", False),
    ("trained_tokens=64k", True),
    ("trained_tokens>1_000", True),
    ("efficiency>96%", True),
    ("loss<1.2", False),
    ("loss<1.2 OR eval_loss<1", False),
    ("eval_loss!=1", True),
    ("NOT eval_loss<1", True),
    ("created<7d", True),
    ("created>7d", False),
    ("created>=2027-01-01", True),
    ("created<2027-01-01", False),
    ("created:4d", True),
    ("ended<7d", False),
    ("duration>90m", True),
    ("duration<=2h", True),
    ("sums", True),
    ('"first try"', True),
    ('"try first"', False),
    ("RANK", True),
    ("alice qwen", True),
    ("bob", False),
    ("-bob", True),
    ("-state:running", False),
    ("NOT NOT state:running", True),
    ("state:failed OR state:running AND owner:bob", False),
    ("(state:failed OR state:running) AND owner:alice", True),
    ("state:failed owner:bob OR owner:alice", True),
    ("NOT (owner:bob OR state:queued)", True),
    ('"OR"', True),
    ("zero:2 devices>=4 priority=0", True),
)
QUERIES = tuple(query for query, _ in FITTING)


@pytest.mark.parametrize(("query", "expected"), FITTING)
def test_what_fits(query: str, expected: bool) -> None:
    assert fits(query) == expected


@pytest.mark.parametrize(
    ("query", "node"),
    [
        ("a b OR c", Either((Every((Search("a"), Search("b"))), Search("c")))),
        ("a AND (b OR NOT c)", Every((Search("a"), Either((Search("b"), Not(Search("c"))))))),
        (r'"say \"hi\" \\ there"', Search(r'say "hi" \ there')),
        ("loss<1.2", Comparison("loss", "<", (1.2,))),
        ("state:queued,running", Comparison("state", "=", ("queued", "running"))),
        ("http://here", Search("http://here")),
        ("a-b", Search("a-b")),
    ],
)
def test_what_is_read(query: str, node: Node) -> None:
    if query == "http://here":
        with pytest.raises(UserError, match="http"):
            parse_filter(query, NOW)
        node, query = Search("http://here"), '"http://here"'
    assert parse_filter(query, NOW) == node


@pytest.mark.parametrize(
    ("query", "at", "says"),
    [
        ("state:runing", 7, ["runing", "running, "]),
        ("loss<low", 6, ["low", "loss"]),
        ("los<1", 1, ["los", "loss"]),
        ("owner:alice colour:red", 13, ["colour", "owner"]),
        ("owner<alice", 6, ["<", "owner", "~"]),
        ("created~7d", 8, ["~", "created"]),
        ("created<lately", 9, ["lately", "7d"]),
        ("duration>3", 10, ["3", "90s"]),
        ("loss<", 6, ["loss"]),
        ("loss< 1", 6, ["loss"]),
        ("(state:running", 1, ["(", ")"]),
        ("state:running)", 14, [")"]),
        ("a OR", 5, ["nothing"]),
        ("OR a", 1, ["nothing"]),
        ("a AND AND b", 7, ["nothing"]),
        ("NOT", 4, ["nothing"]),
        ("()", 2, ["nothing"]),
        ('a "b', 3, ["quote"]),
        ('model:"b', 7, ["model"]),
        ("x" * 2001, None, ["2,001", "2,000"]),
        ("(" * 60 + "a", 51, ["50"]),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(query: str, at: int | None, says: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_filter(query, NOW)
    fault = caught.value
    assert fault.field == "q"
    assert fault.parameters.get("at") == at
    text = fault.text()
    assert all(part in text for part in says), text
    assert at is None or f"character {at}" in text


@given(st.text(max_size=60) | st.text(alphabet='state:run()"-<>=!~,ORAND 12d\\', max_size=60))
@example('"\\')
@example("--a")
def test_any_text_is_read_or_refused_with_a_place_within_it(query: str) -> None:
    try:
        node = parse_filter(query, NOW)
    except UserError as fault:
        at = fault.parameters["at"]
        assert isinstance(at, int) and 1 <= at <= len(query) + 1
    else:
        assert isinstance(matches(node, JOB), bool)


def test_every_field_takes_its_operators() -> None:
    values = {"word": "running", "number": "1", "time": "7d", "span": "7d"}
    known = {"is": "stalled", "method": "lora", "packing": "packed"}
    for field, kind in FIELDS.items():
        for operator in OPERATORS[kind]:
            node = parse_filter(f"{field}{operator}{known.get(field, values[kind])}", NOW)
            assert isinstance(node, Comparison) and node.field == field
            assert isinstance(matches(node, JOB), bool)
