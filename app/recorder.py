"""The only writer of a job's events.

The guarantee. An event of an attempt carries a seq, 1, 2, 3 ...; the attempt's row carries a watermark, `acked_seq`,
and everything up to it is stored. One transaction reads the watermark, skips what is below it, applies what follows
without a gap, and moves the watermark. So a batch may be delivered twice, late, in parts, over HTTP and through Redis,
in any order: its effect is that of one delivery. A batch beyond a gap is not applied; the reply names the watermark,
and the relay sends from there. After the commit, and never before, the waiting streams are woken and Redis is told.

What an event does beside being stored: steps and evaluations become points of the charts, checkpoints rows, the plan
and the newest numbers fields of the job; the first step of the training moves the job to `running`, the trainer's end
to `finalizing`. All of it in the same transaction. An attempt that is no longer the job's newest is history: its
events and points are kept, the job's fields are not touched.

An event that can't be read (a known kind with a wrong field) is kept as a warning that holds it whole, and the
watermark passes it: one broken event must not dam up those behind it.

If this process dies: before the commit nothing happened, and Redis hands the entries out again under the same consumer
name; after the commit and before the acknowledgement they come again and lie below the watermark. If Redis loses
everything (FLUSHALL), the heartbeat's reply shows the relay a watermark that stands still, and it sends by HTTP.
"""

import logging
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import redis
from pydantic import Field, TypeAdapter, ValidationError
from sqlalchemy import update
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import OperationalError
from sqlmodel import Session, col

from app.jobs.moves import JOBS_TOPIC, move, topic_of
from app.metrics import points_of_event, read_curve
from app.services import Services
from app.tables import Attempt, CheckpointRow, Job, Metric
from app.tables import Event as EventRow
from core.events import (
    EVAL_METRICS,
    Checkpoint,
    End,
    Eval,
    Event,
    Failure,
    Layout,
    Phase,
    Plan,
    Probe,
    RawEvent,
    Step,
    parse_event,
)
from core.states import JobState
from core.wire import EVENT_GROUP, EVENT_STREAM, MAX_EVENTS_A_BATCH, WireEvent

log = logging.getLogger(__name__)

ENTRIES_A_READ = 100
# A transaction of so many steps takes half a second on a slow machine; heartbeats and submits wait for it.
EVENTS_A_TRANSACTION = 1000
BLOCK_MS = 1000  # so that a stop is noticed
SHORTEST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 5.0
CONSUMER = "recorder"  # always the same, so that a restart finds what it had been handed
LARGEST = 2**53  # whole numbers up to here are exact for every reader of JSON
SMOOTHING = 0.1  # share of the newest step in seconds_per_step
# What a job's summary adds up over its steps, by the metric that it is the sum of.
SUMS = {
    "trained_tokens": "trained_tokens",
    "tokens": "tokens",
    "slots": "slots",
    "rows": "rows",
    "steps_s": "step_s",
}
TRAINING_PHASE = "train"
PROGRESS = (Phase, Plan, Step, Eval, Probe, Layout, Checkpoint, End)

_EVENTS: TypeAdapter[tuple[WireEvent, ...]] = TypeAdapter(
    Annotated[tuple[WireEvent, ...], Field(max_length=MAX_EVENTS_A_BATCH)]
)


@dataclass(frozen=True)
class Batch:
    """Events of one attempt, in any order. `fence` is given by the road that anybody might write to, and checked."""

    job: str
    attempt: int
    events: Sequence[WireEvent]
    fence: int | None = None


@dataclass
class _Effects:
    """What one transaction adds, gathered so that each table is written once."""

    events: list[dict[str, Any]] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)


def record(services: Services, batches: Iterable[Batch]) -> dict[tuple[str, int], int]:
    """One transaction; the watermark of each attempt afterwards. An attempt that doesn't exist is left out."""
    now = services.clock()
    watermarks: dict[tuple[str, int], int] = {}
    changed: set[str] = set()
    with services.database.write() as session:
        for (job_id, number), events in _by_attempt(session, batches):
            attempt = session.get_one(Attempt, (job_id, number))
            if _record_attempt(session, attempt, events, now):
                changed.add(job_id)
            watermarks[job_id, number] = attempt.acked_seq
    if changed:
        services.wake.notify(JOBS_TOPIC, *(topic_of(job) for job in changed))
    return watermarks


def _by_attempt(session: Session, batches: Iterable[Batch]) -> Iterator[tuple[tuple[str, int], dict[int, WireEvent]]]:
    """Events by seq, of attempts that exist. Of two with the same seq the first counts."""
    gathered: dict[tuple[str, int], dict[int, WireEvent]] = {}
    for batch in batches:
        attempt = session.get(Attempt, (batch.job, batch.attempt))
        if attempt is None or batch.fence not in (None, attempt.fence):
            log.warning("events of %s.%d (fence %s) belong to no attempt", batch.job, batch.attempt, batch.fence)
            continue
        events = gathered.setdefault((batch.job, batch.attempt), {})
        for event in batch.events:
            events.setdefault(event.seq, event)
    yield from gathered.items()


def _record_attempt(session: Session, attempt: Attempt, events: dict[int, WireEvent], now: float) -> bool:
    """True if anything was new."""
    new: list[WireEvent] = []
    while (seq := attempt.acked_seq + 1 + len(new)) in events:
        new.append(events[seq])
    if not new:
        return False
    job = session.get_one(Job, attempt.job)
    effects = _Effects()
    is_newest = attempt.number == job.attempt
    for wire in new:
        row: dict[str, Any] = {"job": job.id, "attempt": attempt.number, "seq": wire.seq, "kind": wire.kind}
        row |= {"ts": wire.ts if math.isfinite(wire.ts) else now, "data": storable(wire.data)}
        try:
            event = parse_event({**row["data"], "seq": wire.seq, "ts": row["ts"], "kind": wire.kind})
            _refuse_absurd(event)
            points = points_of_event(event) if isinstance(event, Step | Eval) else []
        except (ValueError, OverflowError) as error:
            effects.events.append(row | {"kind": "warning", "data": _unreadable(wire.kind, row["data"], error)})
            continue
        effects.events.append(row)
        effects.points += [
            {"job": job.id, "name": name, "step": step, "attempt": attempt.number, "value": value}
            for name, (step, value) in points
        ]
        _apply(session, job, attempt, event, effects, is_newest=is_newest, now=now)
    attempt.acked_seq += len(new)
    session.add(attempt)
    session.add(job)
    session.flush()
    _write(session, effects)
    return True


def _apply(
    session: Session,
    job: Job,
    attempt: Attempt,
    event: Event | RawEvent,
    effects: _Effects,
    *,
    is_newest: bool,
    now: float,
) -> None:
    match event:
        case Checkpoint():
            effects.checkpoints.append(
                {"job": job.id, "attempt": attempt.number, "step": event.step, "path": event.path}
                | {"bytes": event.bytes, "is_best": event.best, "created_at": now}
            )
        case Failure() if attempt.outcome is None:
            # Kept for an end that nobody is left to explain; `finish` may say more.
            attempt.reason, attempt.text, attempt.remedy = event.reason, event.text, event.remedy or None
    if not is_newest:
        return
    if isinstance(event, PROGRESS):
        job.progress_at = now
    match event:
        case Plan():
            job.plan = event.model_dump(mode="json", exclude={"seq", "ts", "kind"})
            job.summary = (job.summary or {}) | {"total_steps": event.total_steps}
        case Step():
            job.summary = _after_step(session, job, event, effects)
        case Eval():
            job.summary = (job.summary or {}) | event.model_dump(include=set(EVAL_METRICS))
        case Phase():
            told = {"phase": event.name, "phase_done": event.done, "phase_total": event.total}
            job.summary = (job.summary or {}) | told
        case Checkpoint():
            job.pinned_host = attempt.host
            job.summary = (job.summary or {}) | {"checkpoint_step": event.step}
    begins = isinstance(event, Step | Probe | Layout) or (isinstance(event, Phase) and event.name == TRAINING_PHASE)
    if begins and job.state == JobState.STARTING:
        began_at = attempt.claimed_at or attempt.created_at
        job.summary = (job.summary or {}) | {"startup_s": now - began_at}
        first_start = {} if job.started_at is not None else {"started_at": now}
        _follow(session, job, attempt, JobState.RUNNING, now, **first_start)
    elif isinstance(event, End) and event.outcome == "succeeded" and job.state in (JobState.STARTING, JobState.RUNNING):
        _follow(session, job, attempt, JobState.FINALIZING, now)


def _follow(session: Session, job: Job, attempt: Attempt, to: JobState, now: float, **values: Any) -> None:
    """The job's own fields are written first: `move` reads the row again."""
    session.add(job)
    session.flush()
    move(session, job, to, "worker", now=now, expected_fence=attempt.fence, **values)


def _after_step(session: Session, job: Job, event: Step, effects: _Effects) -> dict[str, Any]:
    before = job.summary or {}
    if before.get("step") == event.step - 1 and before.keys() >= SUMS.keys():
        sums = {name: before[name] + getattr(event, metric) for name, metric in SUMS.items()}
    else:
        # The first step of an attempt: what the steps before it came to, those redone counted once.
        _write_points(session, effects)
        sums = {name: _sum_before(session, job, event, metric) for name, metric in SUMS.items()}
    seconds_per_step = before.get("seconds_per_step", event.step_s)
    return before | {
        "step": event.step,
        "epoch": event.epoch,
        "loss": event.loss,
        "learning_rate": event.learning_rate,
        "grad_norm": event.grad_norm,
        "tokens_per_s": event.tokens_per_s,
        "padding_efficiency": event.padding_efficiency,
        "padded_efficiency": event.padded_efficiency,
        "memory_peak_bytes": event.memory_peak_bytes,
        **sums,
        "seconds_per_step": seconds_per_step + SMOOTHING * (event.step_s - seconds_per_step),
    }


def _sum_before(session: Session, job: Job, event: Step, metric: str) -> int | float:
    """Of all steps up to this one, which has no point yet."""
    own: int | float = getattr(event, metric)
    curve = read_curve(session, job, metric)
    return type(own)(own + sum(value or 0 for step, value in curve if step < event.step))


def _write(session: Session, effects: _Effects) -> None:
    connection = session.connection()
    connection.execute(EventRow.__table__.insert(), effects.events)  # type: ignore[attr-defined]
    _write_points(session, effects)
    for row in effects.checkpoints:
        if row["is_best"]:
            others = update(CheckpointRow).where(col(CheckpointRow.job) == row["job"]).values(is_best=False)
            connection.execute(others)
        connection.execute(insert(CheckpointRow).prefix_with("OR REPLACE"), row)


def _write_points(session: Session, effects: _Effects) -> None:
    if effects.points:
        session.connection().execute(insert(Metric).prefix_with("OR REPLACE"), effects.points)
        effects.points.clear()


def _refuse_absurd(event: Event | RawEvent) -> None:
    """Raises ValueError on what fits no column."""
    if isinstance(event, Step | Eval | Checkpoint) and not 0 <= event.step <= LARGEST:
        raise ValueError(f"step {event.step} is no step")
    if isinstance(event, Checkpoint) and not 0 <= event.bytes <= LARGEST:
        raise ValueError(f"{event.bytes} is no size")


def storable(value: Any) -> Any:
    """What JSON has no word for is replaced: NaN and the infinities by null, half a character by a question mark."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case str():
            return value.encode(errors="replace").decode()
        case dict():
            return {storable(key): storable(inner) for key, inner in value.items()}
        case list() | tuple():
            return [storable(inner) for inner in value]
    return value


def _unreadable(kind: str, data: dict[str, Any], error: Exception) -> dict[str, Any]:
    wrong = str(error)
    if isinstance(error, ValidationError):
        faults = error.errors(include_url=False)
        wrong = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults)
    return {"code": "event.unreadable", "text": f"an event {kind!r} cannot be read ({wrong})", "event": data}


# -- the fast road -------------------------------------------------------------------------------------------------


class StreamReader(threading.Thread):
    """Reads the Redis stream and hands what it finds to the recorder. Any fault of Redis is waited out."""

    def __init__(self, services: Services) -> None:
        super().__init__(name="stream-reader", daemon=True)
        self._services = services
        self._redis = redis.Redis.from_url(
            services.settings.redis_url,
            protocol=2,
            socket_timeout=BLOCK_MS / 1000 + 5,
            socket_connect_timeout=2,
            health_check_interval=25,
        )
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()
        self.join()

    def run(self) -> None:
        pause_s = SHORTEST_PAUSE_S
        # "0" = what this consumer was handed and has not acknowledged; ">" = what nobody was handed yet.
        position = "0"
        while not self._stopping.is_set():
            try:
                position = self._read(position)
                pause_s = SHORTEST_PAUSE_S
            except (redis.RedisError, OSError, OperationalError) as error:
                log.warning("the event stream is not read for %.2f s: %s", pause_s, error)
                position = "0"
                self._stopping.wait(pause_s)
                pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
        self._redis.close()

    def _read(self, position: str) -> str:
        """One read, recorded and acknowledged; where to read next."""
        try:
            reply: Any = self._redis.xreadgroup(
                EVENT_GROUP, CONSUMER, {EVENT_STREAM: position}, count=ENTRIES_A_READ, block=BLOCK_MS
            )
        except redis.ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            self._make_group()
            return "0"
        entries = [(entry, fields) for _, found in reply for entry, fields in found]
        if not entries:
            return ">"
        self._record([fields for _, fields in entries])
        ids = [entry for entry, _ in entries]
        # Recorded entries are of no more use to anybody; deleting them keeps the stream as short as the backlog.
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.xack(EVENT_STREAM, EVENT_GROUP, *ids)
        pipeline.xdel(EVENT_STREAM, *ids)
        pipeline.execute()
        return position

    def _record(self, entries: Sequence[dict[bytes, bytes] | None]) -> None:
        batches = [batch for entry in entries if (batch := parse_entry(entry)) is not None]
        for portion in portions(batches):
            try:
                record(self._services, portion)
            except OperationalError:
                raise  # the database's trouble, not the entries': they are tried again
            except Exception:
                # The border of this loop: an entry that finds a mistake of ours must not dam up all jobs. It is not
                # lost, since its watermark stands still and the relay sends it by HTTP.
                log.exception("%d batches are recorded one by one", len(portion))
                self._record_one_by_one(portion)

    def _record_one_by_one(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            try:
                record(self._services, [batch])
            except OperationalError:
                raise
            except Exception:
                log.exception("a batch of %s.%d is left to the sure road", batch.job, batch.attempt)

    def _make_group(self) -> None:
        try:
            self._redis.xgroup_create(EVENT_STREAM, EVENT_GROUP, id="0", mkstream=True)
        except redis.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise


def portions(batches: Sequence[Batch]) -> Iterator[list[Batch]]:
    """Cut so that each has few enough events for one transaction, in the order of the stream."""
    portion: list[Batch] = []
    for batch in batches:
        if portion and sum(len(each.events) for each in (*portion, batch)) > EVENTS_A_TRANSACTION:
            yield portion
            portion = []
        portion.append(batch)
    if portion:
        yield portion


def parse_entry(fields: dict[bytes, bytes] | None) -> Batch | None:
    """None for what is no batch of ours; anybody who reaches Redis can write there."""
    try:
        assert fields is not None
        return Batch(
            job=fields[b"job"].decode(),
            attempt=int(fields[b"attempt"]),
            fence=int(fields[b"fence"]),
            events=_EVENTS.validate_json(fields[b"batch"]),
        )
    except (KeyError, ValueError, AssertionError) as error:
        log.warning("an entry of the event stream is no batch: %s", error)
        return None
