"""The directory of one attempt: what stands in it, who writes it, who reads it.

    spec.json        supervisor   the stored JobSpec
    inputs.json      supervisor   `Inputs`: where model, data and resume points lie on this host, devices, threads
    events.jsonl     trainer      its own events, one line each, appended by single writes
    profiles.json    trainer      what it measured of the data, for the web service to keep
    layouts/         certifier    of a certificate: a directory like this one for each layout
    checkpoints/     trainer      step-<n>/ with a manifest; half-written ones are .tmp-*
    result/          trainer      the adapter or model; complete once outcome.json says 0; a trial has none
    outcome.json     trainer      `OutcomeFile`, its last act; none = it was killed
    report.json      trainer      what was planned beside what happened
    trainer.log      supervisor   what the trainer printed; with several ranks, what torchrun did
    rank-<k>.log     trainer      what each of several ranks printed, word for word: secrets are hidden in all that is
                                  sent on, and in trainer.log, but here no other account may read
    adapter/         supervisor   the adapter to start from, where the spec names one
    journal.jsonl    supervisor   events and logs under the attempt's own seq
    supervisor.json  supervisor   who it is: attempt, fence, pid, start time, boot id; made before the claim, by a link
                                  that fails where one exists: who made it is the attempt's only supervisor
    supervisor.log   supervisor   what it has to say itself
    exit.json        supervisor   `ExitFile`: how it ended, once the trainer and all it started are gone and the journal
                                  is whole; none and a dead supervisor = outcome `lost`
    finished.json    supervisor   the server's answer to that report, the last act; none and a dead supervisor = the
                                  host agent sends what is missing and finishes from exit.json

`pegbox train --out DIR` makes the same directory by hand. Nothing here knows torch or the network.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, ValidationError

from core.events import FailureReason
from core.states import Outcome
from core.trial import Certify, DryRun, RateProbe

EXIT_CODES: dict[FailureReason, int] = {
    "bad_spec": 65,
    "bad_data": 66,
    "internal": 70,
    "oom": 71,
    "nan": 72,
    "disk_full": 73,
    "stopped": 75,
}


class File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InputFile(File):
    dataset: str  # as the spec names it
    path: str
    sha256: str
    revision: str = ""  # of a data set on a hub: the commit that it was taken at


class LayoutTrial(File):
    """The first `steps` steps in one layout, for their losses alone: nothing is told, saved or handed out."""

    kind: Literal["layout"] = "layout"
    steps: int
    is_alone: bool = False  # each segment of a step in a row of its own


class Inputs(File):
    model_path: str
    model_name: str
    data: tuple[InputFile, ...]
    resume: tuple[str, ...] = ()  # checkpoint directories, newest first; the first that verifies is taken
    # A step that a checkpoint of another job has reached counts for `retry` just as one of this job's own.
    # GPUs, one a rank; on a CPU one slot, in which all ranks run.
    devices: tuple[str, ...] = ("cpu0",)
    cpu_slots: int = 1  # of this host, which share its memory
    ranks: int = 1
    # Tokenised data by content, shared by the jobs of a host; "" = cache/ in the job directory.
    cache_dir: str = ""
    # Of a trial nothing is evaluated, saved or handed out.
    trial: Annotated[DryRun | RateProbe | Certify | LayoutTrial, Discriminator("kind")] | None = None
    # The folder of the adapter to start from, or "" to begin with a new one.
    adapter_path: str = ""
    # CPU threads a rank; bit-for-bit resume depends on it. A checkpoint's own number wins on resume.
    threads: int = 1


class OutcomeFile(File):
    code: int
    reason: FailureReason | None = None
    text: str = ""
    remedy: str = ""


def read_outcome(directory: Path) -> OutcomeFile | None:
    """None where the trainer did not get so far, or the file is none of ours."""
    try:
        return OutcomeFile.model_validate_json((directory / "outcome.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


# What `worker.engine.prepare` leaves beside its RESULT.json while it works: a `core.wire.ProfileProgress`, and one with
# the profile of sampled rows.
PREPARE_PROGRESS, PREPARE_SAMPLED = "progress.json", "sampled.json"


class PrepareOrder(File):
    """ORDER.json of `worker.engine.prepare`; its RESULT.json is a `core.wire.ProfileResult`."""

    model_path: str
    model_name: str
    chat_template: str | None
    data: InputFile
    format: str
    train_on: str
    multi_turn: str
    cache_dir: str = ""  # as in Inputs; "" = none
    num_rows: int = 0  # of the file, where that is known: from core.sampled.LEAST_ROWS on a sample is measured first


class ExitFile(File):
    outcome: Outcome
    exit_code: int | None
    reason: FailureReason | None = None
    text: str = ""
    remedy: str = ""
    final_seq: int = 0


def write_atomically(path: Path, content: bytes) -> None:
    """All or nothing, also through a power cut: temporary file, fsync, rename, fsync of the folder."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".tmp-{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: BaseModel) -> None:
    write_atomically(path, json.dumps(value.model_dump(mode="json"), ensure_ascii=False, indent=1).encode())
