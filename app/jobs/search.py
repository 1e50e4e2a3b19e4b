"""The language of filters (core.filter) as conditions on the table of jobs, and what jobs may be sorted by.

A field is an expression over one job: a column, a value within its spec, its plan or its summary, or of another table.
One with several values (tags, data sets) is asked by a subquery over them.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from sqlalchemy import (
    ColumnElement,
    Float,
    SQLColumnExpression,
    String,
    and_,
    case,
    cast,
    exists,
    false,
    func,
    not_,
    or_,
    true,
)
from sqlmodel import col, select

from app.jobs.badge import HEARD_OF, STALLED_S, STALLED_STEPS
from app.tables import Host, Job, User
from core.errors import UserError
from core.filter import COMPARES, FIELDS, SEARCHED, Comparison, Either, Every, Node, Not, Operator, Search

Condition: TypeAlias = ColumnElement[bool]
Expression: TypeAlias = SQLColumnExpression[Any]  # of one job
NEWEST = "-created"
SORTS = ("created", "name", "state", "loss", "eval_loss", "learning_rate", "efficiency", "tokens_per_s", "duration")


def condition(node: Node, now: float) -> Condition:
    match node:
        case Every(parts):
            return and_(true(), *(condition(part, now) for part in parts))
        case Either(parts):
            return or_(false(), *(condition(part, now) for part in parts))
        case Not(part):
            # What is not known is not so: null would be neither.
            return not_(func.coalesce(condition(part, now), false()))
        case Search(text):
            return or_(*(_word(field, "~", (text,), now) for field in SEARCHED))
        case Comparison(field, operator, values):
            if FIELDS[field] == "word":
                return _word(field, operator, tuple(map(str, values)), now)
            return _number(numbers(now)[field], operator, tuple(map(float, values)))


def order(sort: str, now: float) -> list[Expression]:
    """By one of SORTS, falling with a - before it; what is not known comes last. Raises UserError filter.sort."""
    name = sort.removeprefix("-")
    if name not in SORTS:
        raise UserError("filter.sort", "sort", name=name, known=", ".join(SORTS))
    by: Expression = WORDS[name]() if FIELDS[name] == "word" else numbers(now)[name]
    by = func.lower(by) if name == "name" else by
    first = by.desc() if sort.startswith("-") else by.asc()
    return [first.nulls_last(), col(Job.id).desc()]


# -- words -----------------------------------------------------------------------------------------------------------
def _owner() -> Expression:
    return select(User.name).where(User.id == Job.owner).scalar_subquery()


def _host() -> Expression:
    id = func.coalesce(Job.host, Job.pinned_host)
    return select(Host.name).where(Host.id == id).scalar_subquery()


def _spec(part: str, name: str) -> Callable[[], Expression]:
    text: Callable[[], Expression] = col(Job.spec)[part][name].as_string
    return text


WORDS: Mapping[str, Callable[[], Expression]] = {
    "id": lambda: col(Job.id),
    "name": lambda: col(Job.name),
    "notes": lambda: col(Job.notes),
    "state": lambda: col(Job.state),
    "owner": _owner,
    "host": _host,
    "model": _spec("model", "base"),
    "method": _spec("method", "type"),
    "packing": _spec("packing", "mode"),
}


def _word(field: str, operator: Operator, values: tuple[str, ...], now: float) -> Condition:
    if operator == "!=":
        return not_(_word(field, "=", values, now))
    if field == "is":
        return or_(*(_is(value, now) for value in values))
    if field in ("tag", "dataset"):
        return or_(*(_among(field, operator, value) for value in values))
    word = func.coalesce(WORDS[field](), "")
    if operator == "~":
        return or_(*(word.icontains(value, autoescape=True) for value in values))
    return func.lower(word).in_([value.lower() for value in values])


def _among(field: str, operator: Operator, value: str) -> Condition:
    """One of several. A stored spec names its data as NAME@VERSION."""
    if field == "tag":
        each = func.json_each(Job.tags).table_valued("value", name="tag")
        text: Expression = cast(each.c.value, String)
    else:
        each = func.json_each(Job.spec, "$.data.train").table_valued("value", name="part")
        text = func.json_extract(each.c.value, "$.dataset")
    if operator == "~":
        fits = text.icontains(value, autoescape=True)
    elif field == "tag":
        fits = func.lower(text) == value.lower()
    else:
        fits = or_(func.lower(text) == value.lower(), text.istartswith(f"{value}@", autoescape=True))
    return exists(select(1).select_from(each).where(fits))


def _is(value: str, now: float) -> Condition:
    """As app.jobs.badge tells it."""
    if value == "trial":
        is_trial: Condition = col(Job.trial)["kind"].as_string().is_not(None)
        return is_trial
    is_heard_of = col(Job.state).in_([state.value for state in HEARD_OF])
    is_unreachable = and_(is_heard_of, func.coalesce(col(Job.lease_until) < now, false()))
    if value == "unreachable":
        return is_unreachable
    pace = func.coalesce(col(Job.summary)["seconds_per_step"].as_float(), 0.0)
    patience = case((pace * STALLED_STEPS > STALLED_S, pace * STALLED_STEPS), else_=STALLED_S)
    is_late = func.coalesce(now - col(Job.progress_at) > patience, false())
    return and_(is_heard_of, not_(is_unreachable), is_late)


# -- numbers ---------------------------------------------------------------------------------------------------------
def numbers(now: float) -> Mapping[str, Expression]:
    spec, plan, summary = col(Job.spec), col(Job.plan), col(Job.summary)

    def chosen(field: str, given: Expression) -> Expression:
        """What `auto` became, where the trainer has said it."""
        each = func.json_each(Job.plan, "$.choices").table_valued("value", name="choice")
        value = cast(func.json_extract(each.c.value, "$.value"), Float)
        found = select(value).where(func.json_extract(each.c.value, "$.field") == field).limit(1).scalar_subquery()
        return func.coalesce(found, given)

    def given(part: str, name: str) -> Expression:
        text = spec[part][name].as_string()
        return case((text == "auto", None), else_=cast(text, Float))

    return {
        "zero": chosen("parallel.zero_stage", given("parallel", "zero_stage")),
        "devices": spec["parallel"]["devices"].as_float(),
        "priority": cast(col(Job.priority), Float),
        "attempt": cast(col(Job.attempt), Float),
        "learning_rate": func.coalesce(plan["peak_learning_rate"].as_float(), given("schedule", "learning_rate")),
        "step": summary["step"].as_float(),
        "steps": summary["total_steps"].as_float(),
        "epoch": summary["epoch"].as_float(),
        "loss": summary["loss"].as_float(),
        "eval_loss": summary["eval_loss"].as_float(),
        "trained_tokens": summary["trained_tokens"].as_float(),
        "tokens_per_s": summary["tokens_per_s"].as_float(),
        "efficiency": summary["padding_efficiency"].as_float(),
        "created": col(Job.created_at),
        "started": col(Job.started_at),
        "ended": col(Job.ended_at),
        "duration": func.coalesce(col(Job.ended_at), now) - col(Job.started_at),
    }


def _number(number: Expression, operator: Operator, values: tuple[float, ...]) -> Condition:
    if operator == "!=":
        return or_(number.is_(None), number.not_in(values))
    if operator == "=":
        return number.in_(values)
    compare: Any = COMPARES[operator]  # expressions are compared as numbers are
    return or_(*(compare(number, value) for value in values))
