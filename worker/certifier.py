"""The trainer of a job that is to be certified: `python -m worker.certifier TRAINER... JOB_DIR`.

To its supervisor it is a trainer like any other: it reads spec.json and inputs.json, appends events.jsonl, obeys TERM,
and its last act is outcome.json. What it does is to start `TRAINER` once for each layout, one after the other, in
layouts/ below the job's directory (worker.certify). Those carry the attempt's mark, print into its log, and die with
it.

That a layout makes other steps is what was asked, so the job succeeds and its certificate says so. It fails where there
is nothing to compare with, and where a layout ended by a fault of ours or the host's.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from core import events
from core.certify import Certificate, Finding, Layout, Reference, Tried, layouts, left_out, references, told
from core.errors import USER_FAULTS, Reason
from core.events import FailureReason
from core.spec import JobSpec, parse_spec
from core.trial import Certify
from worker.by_hand import train_ranks
from worker.certify import Ground, NothingToCompare, as_json, own_dtype, try_layouts
from worker.engine.emit import Emitter
from worker.job_directory import EXIT_CODES, Inputs, OutcomeFile, write_atomically, write_json
from worker.processes import MARK

NOTHING_KEPT = "stopped as asked; a trial keeps nothing to go on from"
RANKS_ON_A_CPU = 2

Layouts = Callable[[JobSpec, int], Iterator[Layout]]


@dataclass
class Certifier:
    directory: Path
    trainer_argv: Sequence[str]
    emitter: Emitter
    layouts: Layouts = layouts
    num_stops: int = 0
    began: float = field(default_factory=time.monotonic)
    tried: list[Tried] = field(default_factory=list)

    def run(self) -> OutcomeFile:
        """Raises NothingToCompare, and KeyboardInterrupt once somebody stops it."""
        spec = parse_spec(json.loads((self.directory / "spec.json").read_bytes()))
        inputs = Inputs.model_validate_json((self.directory / "inputs.json").read_bytes())
        assert isinstance(inputs.trial, Certify)
        most_ranks = most_ranks_of(inputs)
        dtype = own_dtype(spec, lambda: inputs.devices[0])
        ways = tuple(self.layouts(spec, most_ranks))
        total = len([*references(dtype), *ways])
        self.emitter.phase("certify", 0, total)
        ground = Ground(
            self.directory / "layouts",
            inputs.trial.steps,
            lambda spec: inputs_for(spec, inputs),
            partial(train_ranks, argv=self.trainer_argv, mark=os.environ[MARK]),
        )
        for number, tried in enumerate(try_layouts(spec, dtype, ways, ground, before=self._begin), start=1):
            self._tell(tried, dtype)
            self.emitter.phase("certify", number, total)
        for run in left_out(spec, most_ranks):
            self._tell(run, dtype)
        certificate = Certificate.of(dtype, self.tried)
        report = json.dumps(as_json(certificate), ensure_ascii=False, indent=1)
        write_atomically(self.directory / "report.json", report.encode())
        verdict = certificate.verdict.text()
        if not certificate.holds:
            self.emitter.warn("certificate", verdict)
        if certificate.faults:
            told_faults = "; ".join(f"{run.name}: {run.reason}" for run in certificate.faults)
            return _outcome("internal", f"{verdict}. {told_faults}", "the log holds what each layout has printed")
        return OutcomeFile(code=0)

    def _begin(self, name: str) -> None:
        if self.num_stops:
            raise KeyboardInterrupt
        sys.stderr.write(f"-- {name}\n")

    def _tell(self, tried: Tried, dtype: str) -> None:
        self.tried.append(tried)
        self.emitter.emit(events.Layout, **told(tried, dtype))

    def end(self) -> int:
        """Runs it, and says how it ended in every place where someone looks."""
        try:
            outcome = self.run()
        except KeyboardInterrupt:
            outcome = _outcome("stopped", NOTHING_KEPT)
        except NothingToCompare as fault:
            outcome = _outcome(fault.cause, fault.text())
        except USER_FAULTS as fault:
            outcome = _outcome("bad_spec", str(fault))
        except Exception as error:  # noqa: BLE001  the border of the process: it becomes outcome.json and an event
            traceback.print_exc()
            text = Reason("certify.broken", {"kind": type(error).__name__, "problem": str(error)}).text()
            outcome = _outcome("internal", text, "the log holds the traceback")
        if outcome.reason not in (None, "stopped"):
            self.emitter.fail(outcome.reason or "internal", outcome.text, outcome.remedy)
        curves = [tried.curve for tried in self.tried if isinstance(tried, Reference | Finding)]
        self.emitter.emit(
            events.End,
            outcome="succeeded" if outcome.code == 0 else "stopped" if outcome.reason == "stopped" else "failed",
            steps=sum(len(curve.losses) for curve in curves),
            trained_tokens=0,
            seconds=time.monotonic() - self.began,
        )
        write_json(self.directory / "outcome.json", outcome)
        return outcome.code


def most_ranks_of(inputs: Inputs) -> int:
    """As many as the job has GPUs; on a CPU, whose ranks share a slot, two where it has as many cores."""
    if inputs.devices[0].startswith("gpu"):
        return len(inputs.devices)
    return max(inputs.ranks, min(RANKS_ON_A_CPU, len(os.sched_getaffinity(0))))


def inputs_for(spec: JobSpec, inputs: Inputs) -> Inputs:
    """Of what the job has, what a layout needs: as many of its GPUs as ranks, and all of its threads."""
    ranks = spec.parallel.devices
    threads = max(1, inputs.threads * inputs.ranks // ranks)
    return inputs.model_copy(update={"devices": inputs.devices[:ranks], "ranks": ranks, "threads": threads})


def _outcome(reason: FailureReason, text: str, remedy: str = "") -> OutcomeFile:
    return OutcomeFile(code=EXIT_CODES.get(reason, EXIT_CODES["internal"]), reason=reason, text=text, remedy=remedy)


def certify_attempt(directory: Path, trainer_argv: Sequence[str], layouts: Layouts = layouts) -> int:
    """Certifies the job in `directory` and returns the exit code that outcome.json holds."""
    (directory / "outcome.json").unlink(missing_ok=True)
    with Emitter(directory / "events.jsonl") as emitter:
        certifier = Certifier(directory, trainer_argv, emitter, layouts)

        def stop(*_: object) -> None:
            certifier.num_stops += 1

        # While a layout runs, `train_ranks` hears them instead and passes them on.
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        return certifier.end()


if __name__ == "__main__":
    sys.exit(certify_attempt(Path(sys.argv[-1]), sys.argv[1:-1]))
