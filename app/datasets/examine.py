"""What an uploaded file is: its kind and format, how many rows it has, each row that is refused and why.

The same readers as the trainer's (core.rows, core.conversation) go over the file: over its beginning to learn the
format, then over all of it. Nothing is held but one row, the first few as a preview and the first thousand refusals.

Of Parquet only the footer is read here: how many rows, and whether their columns are of use. A host reads the rows, and
says which it refuses, when it measures the data set."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from core.conversation import FORMAT_ROWS, Format, detect_format, parse_row
from core.errors import UserError, UserErrors
from core.parquet import Column, read_footer
from core.rows import FileType, RefusedRow, Row, detect_file, read_rows, unpack_gzip

MAX_REFUSED_KEPT = 1000
NUM_PREVIEW_ROWS = 20
NUM_REASONS_TOLD = 5
# A preview shows what a row looks like; more of one than this is cut.
PREVIEW_CHARACTERS = 20_000
PREVIEW_TEXT_CHARACTERS = 4_000

OpenFile = Callable[[], Iterable[bytes]]


@dataclass
class Examined:
    kind: FileType
    format: Format
    num_rows: int = 0  # good and refused
    num_refused: int = 0
    refused: list[dict[str, Any]] = field(default_factory=list)
    preview: list[dict[str, Any]] = field(default_factory=list)


def examine(open_file: OpenFile) -> Examined:
    """Raises UserError or UserErrors when the file holds not one good row; the first reasons are among them."""
    kind = detect_file(open_file())
    if kind.kind == "parquet":
        return _examine_footer(open_file, kind)
    found = Examined(kind, find_format(open_file))
    reasons: list[UserError] = []
    for row in read_rows(open_file()):
        found.num_rows += 1
        error = row.error if isinstance(row, RefusedRow) else _fault(row, found.format)
        if error is None:
            assert isinstance(row, Row)
            if len(found.preview) < NUM_PREVIEW_ROWS:
                found.preview.append({"line": row.line, "row": shortened(row.value)})
            continue
        found.num_refused += 1
        if len(reasons) < NUM_REASONS_TOLD:
            reasons.append(_told(row.line, error))
        if len(found.refused) < MAX_REFUSED_KEPT:
            found.refused.append({"line": row.line, "field": error.field, "code": error.code, "text": _text(error)})
    if found.num_refused == found.num_rows:
        raise UserErrors(reasons)
    return found


def _examine_footer(open_file: OpenFile, kind: FileType) -> Examined:
    footer = read_footer(unpack_gzip(open_file()) if kind.is_gzip else open_file())
    if footer.num_rows == 0:
        raise UserError("data.no_rows")
    return Examined(kind, detect_format([_stand_in(footer.columns)]), footer.num_rows)


def _stand_in(columns: Iterable[Column]) -> dict[str, object]:
    """A row as these columns make it; of a list of turns, what its turns are made of. (A list whose JSON text is in
    the column shows nothing of that.)"""
    row: dict[str, object] = dict.fromkeys((column.name for column in columns), "")
    guesses = {"messages": {"role"}, "conversations": {"from"}}
    return row | {
        column.name: [dict.fromkeys(column.inner or guesses[column.name])]
        for column in columns
        if column.name in guesses
    }


def find_format(open_file: OpenFile) -> Format:
    reasons: list[UserError] = []

    def good_rows() -> Iterator[dict[str, object]]:
        for row in read_rows(open_file()):
            if isinstance(row, Row):
                yield row.value
            elif len(reasons) < NUM_REASONS_TOLD:
                reasons.append(_told(row.line, row.error))

    try:
        return detect_format(islice(good_rows(), FORMAT_ROWS))
    except UserError as error:
        # A file of refused rows alone is no empty file: the rows say more than "no row".
        raise UserErrors(reasons if error.code == "data.no_rows" and reasons else [error, *reasons]) from None


def read_page(open_file: OpenFile, offset: int, limit: int) -> list[dict[str, Any]]:
    """Rows `offset` to `offset + limit` of the file, good and refused, each with its line. Raises UserError
    data.rows_of_parquet."""
    if detect_file(open_file()).kind == "parquet":
        raise UserError("data.rows_of_parquet")
    rows = islice(read_rows(open_file()), offset, offset + limit)
    return [
        {"line": row.line, "row": shortened(row.value)}
        if isinstance(row, Row)
        else {"line": row.line, "refused": _text(row.error)}
        for row in rows
    ]


def _fault(row: Row, format: Format) -> UserError | None:
    try:
        parse_row(row.value, format)
    except UserError as error:
        return error
    return None


def _text(error: UserError) -> str:
    return f"{error.field}: {error.text()}" if error.field else error.text()


def _told(line: int, error: UserError) -> UserError:
    return UserError("data.line", line=line, reason=_text(error))


def shortened(row: dict[str, object]) -> dict[str, Any]:
    """The row for people to look at; whatever was cut away shows as an ellipsis."""
    left = PREVIEW_CHARACTERS

    def cut(value: object) -> Any:
        nonlocal left
        if isinstance(value, str):
            length = min(len(value), PREVIEW_TEXT_CHARACTERS, max(left, 0))
            left -= length
            return value if length == len(value) else value[:length] + "…"
        left -= 1
        if isinstance(value, list):
            return [cut(part) for part in value] if left > 0 else "…"
        if isinstance(value, dict):
            return {str(cut(key)): cut(part) for key, part in value.items()} if left > 0 else "…"
        return value

    shown = cut(row)
    assert isinstance(shown, dict)
    return shown
