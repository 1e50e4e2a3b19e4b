"""Whatever persons, hosts and the sweeper do, and in whatever order: a job's history is one that the table allows."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlmodel import Session

from app.jobs import actions
from app.jobs.attempts import NotRecorded, StaleFence, beat, claim, finish, give_up, lose
from app.problems import Problem
from app.tables import Attempt, Job
from core.states import ACTIONS, MOVES, ON_A_HOST, TERMINAL, JobState, Outcome
from core.wire import AttemptRef, Finish
from tests.app.ledger import Ledger, open_ledger
from tests.app.scene import step, wire

REACHED: set[str] = set()


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    ledger = open_ledger(tmp_path_factory.mktemp("states"))
    yield ledger
    ledger.services.database.close()


DEEDS: list[tuple[str, tuple[object, ...]]] = [
    *(("dispatch", (goes_on,)) for goes_on in ("unclaimed", "claimed", "steps", "steps", "steps", "steps")),
    *(("ask", (action,)) for action in ("cancel", "stop", "stop", "resume", "resume", "checkpoint")),
    *((deed, (back,)) for deed in ("claim", "beat") for back in (1, 2, 3)),
    *(("emit", (back, kind)) for back in (1, 2) for kind in ("step", "train", "end", "checkpoint")),
    *(("finish", (1, outcome, "killed")) for outcome in ("succeeded", "failed", "stopped", "preempted", "lost")),
    *(("finish", (back, "lost", "hang")) for back in (1, 2)),
    ("finish", (2, "succeeded", None)),
    ("finish_too_early", ()),
    ("give_up", ()),
    ("lose", ()),
]


class JobLife(RuleBasedStateMachine):
    ledger: Ledger

    @initialize()
    def enter(self) -> None:
        self.job = self.ledger.add_job()
        self.launches: list[AttemptRef] = []
        self.sent: dict[int, int] = {}
        self.frozen: tuple[str, int] | None = None

    def change(self, act: Callable[[Session, Job], object]) -> None:
        """One request; a refusal is fine, an assertion of the code under test is not."""
        try:
            with self.ledger.services.database.write() as session:
                act(session, session.get_one(Job, self.job))
        except (Problem, StaleFence, NotRecorded):
            pass

    @rule(data=st.data())
    def somebody_acts(self, data: st.DataObject) -> None:
        """One rule that chooses, and not one rule a deed: so each deed comes up as often as it stands in the list."""
        deed, arguments = data.draw(st.sampled_from(DEEDS))
        getattr(self, deed)(*arguments)

    def dispatch(self, goes_on: str) -> None:
        launch = self.ledger.dispatch(self.job)
        if launch is None:
            return
        self.launches.append(launch)
        if goes_on != "unclaimed":
            self.claim(1)
        if goes_on == "steps":
            self.emit(1, "step")

    def ask(self, action: str) -> None:
        state = JobState(self.ledger.job(self.job).state)
        refused = False
        try:
            with self.ledger.services.database.write() as session:
                job = session.get_one(Job, self.job)
                getattr(actions, action)(session, job, now=self.ledger.clock(), who="alice")
        except Problem as problem:
            assert problem.status == 409
            refused = True
        assert refused == (action not in ACTIONS[state])

    def launch(self, back: int) -> AttemptRef | None:
        """The newest launch, or one before it, whose fence is stale."""
        return self.launches[-back] if back <= len(self.launches) else None

    def attempt(self, session: Session, launch: AttemptRef) -> Attempt:
        return session.get_one(Attempt, (self.job, launch.attempt))

    def claim(self, back: int) -> None:
        if launch := self.launch(back):
            self.change(lambda s, job: claim(s, job, self.attempt(s, launch), launch.fence, self.ledger.clock()))

    def beat(self, back: int) -> None:
        if launch := self.launch(back):
            self.change(lambda s, job: beat(s, job, self.attempt(s, launch), launch.fence, self.ledger.clock()))

    def emit(self, back: int, kind: str) -> None:
        if not (launch := self.launch(back)):
            return
        seq = self.sent[launch.attempt] = self.sent.get(launch.attempt, 0) + 1
        event = {
            "step": step(seq, seq),
            "train": wire(seq, "phase", name="train"),
            "end": wire(seq, "end", outcome="succeeded", steps=seq, trained_tokens=1, seconds=1.0),
            "checkpoint": wire(seq, "checkpoint", step=seq, path=f"checkpoints/step-{seq}", bytes=1),
        }[kind]
        assert self.ledger.record(launch, event) == seq

    def finish(self, back: int, outcome: str, reason: str | None) -> None:
        if launch := self.launch(back):
            seq = self.sent.get(launch.attempt, 0)
            message = Finish(fence=launch.fence, outcome=Outcome(outcome), reason=reason, final_seq=seq)  # type: ignore[arg-type]
            self.change(lambda s, job: finish(s, job, self.attempt(s, launch), message, self.ledger.clock()))

    def finish_too_early(self) -> None:
        if launch := self.launch(1):
            before = self.ledger.job(self.job).rev
            seq = self.sent.get(launch.attempt, 0) + 1
            message = Finish(fence=launch.fence, outcome=Outcome.FAILED, final_seq=seq)
            self.change(lambda s, job: finish(s, job, self.attempt(s, launch), message, self.ledger.clock()))
            assert self.ledger.job(self.job).rev == before

    def give_up(self) -> None:
        self.change(lambda s, job: job.state == JobState.DISPATCHING and give_up(s, job, self.ledger.clock()))

    def lose(self) -> None:
        if self.launches:
            self.change(lambda s, job: lose(s, job, "silent", self.ledger.clock()))

    @invariant()
    def history_is_legal(self) -> None:
        job, history = self.ledger.job(self.job), self.ledger.events(self.job, 0)
        assert [event.seq for event in history] == list(range(1, job.rev + 1))
        moves = [event.data for event in history if event.kind == "state"]
        assert moves[0]["state"] == "queued"
        for before, move in pairwise(moves):
            assert move["from"] == before["state"]
            assert move["actor"] in MOVES[JobState(move["from"]), JobState(move["state"])]
        assert job.state == moves[-1]["state"]
        REACHED.update(move["state"] for move in moves)

    @invariant()
    def an_end_is_the_end(self) -> None:
        job = self.ledger.job(self.job)
        if self.frozen is not None:
            assert (job.state, job.rev) == self.frozen
        elif JobState(job.state) in TERMINAL:
            self.frozen = (job.state, job.rev)
            assert job.ended_at is not None

    @invariant()
    def at_most_one_attempt_lives(self) -> None:
        job, attempts = self.ledger.job(self.job), self.ledger.attempts(self.job)
        living = [attempt for attempt in attempts if attempt.outcome is None]
        if job.state in ON_A_HOST:
            assert [(attempt.number, attempt.fence) for attempt in living] == [(job.attempt, job.fence)]
        else:
            assert living == []
        assert len({attempt.fence for attempt in attempts}) == len(attempts)
        assert (job.desired == "run") == (job.state != JobState.STOPPING) or job.state in (*TERMINAL, JobState.PAUSED)

    @invariant()
    def outcomes_never_change(self) -> None:
        outcomes = {attempt.number: attempt.outcome for attempt in self.ledger.attempts(self.job) if attempt.outcome}
        for number, outcome in getattr(self, "outcomes", {}).items():
            assert outcomes[number] == outcome
        self.outcomes = outcomes


PLAIN_LIVES: dict[str, list[tuple[str, tuple[object, ...]]]] = {
    "succeeded": [("dispatch", ("steps",)), ("emit", (1, "end")), ("finish", (1, "succeeded", None))],
    "failed": [("dispatch", ("steps",)), ("finish", (1, "failed", "killed"))],
    "cancelled": [("dispatch", ("steps",)), ("ask", ("cancel",)), ("finish", (1, "stopped", "killed"))],
    "paused": [("dispatch", ("steps",)), ("ask", ("stop",)), ("finish", (1, "stopped", "killed"))],
    "queued": [("dispatch", ("claimed",)), ("finish", (1, "lost", "killed"))],
}


@pytest.fixture
def life(ledger: Ledger) -> JobLife:
    machine = type("Life", (JobLife,), {"ledger": ledger})()
    machine.enter()
    return machine


@pytest.mark.parametrize("end", PLAIN_LIVES)
def test_the_deeds_lead_to_every_end(life: JobLife, end: str) -> None:
    """So that the walk below is known to be able to reach what it looks for."""
    for deed, arguments in PLAIN_LIVES[end]:
        getattr(life, deed)(*arguments)
    life.history_is_legal()
    assert life.ledger.job(life.job).state == end


@pytest.mark.timeout(240)
def test_every_history_of_a_job_is_legal(ledger: Ledger) -> None:
    REACHED.clear()
    run_state_machine_as_test(
        type("Life", (JobLife,), {"ledger": ledger}),
        settings=settings(max_examples=30, stateful_step_count=20, deadline=None, suppress_health_check=[*HealthCheck]),
    )
    assert len(REACHED) >= 6, f"only {REACHED} came up, which says little"


def test_a_launch_is_claimed_only_under_its_own_fence(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    job = ledger.add_job()
    old = ledger.dispatch(job)
    assert old is not None
    with ledger.services.database.write() as session:
        assert give_up(session, session.get_one(Job, job), ledger.clock())
    new = ledger.dispatch(job)
    assert new is not None and new.fence == old.fence + 2
    with pytest.raises(StaleFence) as stale, ledger.services.database.write() as session:
        attempt = session.get_one(Attempt, (job, old.attempt))
        claim(session, session.get_one(Job, job), attempt, old.fence, ledger.clock())
    assert stale.value.current_fence == new.fence
    ledger.services.database.close()
