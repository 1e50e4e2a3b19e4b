"""The database finds the jobs that core.filter says fit, in the order that was asked for."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
from sqlmodel import select

from app.jobs.badge import badges
from app.jobs.search import NEWEST, SORTS, condition, order
from app.tables import Host, Job, User
from core.errors import UserError
from core.filter import matches, parse_filter
from core.spec import parse_spec
from core.states import JobState
from tests.app.ledger import Ledger, open_ledger
from tests.app.scene import SPEC
from tests.core.test_filter import NOW, QUERIES

DAY = 86_400.0
NUM_JOBS = 60


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    ledger = open_ledger(tmp_path_factory.mktemp("ledger"))
    draw = random.Random(3)
    spec = parse_spec(SPEC).model_dump(mode="json")
    with ledger.services.database.write() as session:
        session.add(User(id="user_a", name="alice", role="admin", created_at=NOW))
        session.add(User(id="user_b", name="Bob", role="member", created_at=NOW))
        session.flush()
        host = session.exec(select(Host.id)).first()
        for number in range(NUM_JOBS):
            session.add(_job(number, draw, spec, host))
    yield ledger
    ledger.services.database.close()


def _job(number: int, draw: random.Random, spec: dict[str, Any], host: str | None) -> Job:
    is_planned = draw.random() < 0.7
    created = NOW - draw.uniform(0, 14 * DAY)
    started = created + 600 if draw.random() < 0.7 else None
    state = draw.choice([state.value for state in JobState])
    mine = {
        **spec,
        "model": {**spec["model"], "base": draw.choice(["demo/tiny-llama", "Qwen/Qwen2.5-0.5B"])},
        "method": {**spec["method"], "type": draw.choice(["lora", "qlora", "full"])},
        "packing": {**spec["packing"], "mode": draw.choice(["packed", "padded"])},
        "parallel": {**spec["parallel"], "devices": draw.choice([1, 4]), "zero_stage": draw.choice(["auto", 2])},
        "schedule": {**spec["schedule"], "learning_rate": draw.choice(["auto", 2e-4, 1e-5])},
        "data": {**spec["data"], "train": [{"dataset": draw.choice(["sums@1a2b", "sums2@1a2b", "dialogues@ff"])}]},
    }
    plan = {
        "peak_learning_rate": 2e-4,
        "choices": [{"field": "parallel.zero_stage", "value": draw.choice([0, 2, 3])}],
    }
    summary = {
        "step": draw.randrange(200),
        "total_steps": 900,
        "epoch": 0.4,
        "loss": draw.uniform(0.5, 2.5),
        "trained_tokens": draw.choice([64_000, 500, 2_000]),
        "tokens_per_s": 812.5,
        "padding_efficiency": draw.choice([0.97, 0.4]),
        "seconds_per_step": draw.choice([1.0, 500.0]),
    }
    return Job(
        id=f"job_{number:03}",
        name=draw.choice(["Sums, first try", "100% sure_thing", "星期三"]),
        notes=draw.choice(["", "higher rank than before"]),
        owner=draw.choice([None, "user_a", "user_b"]),
        host=draw.choice([None, host]),
        spec=mine,
        spec_sha256="",
        tags=draw.sample(["prod", "long run", "Test"], draw.randrange(3)),
        state=state,
        priority=draw.choice([0, 3]),
        attempt=draw.choice([0, 1]),
        trial=draw.choice([None, None, {"kind": "dry_run", "steps": 10}]),
        created_at=created,
        queued_at=created,
        started_at=started,
        ended_at=None if started is None or draw.random() < 0.5 else started + draw.uniform(60, 3 * DAY),
        lease_until=draw.choice([None, NOW - 100, NOW + 30]),
        progress_at=draw.choice([None, NOW - 3000, NOW - 5]),
        plan=plan if is_planned else None,
        summary=summary if is_planned else None,
    )


def facts_of(job: Job, names: dict[str, str]) -> dict[str, Any]:
    """What core.filter asks, read off the row."""
    plan, summary = job.plan or {}, job.summary or {}
    stage, rate = job.spec["parallel"]["zero_stage"], job.spec["schedule"]["learning_rate"]
    chosen = {choice["field"]: choice["value"] for choice in plan.get("choices", ())}
    is_over = job.ended_at if job.ended_at is not None else NOW
    return {
        "id": job.id,
        "name": job.name,
        "notes": job.notes,
        "state": job.state,
        "is": [*badges(job, NOW), *(["trial"] if job.trial else [])],
        "owner": names.get(job.owner or ""),
        "host": names.get(job.host or ""),
        "model": job.spec["model"]["base"],
        "method": job.spec["method"]["type"],
        "packing": job.spec["packing"]["mode"],
        "dataset": [part["dataset"].partition("@")[0] for part in job.spec["data"]["train"]],
        "tag": job.tags,
        "zero": chosen.get("parallel.zero_stage", None if stage == "auto" else stage),
        "devices": job.spec["parallel"]["devices"],
        "priority": job.priority,
        "attempt": job.attempt,
        "learning_rate": plan.get("peak_learning_rate", None if rate == "auto" else rate),
        "step": summary.get("step"),
        "steps": summary.get("total_steps"),
        "epoch": summary.get("epoch"),
        "loss": summary.get("loss"),
        "eval_loss": summary.get("eval_loss"),
        "trained_tokens": summary.get("trained_tokens"),
        "tokens_per_s": summary.get("tokens_per_s"),
        "efficiency": summary.get("padding_efficiency"),
        "created": job.created_at,
        "started": job.started_at,
        "ended": job.ended_at,
        "duration": None if job.started_at is None else is_over - job.started_at,
    }


MORE = (
    "dataset:sums",
    "dataset~sums",
    "owner:bob",
    "NOT owner:bob",
    "owner!=bob",
    "host~a",
    "is:unreachable OR is:stalled",
    "is!=trial state:running",
    "zero:2",
    "zero!=2",
    "learning_rate<1e-4",
    "NOT loss>1",
    "100%",
    "sure_thing",
    "星期三 OR first",
    "created<2d started>12h",
    "duration>1d",
    "(state:queued OR loss<1) -tag:prod",
)


@pytest.mark.parametrize("query", [*QUERIES, *MORE])
def test_what_the_database_finds_is_what_fits(ledger: Ledger, query: str) -> None:
    node = parse_filter(query, NOW)
    with ledger.services.database.read() as session:
        names = {user.id: user.name for user in session.exec(select(User))}
        names |= {host.id: host.name for host in session.exec(select(Host))}
        jobs = session.exec(select(Job)).all()
        found = {job.id for job in session.exec(select(Job).where(condition(node, NOW)))}
    assert found == {job.id for job in jobs if matches(node, facts_of(job, names))}


def test_most_of_these_queries_find_some_and_not_all(ledger: Ledger) -> None:
    with ledger.services.database.read() as session:
        sizes = [len(session.exec(select(Job.id).where(condition(parse_filter(q, NOW), NOW))).all()) for q in MORE]
    assert all(0 < size < NUM_JOBS for size in sizes), dict(zip(MORE, sizes, strict=True))


@pytest.mark.parametrize("sort", [*SORTS, *(f"-{name}" for name in SORTS)])
def test_jobs_come_in_the_order_that_was_asked_for_and_the_unknown_last(ledger: Ledger, sort: str) -> None:
    with ledger.services.database.read() as session:
        jobs = session.exec(select(Job).order_by(*order(sort, NOW))).all()
    assert len(jobs) == NUM_JOBS
    field = sort.removeprefix("-")
    values = [facts_of(job, {})[field] for job in jobs]
    known = [value.lower() if isinstance(value, str) else value for value in values if value is not None]
    assert values[len(known) :] == [None] * (NUM_JOBS - len(known))
    assert known == sorted(known, reverse=sort.startswith("-"))
    assert len(set(known)) > 1 or field in ("eval_loss", "tokens_per_s")


def test_another_order_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(UserError, match=r"colour.*created"):
        order("-colour", NOW)
    assert NEWEST.removeprefix("-") in SORTS
