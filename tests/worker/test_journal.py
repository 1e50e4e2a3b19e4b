"""Whatever a power cut or a bad disk leaves of a journal, opening it gives back the valid part of it, and goes on."""

import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.journal import Journal
from worker.trainer import EventTail, merge_events

TEXT = st.text(max_size=20)
EVENTS = st.lists(st.tuples(st.sampled_from(["log", "step", "checkpoint"]), TEXT), min_size=1, max_size=6)


def write(path: Path, events: list[tuple[str, str]]) -> bytes:
    path.unlink(missing_ok=True)
    with Journal(path) as journal:
        for kind, text in events:
            journal.append(kind, ts=1.5, text=text)
    return path.read_bytes()


def read(path: Path) -> list[tuple[int, str, str]]:
    with Journal(path) as journal:
        return [(event.seq, event.kind, event.data["text"]) for event in journal.read_after(0)]


def whole(events: list[tuple[str, str]]) -> list[tuple[int, str, str]]:
    return [(seq, kind, text) for seq, (kind, text) in enumerate(events, start=1)]


@given(EVENTS, st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8)
def test_a_journal_cut_at_any_byte_keeps_its_whole_lines(
    tmp_path: Path, events: list[tuple[str, str]], data: st.DataObject
) -> None:
    path = tmp_path / "journal.jsonl"
    content = write(path, events)
    assert read(path) == whole(events)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        num_whole = content[:length].count(b"\n")
        assert read(path) == whole(events)[:num_whole]
    length = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:length])
    num_whole = content[:length].count(b"\n")
    with Journal(path) as journal:
        assert journal.append("log", ts=2.0, text="on") == num_whole + 1
    assert read(path) == [*whole(events)[:num_whole], (num_whole + 1, "log", "on")]


@given(EVENTS, st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_a_journal_with_any_bit_flipped_keeps_what_stands_before(
    tmp_path: Path, events: list[tuple[str, str]], data: st.DataObject
) -> None:
    path = tmp_path / "journal.jsonl"
    content = bytearray(write(path, events))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    assert read(path) == whole(events)[: bytes(content[:at]).count(b"\n")]


def test_numbering_goes_on_after_what_the_recorder_has_seen(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, [("log", "a"), ("log", "b")])
    with Journal(path) as journal:
        journal.continue_after(5)
        assert journal.append("log", text="c") == 6
        journal.continue_after(3)
        assert journal.append("log", text="d") == 7
    with Journal(path) as journal:
        assert [event.seq for event in journal.read_after(0)] == [1, 2, 6, 7]
        assert [event.seq for event in journal.read_after(2)] == [6, 7]


def test_a_batch_is_cut_by_count_and_by_size(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.jsonl") as journal:
        for number in range(1500):
            journal.append("log", text=str(number))
        assert [event.seq for event in journal.read_after(0)] == list(range(1, 1001))
        assert [event.seq for event in journal.read_after(1000)] == list(range(1001, 1501))
        assert [event.seq for event in journal.read_after(700, limit=3)] == [701, 702, 703]
        assert journal.read_after(1500) == ()
        for _ in range(3):
            journal.append("log", text="x" * 700_000)
        assert [event.seq for event in journal.read_after(1500)] == [1501]


def test_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.jsonl") as journal:
        with pytest.raises(ValueError, match="JSON"):
            journal.append("step", loss=float("nan"))
        assert journal.append("step", loss=None) == 1


def test_one_thread_may_read_while_another_appends(tmp_path: Path) -> None:
    num_events = 3000
    with Journal(tmp_path / "journal.jsonl") as journal:
        writer = threading.Thread(target=lambda: [journal.append("log", text="x") for _ in range(num_events)])
        seen: list[int] = []
        writer.start()
        num_polls_while_writing = 0
        while len(seen) < num_events:
            num_polls_while_writing += writer.is_alive()
            seen += [event.seq for event in journal.read_after(seen[-1] if seen else 0)]
            # A relay pauses too; without it the reader keeps the interpreter, and each write waits 5 ms to get it back.
            writer.join(0.001)
        writer.join()
    assert num_polls_while_writing > 1
    assert seen == list(range(1, num_events + 1))


class Trainer:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_events = 0

    def write(self, data: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(data)

    def step(self) -> None:
        self.num_events += 1
        self.write(json.dumps({"seq": self.num_events, "ts": 1.0, "kind": "step", "step": self.num_events}).encode())
        self.write(b"\n")


@given(st.lists(st.sampled_from(["step", "half", "merge", "killed", "power cut"]), max_size=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_event_of_the_trainer_is_lost_or_doubled_whoever_numbers_it(tmp_path: Path, story: list[str]) -> None:
    journal_path, trainer = tmp_path / "journal.jsonl", Trainer(tmp_path / "events.jsonl")
    journal_path.unlink(missing_ok=True)
    trainer.path.unlink(missing_ok=True)
    journal = Journal(journal_path)
    tail = EventTail(trainer.path, 0)
    for act in [*story, "killed", "merge"]:
        match act:
            case "step":
                trainer.step()
            case "half":
                trainer.write(b'{"kind": "log", "ts": 1, "text": "a write in two parts')
                list(merge_events(tail, journal))
                trainer.write(b'"}\n')
            case "merge":
                list(merge_events(tail, journal))
            case "killed":
                journal.close()
                journal = Journal(journal_path)
                tail = EventTail(trainer.path, journal.trainer_offset)
            case "power cut":
                journal.close()
                size = journal_path.stat().st_size
                os.truncate(journal_path, max(0, size - 7))
                journal = Journal(journal_path)
                tail = EventTail(trainer.path, journal.trainer_offset)
    steps = [event.data["step"] for event in journal.read_after(0) if event.kind == "step"]
    seqs = [event.seq for event in journal.read_after(0)]
    journal.close()
    assert steps == list(range(1, trainer.num_events + 1))
    assert seqs == list(range(1, len(seqs) + 1))


def test_a_line_that_is_no_event_becomes_a_warning_and_dams_up_nothing(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "events.jsonl")
    trainer.step()
    for bad in (b"not json\n", b'{"kind": 3, "ts": 1}\n', b'{"kind": "step", "ts": 1, "loss": NaN}\n', b"\n", b"[]\n"):
        trainer.write(bad)
    trainer.write(b'{"kind": "log", "ts": 1, "text": "' + b"x" * 200_000 + b'"}\n')
    trainer.step()
    tail = EventTail(trainer.path, 0)
    with Journal(tmp_path / "journal.jsonl") as journal:
        while list(merge_events(tail, journal)):
            pass
        kinds = [event.kind for event in journal.read_after(0)]
    assert kinds == ["step", *["warning"] * 5, "log", "step"]
