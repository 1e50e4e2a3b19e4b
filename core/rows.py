"""Bytes of an uploaded file -> rows, one at a time, good and refused alike.

The web service reads an upload with it and the trainer reads the same bytes again, so a row has the same number and
the same fault in the report and in the run. Nothing vanishes: every row of the file comes out once, as a `Row` or as
a `RefusedRow` that says what stood there and what was expected.

Memory is bounded by the longest row that is allowed, never by the file. A line of JSONL is put together from its
pieces and dropped as soon as it is over the limit; then only its bytes are counted. An array is parsed element by
element from a window of text. An element that isn't complete yet is tried again only when the window has doubled, so
a long row is parsed at most twice as much as it is long. Lines stand on their own, so after a bad one the next goes
on; in a broken array nobody can say where the next row begins, so there reading ends and says so.
"""

import codecs
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from core.errors import UserError

FileKind = Literal["jsonl", "json"]

MAX_ROW_BYTES = 32 * 2**20
# What detection sees. A first line that isn't JSON is one bad row if a line with an object follows within it.
HEAD_BYTES = 64 * 2**10
# The longest token of JSON that may be cut by the end of a window, "-Infinity" or "\ud83d\ude00"; an error further
# than this before the end is no cut.
LONGEST_CUT = 16

UTF8_BOM = codecs.BOM_UTF8
KINDS_NOT_BUILT = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
}
WHITESPACE = re.compile(r"[ \t\r\n]*")
LINE_WITH_OBJECT = re.compile(rb"^[ \t]*\{", re.MULTILINE)
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Row:
    line: int  # from 1; in an array, the line where its object begins
    index: int  # from 0, over good and refused rows
    value: dict[str, object]


@dataclass(frozen=True, slots=True)
class RefusedRow:
    line: int
    index: int
    error: UserError

    def __str__(self) -> str:
        return f"line {self.line}: {self.error}"


def detect_kind(first_bytes: bytes) -> FileKind:
    """What the file is, by its content; a UserError names a kind that isn't read yet."""
    for magic, kind in KINDS_NOT_BUILT.items():
        if first_bytes.startswith(magic):
            raise UserError("data.kind_not_built", kind=kind)
    head = first_bytes.removeprefix(UTF8_BOM).lstrip()
    if head.startswith(b"["):
        return "json"
    if not head or LINE_WITH_OBJECT.search(head):
        return "jsonl"
    raise UserError("data.kind_unknown", start=ascii(head[:40].decode("utf-8", "replace")))


def read_rows(chunks: Iterable[bytes], max_row_bytes: int = MAX_ROW_BYTES) -> Iterator[Row | RefusedRow]:
    """All rows of a JSONL file or a JSON array of objects, in order. Raises UserError where the kind isn't read."""
    source = iter(chunks)
    head: list[bytes] = []
    num_bytes = 0
    while num_bytes < HEAD_BYTES and (chunk := next(source, None)) is not None:
        head.append(chunk)
        num_bytes += len(chunk)
    kind = detect_kind(b"".join(head)[:HEAD_BYTES])
    pieces = _without_bom(chain(head, source))
    yield from _read_lines(pieces, max_row_bytes) if kind == "jsonl" else _read_array(pieces, max_row_bytes)


def _without_bom(chunks: Iterable[bytes]) -> Iterator[bytes]:
    source = iter(chunks)
    start = b""
    while len(start) < len(UTF8_BOM) and (chunk := next(source, None)) is not None:
        start += chunk
    yield start.removeprefix(UTF8_BOM)
    yield from source


class _Decoder:
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
    decoder = _Decoder()
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


def _parse_line(decoder: _Decoder, line: int, index: int, content: bytes) -> Row | RefusedRow:
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
    decoder = _Decoder()
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


def _read_element(decoder: _Decoder, window: _Window, index: int, max_row_bytes: int) -> Row | RefusedRow:
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
