"""Data sets and their versions. The same bytes are the same version, whoever sends them and how often."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete
from sqlmodel import Session, col, select

from app.blobs import IncomingBlob, record_blob
from app.datasets.examine import Examined
from app.ids import new_id
from app.problems import Problem, not_found
from app.services import Services
from app.tables import ArtifactRow, Blob, Dataset, DatasetVersion, Job, Profile, User
from core.errors import UserError
from core.spec import DATASET_NAME, DATASET_REFERENCE
from core.states import TERMINAL

VERSION_DIGITS = 12


@dataclass(frozen=True)
class Found:
    """A data set with one of its versions, and who made it."""

    dataset: Dataset
    version: DatasetVersion
    owner: str | None


def check_name(name: str) -> None:
    if not DATASET_NAME.fullmatch(name):
        raise UserError("dataset.name", "name", name=name[:200])


def find(session: Session, reference: str) -> Found:
    """`NAME` is the newest version, `NAME@VERSION` that one. Raises Problem 404."""
    match = DATASET_REFERENCE.fullmatch(reference)
    if match is None:
        raise not_found("data set", reference[:200])
    query = (
        select(Dataset, DatasetVersion, User)
        .join(DatasetVersion, col(DatasetVersion.dataset) == Dataset.id)
        .join(User, isouter=True)
        .where(Dataset.name == match["name"], col(DatasetVersion.sha256).startswith(match["version"] or ""))
        .order_by(col(DatasetVersion.created_at).desc(), col(DatasetVersion.id).desc())
    )
    row = session.exec(query).first()
    if row is None:
        raise not_found("data set", reference)
    return Found(row[0], row[1], row[2].name if row[2] else None)


def newest_of_each(session: Session) -> list[Found]:
    """Every data set with its newest version, by name."""
    rows = session.exec(
        select(Dataset, DatasetVersion, User)
        .join(DatasetVersion, col(DatasetVersion.dataset) == Dataset.id)
        .join(User, isouter=True)
        .order_by(col(Dataset.name), col(DatasetVersion.created_at), col(DatasetVersion.id))
    )
    return list(
        {dataset.id: Found(dataset, version, user.name if user else None) for dataset, version, user in rows}.values()
    )


def versions_of(session: Session, dataset: Dataset) -> Sequence[DatasetVersion]:
    """Newest first."""
    return session.exec(
        select(DatasetVersion)
        .where(DatasetVersion.dataset == dataset.id)
        .order_by(col(DatasetVersion.created_at).desc(), col(DatasetVersion.id).desc())
    ).all()


def existing_version(services: Services, name: str, sha256: str) -> Found | None:
    with services.database.read() as session:
        row = session.exec(
            select(DatasetVersion).join(Dataset).where(Dataset.name == name, DatasetVersion.sha256 == sha256)
        ).first()
        return find(session, f"{name}@{sha256}") if row is not None else None


def add_version(services: Services, name: str, blob: IncomingBlob, examined: Examined, owner: str | None) -> Found:
    """Keeps the file and its report. An upload of the same bytes that was quicker has made the version already."""
    now, stored = services.clock(), blob.stored
    with services.database.write() as session:
        dataset = session.exec(select(Dataset).where(Dataset.name == name)).first()
        if dataset is None:
            dataset = Dataset(id=new_id("ds"), name=name, owner=owner, created_at=now)
            session.add(dataset)
            session.flush()
        same = select(DatasetVersion).where(
            DatasetVersion.dataset == dataset.id, DatasetVersion.sha256 == stored.sha256
        )
        if session.exec(same).first() is None:
            blob.keep()
            record_blob(session, stored, now)
            session.add(
                DatasetVersion(
                    id=new_id("dsv"),
                    dataset=dataset.id,
                    sha256=stored.sha256,
                    bytes=stored.bytes,
                    kind=str(examined.kind),
                    format=examined.format,
                    num_rows=examined.num_rows,
                    num_refused=examined.num_refused,
                    refused=examined.refused,
                    preview=examined.preview,
                    created_at=now,
                )
            )
            session.flush()
        return find(session, f"{name}@{stored.sha256}")


def delete_dataset(services: Services, name: str) -> None:
    """All its versions, their profiles, and the files that nothing else refers to. Raises Problem 404, or 409 while
    a job that may still read it is not over."""
    with services.database.write() as session:
        dataset = find(session, name).dataset
        jobs = session.exec(select(Job).where(col(Job.state).not_in([state.value for state in TERMINAL]))).all()
        readers = [job for job in jobs if dataset.name in names_in(job.spec)]
        if readers:
            raise Problem(
                409, UserError("dataset.in_use", name=dataset.name, job=readers[0].name, state=readers[0].state)
            )
        hashes = [version.sha256 for version in versions_of(session, dataset)]
        session.execute(delete(DatasetVersion).where(col(DatasetVersion.dataset) == dataset.id))
        session.execute(delete(Dataset).where(col(Dataset.id) == dataset.id))
        for sha256 in hashes:
            if not _is_referred_to(session, sha256):
                session.execute(delete(Profile).where(col(Profile.data_sha256) == sha256))
                session.execute(delete(Blob).where(col(Blob.sha256) == sha256))
                # Within the transaction, so that an upload of the same bytes comes wholly before it or after it.
                services.blobs.delete(sha256)


def names_in(spec: dict[str, Any]) -> set[str]:
    """The data sets that a stored spec reads, without versions."""
    validation = spec["data"]["validation"]
    parts = [
        *spec["data"]["train"],
        *([validation] if isinstance(validation, dict) and "dataset" in validation else []),
    ]
    return {part["dataset"].partition("@")[0] for part in parts}


def _is_referred_to(session: Session, sha256: str) -> bool:
    queries = (
        select(DatasetVersion.id).where(DatasetVersion.sha256 == sha256),
        select(ArtifactRow.name).where(ArtifactRow.sha256 == sha256),
    )
    return any(session.exec(query.limit(1)).first() is not None for query in queries)
