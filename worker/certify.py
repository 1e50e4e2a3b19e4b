"""The first steps of a job in every layout, and how far their losses differ: `pegbox certify -f spec.yaml` by hand, and
under a supervisor as a trial (worker.certifier).

Each layout is a real trainer in a directory of its own, under torchrun where it has several ranks, that makes so many
steps and stops (`LayoutTrial`). What is claimed and what counts as equal is core.certify's. A layout that this model
or this machine can't run is listed with the reason; it refutes nothing.
"""

import json
import math
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from core.certify import (
    ALONE,
    Certificate,
    Curve,
    Layout,
    NotRun,
    Reference,
    Tried,
    certified,
    compare,
    deviation_text,
    layouts,
    left_out,
    references,
)
from core.errors import USER_FAULTS, Reason, UserError
from core.events import FailureReason, finite
from core.spec import JobSpec
from worker.by_hand import gather, own_devices, train_ranks, visible_gpus
from worker.job_directory import EXIT_CODES, Inputs, LayoutTrial, read_outcome, write_json
from worker.settings import WorkerSettings

# Before a trainer has its handlers, what asks it to stop ends it.
STOPPED = (EXIT_CODES["stopped"], 128 + signal.SIGTERM, 128 + signal.SIGINT)


class NothingToCompare(UserError):
    """certify.failed: the job does not run even with each sample alone, or not as it is."""

    def __init__(self, run: NotRun) -> None:
        super().__init__("certify.failed", layout=run.name, reason=run.reason)
        self.cause = run.cause


@dataclass(frozen=True)
class Ground:
    """Where layouts are run, and by what."""

    out: Path  # each in a folder below
    steps: int
    inputs_of: Callable[[JobSpec], Inputs]  # where all that a spec names lies; raises UserError for what doesn't
    train: Callable[[Path], int]  # runs the ranks of a prepared directory to their end and returns the exit code


def certify(spec: JobSpec, out: Path, settings: WorkerSettings, *, steps: int, most_ranks: int) -> Certificate:
    """By hand: runs all layouts, one after the other, in folders of `out`. Raises NothingToCompare."""
    ground = Ground(
        out,
        steps,
        lambda spec: gather(spec, settings.model_roots, settings.cache_dir),
        partial(train_ranks, is_quiet=True),
    )
    dtype = own_dtype(spec, lambda: own_devices(1)[0])
    tried = try_layouts(spec, dtype, tuple(layouts(spec, most_ranks)), ground, before=_announce)
    return Certificate.of(dtype, [*tried, *left_out(spec, most_ranks)])


def try_layouts(
    spec: JobSpec, dtype: str, ways: Iterable[Layout], ground: Ground, before: Callable[[str], None]
) -> Iterator[Tried]:
    """The references, then the `ways`; `before` hears the name of each. Raises NothingToCompare."""
    spec = certified(spec, dtype)
    curves: list[Curve] = []
    for number, layout in enumerate(references(dtype)):
        before(layout.name)
        curve = _run(layout, spec, f"reference-{number}", ground)
        if isinstance(curve, Curve) and not all(map(math.isfinite, (*curve.losses, *curve.grad_norms))):
            curve = NotRun(layout.name, Reason("certify.no_number", {}).text(), "nan")
        if isinstance(curve, NotRun):
            raise NothingToCompare(curve)
        curves.append(curve)
        yield Reference(layout.name, curve)
    fp32, *rounded = curves
    for number, layout in enumerate(ways):
        before(layout.name)
        curve = _run(layout, spec, f"layout-{number}", ground)
        if isinstance(curve, Curve):
            yield compare(layout.name, curve, fp32, rounded[0] if rounded else None)
        elif layout.changes:
            yield curve
        else:
            raise NothingToCompare(curve)


def most_ranks_here() -> int:
    """All GPUs that may be used; on a CPU two processes."""
    num_gpus = len(visible_gpus())
    return num_gpus or 2


def own_dtype(spec: JobSpec, device: Callable[[], str]) -> str:
    """The job's own arithmetic, on the device that is asked for where it depends on one."""
    if spec.compute.dtype != "auto":
        return spec.compute.dtype
    name = device()
    if not name.startswith("gpu"):
        return "fp32"
    # In a process of its own: to ask a GPU takes half a gigabyte of it, for as long as the one who asked lives.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_auto_dtype, name).result()


def _auto_dtype(device: str) -> str:
    from core.presets import auto_dtype
    from worker.engine.device import find_device

    try:
        return auto_dtype(find_device(device)[1])[0]
    except UserError:  # it can't be used, and the first layout says why
        return "fp32"


def _run(layout: Layout, spec: JobSpec, folder: str, ground: Ground) -> Curve | NotRun:
    """Raises KeyboardInterrupt where somebody has stopped it."""
    directory = ground.out / folder
    try:
        spec = layout.apply(spec)
        inputs = ground.inputs_of(spec)
    except USER_FAULTS as fault:
        return NotRun(layout.name, str(fault), "bad_spec")
    directory.mkdir(parents=True)
    write_json(directory / "spec.json", spec)
    trial = LayoutTrial(steps=ground.steps, is_alone=layout.is_alone)
    write_json(directory / "inputs.json", inputs.model_copy(update={"trial": trial}))
    code = ground.train(directory)
    if code in STOPPED:
        raise KeyboardInterrupt
    if code == 0:
        return Curve.model_validate_json((directory / "trial.json").read_bytes())
    outcome = read_outcome(directory)
    if outcome is None:
        text = Reason("certify.unexplained", {"code": code, "directory": str(directory)}).text()
        return NotRun(layout.name, text, _cause_of(code))
    return NotRun(layout.name, outcome.text, outcome.reason or "internal")


def _cause_of(code: int) -> FailureReason:
    return "killed" if code > 128 else "internal"


def _announce(name: str) -> None:
    sys.stderr.write(f"{name} ...\n")


# -- shown -----------------------------------------------------------------------------------------------------------


def as_json(certificate: Certificate) -> dict[str, Any]:
    return {
        "holds": certificate.holds,
        "is_telling": certificate.is_telling,
        "dtype": certificate.dtype,
        "steps": certificate.steps,
        "reference": certificate.references[0].curve.model_dump(mode="json"),
        "layouts": [
            {
                "name": finding.name,
                "holds": finding.holds,
                "loss_deviation": finite(finding.loss_deviation),
                "norm_deviation": finite(finding.norm_deviation),
                "allowed": finding.allowed,
                **finding.curve.model_dump(mode="json"),
            }
            for finding in certificate.findings
        ],
        "not_run": [
            {"name": run.name, "reason": run.reason, "cause": run.cause, "is_fault": run.is_fault}
            for run in certificate.not_run
        ],
    }


def write_certificate(certificate: Certificate, as_: str) -> None:
    """On stdout, as a table or as one JSON object."""
    if as_ == "json":
        sys.stdout.write(json.dumps(as_json(certificate), indent=1) + "\n")
        return
    # rich takes a pipe for a terminal of 80 columns, in which the numbers would be cut off.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    table = Table(title=f"{certificate.steps} steps in {certificate.dtype}, beside {ALONE} (fp32, eager, one device)")
    table.add_column("layout", no_wrap=True)
    for column in ("ranks", "slots", "in a row", "loss", "norm", "allowed"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in _rows(certificate):
        table.add_row(*row)
    console.print(table)
    for run in certificate.not_run:
        console.print(f"{'FAILED' if run.is_fault else 'not run'}: {run.name}: {run.reason}", soft_wrap=True)
    console.print(certificate.verdict.text(), soft_wrap=True)


def _rows(certificate: Certificate) -> Iterator[tuple[str, ...]]:
    for finding in certificate.findings:
        curve = finding.curve
        yield (
            finding.name,
            str(curve.ranks),
            f"{curve.slots:,}",
            str(curve.most_segments_in_a_row),
            deviation_text(finding.loss_deviation),
            deviation_text(finding.norm_deviation),
            deviation_text(finding.allowed),
            "equal" if finding.holds else "DIFFERS",
        )
