"""Bytes of a data file -> rows, one at a time, good and refused alike.

The web service reads an upload with it and the trainer reads the same bytes again, so a row has the same number and
the same fault in the report and in the run. Nothing vanishes: every row of the file comes out once, as a `Row` or as
a `RefusedRow` that says what stood there and what was expected.

What a file is, its content says: JSON objects a line (JSONL), an array of them (JSON), cells under a header (CSV), or
Parquet, which is known here by its magic bytes and read by the engine (worker.engine.parquet). Each may be packed with
gzip; it is unpacked in a stream, and one that grows out of all proportion is refused.

Memory is bounded by the longest row that is allowed, never by the file. A line of JSONL is put together from its
pieces and dropped as soon as it is over the limit; then only its bytes are counted. An array is parsed element by
element from a window of text. An element that isn't complete yet is tried again only when the window has doubled, so
a long row is parsed at most twice as much as it is long. Lines stand on their own, so after a bad one the next goes
on; in a broken array, in a table whose quotes don't close and behind a tear in gzip nobody can say where the next row
begins, so there reading ends and says so.
"""

import codecs
import csv
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from core.errors import UserError

FileKind = Literal["jsonl", "json", "csv", "parquet"]

MAX_ROW_BYTES = 32 * 2**20
# What detection sees. A first line that isn't JSON is one bad row if a line with an object follows within it.
HEAD_BYTES = 64 * 2**10
# The longest token of JSON that may be cut by the end of a window, "-Infinity" or "\ud83d\ude00"; an error further
# than this before the end is no cut.
LONGEST_CUT = 16

UTF8_BOM = codecs.BOM_UTF8
GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"
KINDS_NOT_BUILT = {
    b"ARROW1": "Arrow",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
}
# Text packs to a third or a tenth, rows that repeat to a hundredth. Gzip could do 1:1032, a thousandth of which nobody
# means; small files are let be.
MAX_EXPANSION = 200
FREE_EXPANSION_BYTES = 256 * 2**20
UNPACKED_BYTES = 2**20  # a piece

# What a row's keys may be (core.conversation). A table whose header holds one of them is CSV, and of a wide Parquet
# file only these columns are read.
COLUMNS = frozenset(
    {"messages", "conversations", "tools", "functions", "system", "instruction", "input", "output", "history"}
    | {"prompt", "completion", "text"}
)
# Lists, which a cell of CSV can hold only as their JSON text. (Where `tools` may be a text, core.conversation says.)
JSON_COLUMNS = frozenset({"messages", "conversations", "history"})
DELIMITERS = (",", ";", "\t")  # the comma, what spreadsheets write where it is the decimal sign, and the tab
COLUMN_NAME = re.compile(r"[A-Za-z_][\w .-]{0,63}")

WHITESPACE = re.compile(r"[ \t\r\n]*")
LINE_WITH_OBJECT = re.compile(rb"^[ \t]*\{", re.MULTILINE)
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Row:
    line: int  # from 1; in an array or a table, the line where the row begins; in Parquet, the row's number from 1
    index: int  # from 0, over good and refused rows
    value: dict[str, object]


@dataclass(frozen=True, slots=True)
class RefusedRow:
    line: int
    index: int
    error: UserError

    def __str__(self) -> str:
        return f"line {self.line}: {self.error}"


@dataclass(frozen=True, slots=True)
class FileType:
    kind: FileKind
    is_gzip: bool = False
    delimiter: str = ","  # of CSV

    def __str__(self) -> str:
        return f"{self.kind}.gz" if self.is_gzip else self.kind

    @property
    def row_word(self) -> Literal["line", "row"]:
        """What a row's number counts."""
        return "row" if self.kind == "parquet" else "line"


def detect_type(head: bytes) -> FileType:
    """What the file is, by its first HEAD_BYTES; a UserError names a kind that isn't read."""
    if not head.startswith(GZIP):
        return _detect_unpacked(head)
    unpacked, _ = _peek(unpack_gzip([head], is_cut=True))
    if unpacked.startswith(GZIP):
        raise UserError("data.kind_not_built", kind="gzip within gzip")
    inner = _detect_unpacked(unpacked)
    return FileType(inner.kind, is_gzip=True, delimiter=inner.delimiter)


def detect_file(chunks: Iterable[bytes]) -> FileType:
    """The same, of a whole file; reads its beginning."""
    return detect_type(_peek(chunks)[0][:HEAD_BYTES])


def _detect_unpacked(head: bytes) -> FileType:
    for magic, kind in KINDS_NOT_BUILT.items():
        if head.startswith(magic):
            raise UserError("data.kind_not_built", kind=kind)
    if head.startswith(PARQUET):
        return FileType("parquet")
    text = head.removeprefix(UTF8_BOM).lstrip()
    if text.startswith(b"["):
        return FileType("json")
    names, delimiter = _first_cells(text)
    if not COLUMNS.isdisjoint(names):
        return FileType("csv", delimiter=delimiter)
    if not text or LINE_WITH_OBJECT.search(text):
        return FileType("jsonl")
    # A table, but not of ours: what its columns are is said by whoever looks for the format.
    if len(names) > 1 and all(map(COLUMN_NAME.fullmatch, names)):
        return FileType("csv", delimiter=delimiter)
    raise UserError("data.kind_unknown", start=ascii(text[:40].decode("utf-8", "replace")))


def _first_cells(text: bytes) -> tuple[list[str], str]:
    """The cells of the first line and the delimiter that makes most of them; none where that is no line of CSV."""
    best: tuple[list[str], str] = ([], ",")
    try:
        line = text.partition(b"\n")[0].decode("utf-8").rstrip("\r")
    except UnicodeDecodeError:
        return best
    for delimiter in DELIMITERS:
        try:
            cells = next(csv.reader([line], delimiter=delimiter, strict=True), [])
        except csv.Error:
            continue
        if len(cells) > len(best[0]):
            best = cells, delimiter
    return best


def read_rows(chunks: Iterable[bytes], max_row_bytes: int = MAX_ROW_BYTES) -> Iterator[Row | RefusedRow]:
    """All rows of a file of text, in order. Raises UserError where the kind isn't read, and where a file of gzip
    unpacks to more than is sane. Parquet isn't for this function."""
    head, pieces = _peek(chunks)
    type = detect_type(head[:HEAD_BYTES])
    assert type.kind != "parquet", "rows of Parquet are read by worker.engine.parquet"
    if type.is_gzip:
        pieces = unpack_gzip(pieces)
    pieces = _without_bom(pieces)
    match type.kind:
        case "jsonl":
            rows = _read_lines(pieces, max_row_bytes)
        case "json":
            rows = _read_array(pieces, max_row_bytes)
        case "csv":
            rows = _read_csv(pieces, max_row_bytes, type.delimiter)
    last: Row | RefusedRow | None = None
    try:
        for row in rows:
            last = row
            yield row
    except UserError as error:
        if error.code != "data.gzip_broken":
            raise
        yield RefusedRow(last.line + 1, last.index + 1, error) if last else RefusedRow(1, 0, error)


def _peek(chunks: Iterable[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """At least HEAD_BYTES of a file, where it has so many, and all of it. A fault behind the first piece is left for
    whoever gets there."""
    source = iter(chunks)
    head: list[bytes] = []
    num_bytes = 0
    try:
        while num_bytes < HEAD_BYTES and (chunk := next(source, None)) is not None:
            head.append(chunk)
            num_bytes += len(chunk)
    except UserError as error:
        if not head:
            raise
        source = _raise(error)
    return b"".join(head), chain(head, source)


def _raise(error: UserError) -> Iterator[bytes]:
    raise error
    yield


def unpack_gzip(chunks: Iterable[bytes], *, is_cut: bool = False) -> Iterator[bytes]:
    """What was packed, one member or several. Raises UserError data.gzip_broken, and data.gzip_expands for a file that
    was made to fill a disk. `is_cut`: the file goes on behind these chunks."""
    inflate = zlib.decompressobj(wbits=31)
    num_packed = num_unpacked = 0
    is_at_border = False  # between two members
    for chunk in chunks:
        num_packed += len(chunk)
        rest = chunk
        while rest:
            if is_at_border:
                rest = rest.lstrip(b"\0")  # padding of blocks
                if not rest:
                    break
                inflate, is_at_border = zlib.decompressobj(wbits=31), False
            try:
                piece = inflate.decompress(rest, UNPACKED_BYTES)
            except zlib.error as error:
                raise UserError("data.gzip_broken", problem=str(error).rpartition(": ")[2]) from None
            num_unpacked += len(piece)
            if num_unpacked > max(FREE_EXPANSION_BYTES, MAX_EXPANSION * num_packed):
                raise UserError("data.gzip_expands", packed=num_packed, unpacked=num_unpacked, limit=MAX_EXPANSION)
            if piece:
                yield piece
            is_at_border = inflate.eof
            rest = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
    if not is_cut and not is_at_border:
        raise UserError("data.gzip_broken", problem="it ends too early")


def _without_bom(chunks: Iterable[bytes]) -> Iterator[bytes]:
    source = iter(chunks)
    start = b""
    while len(start) < len(UTF8_BOM) and (chunk := next(source, None)) is not None:
        start += chunk
    yield start.removeprefix(UTF8_BOM)
    yield from source


class JsonDecoder:
    """JSON as the standard has it: Python's own parser also takes NaN and Infinity, which this one notes."""

    def __init__(self) -> None:
        self._not_finite: list[str] = []
        self._decoder = json.JSONDecoder(parse_constant=self._not_finite.append, parse_float=self._parse_float)

    def _parse_float(self, digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            self._not_finite.append(digits[:40])
        return number

    def parse(self, text: str, start: int) -> tuple[object, int]:
        """The value that begins at `start`, and where it ends; ValueError or RecursionError."""
        self._not_finite.clear()
        value, end = self._decoder.raw_decode(text, start)
        return value, end

    def accept(self, line: int, index: int, value: object, source: str) -> Row | RefusedRow:
        """The last parsed value as a row, unless it holds what no tokenizer or database can take."""
        if self._not_finite:
            return RefusedRow(line, index, UserError("data.row_not_finite", constant=self._not_finite[0]))
        if not isinstance(value, dict):
            return RefusedRow(line, index, UserError("data.row_not_object", found=_kind_of(value)))
        if ESCAPED_SURROGATE.search(source) and not _is_unicode(json.dumps(value, ensure_ascii=False)):
            return RefusedRow(line, index, UserError("data.row_half_character"))
        return Row(line, index, value)


# -- JSONL ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Line:
    number: int
    num_bytes: int
    content: bytes | None  # None: longer than the limit, so not held


def _read_lines(chunks: Iterable[bytes], max_row_bytes: int) -> Iterator[Row | RefusedRow]:
    decoder = JsonDecoder()
    index = 0
    for line in _split_lines(chunks, max_row_bytes):
        content = line.content
        if content is None:
            error = UserError("data.row_too_long", size=line.num_bytes, limit=max_row_bytes)
            yield RefusedRow(line.number, index, error)
        elif not content or content.isspace():
            continue
        else:
            yield _parse_line(decoder, line.number, index, content)
        index += 1


def _parse_line(decoder: JsonDecoder, line: int, index: int, content: bytes) -> Row | RefusedRow:
    try:
        text = content.decode("utf-8").strip(" \t\r\n")
        value, end = decoder.parse(text, 0)
    except UnicodeDecodeError as error:
        return RefusedRow(line, index, UserError("data.row_not_utf8", position=error.start + 1))
    except RecursionError:
        return RefusedRow(line, index, UserError("data.row_too_deep"))
    except ValueError as error:
        return RefusedRow(line, index, UserError("data.row_broken", problem=_problem(error)))
    if end < len(text):
        problem = f"more follows after the value ends at character {end}"
        return RefusedRow(line, index, UserError("data.row_broken", problem=problem))
    return decoder.accept(line, index, value, text)


def _split_lines(chunks: Iterable[bytes], max_line_bytes: int) -> Iterator[_Line]:
    number = 1
    num_bytes = 0
    pieces: list[bytes] = []  # of the line that isn't complete yet; empty while it is over the limit
    for chunk in chunks:
        *complete, rest = chunk.split(b"\n")
        for piece in complete:
            num_bytes += len(piece)
            pieces.append(piece)
            yield _Line(number, num_bytes, b"".join(pieces) if num_bytes <= max_line_bytes else None)
            number += 1
            num_bytes = 0
            pieces.clear()
        num_bytes += len(rest)
        if num_bytes <= max_line_bytes:
            pieces.append(rest)
        else:
            pieces.clear()
    yield _Line(number, num_bytes, b"".join(pieces) if num_bytes <= max_line_bytes else None)


# -- a JSON array ---------------------------------------------------------------------------------------------------


class _Window:
    """The part of a file's text that is held: from `position` on it is unread, before it is forgotten at `grow`.

    Bytes that are no UTF-8 become lone surrogates, so that the array around them can still be read and only the row
    that holds them is refused.
    """

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        self.text = ""
        self.position = 0
        self.line = 1
        self.has_ended = False

    def grow(self) -> None:
        """Reads on until twice as much is unread, or the file ends."""
        pieces = [self.text[self.position :]]
        num_unread = len(pieces[0])
        wanted = 2 * num_unread
        while num_unread <= wanted and not self.has_ended:
            chunk = next(self._chunks, None)
            self.has_ended = chunk is None
            piece = self._decoder.decode(chunk or b"", final=chunk is None)
            num_unread += len(piece)
            pieces.append(piece)
        self.text = "".join(pieces)
        self.position = 0

    def advance(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def next_character(self) -> str:
        """Skips whitespace; "" at the end of the file."""
        while True:
            match = WHITESPACE.match(self.text, self.position)
            assert match is not None
            self.advance(match.end())
            if self.position < len(self.text):
                return self.text[self.position]
            if self.has_ended:
                return ""
            self.grow()


def _read_array(chunks: Iterable[bytes], max_row_bytes: int) -> Iterator[Row | RefusedRow]:
    decoder = JsonDecoder()
    window = _Window(chunks)
    opening = window.next_character()
    assert opening == "["
    window.advance(window.position + 1)
    index = 0
    delimiter = window.next_character()
    while delimiter != "]":
        row = _read_element(decoder, window, index, max_row_bytes)
        yield row
        if isinstance(row, RefusedRow) and row.error.code in ENDS_ARRAY:
            return
        index += 1
        delimiter = window.next_character()
        if delimiter not in ("]", ","):
            found = ascii(delimiter) if delimiter else "the end of the file"
            problem = f"a comma or ] is expected, {found} was found"
            yield RefusedRow(window.line, index, UserError("data.array_broken", problem=problem))
            return
        window.advance(window.position + 1)
        if delimiter == ",":
            window.next_character()
    if index == 0:
        window.advance(window.position + 1)
    if window.next_character():
        problem = "more text follows after the array has ended"
        yield RefusedRow(window.line, index, UserError("data.array_broken", problem=problem))


ENDS_ARRAY = {"data.array_broken", "data.array_row_too_long", "data.array_row_too_deep"}


def _read_element(decoder: JsonDecoder, window: _Window, index: int, max_row_bytes: int) -> Row | RefusedRow:
    line = window.line
    while True:
        try:
            value, end = decoder.parse(window.text, window.position)
        except RecursionError:
            return RefusedRow(line, index, UserError("data.array_row_too_deep"))
        except ValueError as error:
            if window.has_ended or not _may_be_cut(error, len(window.text)):
                break_line = line + _lines_before(error, window)
                return RefusedRow(break_line, index, UserError("data.array_broken", problem=_problem(error, "")))
        else:
            # A number at the very end of the window may go on behind it.
            if end < len(window.text) or window.has_ended:
                break
        if len(window.text) - window.position > max_row_bytes:
            return RefusedRow(line, index, UserError("data.array_row_too_long", limit=max_row_bytes))
        window.grow()
    source = window.text[window.position : end]
    window.advance(end)
    num_bytes = len(source.encode("utf-8", "surrogateescape"))
    if num_bytes > max_row_bytes:
        return RefusedRow(line, index, UserError("data.row_too_long", size=num_bytes, limit=max_row_bytes))
    if not _is_unicode(source):
        position = len(source[: _first_surrogate(source)].encode()) + 1
        return RefusedRow(line, index, UserError("data.row_not_utf8", position=position))
    return decoder.accept(line, index, value, source)


def _may_be_cut(error: ValueError, num_characters: int) -> bool:
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= num_characters - LONGEST_CUT


def _lines_before(error: ValueError, window: _Window) -> int:
    return window.text.count("\n", window.position, error.pos) if isinstance(error, json.JSONDecodeError) else 0


# -- CSV ------------------------------------------------------------------------------------------------------------


class _CsvLines:
    """Lines for csv.reader, which asks for as many as a row has. Bytes that are no UTF-8 become lone surrogates, so
    that only the row that holds them is refused."""

    def __init__(self, chunks: Iterable[bytes], max_row_bytes: int) -> None:
        self._lines = _split_lines(chunks, max_row_bytes)
        self._max_row_bytes = max_row_bytes
        self._num_bytes = 0  # of the row that isn't complete yet
        self.number = 0

    def begin_row(self) -> int:
        """The line where the next row begins."""
        self._num_bytes = 0
        return self.number + 1

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number = line.number
        self._num_bytes += line.num_bytes
        if line.content is None or self._num_bytes > self._max_row_bytes:
            raise UserError("data.csv_row_too_long", limit=self._max_row_bytes)
        return line.content.decode("utf-8", "surrogateescape") + "\n"


def _read_csv(chunks: Iterable[bytes], max_row_bytes: int, delimiter: str) -> Iterator[Row | RefusedRow]:
    csv.field_size_limit(max(max_row_bytes, csv.field_size_limit()))  # the module's own; 128 kB unless it is told
    decoder = JsonDecoder()
    lines = _CsvLines(chunks, max_row_bytes)
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    index = 0
    while True:
        line = lines.begin_row()
        try:
            cells = next(table, None)
        except csv.Error as error:
            yield RefusedRow(line, index, UserError("data.csv_broken", problem=str(error)))
            return
        except UserError as error:
            if error.code != "data.csv_row_too_long":
                raise
            yield RefusedRow(line, index, error)
            return
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = _check_header(cells)
            continue
        yield _table_row(decoder, line, index, header, cells)
        index += 1


def _check_header(names: list[str]) -> list[str]:
    for number, name in enumerate(names, 1):
        if not name or not _is_unicode(name):
            raise UserError("data.csv_no_column_name", column=number)
        if names.index(name) < number - 1:
            raise UserError("data.csv_same_column_name", column=number, name=name)
    return names


def _table_row(decoder: JsonDecoder, line: int, index: int, header: list[str], cells: list[str]) -> Row | RefusedRow:
    if len(cells) != len(header):
        return RefusedRow(line, index, UserError("data.csv_cells", found=len(cells), expected=len(header)))
    for name, cell in zip(header, cells, strict=True):
        if not _is_unicode(cell):
            return RefusedRow(line, index, UserError("data.cell_not_utf8", name))
    return parse_json_cells(decoder, line, index, dict(zip(header, cells, strict=True)))


def parse_json_cells(decoder: JsonDecoder, line: int, index: int, row: dict[str, object]) -> Row | RefusedRow:
    """A row of a table, whose lists may stand as their JSON text."""
    for name in JSON_COLUMNS & row.keys():
        cell = row[name]
        if not isinstance(cell, str) or not cell:
            continue
        text = cell.strip(" \t\r\n")
        try:
            value, end = decoder.parse(text, 0)
            problem = f"more follows after the value ends at character {end}" if end < len(text) else ""
        except RecursionError:
            return RefusedRow(line, index, UserError("data.row_too_deep", name))
        except ValueError as error:
            problem = _problem(error)
        if problem:
            return RefusedRow(line, index, UserError("data.cell_broken", name, problem=problem))
        accepted = decoder.accept(line, index, {name: value}, text)
        if isinstance(accepted, RefusedRow):
            return accepted
        row[name] = value
    return Row(line, index, row)


# -- words ----------------------------------------------------------------------------------------------------------


def _problem(error: ValueError, place: str = " at character {position}") -> str:
    """Python's words for a fault of the syntax, with the place in the line where that is known."""
    if not isinstance(error, json.JSONDecodeError):
        return "a number has too many digits"
    if error.pos >= len(error.doc):
        return "it ends too early"
    message = error.msg[:1].lower() + error.msg[1:].removesuffix(" at")
    return message + place.format(position=error.pos + 1)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _first_surrogate(text: str) -> int:
    return next(position for position, character in enumerate(text) if "\ud800" <= character <= "\udfff")


def _kind_of(value: object) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return names[type(value)]
