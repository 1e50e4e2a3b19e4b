"""A certificate under a real supervisor: a trainer for each layout, one after the other, through every end that it can
have; and once with the real trainer."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from core import events
from core.certify import Certificate, Finding, Layout, layouts, read_certificate
from core.spec import JobSpec, parse_spec
from core.states import Outcome
from core.trial import Certify
from tests.engine import jobs
from tests.worker import script_trainer
from tests.worker.conftest import Host
from tests.worker.ledger import Ledger, LedgerAttempt, wait_until
from worker.certifier import Certifier, inputs_for, most_ranks_of
from worker.certify import as_json
from worker.engine.emit import Emitter
from worker.job_directory import EXIT_CODES, Inputs, write_json
from worker.processes import MARK, mark_of, marked
from worker.settings import TRAINER_ARGV

LAYOUTS = 8  # of a job by rows on one rank


@pytest.fixture
def one_core() -> Iterator[None]:
    """What is started meanwhile has room for one rank on its CPU."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


def certify(host: Host, notes: str, steps: int = 2) -> tuple[LedgerAttempt, Path]:
    """A job by rows: it has the fewest layouts."""
    data = (host.ledger.put_blob(b'{"text": "a row"}\n'),)
    spec = host.spec(notes, batch={"rows_per_step": 2})
    entry = host.ledger.dispatch(host.job, spec, data=data, trial=Certify(steps=steps))
    return entry, host.launch(entry)


def certificate_of(told: list[dict[str, Any]]) -> Certificate:
    read = read_certificate([events.Layout.model_validate({"seq": 1, "ts": 0.0, **data}) for data in told])
    assert read is not None
    return read


def test_each_layout_is_told_as_it_comes_and_a_different_one_is_no_failure(one_core: None, host: Host) -> None:
    entry, directory = certify(host, "steps=1 differs=layout-3 only=layout-4 then=refuse")
    host.wait_for_finish(entry)
    assert entry.finish is not None
    assert (entry.finish.outcome, entry.finish.artifacts) == (Outcome.SUCCEEDED, ())
    certificate = certificate_of(entry.of_kind("layout"))
    assert certificate.steps == 2 and len(certificate.references) == 1
    names = [layout.name for layout in layouts(JobSpec.model_validate(entry.spec), 1)]
    assert len(names) == LAYOUTS and names[0] == "the job as it is"
    assert [finding.name for finding in certificate.findings] == names[:4] + names[5:]
    assert [finding.name for finding in certificate.differing] == [names[3]]
    assert [run.name for run in certificate.not_run] == [
        names[4],
        "other modes and algorithms of packing",
        "several ranks, ZeRO 0 to 3",
    ]
    assert certificate.not_run[0].reason == "this model has no such attention" and not certificate.faults
    phases = [(data["done"], data["total"]) for data in entry.of_kind("phase") if data["name"] == "certify"]
    assert phases[0] == (0, LAYOUTS + 1) and phases[-1] == (LAYOUTS + 1, LAYOUTS + 1)
    (warning,) = entry.of_kind("warning")
    assert warning["text"] == certificate.verdict.text()
    assert json.loads((directory / "report.json").read_bytes()) == json.loads(json.dumps(as_json(certificate)))
    assert entry.of_kind("end")[0]["steps"] == 2 * LAYOUTS, "of the reference and all layouts but one"
    headings = [data["text"] for data in entry.of_kind("log") if data["text"].startswith("-- ")]
    assert headings == [f"-- {name}" for name in ("each sample alone, fp32", *names)]


def test_a_layout_that_ended_by_a_fault_fails_the_job_after_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "job"
    directory.mkdir()
    spec = parse_spec({"data": {"train": [{"dataset": "d"}]}, "notes": "steps=1 only=layout-1 then=segfault"})
    write_json(directory / "spec.json", spec)
    write_json(directory / "inputs.json", Inputs(model_path="m", model_name="m", data=(), trial=Certify()))
    monkeypatch.setenv(MARK, f"test.{os.getpid()}")
    with Emitter(directory / "events.jsonl") as emitter:
        certifier = Certifier(
            directory,
            (sys.executable, script_trainer.__file__),
            emitter,
            lambda spec, most_ranks: islice(layouts(spec, 1), 3),
        )
        assert certifier.end() == EXIT_CODES["internal"]
    certificate = Certificate.of("fp32", certifier.tried)
    (fault,) = certificate.faults
    assert len(certificate.findings) == 2 and not certificate.differing
    assert fault.cause == "killed" and "139" in fault.reason
    outcome = jobs.outcome_of(directory)
    assert outcome.reason == "internal"
    assert outcome.text.startswith(certificate.verdict.text()) and fault.name in outcome.text
    assert [event["text"] for event in jobs.events_of(directory, "failure")] == [outcome.text]


def test_where_the_reference_does_not_run_there_is_nothing_to_compare(host: Host) -> None:
    entry, _ = certify(host, "only=reference-0 then=exit:71")
    host.wait_for_finish(entry)
    assert entry.finish is not None
    assert (entry.finish.outcome, entry.finish.reason, entry.finish.exit_code) == (Outcome.FAILED, "oom", 71)
    assert "each sample alone, fp32 does not run" in entry.finish.text and not entry.of_kind("layout")


def test_a_cancelled_certificate_ends_with_the_step_that_is_under_way(host: Host) -> None:
    entry, directory = certify(host, "steps=100000 pause=0.05")
    wait_until((directory / "layouts/reference-0/pid-0").exists)
    wait_until(lambda: b'"step"' in (directory / "layouts/reference-0/events.jsonl").read_bytes())
    entry.desired = "cancel"
    host.wait_for_finish(entry)
    assert entry.finish is not None
    assert (entry.finish.outcome, entry.finish.exit_code) == (Outcome.STOPPED, EXIT_CODES["stopped"])
    assert "keeps nothing" in entry.finish.text and not entry.of_kind("layout")
    assert [folder.name for folder in (directory / "layouts").iterdir()] == ["reference-0"], "no other was begun"
    assert entry.of_kind("end")[0]["outcome"] == "stopped"


def test_a_certificate_dies_with_its_supervisor_and_so_does_its_trainer(host: Host) -> None:
    entry, directory = certify(host, "steps=100000")
    wait_until((directory / "layouts/reference-0/pid-0").exists)
    assert len(marked(mark_of(entry.ref))) == 2
    os.kill(host.supervisor_pid(), signal.SIGKILL)
    wait_until(lambda: not marked(mark_of(entry.ref)))
    assert host.adopt() == "lost"


def test_where_a_layouts_trainer_hangs_is_told(make_host: Callable[..., Host], ledger: Ledger) -> None:
    host = make_host(ledger, quiet_hang_s=4.0, stack_wait_s=1.0)
    entry, _ = certify(host, "only=reference-0 then=hang")
    host.wait_for_finish(entry)
    assert entry.finish is not None
    assert (entry.finish.outcome, entry.finish.reason) == (Outcome.LOST, "hang")
    assert "misbehave" in entry.finish.text


def test_a_layout_gets_the_devices_and_threads_that_the_job_has() -> None:
    spec = JobSpec.model_validate({"data": {"train": [{"dataset": "d"}]}, "parallel": {"devices": 2}})
    common: dict[str, Any] = {"model_path": "m", "model_name": "m", "data": ()}
    gpus = Inputs(**common, devices=("gpu1", "gpu2", "gpu3", "gpu4"), ranks=4, threads=3)
    assert most_ranks_of(gpus) == 4
    assert inputs_for(spec, gpus).model_dump(include={"devices", "ranks", "threads"}) == {
        "devices": ("gpu1", "gpu2"),
        "ranks": 2,
        "threads": 6,
    }
    slot = Inputs(**common, devices=("cpu1",), threads=1)
    assert most_ranks_of(slot) == min(2, len(os.sched_getaffinity(0)))
    assert inputs_for(spec, slot).devices == ("cpu1",) and inputs_for(spec, slot).threads == 1


def test_the_real_trainer_makes_the_same_steps_alone_and_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = jobs.make_model(tmp_path / "model"), jobs.make_data(tmp_path / "data.jsonl")
    job = jobs.make_job(tmp_path / "job", model, data, trial=Certify(steps=2))
    monkeypatch.setenv(MARK, f"test.{os.getpid()}")

    def rows_of_two(spec: JobSpec, most_ranks: int) -> Iterator[Layout]:
        yield from (layout for layout in layouts(spec, most_ranks) if "2 rows a pass" in layout.name)

    with Emitter(job / "events.jsonl") as emitter:
        certifier = Certifier(job, TRAINER_ARGV, emitter, rows_of_two)
        assert certifier.end() == 0, jobs.outcome_of(job).text
    certificate = certificate_of([event for event in jobs.events_of(job) if event["kind"] == "layout"])
    assert certificate == Certificate.of("fp32", certifier.tried)
    (found,), (alone,) = certificate.findings, certificate.references
    assert isinstance(found, Finding) and found.holds and certificate.verdict.code == "certify.equal"
    assert found.curve.most_segments_in_a_row > 1 == alone.curve.most_segments_in_a_row
    assert len(found.curve.losses) == 2 and found.curve.losses[0] != found.curve.losses[1]
