"""Rows of Parquet are those that JSONL would have had."""

import gzip
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
from pyarrow import parquet

from core.conversation import parse_row
from core.errors import UserError
from core.rows import RefusedRow, Row
from worker.engine.parquet import ROWS_PER_BATCH, read_parquet

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CONVERSATION = [
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "c1"},
    {"role": "assistant", "content": "3"},
]


def write(path: Path, rows: list[dict[str, Any]], schema: arrow.Schema | None = None) -> Path:
    parquet.write_table(arrow.Table.from_pylist(rows, schema), path, row_group_size=100)
    return path


def read(path: Path, *, is_gzip: bool = False) -> list[Row | RefusedRow]:
    return list(read_parquet(path, is_gzip=is_gzip))


def test_structs_lists_and_json_text_are_read_and_nulls_of_structs_are_not_there(tmp_path: Path) -> None:
    for name, rows in (
        ("structs", [{"messages": CONVERSATION, "tools": None, "unused": b"\x00"}] * 300),
        ("text", [{"messages": json.dumps(CONVERSATION), "tools": ""}] * 300),
    ):
        read_rows = read(write(tmp_path / f"{name}.parquet", rows))
        assert len(read_rows) == 300 > ROWS_PER_BATCH
        assert [(row.line, row.index) for row in read_rows] == [(number + 1, number) for number in range(300)]
        for row in read_rows:
            assert isinstance(row, Row) and "unused" not in row.value
            assert parse_row(row.value, "messages") == parse_row({"messages": CONVERSATION}, "messages")


def test_a_map_of_arguments_is_an_object(tmp_path: Path) -> None:
    call = arrow.struct({"name": arrow.string(), "arguments": arrow.map_(arrow.string(), arrow.int64())})
    turn = arrow.struct({"role": arrow.string(), "content": arrow.string(), "tool_calls": arrow.list_(call)})
    row = {"messages": [{"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}]}
    (read_row,) = read(write(tmp_path / "map.parquet", [row], arrow.schema({"messages": arrow.list_(turn)})))
    assert isinstance(read_row, Row) and read_row.value == row


def test_what_json_does_not_have_is_refused_by_its_row_and_field(tmp_path: Path) -> None:
    for value, code in ((math.nan, "data.row_not_finite"), (datetime(2026, 1, 1, tzinfo=UTC), "data.parquet_value")):
        rows: list[dict[str, Any]] = [{"text": "a", "history": [None]}, {"text": "b", "history": [value]}]
        first, second = read(write(tmp_path / "odd.parquet", rows))
        assert isinstance(first, Row)
        assert isinstance(second, RefusedRow)
        assert (second.line, second.error.code, second.error.field) == (2, code, "history[0]")
    rows = [{"text": "a", "messages": "["}]
    (refused,) = read(write(tmp_path / "odd.parquet", rows))
    assert isinstance(refused, RefusedRow) and refused.error.code == "data.cell_broken"


def test_a_packed_file_is_unpacked_first_and_progress_counts_its_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "plain.parquet", [{"text": f"row {number}"} for number in range(600)])
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    seen: list[tuple[int, int]] = []
    rows = list(read_parquet(packed, is_gzip=True, on_progress=lambda done, total: seen.append((done, total))))
    assert rows == read(path)
    assert len(seen) > 1 and seen == sorted(seen) and seen[-1] == (packed.stat().st_size, packed.stat().st_size)


def test_a_torn_file_and_one_without_a_column_of_use_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", [{"question": "a", "answer": "b"}])
    with pytest.raises(UserError, match="the rows have the keys question, answer"):
        read(path)
    path.write_bytes(path.read_bytes()[:-20] + b"PAR1")
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.code == "data.parquet_broken"
