"""Every row becomes samples or is refused with its line; what is stored is what was built."""

import csv
import gzip
import hashlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from core.chat import CHATML, build_samples
from core.conversation import parse_row
from core.errors import UserError
from core.selection import select
from core.spec import parse_spec
from tests.engine.test_tokenizer import byte_level
from worker.engine.data import (
    MAX_REFUSED_LISTED,
    NUM_DECIDING_ROWS,
    ROWS_PER_BATCH,
    Reading,
    hash_row,
    load_corpus,
    read_samples,
)
from worker.engine.tokenizer import HfChatTokenizer
from worker.job_directory import InputFile, Inputs

TOKENIZER = HfChatTokenizer(byte_level(chat_template=CHATML))
# Earlier answers lose their last word once another turn follows: history doesn't stand.
REWRITING = (
    "{% for m in messages %}{{ m.role + ':' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split(' ')[0] }}{% else %}{{ m.content }}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def conversation(*answers: str, **message: object) -> dict[str, Any]:
    turns: list[dict[str, object]] = []
    for number, answer in enumerate(answers):
        turns.append({"role": "user", "content": f"question {number}"})
        turns.append({"role": "assistant", "content": answer, **message})
    return {"messages": turns}


def write(path: Path, rows: list[object]) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def refusal(path: Path, tokenizer: HfChatTokenizer = TOKENIZER, reading: Reading | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        read_samples(path, tokenizer, reading or Reading())
    return caught.value


def test_good_and_bad_rows_all_appear_under_their_line(tmp_path: Path) -> None:
    rows = [
        conversation("one"),
        "{broken",
        "",
        conversation("two", "three"),
        {"messages": [{"role": "user"}]},
        conversation("never", weight=0),
        "7",
        conversation("four"),
    ]
    measured = read_samples(write(tmp_path / "rows.jsonl", rows), TOKENIZER, Reading(multi_turn="split"))
    profile = measured.profile
    assert (profile.num_rows, profile.num_refused, profile.format) == (7, 4, "messages")
    assert [(row.line, row.code) for row in profile.refused] == [
        (2, "data.row_broken"),
        (5, "data.expected"),
        (6, "data.nothing_trained"),
        (7, "data.row_not_object"),
    ]
    assert "messages[0].content" in profile.refused[1].text
    assert profile.sample_row == [0, 2, 2, 6]
    assert [measured.samples.line(index) for index in range(4)] == [1, 4, 4, 8]
    assert len({*profile.sample_row}) + profile.num_refused == profile.num_rows


def test_stored_samples_are_those_that_core_builds(tmp_path: Path) -> None:
    rows = [conversation(f"answer {number} " * (number % 7 + 1)) for number in range(ROWS_PER_BATCH + 5)]
    measured = read_samples(write(tmp_path / "rows.jsonl", list(rows)), TOKENIZER, Reading())
    assert len(measured.samples) == len(rows)
    for index in (0, ROWS_PER_BATCH - 1, ROWS_PER_BATCH, len(rows) - 1):
        parsed = parse_row(rows[index], "messages")
        (expected,) = build_samples(parsed, TOKENIZER, train_on="assistant", multi_turn="whole")
        token_ids, trained = measured.samples.sample(index)
        assert (token_ids.dtype, trained.dtype) == (np.int32, np.bool_)
        assert tuple(token_ids) == expected.token_ids
        assert tuple(trained) == expected.trained
        assert measured.profile.sample_length[index] == len(token_ids)
        assert measured.profile.sample_trained[index] == trained.sum() > 0


def test_a_row_keeps_its_hash_however_it_is_written() -> None:
    first, second = json.loads('{"a": 1, "b": "é"}'), json.loads('{ "b":"\\u00e9","a":1}')
    assert hash_row(first) == hash_row(second) != hash_row({"a": 2, "b": "é"})
    assert hash_row(first) == hashlib.sha256('{"a":1,"b":"é"}'.encode()).hexdigest()[:16]


def test_auto_keeps_conversations_whole_where_history_stands_and_splits_where_not(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [conversation("one two", "three four", "five six")] * 3)
    whole = read_samples(path, TOKENIZER, Reading()).profile
    assert (whole.multi_turn, whole.sample_turns) == ("whole", [3, 3, 3])
    rewriting = HfChatTokenizer(byte_level(chat_template=REWRITING))
    split = read_samples(path, rewriting, Reading()).profile
    assert (split.multi_turn, split.sample_turns, split.num_fell_back) == ("split", [1] * 9, 0)
    assert "rewrites earlier turns" in split.multi_turn_reason
    asked = read_samples(path, rewriting, Reading(multi_turn="whole")).profile
    assert (asked.multi_turn, asked.num_fell_back, len(asked.sample_row)) == ("whole", 3, 9)
    assert asked.multi_turn_reason == "as the spec asks"


def calling(name: str) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": {}}}
    return conversation("", tool_calls=[call])


def test_calls_that_the_template_leaves_out_are_counted_among_the_deciding_rows(tmp_path: Path) -> None:
    rows = [conversation("no call"), calling("add"), "{", *[calling("add")] * NUM_DECIDING_ROWS]
    path = write(tmp_path / "rows.jsonl", rows)
    plain = HfChatTokenizer(byte_level(chat_template=REWRITING))
    for reading in (Reading(), Reading(multi_turn="split")):
        dropped = read_samples(path, plain, reading).profile
        assert dropped.num_with_calls == dropped.num_calls_dropped == NUM_DECIDING_ROWS - 1
    seen = read_samples(path, TOKENIZER, Reading()).profile
    assert (seen.num_with_calls, seen.num_calls_dropped) == (NUM_DECIDING_ROWS - 1, 0)


def test_the_format_is_decided_by_good_rows_however_many_bad_ones_stand_before(tmp_path: Path) -> None:
    rows: list[object] = ["{"] * (NUM_DECIDING_ROWS + 50)
    alpaca = {"instruction": "say", "output": "hello"}
    profile = read_samples(write(tmp_path / "rows.jsonl", [*rows, alpaca]), TOKENIZER, Reading()).profile
    assert (profile.format, profile.num_refused, profile.sample_row) == ("alpaca", len(rows), [len(rows)])
    other = Reading(format="prompt_completion")
    assert refusal(tmp_path / "rows.jsonl", reading=other).code == "data.no_good_row"


def test_only_the_first_refused_rows_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    rows: list[object] = [conversation("good"), *(["[]"] * (MAX_REFUSED_LISTED + 7))]
    profile = read_samples(write(tmp_path / "rows.jsonl", rows), TOKENIZER, Reading()).profile
    assert profile.num_refused == MAX_REFUSED_LISTED + 7
    assert len(profile.refused) == MAX_REFUSED_LISTED


def test_a_file_without_a_good_row_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    split = Reading(multi_turn="split")
    error = refusal(write(tmp_path / "mine.jsonl", ["{", conversation("never", weight=0)]), reading=split)
    assert error.code == "data.no_good_row"
    assert error.parameters["num_rows"] == 2
    assert error.text().startswith("none of the 2 rows of mine.jsonl can be used. The first: line 1: ")
    assert "line 2: this row has no assistant turn that is trained" in error.text()
    error = refusal(write(tmp_path / "mine.jsonl", ["{"] * 5))
    assert (error.code, error.parameters["num_rows"], error.text().count("line ")) == ("data.no_good_row", 5, 3)


def test_files_that_cannot_be_read_at_all(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"")
    assert refusal(path).code == "data.no_rows"
    path.write_bytes(gzip.compress(b"PK\x03\x04"))
    assert refusal(path).code == "data.kind_not_built"
    assert refusal(write(path, [{"a": 1}])).code == "data.format_unknown"
    without = HfChatTokenizer(byte_level())
    error = refusal(write(path, [conversation("one")]), without, Reading(multi_turn="split"))
    assert error.code == "chat.no_template"


def test_progress_counts_bytes_to_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [conversation("long " * 1000)] * 400)
    seen: list[tuple[int, int]] = []
    read_samples(path, TOKENIZER, Reading(), lambda done, total: seen.append((done, total)))
    size = path.stat().st_size
    assert size > 2**20
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert seen[-1] == (size, size)


# -- of a job ------------------------------------------------------------------------------------------------------
def inputs(*paths: Path) -> Inputs:
    files = tuple(InputFile(dataset=path.stem, path=str(path), sha256="0" * 64) for path in paths)
    return Inputs(model_path="", model_name="", data=files)


def test_global_ids_follow_the_spec_and_end_with_the_validation_set(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{name}.jsonl", [conversation(f"{name} {number}") for number in range(count)])
        for name, count in (("held", 2), ("second", 3), ("first", 4))
    ]
    train = [{"dataset": "first"}, {"dataset": "second", "weight": 2.0}, {"dataset": "first", "weight": 0.5}]
    spec = parse_spec({"data": {"train": train, "validation": {"dataset": "held"}}})
    progress: list[tuple[int, int]] = []
    corpus = load_corpus(spec, inputs(*paths), TOKENIZER, lambda done, total: progress.append((done, total)))
    assert len(corpus) == 4 + 3 + 4 + 2
    assert set(corpus.profiles) == {"first", "second", "held"}

    def answer(sample_id: int) -> str:
        token_ids, trained = corpus.sample(sample_id)
        return "".join(TOKENIZER.pieces(token_ids[trained].tolist()))

    assert [answer(sample_id).removesuffix("<|im_end|>") for sample_id in range(len(corpus))] == [
        *(f"first {number}" for number in range(4)),
        *(f"second {number}" for number in range(3)),
        *(f"first {number}" for number in range(4)),
        *(f"held {number}" for number in range(2)),
    ]
    assert [corpus.dataset(sample_id) for sample_id in (0, 6, 7, 12)] == ["first", "second", "first", "held"]
    assert [corpus.row_line(sample_id) for sample_id in (0, 6, 7, 12)] == [1, 3, 1, 2]
    total = sum(path.stat().st_size for path in paths)
    assert progress[-1] == (total, total)
    # The plan counts the same samples under the same ids.
    selection = select(spec, corpus.profiles, context_length=512)
    train, held_out = (pieces.sample_ids.tolist() for pieces in (selection.train, selection.validation))
    assert {*train, *held_out} == set(range(len(corpus)))
    assert held_out == [11, 12]


def test_a_job_opens_what_was_tokenised_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "only.jsonl", [conversation("one", "two"), "{"])
    spec = parse_spec({"data": {"train": [{"dataset": "only"}], "validation": None}})
    cached = inputs(path).model_copy(update={"cache_dir": str(tmp_path / "cache")})
    made = load_corpus(spec, cached, TOKENIZER)
    monkeypatch.setattr(HfChatTokenizer, "encode_batch", None)  # whoever tokenises now, fails
    seen: list[tuple[int, int]] = []
    opened = load_corpus(spec, cached, TOKENIZER, lambda done, total: seen.append((done, total)))
    assert opened.profiles == made.profiles
    assert opened.sample(0)[0].tolist() == made.sample(0)[0].tolist()
    assert seen == [(path.stat().st_size, path.stat().st_size)]
    for other in (
        {"data": {"train": [{"dataset": "only"}], "train_on": "last"}},
        {"data": {"train": [{"dataset": "only"}], "multi_turn": "split"}},
        {"data": {"train": [{"dataset": "only"}], "format": "messages"}},
    ):
        with pytest.raises(TypeError):
            load_corpus(parse_spec(other), cached, TOKENIZER)
    with pytest.raises(TypeError):
        load_corpus(spec, cached, HfChatTokenizer(byte_level(chat_template=CHATML + " ")))
    with pytest.raises(TypeError):
        load_corpus(
            spec,
            cached,
            HfChatTokenizer(byte_level(chat_template=CHATML, clean_up_tokenization_spaces=False, bos_token="<end>")),
        )


def test_what_a_whole_conversation_would_cost_split_is_known_without_splitting_it(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [conversation("one", "two two", "three"), conversation("alone")])
    for template in (CHATML, CHATML.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")):
        tokenizer = HfChatTokenizer(byte_level(chat_template=template))
        whole = read_samples(path, tokenizer, Reading()).profile
        split = read_samples(path, tokenizer, Reading(multi_turn="split")).profile
        assert (whole.multi_turn, list(whole.sample_turns), len(split.sample_row)) == ("whole", [3, 1], 4)
        assert whole.num_tokens_if_split == sum(split.sample_length) > sum(whole.sample_length)
        assert split.num_tokens_if_split == sum(split.sample_length)


# -- every row -----------------------------------------------------------------------------------------------------
ROWS: dict[str, object] = {
    "taken": conversation("one", "two"),
    "also taken": conversation("one"),
    "empty": {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "weight": 0}]},
    "wrong": {"messages": [{"role": "nobody", "content": "?"}]},
    "no turn": {"messages": [{"role": "user", "content": "?"}]},
    "number": 7,
    "broken": "{broken",
    "blank": "",
}
OBJECTS = ("taken", "also taken", "empty", "wrong", "no turn")


def as_csv(rows: list[str]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["messages"])
    for name in rows:
        row = ROWS[name]
        writer.writerow([json.dumps(row["messages"])] if isinstance(row, dict) else [row, "too many"])
    return text.getvalue().encode()


def as_parquet(rows: list[str]) -> bytes:
    target = io.BytesIO()
    table = [{"messages": json.dumps(row["messages"]) if isinstance(row := ROWS[name], dict) else "["} for name in rows]
    parquet.write_table(arrow.Table.from_pylist(table), target)
    return target.getvalue()


WRITERS: dict[str, Callable[[list[str]], bytes]] = {
    "jsonl": lambda rows: "\n".join(r if isinstance(r := ROWS[n], str) else json.dumps(r) for n in rows).encode(),
    "json": lambda rows: json.dumps([ROWS[name] for name in rows], indent=1).encode(),
    "csv": as_csv,
    "parquet": as_parquet,
}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(ROWS)), max_size=8),
    st.sampled_from(sorted(WRITERS)),
    st.sampled_from(["whole", "split"]),
    st.booleans(),
)
def test_every_row_is_taken_or_empty_or_refused_with_its_place(
    names: list[str], kind: str, multi_turn: str, is_packed: bool
) -> None:
    names = ["taken", *names]
    content = WRITERS[kind](names)
    # A text within an array is a row that is no object; a blank line is none.
    rows = [name for name in names if not (kind == "jsonl" and name == "blank")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        path.write_bytes(gzip.compress(content) if is_packed else content)
        measured = read_samples(path, TOKENIZER, Reading(format="messages", multi_turn=multi_turn))
    profile = measured.profile
    trained = {row for row, count in zip(profile.sample_row, profile.sample_trained, strict=True) if count}
    untrained = set(profile.sample_row) - trained
    assert profile.num_rows == len(rows) == profile.num_refused + len(trained) + len(untrained)
    assert trained == {index for index, name in enumerate(rows) if name in ("taken", "also taken")}
    empty = {index for index, name in enumerate(rows) if name == "empty"}
    assert untrained == (empty if multi_turn == "whole" else set())
    assert len(profile.refused) == profile.num_refused
    places = {row.line for row in profile.refused} | {measured.samples.line(i) for i in range(len(measured.samples))}
    assert len(places) == len(rows)
    if kind == "parquet":
        assert places == {number + 1 for number in range(len(rows))}


def test_an_id_beyond_the_corpus_is_a_programmers_mistake(tmp_path: Path) -> None:
    path = write(tmp_path / "only.jsonl", [conversation("one")])
    spec = parse_spec({"data": {"train": [{"dataset": "only"}], "validation": None}})
    corpus = load_corpus(spec, inputs(path), TOKENIZER)
    with pytest.raises(AssertionError):
        corpus.sample(1)
