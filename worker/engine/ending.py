"""How a run ends: what was raised, as an exit code, a reason, a sentence and what to do about it.

outcome.json is the last thing that a trainer writes, whatever happened; none means that it was killed. Of several ranks
the first to fail writes it, since its words name the cause, and no later one replaces it. A rank that only sees its
peers go waits a moment for that one's words. If none come, the other was killed, and that is what it writes itself.
"""

import logging
import re
import secrets
import time
from pathlib import Path

import torch

from core.errors import UserError, UserErrors
from core.events import FailureReason
from core.spec import Batch, JobSpec
from worker.engine.checkpoint import NoSpace, is_want_of_space
from worker.engine.signals import Stopped
from worker.job_directory import EXIT_CODES, OutcomeFile, sync_folder, write_json

log = logging.getLogger(__name__)

# A traceback and a file's fsync, on a busy disk; torchrun kills the rest of the ranks after 30 s.
CULPRIT_MAY_TAKE_S = 5.0
# A CPU allocator says it in words only, and every release in other ones.
CPU_OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|DefaultCPUAllocator", re.IGNORECASE)
# Faults of the data, and of what the plan made of it. Everything else that a person can mend is in the spec.
DATA_CODES = ("data.", "chat.", "plan.no_samples")
# A person can mend it, but not by changing the spec.
INTERNAL_CODES = ("engine.no_checkpoint", "engine.no_device")


class Diverged(Exception):
    """The loss or the gradient is no number any more."""

    def __init__(self, step: int, loss: float, grad_norm: float, learning_rate: float) -> None:
        super().__init__(step, loss, grad_norm, learning_rate)
        self.step, self.loss, self.grad_norm, self.learning_rate = step, loss, grad_norm, learning_rate


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and CPU_OUT_OF_MEMORY.search(str(error)) is not None


def write_first(directory: Path, outcome: OutcomeFile) -> OutcomeFile:
    """Writes outcome.json unless one stands, and returns the one that stands."""
    path = directory / "outcome.json"
    draft = directory / f".tmp-outcome-{secrets.token_hex(4)}"
    write_json(draft, outcome)
    try:
        path.hardlink_to(draft)
    except FileExistsError:
        return OutcomeFile.model_validate_json(path.read_bytes())
    finally:
        draft.unlink()
    sync_folder(directory)
    return outcome


def culprits_outcome(directory: Path) -> OutcomeFile:
    """What the rank that failed first has to say, or that it said nothing."""
    deadline = time.monotonic() + CULPRIT_MAY_TAKE_S
    while time.monotonic() < deadline:
        try:
            return OutcomeFile.model_validate_json((directory / "outcome.json").read_bytes())
        except FileNotFoundError:
            time.sleep(0.05)
    # The supervisor, which sees the exit status of each, does not believe this where a signal ended one.
    return _outcome(
        "internal",
        "another rank of this job ended without a word, as a process does that is killed",
        "see the memory of the host and what was going on there; resume goes on from the newest checkpoint",
    )


def outcome_of(error: BaseException, phase: str, step: int, spec: JobSpec | None) -> OutcomeFile:
    """`spec` as far as it was resolved. An error that is nobody's to mend is logged with its traceback."""
    if isinstance(error, Stopped):
        return _stopped(str(error), phase, step)
    if isinstance(error, UserError | UserErrors):
        return _outcome(_reason_of(error), str(error), "")
    if isinstance(error, Diverged):
        return _outcome(
            "nan",
            f"the loss was {error.loss:g} and the gradient's norm {error.grad_norm:g} at step {error.step}",
            f"lower schedule.learning_rate (it was {error.learning_rate:g} there), lengthen the warm-up, or read the "
            f"samples of step {error.step}; earlier checkpoints are untouched",
        )
    if is_out_of_memory(error):
        return _outcome("oom", f"out of memory in the phase {phase}: {_first_line(error)}", _oom_remedy(spec))
    if isinstance(error, NoSpace) or is_want_of_space(error):
        return _outcome(
            "disk_full",
            f"no room for a checkpoint or the result: {error}",
            "free space on the disk that holds the job's directory, or lower checkpoint.keep_last; then resume",
        )
    log.error("the trainer failed in the phase %s", phase, exc_info=error)
    return _outcome(
        "internal",
        f"{type(error).__name__} in the phase {phase}: {_first_line(error)}",
        "the log holds the traceback; resume goes on from the newest checkpoint",
    )


def _stopped(why_nothing_is_kept: str, phase: str, step: int) -> OutcomeFile:
    if why_nothing_is_kept:
        return _outcome("stopped", f"stopped as asked; {why_nothing_is_kept}", "")
    where = f"with a checkpoint at step {step}" if step else f"in the phase {phase}, before the first step"
    return _outcome("stopped", f"stopped as asked, {where}", "resume goes on from there")


def _outcome(reason: FailureReason, text: str, remedy: str) -> OutcomeFile:
    return OutcomeFile(code=EXIT_CODES[reason], reason=reason, text=text, remedy=remedy)


def _reason_of(error: UserError | UserErrors) -> FailureReason:
    codes = [fault.code for fault in error.errors]
    if all(code in INTERNAL_CODES for code in codes):
        return "internal"
    return "bad_data" if all(code.startswith(DATA_CODES) for code in codes) else "bad_spec"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:500]


def _oom_remedy(spec: JobSpec | None) -> str:
    """The changes that would make it smaller, the cheapest first, with the numbers as they are."""
    if spec is None:
        return "use a smaller model or data set, or a host with more memory"
    batch: Batch = spec.batch
    changes = []
    if batch.micro_batch_size > 1:
        changes.append(
            f"batch.micro_batch_size {batch.micro_batch_size} -> {batch.micro_batch_size // 2} (steps stay the same)"
        )
    if spec.compute.gradient_checkpointing is not True:
        changes.append("compute.gradient_checkpointing -> true (about a third more compute)")
    if spec.packing.row_length is not None and isinstance(spec.data.max_length, int):
        if spec.packing.row_length > spec.data.max_length:
            changes.append(f"packing.row_length {spec.packing.row_length} -> {spec.data.max_length}")
        changes.append(f"data.max_length {spec.data.max_length} -> {spec.data.max_length // 2}")
    if spec.method.type == "full":
        changes.append("method.type full -> lora")
    else:
        changes.append(f"method.rank {spec.method.rank} -> {max(1, spec.method.rank // 2)}")
    return "change, the first that is enough: " + "; ".join(changes)
