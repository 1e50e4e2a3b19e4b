"""The end of an attempt, told to the server: by its supervisor, or by the host agent if that one died before it could.

Everything here may be repeated from the start: the recorder drops what it has, an artifact is named by its hash,
`finish` answers a repeat as it answered first. So the only state is finished.json, written when the server has it.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import TypeAdapter

from core import wire
from core.states import Outcome
from worker.job_directory import ExitFile, write_json
from worker.journal import Journal
from worker.relay import catch_up
from worker.server import Away, Server, Stale, TooEarly, insist
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

EXIT, FINISHED, PROFILES = "exit.json", "finished.json", "profiles.json"
REPORT, RESULT = "report.json", "result"
_PROFILES = TypeAdapter(tuple[wire.MeasuredProfile, ...])


def deliver(
    settings: WorkerSettings,
    server: Server,
    attempt: wire.AttemptRef,
    directory: Path,
    journal: Journal,
    *,
    is_unwanted: Callable[[], bool],
) -> wire.Finished:
    """Events to the last one, profiles, artifacts of a success, then `finish`; waits for the server for ever.

    Raises Interrupted once `is_unwanted`. An attempt that the server has given away ends as "stale"."""
    exit_file = ExitFile.model_validate_json((directory / EXIT).read_bytes())

    def send_everything() -> wire.Finished:
        catch_up(journal, server, attempt, server.send_events(attempt, ()), is_unwanted=is_unwanted)
        for profile in _measured_profiles(directory):
            server.send_profile(attempt, profile)
        artifacts = tuple(_artifacts(directory)) if exit_file.outcome == Outcome.SUCCEEDED else ()
        for artifact in artifacts:
            server.upload(attempt, artifact.sha256, directory / RESULT / artifact.name)
        finish = wire.Finish(
            fence=attempt.fence,
            outcome=exit_file.outcome,
            reason=exit_file.reason,
            exit_code=exit_file.exit_code,
            text=exit_file.text,
            remedy=exit_file.remedy,
            final_seq=exit_file.final_seq,
            artifacts=artifacts,
        )
        try:
            return server.finish(attempt, finish)
        except TooEarly as error:
            # The recorder lost sight of what it had acknowledged (a restored backup): begin again from its watermark.
            raise Away(str(error)) from error

    try:
        finished = insist(
            send_everything,
            is_unwanted=is_unwanted,
            longest_back_off_s=settings.longest_back_off_s,
            note=lambda text: log.warning("the server is away: %s", text),
        )
    except Stale as error:
        log.warning("the server does not count on this attempt any more: %s", error)
        finished = wire.Finished(state="stale")
    write_json(directory / FINISHED, finished)
    return finished


def _measured_profiles(directory: Path) -> tuple[wire.MeasuredProfile, ...]:
    try:
        return _PROFILES.validate_json((directory / PROFILES).read_bytes())
    except FileNotFoundError:
        return ()


def _artifacts(directory: Path) -> Iterator[wire.Artifact]:
    root = directory / RESULT
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            yield wire.Artifact(name=path.relative_to(root).as_posix(), bytes=path.stat().st_size, sha256=sha256)
