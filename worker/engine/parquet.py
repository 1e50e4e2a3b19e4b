"""Rows of a Parquet file, as core.rows has them: the same refusals, numbered from 1.

Rows come out of a row group in small batches, so memory follows the file's pages, not the file. Only columns that a
row may have (core.rows.COLUMNS) are read. Parquet gives every struct all keys of its column, null where a row had
none; nulls within a row are therefore taken away, as if they had not been written. A list may also stand as its JSON
text, as in CSV.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as arrow
from pyarrow import parquet

from core.conversation import unknown_format
from core.errors import UserError
from core.rows import COLUMNS, JsonDecoder, RefusedRow, Row, parse_json_cells, unpack_gzip

ROWS_PER_BATCH = 256


def read_parquet(
    path: Path, *, is_gzip: bool, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Row | RefusedRow]:
    """All rows in order. Raises UserError data.parquet_broken, data.format_unknown where no column is of use.
    Progress counts the file's bytes, by the share of its rows that are read."""
    size = path.stat().st_size
    with _opened(path, is_gzip=is_gzip) as source:
        try:
            file = parquet.ParquetFile(source)
            names = [name for name in file.schema_arrow.names if name in COLUMNS]
            if not names:
                raise unknown_format(file.schema_arrow.names)
            decoder, index = JsonDecoder(), 0
            for batch in file.iter_batches(ROWS_PER_BATCH, columns=names, use_threads=False):
                for value in batch.to_pylist(maps_as_pydicts="strict"):
                    yield _row(decoder, index, value)
                    index += 1
                on_progress(size * index // file.metadata.num_rows, size)
        except (arrow.ArrowException, OSError, KeyError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's fault, not the file's
            # A KeyError tells of a map that holds a key twice.
            raise UserError("data.parquet_broken", problem=str(error).split("\n")[0]) from error


@contextmanager
def _opened(path: Path, *, is_gzip: bool) -> Iterator[IO[bytes]]:
    """What is packed has to be unpacked first: the end of the file is what is read first."""
    with path.open("rb") as file:
        if not is_gzip:
            yield file
            return
        with tempfile.TemporaryFile() as unpacked:
            for piece in unpack_gzip(iter(lambda: file.read(2**20), b"")):
                unpacked.write(piece)
            unpacked.seek(0)
            yield unpacked


def _row(decoder: JsonDecoder, index: int, row: dict[str, Any]) -> Row | RefusedRow:
    number = index + 1
    try:
        value = {key: _plain(cell, key) for key, cell in row.items() if cell is not None}
    except UserError as error:
        return RefusedRow(number, index, error)
    return parse_json_cells(decoder, number, index, value)


def _plain(value: object, field: str) -> object:
    """As JSON would have it, without the nulls of structs. Raises UserError for what JSON doesn't have."""
    match value:
        case None | str() | bool() | int():
            return value
        case float() if math.isfinite(value):
            return value
        case float():
            raise UserError("data.row_not_finite", field, constant=str(value))
        case list():
            return [_plain(part, f"{field}[{number}]") for number, part in enumerate(value)]
        case dict() if all(isinstance(key, str) for key in value):
            return {key: _plain(part, f"{field}.{key}") for key, part in value.items() if part is not None}
    raise UserError("data.parquet_value", field, kind=type(value).__name__)
