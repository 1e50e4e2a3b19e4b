"""The language that filters jobs, one for the page, the API and the command line.

    state:running owner:alice model~qwen learning_rate>=1e-4 loss<1.2 tag:prod created<7d
    state:queued,running (tag:prod OR priority>0) NOT name~test "free text"

    query    = any of     and { OR and }
    and      = all of     not { [AND] not }
    not      = [NOT | -] ( "(" query ")" | test | text )
    test     = field operator value { "," value }       no space around the operator
    operator = ":" or "=" is   "!=" is not   "~" contains   "<" "<=" ">" ">="
    value    = a word, or anything in double quotes

Words are compared without regard to case. Numbers may be written 2e-4, 64k, 1_000 or 97%; spans of time 90s, 30m,
12h, 7d, 2w; times as a span before now (created<7d: less than seven days ago) or as a day, 2026-11-24, in UTC. A text
without a field is looked for in a job's id, name, notes, model, owner and tags.

What cannot be read raises UserError filter.* with the character at which it stands, counted from 1. `matches` says of a
job's facts whether they fit; a database asks by the same tree.
"""

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypeAlias

from core.errors import UserError
from core.states import JobState

Kind = Literal["word", "number", "time", "span"]
Operator = Literal["=", "!=", "~", "<", "<=", ">", ">="]
Fact: TypeAlias = "str | float | Sequence[str] | None"

FIELDS: Mapping[str, Kind] = {
    "id": "word",
    "name": "word",
    "state": "word",
    "is": "word",
    "owner": "word",
    "host": "word",
    "model": "word",
    "method": "word",
    "dataset": "word",
    "packing": "word",
    "tag": "word",
    "zero": "number",
    "devices": "number",
    "priority": "number",
    "attempt": "number",
    "learning_rate": "number",
    "step": "number",
    "steps": "number",
    "epoch": "number",
    "loss": "number",
    "eval_loss": "number",
    "trained_tokens": "number",
    "tokens_per_s": "number",
    "efficiency": "number",
    "created": "time",
    "started": "time",
    "ended": "time",
    "duration": "span",
}
# Fields with few values: another one is a slip of the pen.
VALUES: Mapping[str, tuple[str, ...]] = {
    "state": tuple(state.value for state in JobState),
    "is": ("unreachable", "stalled", "trial"),
    "method": ("lora", "qlora", "full"),
    "packing": ("packed", "padding_free", "grouped", "padded"),
}
SEARCHED = ("id", "name", "notes", "model", "owner", "tag")

OPERATORS: Mapping[Kind, tuple[Operator, ...]] = {
    "word": ("=", "!=", "~"),
    "number": ("=", "!=", "<", "<=", ">", ">="),
    "time": ("<", "<=", ">", ">="),
    "span": ("<", "<=", ">", ">="),
}
COMPARES: Mapping[Operator, Callable[[float, float], bool]] = {
    "=": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
MOST_CHARACTERS = 2000
MOST_DEPTH = 50  # of parentheses and NOTs

SPANS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "%": 0.01}


@dataclass(frozen=True)
class Search:
    """Somewhere in what SEARCHED names."""

    text: str


@dataclass(frozen=True)
class Comparison:
    """`values` are texts of a word's field, else numbers: of a time seconds since the epoch, of a span seconds. One of
    them will do; of `!=` none may be it."""

    field: str
    operator: Operator
    values: tuple[str, ...] | tuple[float, ...]


@dataclass(frozen=True)
class Not:
    part: "Node"


@dataclass(frozen=True)
class Every:
    parts: tuple["Node", ...]  # none: everything fits


@dataclass(frozen=True)
class Either:
    parts: tuple["Node", ...]


Node: TypeAlias = Search | Comparison | Not | Every | Either


# -- reading ---------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<open>\() | (?P<close>\)) | (?P<minus>-(?=[^\s)]))
      | (?P<test>(?P<field>[A-Za-z_]+)(?P<operator>!=|<=|>=|[:=~<>]))
      | (?P<text>"(?P<quoted>(?:[^"\\]|\\.)*)" | (?P<word>[^\s()"]+))
    )""",
    re.VERBOSE,
)
_VALUE = re.compile(r'"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<word>[^\s()",]+)')


def parse_filter(query: str, now: float) -> Node:
    """`now` in seconds since the epoch. Raises UserError filter.*, of the field `q`."""
    if len(query) > MOST_CHARACTERS:
        raise UserError("filter.too_long", "q", length=len(query), limit=MOST_CHARACTERS)
    return _Reader(query, now).read()


class _Reader:
    def __init__(self, query: str, now: float) -> None:
        self._query = query
        self._now = now
        self._at = 0
        self._depth = 0

    def read(self) -> Node:
        if not self._query.strip():
            return Every(())
        node = self._any()
        if self._peek() is not None:
            raise self._fault("filter.close", self._start())
        return node

    def _any(self) -> Node:
        parts = [self._all()]
        while self._takes_word("OR"):
            parts.append(self._all())
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def _all(self) -> Node:
        parts = [self._not()]
        while True:
            if self._takes_word("AND"):
                parts.append(self._not())
                continue
            token = self._peek()
            if token is None or token["close"] or token["word"] == "OR":
                return parts[0] if len(parts) == 1 else Every(tuple(parts))
            parts.append(self._not())

    def _not(self) -> Node:
        begin = self._start()
        token = self._peek()
        if token is None or token["close"] or token["word"] in ("OR", "AND"):
            raise self._fault("filter.nothing", begin)
        if token["word"] == "NOT" or token["minus"]:
            self._at = token.end()
            return Not(self._deeper(self._not, begin))
        if token["open"]:
            self._at = token.end()
            node = self._deeper(self._any, begin)
            closing = self._peek()
            if closing is None or not closing["close"]:
                raise self._fault("filter.open", begin)
            self._at = closing.end()
            return node
        if token["test"]:
            return self._test(token)
        self._at = token.end()
        return Search(_unquoted(token))

    def _deeper(self, read: Callable[[], Node], begin: int) -> Node:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise self._fault("filter.too_deep", begin, limit=MOST_DEPTH)
        node = read()
        self._depth -= 1
        return node

    def _test(self, token: "re.Match[str]") -> Comparison:
        begin = token.start("field")
        field, sign = token["field"].lower(), token["operator"]
        kind = FIELDS.get(field)
        if kind is None:
            raise self._unknown_field(field, begin)
        operator: Operator = "=" if sign == ":" else sign  # type: ignore[assignment]  # the pattern knows no other
        if kind in ("time", "span") and sign == ":":
            operator = "<="
        if operator not in OPERATORS[kind]:
            known = " ".join(OPERATORS[kind])
            raise self._fault("filter.operator", token.start("operator"), name=field, operator=sign, known=known)
        self._at = token.end()
        values = [self._value(field, kind)]
        while self._query[self._at : self._at + 1] == ",":
            self._at += 1
            values.append(self._value(field, kind))
        if kind == "time" and self._is_span:
            operator = _MIRRORED[operator]
        return Comparison(field, operator, tuple(values))  # type: ignore[arg-type]  # all of one kind

    _is_span = False  # whether the last time was written as a span before now

    def _value(self, field: str, kind: Kind) -> str | float:
        found = _VALUE.match(self._query, self._at)
        if found is None:
            raise self._fault("filter.no_value", self._at, name=field)
        begin, self._at = self._at, found.end()
        text = _unquoted(found)
        match kind:
            case "word":
                return self._word(field, text, begin)
            case "number":
                return self._number(field, text, begin)
            case "span":
                return self._span(field, text, begin)
            case "time":
                return self._time(field, text, begin)

    def _word(self, field: str, text: str, begin: int) -> str:
        known = VALUES.get(field)
        if known is not None and text.lower() not in known:
            raise self._fault("filter.value", begin, name=field, value=text, known=", ".join(known))
        return text

    def _number(self, field: str, text: str, begin: int) -> float:
        found = re.fullmatch(r"(?P<number>[-+]?[0-9_.]+(?:[eE][-+]?[0-9]+)?)(?P<factor>[kKmMgG%]?)", text)
        try:
            number = float(found["number"]) * FACTORS[found["factor"].lower()] if found else math.nan
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self._fault("filter.number", begin, name=field, value=text)
        return number

    def _span(self, field: str, text: str, begin: int) -> float:
        found = re.fullmatch(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>[smhdw])", text)
        if found is None:
            raise self._fault("filter.span", begin, name=field, value=text)
        return float(found["number"]) * SPANS[found["unit"]]

    def _time(self, field: str, text: str, begin: int) -> float:
        self._is_span = re.fullmatch(r"[0-9.]+[smhdw]", text) is not None
        if self._is_span:
            return self._now - self._span(field, text, begin)
        try:
            return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
        except ValueError as error:
            raise self._fault("filter.time", begin, name=field, value=text) from error

    # -- tokens ------------------------------------------------------------------------------------------------------
    def _peek(self) -> "re.Match[str] | None":
        """The next token; None at the end."""
        if not self._query[self._at :].strip():
            return None
        found = _TOKEN.match(self._query, self._at)
        if found is None:
            raise self._fault("filter.quote", self._start())
        return found

    def _takes_word(self, word: str) -> bool:
        token = self._peek()
        if token is None or token["word"] != word:
            return False
        self._at = token.end()
        return True

    def _start(self) -> int:
        """Of what comes next."""
        rest = self._query[self._at :]
        return self._at + len(rest) - len(rest.lstrip())

    def _unknown_field(self, field: str, begin: int) -> UserError:
        close = difflib.get_close_matches(field, FIELDS, n=1, cutoff=0.6)
        if close:
            return self._fault("filter.field_close", begin, name=field, close=close[0])
        return self._fault("filter.field", begin, name=field, known=", ".join(FIELDS))

    def _fault(self, code: str, at: int, **parameters: str | float) -> UserError:
        return UserError(code, "q", at=at + 1, **parameters)


_MIRRORED: Mapping[Operator, Operator] = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


def _unquoted(found: "re.Match[str]") -> str:
    quoted = found["quoted"]
    return found["word"] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)


# -- asking ----------------------------------------------------------------------------------------------------------


def matches(node: Node, facts: Mapping[str, Fact]) -> bool:
    """Of a job, by FIELDS and "notes"; what has several values (tags, data sets) is a list, what is not known None."""
    match node:
        case Every(parts):
            return all(matches(part, facts) for part in parts)
        case Either(parts):
            return any(matches(part, facts) for part in parts)
        case Not(part):
            return not matches(part, facts)
        case Search(text):
            return any(text.lower() in each.lower() for field in SEARCHED for each in _texts(facts.get(field)))
        case Comparison(field, operator, values):
            if FIELDS[field] == "word":
                return _fits_word(operator, [str(value) for value in values], _texts(facts.get(field)))
            fact = facts.get(field)
            assert fact is None or isinstance(fact, int | float)
            return _fits_number(operator, [float(value) for value in values], fact)


def _texts(fact: Fact) -> list[str]:
    if fact is None:
        return []
    return [str(fact)] if isinstance(fact, str | int | float) else list(fact)


def _fits_word(operator: Operator, values: Sequence[str], texts: Sequence[str]) -> bool:
    lowered = [text.lower() for text in texts]
    asked = [value.lower() for value in values]
    if operator == "~":
        return any(value in text for value in asked for text in lowered)
    is_one = any(value in lowered for value in asked)
    return is_one if operator == "=" else not is_one


def _fits_number(operator: Operator, values: Sequence[float], fact: float | None) -> bool:
    """What is not known fits nothing, but that it is not so."""
    if operator == "!=":
        return fact is None or fact not in values
    return fact is not None and any(COMPARES[operator](fact, value) for value in values)
