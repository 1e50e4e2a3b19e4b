"""What a job can be, how an attempt can end, and the one table of legal moves.

A job's stored state moves only by a compare-and-swap that names its current state, and only along `MOVES`.
`unreachable` and `stalled` are no states: they are badges derived from the last heartbeat and the last progress, since
a silent host may well be training on.
"""

from enum import StrEnum
from typing import Literal


class JobState(StrEnum):
    QUEUED = "queued"
    DISPATCHING = "dispatching"
    STARTING = "starting"
    RUNNING = "running"
    FINALIZING = "finalizing"
    STOPPING = "stopping"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Outcome(StrEnum):
    """How an attempt ended; terminal for the attempt, not always for its job."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"  # TERM, a checkpoint, exit 75: the desired state tells cancel from stop
    PREEMPTED = "preempted"  # the same, but nobody asked the job to stop: its host went down in good order
    LOST = "lost"  # the trainer or its supervisor was killed, or the host vanished


Actor = Literal["user", "dispatcher", "worker", "sweeper"]
Action = Literal["cancel", "stop", "resume", "retry", "extend", "clone", "checkpoint"]
Badge = Literal["unreachable", "stalled"]

_S = JobState
TERMINAL = frozenset({_S.SUCCEEDED, _S.FAILED, _S.CANCELLED})
# An attempt is alive on a host (or about to be).
ON_A_HOST = frozenset({_S.DISPATCHING, _S.STARTING, _S.RUNNING, _S.FINALIZING, _S.STOPPING})
LIVE = ON_A_HOST | {_S.QUEUED}

MOVES: dict[tuple[JobState, JobState], frozenset[Actor]] = {
    (_S.QUEUED, _S.DISPATCHING): frozenset({"dispatcher"}),
    (_S.QUEUED, _S.PAUSED): frozenset({"user"}),
    (_S.QUEUED, _S.CANCELLED): frozenset({"user"}),
    (_S.DISPATCHING, _S.STARTING): frozenset({"worker"}),
    (_S.DISPATCHING, _S.QUEUED): frozenset({"sweeper", "worker"}),
    (_S.DISPATCHING, _S.PAUSED): frozenset({"user"}),
    (_S.DISPATCHING, _S.CANCELLED): frozenset({"user"}),
    (_S.STARTING, _S.RUNNING): frozenset({"worker"}),
    (_S.STARTING, _S.FINALIZING): frozenset({"worker"}),
    (_S.STARTING, _S.STOPPING): frozenset({"user"}),
    (_S.STARTING, _S.QUEUED): frozenset({"worker", "sweeper"}),
    (_S.RUNNING, _S.FINALIZING): frozenset({"worker"}),
    (_S.RUNNING, _S.STOPPING): frozenset({"user"}),
    (_S.RUNNING, _S.QUEUED): frozenset({"worker", "sweeper"}),
    (_S.FINALIZING, _S.SUCCEEDED): frozenset({"worker"}),
    (_S.FINALIZING, _S.STOPPING): frozenset({"user"}),
    (_S.FINALIZING, _S.QUEUED): frozenset({"worker", "sweeper"}),
    (_S.STOPPING, _S.PAUSED): frozenset({"worker", "sweeper"}),
    (_S.STOPPING, _S.CANCELLED): frozenset({"worker", "sweeper"}),
    # It ended before the wish arrived: what is done is done.
    (_S.STOPPING, _S.SUCCEEDED): frozenset({"worker"}),
    (_S.PAUSED, _S.QUEUED): frozenset({"user"}),
    (_S.PAUSED, _S.CANCELLED): frozenset({"user"}),
    **{(state, _S.FAILED): frozenset({"worker", "sweeper"}) for state in ON_A_HOST},
    (_S.QUEUED, _S.FAILED): frozenset({"sweeper"}),
}

ACTIONS: dict[JobState, tuple[Action, ...]] = {
    _S.QUEUED: ("stop", "cancel", "clone"),
    _S.DISPATCHING: ("stop", "cancel", "clone"),
    _S.STARTING: ("stop", "cancel", "clone"),
    _S.RUNNING: ("checkpoint", "stop", "cancel", "clone"),
    _S.FINALIZING: ("stop", "cancel", "clone"),
    # A stop can still be turned into a cancel.
    _S.STOPPING: ("cancel", "clone"),
    _S.PAUSED: ("resume", "cancel", "clone"),
    _S.SUCCEEDED: ("extend", "clone"),
    _S.FAILED: ("retry", "clone"),
    _S.CANCELLED: ("retry", "clone"),
}

# What may be asked of a trial, of which nothing is kept to go on from.
TRIAL_ACTIONS: frozenset[Action] = frozenset({"cancel", "clone"})


def may_move(source: JobState, target: JobState, actor: Actor) -> bool:
    return actor in MOVES.get((source, target), frozenset())


def sources_of(target: JobState, actor: Actor) -> tuple[JobState, ...]:
    """Every state from which `actor` may move a job to `target`: the IN list of the compare-and-swap."""
    return tuple(source for (source, to), actors in MOVES.items() if to == target and actor in actors)
