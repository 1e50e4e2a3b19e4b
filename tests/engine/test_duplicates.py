"""What a file says twice: found in the file itself, told by lines, and kept for each sample."""

import json
from pathlib import Path

import numpy as np
import pytest

from core.conversation import parse_row
from core.profile import DataProfile
from tests.engine.test_data import TOKENIZER, conversation, write
from worker.engine.data import Reading, read_samples
from worker.engine.duplicates import MOST_GROUPS_LISTED, MOST_ROWS_LISTED, with_duplicates, words_of

PROSE = (
    "the {} carpenter measured the oak board twice and cut it once before the rain came over the hills and the whole "
    "workshop smelled of resin and cold iron until somebody opened the door"
)


def measured(path: Path, rows: list[object], reading: Reading | None = None) -> DataProfile:
    write(path, rows)
    return with_duplicates(read_samples(path, TOKENIZER, reading or Reading()), path)


def test_equal_and_nearly_equal_rows_are_told_with_their_lines(tmp_path: Path) -> None:
    rows: list[object] = [
        conversation(PROSE.format("old")),
        conversation("nothing like the others at all, for once"),
        "{broken",
        conversation(PROSE.format("young")),
        {"id": 5, **conversation("nothing like the others at all, for once")},  # other content, the same words
        conversation(PROSE.format("old")),
        conversation("a row that stands alone with its own few words"),
    ]
    profile = measured(tmp_path / "rows.jsonl", rows)
    found = profile.duplicates
    assert found is not None
    assert (profile.num_refused, found.num_equal, found.num_alike, found.num_groups) == (1, 1, 2, 2)
    first, second = found.groups
    assert [(row.line, row.is_equal) for row in first.rows] == [(1, True), (4, False), (6, True)]
    assert [row.similarity == 1 for row in first.rows] == [True, False, True]
    assert 0.8 <= first.rows[1].similarity < 1
    assert [(row.line, row.is_equal, row.similarity) for row in second.rows] == [(2, True, 1), (5, False, 1)]
    assert list(profile.sample_group or ()) == [1, 2, 1, 2, 1, 0]
    sketches = np.asarray((profile.sample_sketches or []).numbers).reshape(-1, 2)
    assert (sketches[0] == sketches[4]).all() and (sketches[1] == sketches[3]).all()
    assert np.bitwise_count(sketches[0] ^ sketches[2]).sum() < 30 < np.bitwise_count(sketches[0] ^ sketches[5]).sum()
    assert DataProfile.model_validate_json(profile.model_dump_json()) == profile


def test_every_sample_of_a_row_has_its_group(tmp_path: Path) -> None:
    rows: list[object] = [
        conversation("first", PROSE.format("old")),
        conversation("alone", "with this"),
        conversation("first", PROSE.format("young")),
    ]
    profile = measured(tmp_path / "rows.jsonl", rows, Reading(multi_turn="split"))
    assert list(profile.sample_row) == [0, 0, 1, 1, 2, 2]
    assert list(profile.sample_group or ()) == [1, 1, 0, 0, 1, 1]
    assert len(profile.sample_sketches or ()) == 12


def test_a_system_prompt_and_tools_that_all_rows_share_do_not_make_them_alike(tmp_path: Path) -> None:
    shared = {"role": "system", "content": PROSE.format("kind") * 5}
    rows: list[object] = []
    for word in ("apples", "lamps", "rivers"):
        asked = conversation(f"{word} are here", f"no more {word} today")
        rows.append({"messages": [shared, *asked["messages"]]})
    found = measured(tmp_path / "rows.jsonl", rows).duplicates
    assert found is not None and found.num_alike == 0
    with_call = {
        "messages": [
            {"role": "user", "content": "1+2?"},
            {"role": "assistant", "content": "", "tool_calls": [
                {"type": "function", "function": {"name": "add", "arguments": json.dumps({"b": 2, "a": 1})}}
            ]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "three", "reasoning_content": "it said 3"},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
    }  # fmt: skip
    assert words_of(parse_row(with_call, "messages")).split() == [
        *("1+2?", "add", '{"a":', "1,", '"b":', "2}", "3", "it", "said", "3", "three")
    ]


@pytest.mark.parametrize("format", ["alpaca", "prompt_completion", "text"])
def test_every_format_has_words(tmp_path: Path, format: str) -> None:
    rows = {
        "alpaca": lambda text: {"instruction": "say", "output": text},
        "prompt_completion": lambda text: {"prompt": "say", "completion": text},
        "text": lambda text: {"text": text},
    }
    said = [PROSE.format("old"), PROSE.format("young"), "something else altogether, and so on"]
    found = measured(tmp_path / "rows.jsonl", [rows[format](text) for text in said]).duplicates
    assert found is not None and (found.num_equal, found.num_alike) == (0, 1)


def test_of_very_many_alike_rows_the_first_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    names = [f"name{number}" for number in range(MOST_GROUPS_LISTED + 5)]
    rows: list[object] = [
        conversation(f"{name} is the only word of {name} in this row of {name}") for name in names
    ] * 2
    rows += [conversation(PROSE.format("old"))] * 40
    found = measured(tmp_path / "rows.jsonl", rows).duplicates
    assert found is not None
    assert (found.num_groups, found.num_equal, found.num_alike) == (len(names) + 1, len(names) + 39, 0)
    assert len(found.groups) == MOST_GROUPS_LISTED and found.groups[0].num_rows == 2
    alone = measured(tmp_path / "forty.jsonl", [conversation(PROSE.format("old"))] * 40).duplicates
    assert alone is not None
    assert (len(alone.groups[0].rows), alone.groups[0].num_rows) == (MOST_ROWS_LISTED, 40)


def test_the_reading_of_the_file_tells_its_progress(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [conversation(PROSE.format(number)) for number in range(6000)])
    told: list[tuple[int, int]] = []
    with_duplicates(read_samples(path, TOKENIZER, Reading()), path, lambda done, total: told.append((done, total)))
    assert len(told) > 1 and told[-1] == (path.stat().st_size, path.stat().st_size)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
