"""A database with a host and jobs, without the web around it: for what holds of every sequence of moves and batches."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from sqlmodel import SQLModel, col, select

from app.ids import new_id
from app.jobs.attempts import claim, dispatch
from app.jobs.moves import enter
from app.recorder import Batch, record
from app.services import Services, build_services
from app.tables import ApiToken, Attempt, Event, Host, Job, Metric
from core.spec import parse_spec
from core.wire import AttemptRef, Device, HostReport, WireEvent
from tests.app.conftest import NOW, Clock, settings_in
from tests.app.scene import MODEL, SPEC

HOST = "host_a"


@dataclass
class Ledger:
    services: Services
    clock: Clock = field(default_factory=Clock)

    def add_job(self) -> str:
        with self.services.database.write() as session:
            job = Job(
                id=new_id("job"), name="a job", spec=parse_spec(SPEC).model_dump(mode="json"), spec_sha256="", tags=[],
                state="queued", created_at=self.clock(), queued_at=self.clock(), rev=1,
            )  # fmt: skip
            enter(session, job, now=self.clock(), who=None)
            return job.id

    def dispatch(self, job_id: str) -> AttemptRef | None:
        with self.services.database.write() as session:
            return dispatch(session, session.get_one(Job, job_id), HOST, ("cpu0",), self.clock())

    def claimed(self, job_id: str) -> AttemptRef:
        launch = self.dispatch(job_id)
        assert launch is not None
        with self.services.database.write() as session:
            attempt = session.get_one(Attempt, (job_id, launch.attempt))
            claim(session, session.get_one(Job, job_id), attempt, launch.fence, self.clock())
        return launch

    def record(self, launch: AttemptRef, *events: WireEvent) -> int:
        batch = Batch(job=launch.job, attempt=launch.attempt, events=events)
        return record(self.services, [batch])[launch.job, launch.attempt]

    def job(self, job_id: str) -> Job:
        with self.services.database.read() as session:
            return session.get_one(Job, job_id)

    def attempts(self, job_id: str) -> list[Attempt]:
        with self.services.database.read() as session:
            return list(session.exec(select(Attempt).where(Attempt.job == job_id).order_by(col(Attempt.number))))

    def events(self, job_id: str, attempt: int) -> list[Event]:
        with self.services.database.read() as session:
            query = select(Event).where(Event.job == job_id, Event.attempt == attempt).order_by(col(Event.id))
            return list(session.exec(query))

    def points(self, job_id: str, name: str) -> list[tuple[int, int, float | None]]:
        """(step, attempt, value)"""
        with self.services.database.read() as session:
            query = select(Metric.step, Metric.attempt, Metric.value).where(Metric.job == job_id, Metric.name == name)
            return list(session.exec(query.order_by(col(Metric.step), col(Metric.attempt))).all())


def open_ledger(folder: Path, redis_url: str = "") -> Ledger:
    clock = Clock()
    services = build_services(replace(settings_in(folder), redis_url=redis_url), clock)
    SQLModel.metadata.create_all(services.database.engine)
    add_host(services)
    return Ledger(services, clock)


def add_host(services: Services) -> None:
    report = HostReport(
        host=HOST,
        name="anna",
        devices=(Device(id="cpu0", kind="cpu", name="CPU slot", memory_bytes=1),),
        models=(MODEL,),
        versions={},
        num_cpus=2,
        memory_bytes=1,
    )
    with services.database.write() as session:
        session.add(ApiToken(id="tok_a", name="a", role="worker", secret_sha256="a", created_at=NOW))
        session.flush()
        session.add(
            Host(
                id=HOST,
                name="anna",
                token="tok_a",
                report=report.model_dump(mode="json"),
                registered_at=NOW,
                beat_at=NOW,
            )
        )
