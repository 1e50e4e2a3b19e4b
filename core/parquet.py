"""What the footer of a Parquet file says, without a library that reads Parquet: its rows and its columns.

The web service takes an upload and stores it; its rows are read by a host, which has pyarrow. But how many rows there
are, and whether their columns could be of use, can be told at once: both stand in the footer, at the end of the file,
in Thrift's compact protocol (parquet.thrift, FileMetaData). Of that struct only `schema` (2) and `num_rows` (3) are
taken, all else is stepped over.

    file   = "PAR1" ... footer, 4 bytes of its length (little-endian), "PAR1"
    struct = fields until a 0 byte; each begins with a byte: 4 bits that count the field's number up, 4 bits of type
    number = varint, zigzag; text = varint of its length, bytes; list = 4 bits of size (15: a varint follows), 4 of type
"""

from collections.abc import Iterable
from dataclasses import dataclass

from core.errors import UserError

MAGIC = b"PAR1"
MAX_FOOTER_BYTES = 16 * 2**20
MAX_DEPTH = 32

# The first types of the compact protocol; the others stand in _Reader.
TRUE, FALSE = 1, 2

# Fields of parquet.thrift: FileMetaData, SchemaElement.
SCHEMA, NUM_ROWS = 2, 3
NAME, NUM_CHILDREN = 4, 5


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    inner: frozenset[str]  # names of all that it is made of, however deep


@dataclass(frozen=True, slots=True)
class Footer:
    num_rows: int
    columns: tuple[Column, ...]


def read_footer(chunks: Iterable[bytes]) -> Footer:
    """Of a whole file. Raises UserError data.parquet_broken."""
    tail = b""
    for chunk in chunks:
        tail = (tail + chunk)[-MAX_FOOTER_BYTES - 8 :] if len(chunk) < MAX_FOOTER_BYTES else chunk
    length = int.from_bytes(tail[-8:-4], "little")
    if not tail.endswith(MAGIC) or length > len(tail) - 8:
        raise UserError("data.parquet_broken", problem="it has no footer, so it is not whole")
    try:
        fields = _Reader(tail[-8 - length : -8]).struct(0)
        num_rows, elements = fields[NUM_ROWS], fields[SCHEMA]
        assert isinstance(num_rows, int) and num_rows >= 0 and isinstance(elements, list)
        return Footer(num_rows, _columns(elements))
    except (IndexError, KeyError, AssertionError, UnicodeDecodeError, TypeError):
        raise UserError("data.parquet_broken", problem="its footer makes no sense") from None


def _columns(elements: list[dict[int, object]]) -> tuple[Column, ...]:
    """The schema is a tree, written root first, each node with the number of its children."""
    position = 1

    def read(depth: int) -> tuple[str, set[str]]:
        nonlocal position
        assert depth < MAX_DEPTH
        element = elements[position]
        position += 1
        name, num_children = element[NAME], element.get(NUM_CHILDREN, 0)
        assert isinstance(name, bytes) and isinstance(num_children, int)
        inner: set[str] = set()
        for _ in range(num_children):
            child, below = read(depth + 1)
            inner |= {child, *below}
        return name.decode(), inner

    num_columns = elements[0].get(NUM_CHILDREN, 0)
    assert isinstance(num_columns, int)
    found = [read(0) for _ in range(num_columns)]
    return tuple(Column(name, frozenset(inner)) for name, inner in found)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def struct(self, depth: int) -> dict[int, object]:
        assert depth < MAX_DEPTH
        fields: dict[int, object] = {}
        number = 0
        while header := self._byte():
            number = number + (header >> 4) if header >> 4 else self._integer()
            fields[number] = self._value(header & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> object:
        match kind:
            case 1 | 2:
                value: object = kind == TRUE
            case 3:
                value = self._byte()
            case 4 | 5 | 6:  # numbers of 16, 32, 64 bits
                value = self._integer()
            case 7:  # a double
                value = self._bytes(8)
            case 8:  # bytes or text
                value = self._bytes(self._varint())
            case 9 | 10:  # a list or set
                header = self._byte()
                value = self._elements(self._varint() if header >> 4 == 15 else header >> 4, header & 15, depth=depth)
            case 11:  # a map
                size = self._varint()
                kinds = self._byte() if size else 0
                value = self._elements(size, kinds >> 4, kinds & 15, depth=depth)
            case 12:
                value = self.struct(depth + 1)
            case _:
                raise AssertionError(kind)
        return value

    def _elements(self, size: int, *kinds: int, depth: int) -> list[object]:
        assert size <= len(self._data)  # an element takes a byte at least
        return [self._element(kind, depth + 1) for _ in range(size) for kind in kinds]

    def _element(self, kind: int, depth: int) -> object:
        """Within a list, true and false are a byte."""
        assert depth < MAX_DEPTH
        return self._byte() == TRUE if kind in (TRUE, FALSE) else self._value(kind, depth)

    def _byte(self) -> int:
        value = self._data[self._position]
        self._position += 1
        return value

    def _bytes(self, length: int) -> bytes:
        value = self._data[self._position : self._position + length]
        self._position += length
        assert len(value) == length
        return value

    def _varint(self) -> int:
        value, shift = 0, 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            assert shift < 70
            if byte < 128:
                return value

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
