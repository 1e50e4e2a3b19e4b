"""`pegbox certify -f spec.yaml`: the first steps of one's own job in every layout, and how far their losses differ.

Each layout is a real trainer in a directory of its own, under torchrun where it has several ranks, that makes so many
steps and stops (`LayoutTrial`). What is claimed and what counts as equal is core.certify's. A layout that this model
or this machine can't run is listed with the reason; it refutes nothing.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from core.certify import ALONE, Curve, Finding, Layout, certified, compare, layouts, references
from core.errors import USER_FAULTS, UserError
from core.spec import JobSpec
from worker.by_hand import gather, own_devices, train_ranks, visible_gpus
from worker.job_directory import EXIT_CODES, LayoutTrial, read_outcome, write_json
from worker.settings import WorkerSettings

# A model or a machine that can't compute a layout refutes nothing.
RULED_OUT = ("bad_spec", "oom")


@dataclass(frozen=True)
class NotRun:
    name: str
    reason: str
    is_fault: bool  # of ours: neither the model nor the machine rules it out


@dataclass(frozen=True)
class Certificate:
    dtype: str
    steps: int
    reference: Curve
    findings: tuple[Finding, ...]
    not_run: tuple[NotRun, ...]

    @property
    def holds(self) -> bool:
        return all(finding.holds for finding in self.findings) and not any(run.is_fault for run in self.not_run)

    @property
    def is_telling(self) -> bool:
        """Whether any layout put several samples into a row: without, nothing was asked."""
        return any(finding.curve.most_segments_in_a_row > 1 for finding in self.findings)


def certify(spec: JobSpec, out: Path, settings: WorkerSettings, *, steps: int, most_ranks: int) -> Certificate:
    """Runs all layouts, one after the other, in folders of `out`.

    Raises UserError certify.failed where the job does not run even with each sample alone, or not as it is."""
    dtype = _own_dtype(spec)
    spec = certified(spec, dtype)
    curves: list[Curve] = []
    for number, layout in enumerate(references(dtype)):
        curve = _run(layout, spec, out / f"reference-{number}", settings, steps)
        if isinstance(curve, NotRun):
            raise UserError("certify.failed", layout=layout.name, reason=curve.reason)
        curves.append(curve)
    fp32, *rounded = curves
    findings, not_run = [], []
    for number, layout in enumerate(layouts(spec, most_ranks)):
        _say(f"{layout.name} ...")
        curve = _run(layout, spec, out / f"layout-{number}", settings, steps)
        if isinstance(curve, NotRun):
            if not layout.changes:
                raise UserError("certify.failed", layout=layout.name, reason=curve.reason)
            not_run.append(curve)
        else:
            findings.append(compare(layout.name, curve, fp32, rounded[0] if rounded else None))
    return Certificate(dtype, steps, fp32, tuple(findings), tuple(not_run))


def most_ranks_here() -> int:
    """All GPUs that may be used; on a CPU two processes."""
    num_gpus = len(visible_gpus())
    return num_gpus or 2


def _own_dtype(spec: JobSpec) -> str:
    if spec.compute.dtype != "auto":
        return spec.compute.dtype
    device = own_devices(1)[0]
    if not device.startswith("gpu"):
        return "fp32"
    from core.presets import auto_dtype
    from worker.engine.device import find_device

    return auto_dtype(find_device(device)[1])[0]


def _run(layout: Layout, spec: JobSpec, directory: Path, settings: WorkerSettings, steps: int) -> Curve | NotRun:
    try:
        spec = layout.apply(spec)
        inputs = gather(spec, settings.model_roots, settings.cache_dir)
    except USER_FAULTS as fault:
        return NotRun(layout.name, str(fault), is_fault=False)
    directory.mkdir(parents=True)
    write_json(directory / "spec.json", spec)
    trial = LayoutTrial(steps=steps, is_alone=layout.is_alone)
    write_json(directory / "inputs.json", inputs.model_copy(update={"trial": trial}))
    code = train_ranks(directory, is_quiet=True)
    if code == EXIT_CODES["stopped"]:
        raise KeyboardInterrupt
    if code == 0:
        return Curve.model_validate_json((directory / "trial.json").read_bytes())
    outcome = read_outcome(directory)
    if outcome is None:
        return NotRun(layout.name, f"it ended with {code}; {directory} has its log", is_fault=True)
    return NotRun(layout.name, outcome.text, is_fault=outcome.reason not in RULED_OUT)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


# -- shown -----------------------------------------------------------------------------------------------------------


def as_json(certificate: Certificate) -> dict[str, Any]:
    return {
        "holds": certificate.holds,
        "is_telling": certificate.is_telling,
        "dtype": certificate.dtype,
        "steps": certificate.steps,
        "reference": certificate.reference.model_dump(mode="json"),
        "layouts": [
            {
                "name": finding.name,
                "holds": finding.holds,
                "loss_deviation": finding.loss_deviation,
                "norm_deviation": finding.norm_deviation,
                "allowed": finding.allowed,
                **finding.curve.model_dump(mode="json"),
            }
            for finding in certificate.findings
        ],
        "not_run": [{"name": run.name, "reason": run.reason, "is_fault": run.is_fault} for run in certificate.not_run],
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
    console.print(_verdict(certificate), soft_wrap=True)


def _rows(certificate: Certificate) -> Iterator[tuple[str, ...]]:
    for finding in certificate.findings:
        curve = finding.curve
        yield (
            finding.name,
            str(curve.ranks),
            f"{curve.slots:,}",
            str(curve.most_segments_in_a_row),
            f"{finding.loss_deviation:.1e}",
            f"{finding.norm_deviation:.1e}",
            f"{finding.allowed:.1e}",
            "equal" if finding.holds else "DIFFERS",
        )


def _verdict(certificate: Certificate) -> str:
    if not certificate.is_telling:
        return "No layout put two samples into one row, so packing was not tried: raise packing.row_length."
    worst = max(certificate.findings, key=lambda finding: max(finding.loss_deviation, finding.norm_deviation))
    largest = f"the largest deviation is {max(worst.loss_deviation, worst.norm_deviation):.1e}, of: {worst.name}"
    if certificate.holds:
        return f"All {len(certificate.findings)} layouts make the same steps; {largest}."
    failed = [finding.name for finding in certificate.findings if not finding.holds]
    failed += [run.name for run in certificate.not_run if run.is_fault]
    return f"NOT the same steps: {'; '.join(failed)}; {largest}."
