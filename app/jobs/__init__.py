"""The only place that changes a job.

moves      the one statement that changes a state, and the event it leaves
create     a spec becomes a job in the queue
actions    what a person asks: cancel, stop, resume, retry, extend, clone, checkpoint
attempts   what dispatcher, host and sweeper do: dispatch, claim, beat, finish, give up, lose
badge      unreachable, stalled: derived, never stored
"""

from app.jobs.actions import cancel, checkpoint, clone, extend, get_job, legal_actions, resume, retry, stop
from app.jobs.badge import badges
from app.jobs.create import create_job
from app.jobs.moves import JOBS_TOPIC, QUEUE_TOPIC, topic_of

__all__ = [
    "JOBS_TOPIC",
    "QUEUE_TOPIC",
    "badges",
    "cancel",
    "checkpoint",
    "clone",
    "create_job",
    "extend",
    "get_job",
    "legal_actions",
    "resume",
    "retry",
    "stop",
    "topic_of",
]
