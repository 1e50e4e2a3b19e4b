"""The adapter of a finished job, from which another may start: `model.adapter` names that job by its id."""

from sqlmodel import Session

from app.tables import ArtifactRow, Job
from core.errors import UserError
from core.states import JobState
from core.wire import ADAPTER_FILES, AdapterFile


def require_adapter(session: Session, job_id: str) -> None:
    """Raises UserError where there is no such job, or it has not succeeded, or what it left is no adapter."""
    job = session.get(Job, job_id)
    if job is None:
        raise UserError("job.adapter_unknown", "model.adapter", job=job_id)
    if job.state != JobState.SUCCEEDED:
        raise UserError("job.adapter_not_finished", "model.adapter", job=job_id, state=job.state)
    there = {file.name for file in adapter_of(session, job_id)}
    for name in ADAPTER_FILES:
        if name not in there:
            raise UserError("job.adapter_missing", "model.adapter", job=job_id, file=name)


def adapter_of(session: Session, job_id: str) -> tuple[AdapterFile, ...]:
    """Its files; fewer than ADAPTER_FILES where it is no adapter."""
    rows = ((name, session.get(ArtifactRow, (job_id, name))) for name in ADAPTER_FILES)
    return tuple(AdapterFile(name=name, sha256=row.sha256, bytes=row.bytes) for name, row in rows if row is not None)
