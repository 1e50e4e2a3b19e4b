"""Which checkpoints of a job still lie on its host.

A host tells of each that it writes and of none that it deletes, but it deletes by a rule: behind each new one, all but
the newest and the best by held-out loss. So what is left follows from what was written."""

from collections import defaultdict

from sqlmodel import Session, col, select

from app.metrics import read_curve
from app.tables import CheckpointRow, Job


def kept_checkpoints(session: Session, job: Job) -> list[CheckpointRow]:
    """Of all its attempts, each of which has a folder of its own."""
    ordered = select(CheckpointRow).where(CheckpointRow.job == job.id)
    written = session.exec(ordered.order_by(col(CheckpointRow.attempt), col(CheckpointRow.step))).all()
    losses = {step: loss for step, loss in read_curve(session, job, "eval_loss") if loss is not None}
    by_attempt: dict[int, list[CheckpointRow]] = defaultdict(list)
    for row in written:
        standing = by_attempt[row.attempt]
        standing.append(row)
        by_attempt[row.attempt] = prune(standing, losses, **_rule(job))
    return [row for rows in by_attempt.values() for row in rows]


def _rule(job: Job) -> dict[str, int]:
    wanted = job.spec["checkpoint"]
    return {"keep_last": wanted["keep_last"], "keep_best": wanted["keep_best"]}


def prune(
    standing: list[CheckpointRow], losses: dict[int, float], *, keep_last: int, keep_best: int
) -> list[CheckpointRow]:
    """As worker.engine.checkpoint.prune leaves it."""
    newest_first = sorted(standing, key=lambda row: -row.step)
    measured = [row for row in newest_first if row.step in losses]
    best = sorted(measured, key=lambda row: losses[row.step])[:keep_best]
    return [row for row in standing if row in newest_first[:keep_last] or row in best]
