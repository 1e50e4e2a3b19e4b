"""What is stored. Times are seconds since the epoch by this server's clock, the only one that decides.

Schema changes go through migrations/ (Alembic) alone; a test compares the migrated schema with these classes.
"""

from typing import Any

from sqlalchemy import JSON, Column, Index, LargeBinary, UniqueConstraint
from sqlmodel import Field, SQLModel

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
SQLModel.metadata.naming_convention = NAMING


def json_column(default: Any = None) -> Any:
    return Field(default=default, sa_column=Column(JSON, nullable=True))


# -- people --------------------------------------------------------------------------------------------------------
class User(SQLModel, table=True):
    id: str = Field(primary_key=True)  # user_...
    name: str = Field(unique=True)
    role: str  # viewer | member | admin
    password_hash: str | None = None  # argon2id; none until it is set
    created_at: float
    disabled_at: float | None = None


class LoginSession(SQLModel, table=True):
    __tablename__ = "login_session"

    id_sha256: str = Field(primary_key=True)  # the cookie's value is never stored
    user: str = Field(foreign_key="user.id", index=True)
    csrf: str
    created_at: float
    seen_at: float
    expires_at: float


class LoginLink(SQLModel, table=True):
    """One-time: the first start prints one; `used_at` is set by the log-in that it grants."""

    __tablename__ = "login_link"

    token_sha256: str = Field(primary_key=True)
    user: str = Field(foreign_key="user.id")
    created_at: float
    expires_at: float
    used_at: float | None = None


class ApiToken(SQLModel, table=True):
    __tablename__ = "api_token"

    id: str = Field(primary_key=True)  # tok_...
    name: str
    role: str  # viewer | member | admin | worker
    user: str | None = Field(default=None, foreign_key="user.id")  # a worker's token has none
    secret_sha256: str = Field(unique=True)
    host: str | None = None  # a worker token is bound to the first host that registers with it
    created_at: float
    used_at: float | None = None
    revoked_at: float | None = None


class IdempotentReply(SQLModel, table=True):
    """The reply that a POST with an Idempotency-Key got, kept for 24 h."""

    __tablename__ = "idempotent_reply"

    key: str = Field(primary_key=True)
    owner: str = Field(primary_key=True)  # the user or token
    route: str = Field(primary_key=True)
    body_sha256: str
    status: int
    body: bytes
    created_at: float


# -- data ----------------------------------------------------------------------------------------------------------
class Blob(SQLModel, table=True):
    """A file in blobs/, named by its content."""

    sha256: str = Field(primary_key=True)
    bytes: int
    created_at: float


class Dataset(SQLModel, table=True):
    id: str = Field(primary_key=True)  # ds_...
    name: str = Field(unique=True)
    owner: str | None = Field(default=None, foreign_key="user.id")
    created_at: float


class DatasetVersion(SQLModel, table=True):
    """The same bytes are the same version. `NAME@VERSION` names it by the first digits of its sha256."""

    __tablename__ = "dataset_version"
    __table_args__ = (UniqueConstraint("dataset", "sha256"),)

    id: str = Field(primary_key=True)  # dsv_...
    dataset: str = Field(foreign_key="dataset.id", index=True)
    sha256: str = Field(foreign_key="blob.sha256")
    bytes: int
    kind: str  # core.rows.FileType: jsonl, csv.gz, ...
    format: str  # messages | sharegpt | ...
    num_rows: int
    num_refused: int
    refused: list[dict[str, Any]] = json_column()  # the first 1,000: line, code, text
    preview: list[dict[str, Any]] = json_column()  # the first rows, as they are
    created_at: float


class Profile(SQLModel, table=True):
    """A data set's facts with one tokenizer and mask policy; `key` is a hash over all that it depends on."""

    id: str = Field(primary_key=True)  # prof_...
    key: str = Field(unique=True)
    data_sha256: str = Field(foreign_key="blob.sha256")
    dataset: str  # as the spec that asked first names it
    model: str
    model_hash: str
    chat_template: str | None = None
    format: str
    train_on: str
    multi_turn: str
    state: str  # wanted | running | ready | failed
    host: str | None = None
    wanted_at: float
    sent_at: float | None = None
    ready_at: float | None = None
    error: str | None = None
    result: bytes | None = Field(default=None, sa_column=Column(LargeBinary, nullable=True))  # zlib of DataProfile JSON
    # While it runs: the share of the file that is read, and what a sample of its rows shows, packed likewise.
    progress: float | None = None
    sampled: bytes | None = Field(default=None, sa_column=Column(LargeBinary, nullable=True))


# -- hosts ---------------------------------------------------------------------------------------------------------
class Host(SQLModel, table=True):
    id: str = Field(primary_key=True)  # chosen by the worker, random
    name: str
    token: str = Field(foreign_key="api_token.id")
    report: dict[str, Any] = json_column()  # core.wire.HostReport
    beat: dict[str, Any] | None = json_column()  # core.wire.HostBeat, the newest
    registered_at: float
    beat_at: float
    is_draining: bool = False


# -- jobs ----------------------------------------------------------------------------------------------------------
class Job(SQLModel, table=True):
    id: str = Field(primary_key=True)  # job_...
    name: str
    owner: str | None = Field(default=None, foreign_key="user.id", index=True)
    spec: dict[str, Any] = json_column()
    spec_sha256: str
    tags: list[str] = json_column()
    notes: str = ""
    priority: int = 0
    state: str = Field(index=True)
    desired: str = "run"  # run | stop | cancel
    attempt: int = 0  # the newest attempt's number; 0 = none yet
    fence: int = 0
    host: str | None = Field(default=None, foreign_key="host.id")
    devices: list[str] | None = json_column()
    pinned_host: str | None = None  # where its checkpoints are
    resume_jobs: list[str] | None = json_column()  # jobs whose checkpoints a retry or extension starts from
    parent: str | None = None  # the job that this one retries, extends or was cloned from
    parent_kind: str | None = None  # retry | extend | clone
    checkpoint_request: int = 0
    wait_code: str | None = None  # why it waits, core.scheduling's reason
    wait_parameters: dict[str, Any] | None = json_column()
    infra_left: int = 3
    not_before: float | None = None  # back-off of a retry
    reason: str | None = None
    text: str | None = None
    remedy: str | None = None
    created_at: float = Field(index=True)
    queued_at: float
    dispatched_at: float | None = None
    sent_at: float | None = None  # the launch message
    started_at: float | None = None
    ended_at: float | None = None
    lease_until: float | None = None
    progress_at: float | None = None
    rev: int = 0  # counts its state moves; the seq of their events
    trial: dict[str, Any] | None = json_column()  # core.trial: a few steps for what they tell, without a result
    forecast: dict[str, Any] | None = json_column()  # core.forecast.Forecast, as it stood when the job was submitted
    plan: dict[str, Any] | None = json_column()  # the newest attempt's `plan` event
    summary: dict[str, Any] | None = json_column()  # newest step, loss, eval_loss, tokens/s, ... for lists and tiles


class Attempt(SQLModel, table=True):
    job: str = Field(primary_key=True, foreign_key="job.id")
    number: int = Field(primary_key=True)
    fence: int
    host: str
    devices: list[str] = json_column()
    outcome: str | None = None  # core.states.Outcome; none while it lives
    reason: str | None = None
    exit_code: int | None = None
    text: str | None = None
    remedy: str | None = None
    acked_seq: int = 0  # every event up to here is stored
    final_seq: int | None = None
    created_at: float
    claimed_at: float | None = None
    beat_at: float | None = None
    ended_at: float | None = None


class Event(SQLModel, table=True):
    """Append-only. `id` is given by the one recorder, in the order of commits: the cursor of every live stream.
    Attempt 0 holds the job's own state moves, whose seq is the job's `rev`."""

    __table_args__ = (
        UniqueConstraint("job", "attempt", "seq"),
        Index("ix_event_job_id", "job", "id"),
        {"sqlite_autoincrement": True},
    )

    id: int | None = Field(default=None, primary_key=True)
    job: str = Field(foreign_key="job.id")
    attempt: int
    seq: int
    ts: float
    kind: str
    data: dict[str, Any] = json_column()


class Metric(SQLModel, table=True):
    """One point a step and attempt; readers take the newest attempt that made the step."""

    __table_args__ = ({"sqlite_with_rowid": False},)

    job: str = Field(primary_key=True, foreign_key="job.id")
    name: str = Field(primary_key=True)
    step: int = Field(primary_key=True)
    attempt: int = Field(primary_key=True)
    value: float | None = None


class CheckpointRow(SQLModel, table=True):
    __tablename__ = "checkpoint"

    job: str = Field(primary_key=True, foreign_key="job.id")
    attempt: int = Field(primary_key=True)
    step: int = Field(primary_key=True)
    path: str  # on its host, relative to the attempt's directory
    bytes: int
    is_best: bool = False
    created_at: float


class ArtifactRow(SQLModel, table=True):
    __tablename__ = "artifact"

    job: str = Field(primary_key=True, foreign_key="job.id")
    name: str = Field(primary_key=True)  # relative to result/
    sha256: str = Field(foreign_key="blob.sha256")
    bytes: int
