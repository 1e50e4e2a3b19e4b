"""What stands in the way of a job, or should be known before it starts: a sentence each, a link to its field, and
buttons that mend it.

A button holds its fix as the form's own texts. Its script writes them where they belong; without one it is a submit
button, and the server answers with the form filled so.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from app.change import Comparison
from app.forms import ALTERNATIVES, CONTROLS, FormState, as_text, input_of, inputs_of
from app.pages.environment import translate
from core.errors import N_, Reason, UserError
from core.fix import ALTERNATIVES as ALTERNATIVES_OF_SPEC
from core.fix import Fix, Value, fixes_of, told
from core.preflight import JobPlan
from core.verdict import Remark, verdict

_CHOICE_TITLES = {choice.key: choice.title for choice in ALTERNATIVES}


@dataclass(frozen=True)
class Setting:
    """A field as its button names it."""

    title: str
    value: str  # "": left empty


@dataclass(frozen=True)
class Button:
    texts: str  # JSON, by input
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Line:
    level: Literal["bad", "warn"]
    field: str
    input: str  # "": the form has none for it
    said: UserError | Reason
    buttons: tuple[Button, ...] = ()


def button_of(fix: Fix) -> Button | None:
    """None where the form cannot say it."""
    texts = inputs_of(fix)
    if not texts:
        return None
    return Button(json.dumps(texts, ensure_ascii=False), tuple(_settings(fix)))


def _settings(fix: Fix) -> Iterator[Setting]:
    for field, value in fix.items():
        if value is not None or field not in ALTERNATIVES_OF_SPEC:  # another one of them is named
            yield Setting(_title(field), _value_text(field, value))


def _title(field: str) -> str:
    if field in CONTROLS:
        return translate(CONTROLS[field].title)
    if field in _CHOICE_TITLES:
        return translate(_CHOICE_TITLES[field])
    return translate(N_("Method") if field == "method" else N_("Weight"))


def _value_text(field: str, value: Value) -> str:
    if isinstance(value, dict):
        return str(value["type"]) if field == "method" else told(value)
    return as_text(value)


def _buttons(fixes: Sequence[Fix]) -> tuple[Button, ...]:
    return tuple(button for button in map(button_of, fixes) if button is not None)


def lines_of_errors(state: FormState) -> list[Line]:
    return [
        Line("bad", error.field, input, error, _buttons(fixes_of(error)))
        for input, errors in state.errors.items()
        for error in errors
    ]


def lines_of_plan(plan: JobPlan) -> list[Line]:
    return lines_of_remarks(verdict(plan))


def lines_of_remarks(remarks: Iterable[Remark]) -> list[Line]:
    return [
        Line("warn", remark.field, input_of(remark.field), remark.said, _buttons(remark.fixes))
        for remark in remarks
        if remark.level == "warning"
    ]


def lines_of_lock(comparisons: Sequence[Comparison]) -> Iterator[Line]:
    """What breaks a lock, which holds to the first of them."""
    for held in comparisons[:1]:
        if held.change is None:
            assert held.why_not is not None
            yield Line("warn", "", "", Reason("verdict.lock_unknown", {"why": held.why_not.text(translate)}))
        elif not held.is_same:
            what = held.change.lines[0].text(translate)
            yield Line("warn", "", "", Reason("verdict.lock", {"what": what}), _buttons([held.change.keeps]))


def read_fix(text: str) -> dict[str, str]:
    """What a button sent. Raises UserError."""
    try:
        texts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError("request.not_json", "", problem=str(error)) from error
    if not isinstance(texts, dict) or not all(isinstance(value, str) for value in texts.values()):
        raise UserError("request.invalid", "", problem="a fix holds texts by the names of inputs")
    return texts
