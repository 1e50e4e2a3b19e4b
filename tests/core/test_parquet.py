"""The footer as pyarrow writes it, and everything that is no footer."""

import io

import pyarrow as arrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from core.errors import UserError
from core.parquet import Footer, read_footer

TURN = {"role": "user", "content": "hi", "tool_calls": [{"function": {"name": "add"}}]}


def written(rows: list[dict], **options: object) -> bytes:
    target = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows), target, **options)
    return target.getvalue()


@pytest.mark.parametrize("num_columns", [1, 14, 15, 40])
@pytest.mark.parametrize("row_group_size", [3, 1000])
def test_rows_and_columns_are_those_that_pyarrow_wrote(num_columns: int, row_group_size: int) -> None:
    rows = [{f"column {n}": number * n for n in range(num_columns)} for number in range(100)]
    content = written(rows, row_group_size=row_group_size)
    assert parquet.ParquetFile(io.BytesIO(content)).num_row_groups == -(-100 // row_group_size)
    for size in (1, 1000, 10**7):
        footer = read_footer(content[start : start + size] for start in range(0, len(content), size))
        assert footer.num_rows == 100
        assert [column.name for column in footer.columns] == list(rows[0])
        assert all(column.inner == frozenset() for column in footer.columns)


def test_a_nested_column_tells_what_it_is_made_of() -> None:
    content = written([{"messages": [TURN], "tags": ["a"], "kept": True}])
    footer = read_footer([content])
    messages, tags, kept = footer.columns
    assert (messages.name, tags.name, kept.name) == ("messages", "tags", "kept")
    assert messages.inner >= {"role", "content", "tool_calls", "name"}
    assert "from" not in messages.inner and tags.inner == {"list", "element"}


def test_a_table_without_rows_has_none() -> None:
    target = io.BytesIO()
    parquet.write_table(arrow.table({"text": arrow.array([], arrow.string())}), target)
    assert read_footer([target.getvalue()]).num_rows == 0


@given(st.data())
def test_bytes_that_are_no_footer_are_refused_and_nothing_else_happens(data: st.DataObject) -> None:
    content = bytearray(written([{"messages": [TURN]}] * 3))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(-300, -1))] = data.draw(st.integers(0, 255))
    del content[: data.draw(st.sampled_from([0, 0, 10, len(content) - 5]))]
    try:
        footer = read_footer([bytes(content)])
    except UserError as error:
        assert error.code == "data.parquet_broken"
    else:
        assert isinstance(footer, Footer)
