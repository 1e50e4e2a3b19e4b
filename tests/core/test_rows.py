import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import rows as rows_module
from core.errors import UserError
from core.rows import COLUMNS, RefusedRow, Row, detect_type, read_rows, unpack_gzip

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
json_rows = st.lists(st.dictionaries(st.text(), json_values, max_size=4), max_size=6)


def cut(content: bytes, size: int) -> list[bytes]:
    return [content[start : start + size] for start in range(0, len(content), size)]


def values(content: bytes, size: int = 7) -> list[object]:
    rows = list(read_rows(cut(content, size)))
    assert all(isinstance(row, Row) for row in rows), [str(row) for row in rows]
    return [row.value for row in rows]


def outcomes(content: bytes, **limits: int) -> list[tuple[int, int, str]]:
    """(line, index, "ok" or the error's code), the same however the bytes are cut."""
    results = [
        [
            (row.line, row.index, row.error.code if isinstance(row, RefusedRow) else "ok")
            for row in read_rows(cut(content, size), **limits)
        ]
        for size in (1, 3, 64, 10_000_000)
    ]
    assert all(result == results[0] for result in results)
    return results[0]


@given(json_rows, st.integers(1, 40), st.booleans(), st.sampled_from([b"\n", b"\r\n"]), st.booleans())
def test_jsonl_gives_its_rows_however_the_bytes_are_cut(rows, size, as_ascii, line_end, has_mark):
    lines = [json.dumps(row, ensure_ascii=as_ascii).encode() for row in rows]
    content = (b"\xef\xbb\xbf" if has_mark else b"") + line_end.join(lines)
    assert values(content, size) == rows


@given(json_rows, st.integers(1, 40), st.booleans(), st.sampled_from([None, 2]), st.booleans())
def test_an_array_gives_its_rows_however_the_bytes_are_cut(rows, size, as_ascii, indent, has_mark):
    content = json.dumps(rows, ensure_ascii=as_ascii, indent=indent).encode()
    content = (b"\xef\xbb\xbf" if has_mark else b"") + content
    assert values(content, size) == rows


@given(json_rows)
def test_an_array_counts_its_lines(rows):
    content = b"[\n" + b",\n".join(json.dumps(row).encode() for row in rows) + b"\n]\n"
    assert outcomes(content) == [(number + 2, number, "ok") for number in range(len(rows))]


def test_blank_lines_are_skipped_and_counted_in_line_numbers_alone():
    assert outcomes(b'\n{"a": 1}\r\n\r\n  \n{"a": 2}\n\n') == [(2, 0, "ok"), (5, 1, "ok")]


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf", b"[]", b" [ \n ] \n"])
def test_an_empty_file_yields_nothing(content):
    assert list(read_rows([content])) == []
    assert list(read_rows([])) == []


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"a": "1', "data.row_broken"),
        (b'{"a": 1} {"b": 2}', "data.row_broken"),
        (b'{"a": ' + b"9" * 5000 + b"}", "data.row_broken"),
        (b"hello", "data.row_broken"),
        (b"[1, 2]", "data.row_not_object"),
        (b'"text"', "data.row_not_object"),
        (b"12", "data.row_not_object"),
        (b"null", "data.row_not_object"),
        (b"true", "data.row_not_object"),
        (b'{"a": NaN}', "data.row_not_finite"),
        (b'{"a": [-Infinity]}', "data.row_not_finite"),
        (b'{"a": 1e999}', "data.row_not_finite"),
        (b'{"a": "\xff"}', "data.row_not_utf8"),
        (b'{"a": "\xed\xa0\x80"}', "data.row_not_utf8"),
        (b'{"a": "\\ud83d"}', "data.row_half_character"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "data.row_too_deep"),
    ],
)
def test_a_bad_line_is_refused_with_its_line_and_the_next_goes_on(line, code):
    assert outcomes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n') == [(1, 0, "ok"), (2, 1, code), (3, 2, "ok")]


def test_both_halves_of_an_escaped_emoji_are_one_character():
    assert values(b'{"a": "\\ud83d\\ude00"}') == [{"a": "\U0001f600"}]


@pytest.mark.parametrize(
    ("element", "code"),
    [
        (b"12", "data.row_not_object"),
        (b"[1]", "data.row_not_object"),
        (b'{"a": NaN}', "data.row_not_finite"),
        (b'{"a": "\xff"}', "data.row_not_utf8"),
        (b'{"a": "\\ud83d"}', "data.row_half_character"),
    ],
)
def test_a_bad_element_that_is_whole_is_refused_and_the_next_goes_on(element, code):
    assert outcomes(b'[{"a": 1},\n' + element + b',\n{"a": 2}]') == [(1, 0, "ok"), (2, 1, code), (3, 2, "ok")]


@pytest.mark.parametrize(
    ("rest", "line", "code"),
    [
        (b'\n{"a": }, {"b": 2}]', 2, "data.array_broken"),
        (b'\n{"a": 1} {"b": 2}]', 2, "data.array_broken"),
        (b'\n{"a":\n "abc', 3, "data.array_broken"),
        (b"\n", 2, "data.array_broken"),
        (b"\n]", 2, "data.array_broken"),
        (b'\n{"a": 1}]\n\n{"b": 2}', 4, "data.array_broken"),
        (b'\n{"a": 1}\n', 3, "data.array_broken"),
        (b"\n" + b"[" * 100_000, 2, "data.array_row_too_deep"),
    ],
)
def test_a_broken_array_keeps_what_stood_before_and_names_the_line_where_it_breaks(rest, line, code):
    results = outcomes(b'[{"a": 0},' + rest)
    assert results[0] == (1, 0, "ok")
    assert results[-1] == (line, len(results) - 1, code)
    assert [result[2] for result in results].count("ok") == len(results) - 1


def test_a_broken_array_is_known_as_broken_without_reading_the_file_to_its_end():
    num_read = 0

    def chunks() -> Iterator[bytes]:
        nonlocal num_read
        yield b'[{"a": 1}, {"a" 2},' + b" " * 100_000
        while True:
            num_read += 1
            yield b'{"a": 3},' * 10_000

    rows = list(read_rows(chunks()))
    assert [type(row) for row in rows] == [Row, RefusedRow]
    assert num_read == 0


def test_a_line_over_the_limit_is_refused_with_its_size_and_never_held():
    limit = 100_000
    held: list[int] = []

    class Piece(bytes):
        """Counts how many pieces live at once."""

        def __init__(self, *_: object) -> None:
            held.append(1)

        def __del__(self) -> None:
            held.pop()

        def split(self, *arguments):  # type: ignore[override]
            return [self] if b"\n" not in self else super().split(*arguments)

    most = 0

    def chunks() -> Iterator[bytes]:
        nonlocal most
        yield b'{"a": 1}\n{"a": "'
        for _ in range(1000):
            most = max(most, len(held))
            yield Piece(b"x" * 10_000)
        yield b'"}\n{"a": 2}\n'

    rows = list(read_rows(chunks(), max_row_bytes=limit))
    assert [row.line for row in rows] == [1, 2, 3]
    refused = rows[1]
    assert isinstance(refused, RefusedRow)
    assert refused.error.parameters == {"size": 10_000_009, "limit": limit}
    assert "10,000,009 bytes" in str(refused)
    assert 0 < most <= limit // 10_000 + 2


def test_an_element_over_the_limit_that_could_be_read_is_refused_with_its_size():
    content = b'[{"a": 1},\n{"a": "' + b"x" * 500 + b'"} ,{"a": 2}]'
    rows = list(read_rows([content], max_row_bytes=400))
    assert [type(row) for row in rows] == [Row, RefusedRow, Row]
    assert rows[1].error.parameters == {"size": 509, "limit": 400}


def test_an_element_without_an_end_is_refused_at_the_limit_and_ends_the_reading():
    num_read = 0

    def chunks() -> Iterator[bytes]:
        nonlocal num_read
        yield b'[{"a": 1},\n{"a": "'
        while True:
            num_read += 1
            yield b"x" * 1000

    rows = list(read_rows(chunks(), max_row_bytes=200_000))
    assert [type(row) for row in rows] == [Row, RefusedRow]
    assert (rows[1].line, rows[1].error.code) == (2, "data.array_row_too_long")
    assert 200 < num_read <= 500


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"PK\x03\x04", "zip"),
        (b"ARROW1\x00", "Arrow"),
        (gzip.compress(b"BZh", mtime=0), "bzip2"),
        (gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "gzip within gzip"),
    ],
)
def test_a_kind_that_is_not_read_is_refused_by_name(start, kind):
    with pytest.raises(UserError, match=f"{kind} files are not read; give JSONL, JSON, CSV or Parquet") as caught:
        detect_type(start)
    assert caught.value.code == "data.kind_not_built"


@pytest.mark.parametrize("start", [b"hello world\n", b"\xff\xfe{\x00", b"\x89PNG", gzip.compress(b"<html>", mtime=0)])
def test_what_is_nothing_that_is_read_is_refused_with_how_it_begins(start):
    with pytest.raises(UserError, match="CSV with a header") as caught:
        list(read_rows([start]))
    assert caught.value.code == "data.kind_unknown"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"text": "a"}', "jsonl"),
        (b'[{"text": "a"}]', "json"),
        (b"text\n", "csv"),
        (b"\xef\xbb\xbfinstruction;input;output\r\n", "csv"),
        (b"question,answer\n1,2\n", "csv"),
        (b'\n"messages"\t"tools"\n"[\n{""role"": ', "csv"),
        (b'{"instruction": "a,b", "output": "c"}\n', "jsonl"),
        (b"PAR1\x15\x04", "parquet"),
    ],
)
def test_a_kind_is_told_by_its_content_packed_or_not(content, kind):
    assert str(detect_type(content)) == kind
    assert str(detect_type(gzip.compress(content, mtime=0))) == f"{kind}.gz"
    # Only the beginning of a packed file is seen.
    assert detect_type(gzip.compress(content + b" " * 3_000_000 + bytes(range(256)) * 20)[:2000]).kind == kind


def test_a_bad_first_line_is_one_bad_row():
    assert detect_type(b'oops\n{"a": 1}\n').kind == "jsonl"
    assert outcomes(b'oops\n{"a": 1}\n') == [(1, 0, "data.row_broken"), (2, 1, "ok")]


def test_the_kind_is_seen_behind_mark_and_space():
    assert detect_type(b'\xef\xbb\xbf \n [{"a": 1}]').kind == "json"
    assert detect_type(b'\xef\xbb\xbf{"a": 1}').kind == "jsonl"


def test_the_messages_in_the_docs_are_the_real_ones():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    broken, no_object = read_rows([b'\n{"text": "a\n3\n'])
    assert f"`{broken}`" in page
    assert f"`{no_object}`" in page


# -- CSV


def table(header: list[str], *cells: list[str], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([header, *cells])
    return text.getvalue().encode()


cell_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=12)


@given(st.lists(st.tuples(cell_texts, cell_texts), max_size=6), st.integers(1, 40), st.sampled_from([",", ";", "\t"]))
def test_csv_gives_its_cells_however_the_bytes_are_cut(cells, size, delimiter):
    content = table(["instruction", "output"], *map(list, cells), delimiter=delimiter)
    assert values(content, size) == [{"instruction": first, "output": second} for first, second in cells]


def test_a_list_in_a_cell_is_its_json_text_and_tools_stay_a_text():
    turns = [{"role": "user", "content": 'say "hi",\nthen go'}, {"role": "assistant", "content": "hi"}]
    content = table(["messages", "tools"], [json.dumps(turns, indent=1), "[]"], [json.dumps(turns), ""])
    assert values(content) == [{"messages": turns, "tools": "[]"}, {"messages": turns, "tools": ""}]


def test_a_row_of_csv_is_named_by_the_line_where_it_begins():
    content = b'text,system\n"a\nb",x\n\nc\n"d ""quoted""",y\n'
    assert outcomes(content) == [(2, 0, "ok"), (5, 1, "data.csv_cells"), (6, 2, "ok")]


@pytest.mark.parametrize(
    ("cell", "code"),
    [
        (b'"[{""role"": ]"', "data.cell_broken"),
        (b'"[] []"', "data.cell_broken"),
        (b'"[NaN]"', "data.row_not_finite"),
        (b'"[""\\ud83d""]"', "data.row_half_character"),
        (b"[\xff]", "data.cell_not_utf8"),
    ],
)
def test_a_bad_cell_is_refused_with_its_column_and_the_next_row_is_read(cell, code):
    content = b"messages\n" + cell + b"\n[]\n"
    assert outcomes(content) == [(2, 0, code), (3, 1, "ok")]
    refused = next(read_rows([content]))
    assert "messages" in str(refused) or code.startswith("data.row_")


@pytest.mark.parametrize(
    ("rest", "code"),
    [
        (b'"never closed\nc\nd\n', "data.csv_broken"),
        (b'"a"b\nc\n', "data.csv_broken"),
        (b"x" * 300 + b"\nc\n", "data.csv_row_too_long"),
        (b'"' + b"x\n" * 300, "data.csv_row_too_long"),
    ],
)
def test_a_broken_table_keeps_what_stood_before_and_ends_there(rest, code):
    assert outcomes(b"text\na\nb\n" + rest, max_row_bytes=200) == [(2, 0, "ok"), (3, 1, "ok"), (4, 2, code)]


@pytest.mark.parametrize(
    ("header", "code"),
    [(b"text,\n", "data.csv_no_column_name"), (b"text,system,text\n", "data.csv_same_column_name")],
)
def test_columns_without_a_name_of_their_own_are_refused(header, code):
    with pytest.raises(UserError) as caught:
        list(read_rows([header + b"a,b,c\n"]))
    assert caught.value.code == code


# -- gzip


@given(json_rows, st.integers(1, 40), st.integers(0, 9))
def test_a_packed_file_has_the_same_rows(rows, size, level):
    content = b"\n".join(json.dumps(row).encode() for row in rows)
    half = len(content) // 2
    members = gzip.compress(content[:half], level, mtime=0) + gzip.compress(content[half:], level, mtime=0) + b"\0" * 7
    assert values(members, size) == rows


def test_a_torn_or_damaged_packed_file_keeps_the_rows_before_and_says_so():
    noise = "".join(chr(97 + number * number % 23) for number in range(200))
    content = b"".join(b'{"text": "%d %s"}\n' % (number, noise.encode()) for number in range(5000))
    packed = gzip.compress(content, mtime=0)
    # Cut in the middle, within the checksum, and a byte turned over.
    damaged = bytearray(packed)
    damaged[-3] ^= 255
    for torn in (packed[: len(packed) // 2], packed[:-2], bytes(damaged)):
        # How far before the damage the last row stands depends on how much is unpacked at once.
        *good, last = read_rows(cut(torn, 1000))
        assert isinstance(last, RefusedRow) and last.error.code == "data.gzip_broken"
        assert 100 < len(good) <= 5000
        assert [(row.line, row.index) for row in [*good, last]] == [(n + 1, n) for n in range(len(good) + 1)]
        assert all(isinstance(row, Row) for row in good)


def test_a_bomb_is_refused_as_soon_as_it_is_known(monkeypatch):
    monkeypatch.setattr(rows_module, "FREE_EXPANSION_BYTES", 2**20)
    bomb = gzip.compress(b'{"text": "' + b"a" * 20 * 2**20, mtime=0)
    with pytest.raises(UserError, match="200 times as many") as caught:
        list(read_rows([bomb]))
    assert caught.value.code == "data.gzip_expands"
    assert caught.value.parameters["unpacked"] < 200 * len(bomb) + 2**21
    assert sum(map(len, unpack_gzip([gzip.compress(bytes(2**20), mtime=0)]))) == 2**20


def test_each_column_that_a_format_knows_marks_a_table():
    for name in COLUMNS:
        assert detect_type(name.encode() + b"\n").kind == "csv"
