import json
from pathlib import Path

import pytest

from core.events import Step, parse_event
from worker.engine.emit import Emitter


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_seq_goes_on_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with Emitter(path) as emitter:
        emitter.warn("a", "first")
        emitter.warn("b", "second")
    with Emitter(path) as emitter:
        assert emitter.last_seq == 2
        emitter.warn("c", "third")
    assert [event["seq"] for event in lines(path)] == [1, 2, 3]


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_torn_last_line_is_cut_off_and_its_number_given_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "events.jsonl"
    with Emitter(path) as emitter:
        emitter.warn("a", "first " * 20_000)
        emitter.warn("b", "second")
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Emitter(path) as emitter:
        emitter.warn("c", "third")
    events = lines(path)
    assert [event["seq"] for event in events] == [1, 2]
    assert events[1]["code"] == "c"


def test_a_file_that_holds_only_half_a_line_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"seq": 1, "ki')
    with Emitter(path) as emitter:
        emitter.warn("a", "first")
    assert [event["seq"] for event in lines(path)] == [1]


def test_numbers_that_are_none_travel_as_null(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    step = {"step": 1, "epoch": 0.1, "learning_rate": 1e-4, "trained_tokens": 1, "tokens": 2, "slots": 3, "rows": 1}
    step |= {
        "padding_efficiency": 0.5,
        "padded_efficiency": 0.5,
        "tokens_per_s": 1.0,
        "step_s": 1.0,
        "wait_s": 0.0,
        "sample_hash": "x",
    }
    with Emitter(path) as emitter:
        emitter.emit(Step, loss=float("nan"), grad_norm=float("inf"), **step)
    (event,) = lines(path)
    assert event["loss"] is None and event["grad_norm"] is None
    assert isinstance(parse_event(event), Step)


def test_progress_is_thinned_but_beginning_and_end_always_go_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    clock = iter([0.0, 0.1, 0.2, 0.3, 0.4, 0.9])
    with Emitter(path, monotonic=lambda: next(clock)) as emitter:
        emitter.phase("tokenise", 0, 4)
        emitter.phase("tokenise", 1, 4)
        emitter.phase("tokenise", 4, 4)
        emitter.phase("plan")
        emitter.phase("train", 1, 3)
        emitter.phase("train", 2, 3)
    assert [(event["name"], event["done"]) for event in lines(path)] == [
        ("tokenise", 0),
        ("tokenise", 4),
        ("plan", 0),
        ("train", 1),
        ("train", 2),
    ]
