"""Measured facts: of a data set read with a tokenizer, and of a model.

A worker measures them once (`worker.engine.prepare`, or the trainer on its way) and posts them to the web service,
which keeps them by content; form, preview and trainer then plan from the same numbers.

A million samples have to fit into memory, a database row and a request. What is known of each sample therefore stands
in columns of equal numbers side by side (`Column`), of 1 to 8 bytes each, and no sample is an object. A million
samples of three trained turns are 28 MB in memory and about as much on the wire, a third of it hashes.
"""

import zlib
from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Sequence
from sys import byteorder
from typing import Any, Literal, overload

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from core.architecture import Architecture

MAX_COLUMN_BYTES = 2**28  # what a column may unpack to: 32 million numbers of 8 bytes
ZLIB_LEVEL = 1  # 6 takes two to eight times as long and saves 1 %

# Types of unsigned numbers as the wire names them, by their bytes, and as `array` does.
_CODES = {"u1": "B", "u2": "H", "u4": "I", "u8": "Q"}


class Column(Sequence[int]):
    """Whole numbers from 0, each as wide as the largest needs. `numbers` is the buffer itself, which numpy reads
    without a copy. In JSON: {"type": "u2", "zlib": base64 of the compressed little-endian numbers}; a plain list is
    read too."""

    __slots__ = ("numbers",)

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        if not isinstance(numbers, array | memoryview):
            numbers = array("Q", numbers)
        code = _CODES[_type_of(max(numbers, default=0))]
        narrow = numbers if isinstance(numbers, array) and numbers.typecode == code else array(code, numbers)
        self.numbers: memoryview = memoryview(narrow).toreadonly()

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> "Column": ...
    def __getitem__(self, index: int | slice) -> "int | Column":
        return Column(self.numbers[index]) if isinstance(index, slice) else self.numbers[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # it equals a list, which has none

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.numbers[:5]))
        return f"Column([{shown}{', ...' if len(self) > 5 else ''}])"

    def packed(self) -> dict[str, str]:
        """As JSON has it."""
        raw = self.numbers.tobytes()
        if byteorder == "big":
            raw = _swapped(array(self.numbers.format, raw)).tobytes()
        return {"type": f"u{self.numbers.itemsize}", "zlib": b64encode(zlib.compress(raw, ZLIB_LEVEL)).decode()}

    @classmethod
    def parse(cls, value: object) -> "Column":
        """Raises ValueError where it is no column."""
        match value:
            case Column():
                return value
            case array() | memoryview() | list() | tuple():
                try:
                    return cls(value)
                except (TypeError, OverflowError) as error:
                    raise ValueError(f"a column holds whole numbers from 0 to 2**64 - 1: {error}") from error
            case {"type": str(kind), "zlib": str(text), **more} if kind in _CODES and not more:
                return cls(_unpack(kind, text))
        raise ValueError('a column is a list of whole numbers or {"type": "u1" | "u2" | "u4" | "u8", "zlib": base64}')

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(cls.packed, when_used="json")
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        packed = {"type": {"enum": [*_CODES]}, "zlib": {"type": "string", "contentEncoding": "base64"}}
        return {
            "anyOf": [
                {"type": "object", "properties": packed, "required": [*packed], "additionalProperties": False},
                {"type": "array", "items": {"type": "integer", "minimum": 0}},
            ]
        }


def _type_of(largest: int) -> str:
    return next(kind for kind in _CODES if largest < 1 << 8 * int(kind[1]))


def _unpack(kind: str, text: str) -> "array[int]":
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(b64decode(text, validate=True), MAX_COLUMN_BYTES)
    except zlib.error as error:
        raise ValueError(f"a column's bytes are broken: {error}") from error
    if not inflate.eof:
        raise ValueError(f"a column is torn, or longer than {MAX_COLUMN_BYTES} bytes")
    numbers = array(_CODES[kind])
    numbers.frombytes(raw)  # ValueError where the last number is torn
    return _swapped(numbers) if byteorder == "big" else numbers


def _swapped(numbers: "array[int]") -> "array[int]":
    numbers.byteswap()
    return numbers


class Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RefusedRow(Facts):
    line: int
    code: str
    text: str


class TokenPreview(Facts):
    """One sample as the model sees it: `pieces` are the tokens as text, `trained` marks those with a loss, `special`
    those that stand for no text of anybody's: an end of turn, a role."""

    line: int
    pieces: tuple[str, ...]
    trained: tuple[bool, ...]
    num_hidden: int = 0  # tokens of a very long sample that follow and are not shown
    # Previews of before these were noted have none.
    ids: tuple[int, ...] = ()
    special: tuple[bool, ...] = ()
    num_trained: int | None = None  # of the whole sample
    num_turns: int | None = None  # assistant turns that are trained

    @property
    def num_tokens(self) -> int:
        return len(self.pieces) + self.num_hidden


class AlikeRow(Facts):
    line: int
    similarity: float  # to the first row of its group, the estimated share of words in common; 1 of an equal row
    is_equal: bool


class AlikeRows(Facts):
    """Rows that equal or nearly equal each other, directly or by way of one between them."""

    rows: tuple[AlikeRow, ...]  # the first of them, in the order of the file
    num_rows: int


class Duplicates(Facts):
    """Among the rows that gave a sample, how many only say again what an earlier one said."""

    num_equal: int  # the same content as an earlier row
    num_alike: int  # other content, nearly the same words (core.duplicates)
    num_groups: int
    groups: tuple[AlikeRows, ...]  # the first of them


class DataProfile(Facts):
    """A data set x tokenizer x template x mask policy. The sample columns run parallel, one entry a sample, in the
    order of the rows; lengths are whole, before any limit.

    A sample's trained tokens are runs, as a rule one for each turn. `run_bounds` holds start and end (exclusive) of
    every run, sample after sample, `sample_runs` how many of them are whose: how many targets any piece of a sample
    has follows from them, and where its turns end."""

    num_rows: int
    format: str
    multi_turn: Literal["whole", "split"]
    multi_turn_reason: str
    num_fell_back: int = 0  # conversations split although `whole` was asked
    num_refused: int
    refused: tuple[RefusedRow, ...]  # the first 1,000
    sample_row: Column  # index of its row in the file
    sample_length: Column  # tokens
    sample_trained: Column  # targets: tokens with a loss, the first token never counts
    sample_turns: Column
    sample_hash: Column  # 64 bits of a hash of its row's content: the same row is on the same side of the split
    # Profiles of before runs were noted have none: nothing can be cut by them.
    sample_runs: Column | None = None  # runs of trained tokens
    run_bounds: Column | None = None
    num_new_tokens: int = 0  # that the template added to the model's
    # Of the first rows: conversations with tool calls, and those of them whose calls the template leaves out.
    num_with_calls: int = 0
    num_calls_dropped: int = 0
    num_tokens_if_split: int | None = None  # of `whole`: what one sample a turn, each with its context, would come to
    # Not in profiles of before duplicates were looked for, nor where a trainer measured on its way.
    duplicates: Duplicates | None = None
    sample_group: Column | None = None  # the group of contents that its row's is nearly equal to, from 1; 0: of none
    sample_sketches: Column | None = None  # two numbers a sample, for comparing with other data sets (core.duplicates)
    preview: tuple[TokenPreview, ...] = ()

    @field_validator("sample_hash", mode="before")
    @classmethod
    def _read_hex(cls, value: object) -> object:
        """Earlier profiles list 16 hex digits for each sample."""
        if isinstance(value, list) and value and isinstance(value[0], str):
            return [int(digits, 16) for digits in value]
        return value

    @model_validator(mode="after")
    def _columns_run_parallel(self) -> "DataProfile":
        always = (self.sample_row, self.sample_trained, self.sample_turns, self.sample_hash)
        columns = (*always, self.sample_runs, self.sample_group)
        if any(column is not None and len(column) != len(self.sample_length) for column in columns):
            raise ValueError("the sample columns have an entry for each sample")
        if self.sample_sketches is not None and len(self.sample_sketches) != 2 * len(self.sample_length):
            raise ValueError("sample_sketches has two entries for each sample")
        if (self.sample_runs is None) != (self.run_bounds is None):
            raise ValueError("sample_runs and run_bounds come together")
        if len(self.run_bounds or ()) != 2 * sum(self.sample_runs or ()):
            raise ValueError("run_bounds has a start and an end for each of the sample_runs")
        return self


class ModelProfile(Facts):
    name: str
    content_hash: str  # sha256 over the names and bytes of its files; names a revision of a local model
    architecture: str
    num_parameters: int
    context_length: int  # tokens
    vocabulary: int
    dtype: str
    has_chat_template: bool
    bytes: int
    tokenizer_bytes: int | None = None  # its files, which every result brings along; not in earlier profiles
    shape: Architecture | None = None  # not in profiles of a release that didn't measure it
    quantisation: str | None = None  # how its weights are stored quantised, as its config names it
    license: str | None = None  # as its model card or config names it
    tokenizer: str | None = None  # the class that its files name
