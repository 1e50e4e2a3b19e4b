"""A job as lists and tiles show it, read in a fixed number of queries, whatever the number of jobs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlmodel import Session, col, func, select

from app.jobs import badges
from app.tables import Host, Job, User
from core.errors import TEXTS, Reason
from core.states import JobState
from core.trial import as_trial


@dataclass(frozen=True)
class JobRow:
    id: str
    name: str
    state: str
    badges: tuple[str, ...]
    owner: str | None
    host: str | None
    devices: tuple[str, ...]
    num_ranks: int  # on a CPU more than devices: all of them run in one slot
    tags: tuple[str, ...]
    notes: str
    method: str
    model: str
    created_at: float
    started_at: float | None
    ended_at: float | None
    attempt: int
    wait: Reason | None
    reason: str | None
    text: str | None
    remedy: str | None
    parent: str | None
    parent_kind: str | None
    step: int | None
    total_steps: int | None
    epoch: float | None
    loss: float | None
    eval_loss: float | None
    learning_rate: float | None
    tokens_per_s: float | None
    trained_tokens: int | None
    padding_efficiency: float | None
    padded_efficiency: float | None
    memory_peak_bytes: int | None
    planned_peak_bytes: int | None
    phase: str | None
    phase_done: int
    phase_total: int | None
    seconds_per_step: float | None
    is_packed: bool
    trial: str  # its kind, or ""

    @property
    def is_live(self) -> bool:
        return self.state not in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)

    @property
    def eta_s(self) -> float | None:
        """An estimate: the steps left at the smoothed pace of the last ones."""
        if self.state != JobState.RUNNING or not self.total_steps or self.step is None or self.seconds_per_step is None:
            return None
        return (self.total_steps - self.step) * self.seconds_per_step

    @property
    def seconds(self) -> float | None:
        """How long it ran; None while it runs."""
        if self.started_at is None or self.ended_at is None:
            return None
        return self.ended_at - self.started_at


def read_rows(session: Session, jobs: Sequence[Job], now: float) -> list[JobRow]:
    owners = _names(session, User, (job.owner for job in jobs))
    hosts = _names(session, Host, (job.host or job.pinned_host for job in jobs))
    return [_row(job, now, owners, hosts) for job in jobs]


def _names(session: Session, table: type[User] | type[Host], ids: Iterable[str | None]) -> dict[str, str]:
    wanted = {id for id in ids if id}
    return dict(session.exec(select(table.id, table.name).where(col(table.id).in_(wanted))).all())


def _row(job: Job, now: float, owners: dict[str, str], hosts: dict[str, str]) -> JobRow:
    summary: dict[str, Any] = job.summary or {}
    host = job.host or job.pinned_host
    told = (
        "step", "total_steps", "epoch", "loss", "eval_loss", "learning_rate", "tokens_per_s", "trained_tokens",
        "padding_efficiency", "padded_efficiency", "memory_peak_bytes", "seconds_per_step",
    )  # fmt: skip
    trial = as_trial(job.trial)
    if trial is not None and summary.get("total_steps") is not None:
        summary = summary | {"total_steps": min(trial.steps, summary["total_steps"])}
    waits = job.state == JobState.QUEUED and job.wait_code in TEXTS
    return JobRow(
        id=job.id,
        name=job.name,
        state=job.state,
        badges=tuple(badges(job, now)),
        owner=owners.get(job.owner or ""),
        host=hosts.get(host or ""),
        devices=tuple(job.devices or ()),
        num_ranks=job.spec["parallel"]["devices"],
        tags=tuple(job.tags or ()),
        notes=job.notes,
        method=job.spec["method"]["type"],
        model=job.spec["model"]["base"],
        created_at=job.created_at,
        started_at=job.started_at,
        ended_at=job.ended_at,
        attempt=job.attempt,
        wait=Reason(job.wait_code, job.wait_parameters or {}) if waits and job.wait_code else None,
        reason=job.reason,
        text=job.text,
        remedy=job.remedy,
        parent=job.parent,
        parent_kind=job.parent_kind,
        phase=summary.get("phase"),
        phase_done=int(summary.get("phase_done") or 0),
        phase_total=summary.get("phase_total"),
        planned_peak_bytes=(job.plan or {}).get("planned_peak_bytes"),
        is_packed=job.spec["packing"]["mode"] == "packed",
        trial="" if trial is None else trial.kind,
        **{name: summary.get(name) for name in told},
    )


def count_states(session: Session) -> list[tuple[str, int]]:
    """Of each state that has a job, in the order of a job's life."""
    numbers = dict(session.exec(select(Job.state, func.count()).group_by(col(Job.state))).all())
    return [(state.value, numbers[state.value]) for state in JobState if state.value in numbers]
