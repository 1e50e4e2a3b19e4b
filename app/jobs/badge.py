"""What the last heartbeat and the last progress say of a job. Shown, never stored and never decided on: a silent host
may well be training on."""

from app.tables import Job
from core.states import Badge, JobState

STALLED_S = 600.0
STALLED_STEPS = 20.0  # a slow step is no stall
HEARD_OF = frozenset({JobState.STARTING, JobState.RUNNING, JobState.FINALIZING, JobState.STOPPING})


def badges(job: Job, now: float) -> tuple[Badge, ...]:
    if job.state not in HEARD_OF:
        return ()
    if job.lease_until is not None and job.lease_until < now:
        return ("unreachable",)  # of its progress nothing is known then
    seconds_per_step = float((job.summary or {}).get("seconds_per_step") or 0.0)
    patience_s = max(STALLED_S, STALLED_STEPS * seconds_per_step)
    if job.progress_at is not None and now - job.progress_at > patience_s:
        return ("stalled",)
    return ()
