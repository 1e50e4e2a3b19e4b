"""However events arrive, each is stored once, in order, with all that follows from it, or not at all."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event as sqlalchemy_event
from sqlmodel import select

from app.jobs.attempts import finish
from app.metrics import read_curve
from app.recorder import Batch, portions, record
from app.tables import Attempt, CheckpointRow, Job
from core.wire import AttemptRef, Finish, WireEvent
from tests.app.ledger import Ledger, open_ledger
from tests.app.scene import checkpoint, log, step, wire

PLAN = {
    "total_steps": 40, "steps_per_epoch": 20, "warmup_steps": 2, "peak_learning_rate": 1e-4, "decay": "cosine",
    "min_lr_ratio": 0.0, "max_length": 128, "row_length": 128, "num_samples": 10, "num_validation_samples": 0,
    "num_tokens": 1000, "num_trained_tokens": 500, "num_rows": 9, "padding_efficiency": 0.9, "padded_efficiency": 0.4,
    "fill": 0.9, "trainable_parameters": 10, "total_parameters": 100, "attention": "sdpa", "counts": {"rows": 10},
}  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = open_ledger(tmp_path)
    yield ledger
    ledger.services.database.close()


@pytest.fixture(scope="module")
def shared_ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    """For properties: each example has a job of its own."""
    ledger = open_ledger(tmp_path_factory.mktemp("recorder"))
    yield ledger
    ledger.services.database.close()


def lose(ledger: Ledger, launch: AttemptRef) -> None:
    """Ends the attempt as killed; the job is in the queue again."""
    with ledger.services.database.write() as session:
        attempt = session.get_one(Attempt, (launch.job, launch.attempt))
        message = Finish(fence=launch.fence, outcome="lost", reason="killed", final_seq=attempt.acked_seq)
        finish(session, session.get_one(Job, launch.job), attempt, message, ledger.clock())


deliveries = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 12), st.integers(1, 12)).map(lambda ends: list(range(min(ends), max(ends) + 1))),
        st.lists(st.integers(1, 12), max_size=6),
    ),
    max_size=12,
)


@given(deliveries)
@settings(max_examples=40, deadline=None)
def test_batches_in_any_order_repeated_overlapping_or_with_gaps_count_once(
    shared_ledger: Ledger, batches: list[list[int]]
) -> None:
    launch = shared_ledger.claimed(shared_ledger.add_job())
    acked = 0
    for batch in batches:
        expected = acked
        while expected + 1 in batch:
            expected += 1
        acked = shared_ledger.record(launch, *(step(seq, seq, loss=float(seq)) for seq in batch))
        assert acked == expected
    acked = shared_ledger.record(launch, *(step(seq, seq, loss=float(seq)) for seq in range(1, 13)))
    assert acked == 12
    stored = shared_ledger.events(launch.job, launch.attempt)
    assert [event.seq for event in stored] == list(range(1, 13))
    assert shared_ledger.points(launch.job, "loss") == [(n, 1, float(n)) for n in range(1, 13)]
    assert (shared_ledger.job(launch.job).summary or {})["trained_tokens"] == 1200


def test_the_order_of_ids_is_the_order_of_seqs(ledger: Ledger) -> None:
    launch = ledger.claimed(ledger.add_job())
    ledger.record(launch, *(log(seq, str(seq)) for seq in (3, 1, 2)))
    stored = ledger.events(launch.job, 1)
    assert [event.seq for event in sorted(stored, key=lambda event: event.id or 0)] == [1, 2, 3]


def test_a_fault_at_any_statement_leaves_nothing_half_done(ledger: Ledger) -> None:
    """The n-th SQL statement of the transaction fails, for every n: the database is as before, and the same batch
    then counts once."""
    events = [
        wire(1, "phase", name="train"),
        wire(2, "plan", **PLAN),
        step(3, 1),
        checkpoint(4, 1, best=True),
        wire(5, "eval", step=1, eval_loss=1.0, perplexity=2.7, token_accuracy=0.5),
        wire(6, "end", outcome="succeeded", steps=1, trained_tokens=100, seconds=1.0),
    ]
    engine = ledger.services.database.engine
    countdown = [0]

    def fail_at_last(*_: Any) -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise ConnectionError("the power went out")

    num_failures = 0
    sqlalchemy_event.listen(engine, "before_cursor_execute", fail_at_last)
    for n in range(1, 200):
        countdown[0] = 0
        launch = ledger.claimed(ledger.add_job())
        before = ledger.job(launch.job).model_dump()
        countdown[0] = n
        try:
            ledger.record(launch, *events)
        except ConnectionError:
            num_failures += 1
            countdown[0] = 0
            assert ledger.job(launch.job).model_dump() == before
            assert ledger.events(launch.job, 1) == []
            assert ledger.points(launch.job, "loss") == []
            assert ledger.attempts(launch.job)[0].acked_seq == 0
            assert ledger.record(launch, *events) == 6
        countdown[0] = 0
        assert len(ledger.events(launch.job, 1)) == 6
        assert ledger.points(launch.job, "loss") == [(1, 1, 3.0)]
        assert ledger.job(launch.job).state == "finalizing"
        if num_failures < n:
            break
    sqlalchemy_event.remove(engine, "before_cursor_execute", fail_at_last)
    assert num_failures >= 10, "hardly any statement was hit"


def test_what_a_step_says_is_shown_at_the_job(ledger: Ledger) -> None:
    launch = ledger.claimed(ledger.add_job())
    assert ledger.job(launch.job).state == "starting"
    ledger.record(launch, wire(1, "phase", name="tokenise", done=3, total=9), wire(2, "plan", **PLAN))
    job = ledger.job(launch.job)
    assert job.state == "starting"
    assert job.summary == {"phase": "tokenise", "phase_done": 3, "phase_total": 9, "total_steps": 40}
    assert job.plan is not None and job.plan["peak_learning_rate"] == 1e-4
    ledger.clock.now += 5
    ledger.record(launch, step(3, 1), step(4, 2, loss=2.5, step_s=0.4))
    job = ledger.job(launch.job)
    assert (job.state, job.started_at, job.progress_at) == ("running", ledger.clock.now, ledger.clock.now)
    assert job.summary is not None
    assert job.summary | {"step": 2, "loss": 2.5, "trained_tokens": 200, "total_steps": 40} == job.summary
    assert job.summary["seconds_per_step"] == pytest.approx(0.22)
    ledger.record(launch, wire(5, "eval", step=2, eval_loss=1.5, perplexity=4.5, token_accuracy=0.6))
    assert (ledger.job(launch.job).summary or {})["eval_loss"] == 1.5


def test_only_the_best_checkpoint_is_the_best(ledger: Ledger) -> None:
    launch = ledger.claimed(ledger.add_job())
    ledger.record(launch, checkpoint(1, 5, best=True), checkpoint(2, 10, best=True), checkpoint(3, 15))
    with ledger.services.database.read() as session:
        rows = session.exec(select(CheckpointRow.step, CheckpointRow.is_best).order_by(CheckpointRow.step)).all()
    assert [tuple(row) for row in rows] == [(5, False), (10, True), (15, False)]
    assert ledger.job(launch.job).pinned_host == "host_a"


def test_a_curve_after_a_resume_has_one_point_a_step_from_the_newest_attempt(ledger: Ledger) -> None:
    job_id = ledger.add_job()
    first = ledger.claimed(job_id)
    ledger.record(first, *(step(n, n, loss=10.0 + n) for n in range(1, 9)))
    lose(ledger, first)
    second = ledger.claimed(job_id)
    ledger.record(second, *(step(n - 4, n, loss=20.0 + n) for n in range(5, 8)))
    with ledger.services.database.read() as session:
        curve = read_curve(session, session.get_one(Job, job_id), "loss")
    assert curve == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 14.0), (5, 25.0), (6, 26.0), (7, 27.0), (8, 18.0)]
    summary = ledger.job(job_id).summary or {}
    assert (summary["step"], summary["trained_tokens"]) == (7, 700), "steps made twice are counted once"


def test_an_old_attempts_late_events_are_history_and_change_no_job(ledger: Ledger) -> None:
    job_id = ledger.add_job()
    first = ledger.claimed(job_id)
    ledger.record(first, step(1, 1))
    lose(ledger, first)
    second = ledger.claimed(job_id)
    before = ledger.job(job_id).model_dump()
    late = [step(2, 2), checkpoint(3, 2), wire(4, "end", outcome="succeeded", steps=2, trained_tokens=9, seconds=1.0)]
    assert ledger.record(first, *late) == 4
    assert ledger.job(job_id).model_dump() == before
    assert ledger.points(job_id, "loss") == [(1, 1, 3.0), (2, 1, 1.5)]
    assert ledger.record(second, step(1, 2, loss=7.0)) == 1


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("step", {"step": "many"}),
        ("step", {}),
        ("step", {**step(1, 1).data, "learning_rate": float("nan")}),
        ("step", {**step(1, 1).data, "step": 10**30}),
        ("step", {**step(1, 1).data, "step": -1}),
        ("step", {**step(1, 1).data, "tokens": 10**400}),
        ("failure", {"reason": "boredom", "text": "?"}),
        ("checkpoint", {"step": 1, "path": "p", "bytes": 10**30}),
    ],
)
def test_an_event_that_cannot_be_read_is_kept_and_dams_up_nothing(
    ledger: Ledger, kind: str, data: dict[str, Any]
) -> None:
    launch = ledger.claimed(ledger.add_job())
    assert ledger.record(launch, log(1, "before"), wire(2, kind, **data), log(3, "after")) == 3
    stored = ledger.events(launch.job, 1)
    assert [event.kind for event in stored] == ["log", "warning", "log"]
    assert stored[1].data["code"] == "event.unreadable"
    assert ledger.points(launch.job, "loss") == []


def test_an_unknown_kind_is_kept_as_it_came(ledger: Ledger) -> None:
    launch = ledger.claimed(ledger.add_job())
    ledger.record(launch, wire(1, "expert_load", experts=[1, 2], step=7))
    (stored,) = ledger.events(launch.job, 1)
    assert (stored.kind, stored.data) == ("expert_load", {"experts": [1, 2], "step": 7})


def test_no_nan_and_no_half_character_is_ever_stored(ledger: Ledger) -> None:
    launch = ledger.claimed(ledger.add_job())
    nan, infinity = float("nan"), float("inf")
    odd = WireEvent(seq=2, ts=nan, kind="odd", data={"deep": [{"x": infinity}], "text": "half \ud83d"})
    assert ledger.record(launch, step(1, 1, loss=nan, grad_norm=infinity), odd) == 2
    assert ledger.points(launch.job, "loss") == [(1, 1, None)]
    assert ledger.points(launch.job, "mfu") == []
    stored = ledger.events(launch.job, 1)
    assert json.dumps([event.model_dump() for event in stored], allow_nan=False, ensure_ascii=False).encode()
    assert stored[1].data == {"deep": [{"x": None}], "text": "half ?"}


def test_the_failure_event_explains_an_end_that_says_nothing(ledger: Ledger) -> None:
    launch = ledger.claimed(ledger.add_job())
    ledger.record(launch, wire(1, "failure", reason="nan", text="the loss is NaN at step 3", remedy="lower the rate"))
    with ledger.services.database.write() as session:
        attempt = session.get_one(Attempt, (launch.job, 1))
        message = Finish(fence=launch.fence, outcome="failed", final_seq=1)
        finish(session, session.get_one(Job, launch.job), attempt, message, ledger.clock())
    job = ledger.job(launch.job)
    assert (job.reason, job.text, job.remedy) == ("nan", "the loss is NaN at step 3", "lower the rate")


def test_a_batch_for_an_attempt_that_does_not_exist_or_with_a_forged_fence_is_dropped(ledger: Ledger) -> None:
    launch = ledger.claimed(ledger.add_job())
    batches = [
        Batch(job="job_x", attempt=1, events=[log(1, "a")]),
        Batch(job=launch.job, attempt=2, events=[log(1, "b")]),
        Batch(job=launch.job, attempt=1, events=[log(1, "c")], fence=launch.fence + 1),
        Batch(job=launch.job, attempt=1, events=[log(1, "d")], fence=launch.fence),
    ]
    assert record(ledger.services, batches) == {(launch.job, 1): 1}
    assert [event.data["text"] for event in ledger.events(launch.job, 1)] == ["d"]


def test_streams_are_woken_after_the_commit_and_only_by_news(ledger: Ledger) -> None:
    launch = ledger.claimed(ledger.add_job())
    topic = f"job:{launch.job}"
    wake = ledger.services.wake
    ledger.record(launch, log(1, "a"))
    seen = wake.version(topic)
    assert seen > 0
    ledger.record(launch, log(1, "a"))
    ledger.record(launch, log(3, "c"))
    assert wake.version(topic) == seen
    ledger.record(launch, log(2, "b"))
    assert wake.version(topic) == seen + 1


def test_a_large_backlog_is_recorded_in_portions_that_keep_its_order() -> None:
    sizes = [400, 400, 400, 1, 1000, 1, 999]
    batches = [Batch(job="job_a", attempt=n, events=[log(1, "x")] * size) for n, size in enumerate(sizes)]
    cut = list(portions(batches))
    assert [batch.attempt for portion in cut for batch in portion] == list(range(len(sizes)))
    assert [[len(batch.events) for batch in portion] for portion in cut] == [[400, 400], [400, 1], [1000], [1, 999]]
