"""What a job emits."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.events import KNOWN_KINDS, Choice, RawEvent, ValidationError, finite, parse_event, to_line


def test_a_known_kind_is_parsed_and_a_wrong_field_refused() -> None:
    event = parse_event({"seq": 1, "ts": 0.5, "kind": "log", "text": "中文"})
    assert type(event) is KNOWN_KINDS["log"]
    with pytest.raises(ValidationError):
        parse_event({"seq": 1, "ts": 0.5, "kind": "log"})


def test_an_unknown_kind_is_kept_whole() -> None:
    data = {"seq": 3, "ts": 0.5, "kind": "hologram", "depth": [1, 2]}
    event = parse_event(data)
    assert isinstance(event, RawEvent) and event.model_dump() == data


def test_a_line_is_strict_json_and_holds_no_nan() -> None:
    assert json.loads(to_line({"text": "a\nb中"})) == {"text": "a\nb中"} and to_line({"text": "a\nb"}).count(b"\n") == 1
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_line({"loss": float("nan")})


@given(st.floats())
def test_a_number_that_is_none_becomes_null(value: float) -> None:
    assert json.loads(to_line({"loss": finite(value)}))["loss"] in (None, value)


def test_a_choice_of_a_newer_release_is_shown_by_its_code() -> None:
    assert Choice(field="f", value=1, code="auto.telepathy").text() == "auto.telepathy"
