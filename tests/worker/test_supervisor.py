"""A real supervisor with a real small trainer under it, through every end that an attempt can have."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core import wire
from core.states import Outcome
from core.trial import DryRun, RateProbe
from tests.worker.conftest import Host
from tests.worker.ledger import Ledger, LedgerAttempt, wait_until
from worker import tasks
from worker.adoption import live_attempts, unfinished_attempts
from worker.agent import preempt_all
from worker.delivery import EXIT, FINISHED
from worker.job_directory import ExitFile, Inputs
from worker.processes import mark_of, marked


def trainer_pid(directory: Path) -> int:
    return int(wait_until(lambda: (directory / "pid-0").exists() and (directory / "pid-0").read_text()))


def test_a_job_runs_to_success_and_its_artifacts_arrive(host: Host) -> None:
    entry, directory = host.start("steps=20")
    host.wait_for_finish(entry)
    assert entry.finish.outcome == Outcome.SUCCEEDED
    assert entry.finish.exit_code == 0
    assert entry.steps() == list(range(1, 21))
    assert [event.seq for event in entry.events] == list(range(1, entry.finish.final_seq + 1))
    weights = b"weights of a job"
    assert [(each.name, each.bytes) for each in entry.finish.artifacts] == [
        ("adapter_model.safetensors", len(weights)),
        ("deep/empty.json", 0),
    ]
    assert entry.uploads[hashlib.sha256(weights).hexdigest()] == weights
    assert ExitFile.model_validate_json((directory / EXIT).read_bytes()).outcome == Outcome.SUCCEEDED
    assert json.loads((directory / FINISHED).read_bytes()) == {"state": "succeeded"}
    assert not unfinished_attempts(host.settings)
    inputs = json.loads((directory / "inputs.json").read_bytes())
    assert inputs["model_path"].endswith("models/demo/tiny-llama")
    (file,) = inputs["data"]
    assert Path(file["path"]).read_bytes() == b'{"text": "a row"}\n'


def test_the_training_outlives_whoever_launched_it(host: Host) -> None:
    entry = host.dispatch("steps=100 pause=0.02")
    code = (
        "import sys; from pathlib import Path; from core.wire import AttemptRef; from worker import tasks;"
        "from worker.settings import WorkerSettings;"
        "print(tasks.launch(WorkerSettings.load(Path(sys.argv[1])), AttemptRef(job=sys.argv[2], attempt=1, fence=1)))"
    )
    argv = [sys.executable, "-c", code, str(host.settings.data_dir), host.job]
    launched = subprocess.run(argv, check=False, capture_output=True, text=True, start_new_session=True, timeout=30)
    assert launched.stdout == "claimed\n", launched.stderr
    supervisor = host.supervisor_pid()
    assert os.getsid(supervisor) != supervisor, "a session leader could get a terminal"
    host.wait_for_finish(entry)
    assert entry.finish.outcome == Outcome.SUCCEEDED


def test_several_deliveries_of_a_launch_make_one_supervisor(host: Host) -> None:
    entry = host.dispatch("steps=100 pause=0.02")
    answers = [tasks.launch(host.settings, entry.ref) for _ in range(3)]
    assert answers[0] == "claimed"
    assert answers[1:] == ["refused: it has a supervisor on this host"] * 2
    assert entry.claims == 1
    host.wait_for_finish(entry)
    assert tasks.launch(host.settings, entry.ref).startswith("refused")
    assert entry.num_finishes == 1


def test_a_claim_that_is_refused_leaves_no_directory(host: Host) -> None:
    entry = host.dispatch()
    entry.current_fence = 2
    assert tasks.launch(host.settings, entry.ref).startswith("refused: POST")
    assert entry.claims == 0
    assert not host.settings.attempt_dir(entry.ref).exists()
    assert not live_attempts(host.settings)


def test_a_killed_trainer_is_lost_and_leaves_nothing_behind(host: Host) -> None:
    entry, directory = host.start("steps=10000 at=3 then=grandchild")
    wait_until(lambda: len(marked(mark_of(entry.ref))) == 2)  # the trainer and its grandchild
    os.kill(trainer_pid(directory), signal.SIGKILL)
    host.wait_for_finish(entry)
    assert entry.finish.outcome == Outcome.LOST
    assert entry.finish.reason == "killed"
    assert entry.finish.exit_code == 137
    assert marked(mark_of(entry.ref)) == []
    assert entry.of_kind("failure")[0]["reason"] == "killed"


def test_a_killed_supervisor_takes_its_trainer_along_and_the_agent_reports_it_lost(host: Host) -> None:
    entry, directory = host.start("steps=10000 at=3 then=grandchild")
    pid = trainer_pid(directory)
    wait_until(lambda: entry.acked_seq > 5 and len(marked(mark_of(entry.ref))) == 2)
    os.kill(host.supervisor_pid(), signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert not live_attempts(host.settings)
    assert len(marked(mark_of(entry.ref))) == 1, "the grandchild is still there"
    assert host.adopt() == "lost"
    assert marked(mark_of(entry.ref)) == []
    assert entry.finish.outcome == Outcome.LOST
    assert entry.steps() == list(range(1, len(entry.steps()) + 1)), "no step twice, none missing"
    assert len(entry.steps()) == (directory / "events.jsonl").read_bytes().count(b'"kind": "step"')
    assert not unfinished_attempts(host.settings)


def test_a_supervisor_killed_after_exit_json_is_finished_by_the_agent(host: Host) -> None:
    entry, directory = host.start("steps=10")
    # The server refuses nothing but is away when the end has to be told.
    wait_until(lambda: entry.claims)
    host.ledger.stop()
    wait_until((directory / EXIT).exists)
    os.kill(host.supervisor_pid(), signal.SIGKILL)
    wait_until(lambda: not live_attempts(host.settings))
    assert entry.finish is None
    host.ledger.start()
    assert host.adopt() == "succeeded"
    assert entry.finish.outcome == Outcome.SUCCEEDED
    assert len(entry.finish.artifacts) == 2
    assert entry.steps() == list(range(1, 11))


def test_nothing_is_lost_while_the_server_is_away(host: Host) -> None:
    entry, directory = host.start("steps=150 pause=0.02")
    wait_until(lambda: len(entry.steps()) > 10)
    host.ledger.stop()
    seen = len(entry.steps())
    wait_until(lambda: (directory / "journal.jsonl").read_bytes().count(b'"kind":"step"') > seen + 50)
    assert len(entry.steps()) == seen, "the server was away"
    host.ledger.start()
    host.wait_for_finish(entry)
    assert entry.finish.outcome == Outcome.SUCCEEDED
    assert entry.steps() == list(range(1, 151))


def test_a_server_that_moved_is_found_again(host: Host) -> None:
    entry, _ = host.start("steps=100 pause=0.02")
    wait_until(entry.steps)
    host.ledger.stop()
    elsewhere = Ledger()
    elsewhere.attempts = host.ledger.attempts
    elsewhere.start()
    try:
        assert elsewhere.url != host.ledger.url
        host.settings.model_copy(update={"server": elsewhere.url}).save()
        host.wait_for_finish(entry)
    finally:
        elsewhere.stop()
    assert entry.steps() == list(range(1, 101))


def test_stop_ends_with_a_checkpoint(host: Host) -> None:
    entry, _directory = host.start("steps=100000")
    wait_until(entry.steps)
    entry.desired = "stop"
    host.wait_for_finish(entry)
    assert entry.finish.outcome == Outcome.STOPPED
    assert entry.finish.reason == "stopped"
    assert entry.finish.exit_code == 75
    (checkpoint,) = entry.of_kind("checkpoint")
    assert Path(checkpoint["path"]).exists()
    assert not entry.of_kind("failure")


def test_a_trainer_that_ignores_term_is_killed_after_the_grace(make_host: Callable[..., Host], ledger: Ledger) -> None:
    host = make_host(ledger, stop_grace_s=0.5)
    entry, _ = host.start("steps=100000 term=ignore")
    wait_until(entry.steps)
    entry.desired = "cancel"
    host.wait_for_finish(entry)
    assert entry.finish.outcome == Outcome.STOPPED
    assert entry.finish.exit_code == 137
    assert "0.5 s" in entry.finish.text


def test_going_down_in_good_order_preempts_what_runs(host: Host) -> None:
    entry, _ = host.start("steps=100000")
    wait_until(entry.steps)
    assert preempt_all(host.settings.data_dir)
    assert entry.finish.outcome == Outcome.PREEMPTED
    assert entry.finish.reason == "preempted"
    assert entry.of_kind("checkpoint")
    assert not live_attempts(host.settings)


def test_going_down_without_a_server_leaves_the_end_to_the_next_start(host: Host) -> None:
    entry, directory = host.start("steps=100000")
    wait_until(entry.steps)
    host.ledger.stop()
    assert not preempt_all(host.settings.data_dir, timeout_s=2)
    assert not live_attempts(host.settings)
    assert ExitFile.model_validate_json((directory / EXIT).read_bytes()).outcome == Outcome.PREEMPTED
    host.ledger.start()
    assert host.adopt() == "preempted"
    assert entry.finish.outcome == Outcome.PREEMPTED


def test_an_attempt_whose_fence_is_old_is_ended_and_its_events_are_kept(host: Host) -> None:
    entry, directory = host.start("steps=100000")
    wait_until(entry.steps)
    entry.current_fence = 2
    wait_until(lambda: not live_attempts(host.settings))
    assert entry.finish is None
    assert not entry.uploads
    assert json.loads((directory / FINISHED).read_bytes()) == {"state": "stale"}
    assert len(entry.steps()) == (directory / "events.jsonl").read_bytes().count(b'"kind": "step"')


def test_a_requested_checkpoint_is_written_and_the_training_goes_on(host: Host) -> None:
    entry, _ = host.start("steps=200 pause=0.02")
    wait_until(entry.steps)
    entry.checkpoint_request = 1
    host.wait_for_finish(entry)
    assert len(entry.of_kind("checkpoint")) == 1
    assert entry.finish.outcome == Outcome.SUCCEEDED


def test_the_next_attempt_resumes_from_the_newest_checkpoint(host: Host) -> None:
    first, directory = host.start("steps=100000")
    wait_until(lambda: len(first.steps()) > 3)
    first.desired = "stop"
    host.wait_for_finish(first)
    (checkpoint,) = first.of_kind("checkpoint")
    (directory / "checkpoints" / ".tmp-9-half").mkdir()
    step = checkpoint["step"]
    second = host.dispatch(f"steps={step + 5}", attempt=2, fence=2, resume_from=(host.job,))
    host.launch(second)
    host.wait_for_finish(second)
    assert second.finish.outcome == Outcome.SUCCEEDED
    assert second.steps() == list(range(step + 1, step + 6))


@pytest.mark.parametrize(
    ("notes", "outcome", "reason", "exit_code", "words"),
    [
        ("at=3 then=exit:71", Outcome.FAILED, "oom", 71, "out of memory"),
        ("at=3 then=raise", Outcome.FAILED, "internal", 1, "a bug in the trainer"),
        ("at=3 then=segfault", Outcome.FAILED, "internal", 139, "SIGSEGV"),
        ("end=none", Outcome.FAILED, "internal", 0, "end event"),
        ("result=none", Outcome.FAILED, "internal", 0, "result/"),
    ],
)
def test_each_way_to_fail_is_told_apart(
    host: Host, notes: str, outcome: Outcome, reason: str, exit_code: int, words: str
) -> None:
    entry, _ = host.start(f"steps=5 {notes}")
    host.wait_for_finish(entry)
    assert (entry.finish.outcome, entry.finish.reason, entry.finish.exit_code) == (outcome, reason, exit_code)
    assert words in entry.finish.text
    assert len(entry.of_kind("failure")) == 1, "the trainer's own, or the supervisor's"
    assert not entry.finish.artifacts


def test_a_silent_trainer_is_killed_as_hung(make_host: Callable[..., Host], ledger: Ledger) -> None:
    host = make_host(ledger, hang_s=1.0)
    entry, _ = host.start("steps=100 at=3 then=hang")
    host.wait_for_finish(entry)
    assert entry.finish.outcome == Outcome.LOST
    assert entry.finish.reason == "hang"
    assert entry.steps() == [1, 2, 3]
    assert re.search(r"it stood in misbehave \(script_trainer.py:\d+\), called by main", entry.finish.text)
    assert any("in misbehave" in log["text"] for log in entry.of_kind("log")), "the whole stack is in the log"


def test_a_hang_before_the_first_step_has_a_patience_of_its_own(make_host: Callable[..., Host], ledger: Ledger) -> None:
    host = make_host(ledger, quiet_hang_s=3.0)
    entry, _ = host.start("at=0 then=hang")
    host.wait_for_finish(entry)
    assert (entry.finish.outcome, entry.finish.reason) == (Outcome.LOST, "hang")
    assert entry.of_kind("phase")[-1]["name"] == "load_model" and not entry.steps()


def test_output_is_a_sign_of_life_only_while_no_steps_are_made(make_host: Callable[..., Host], ledger: Ledger) -> None:
    host = make_host(ledger, hang_s=1.0, quiet_hang_s=5.0)
    # Chatting for longer than either patience before the first step, and then for ever after the third.
    entry, _ = host.start("chat=6 at=3 then=chat")
    host.wait_for_finish(entry)
    assert entry.finish.reason == "hang"
    assert entry.steps() == [1, 2, 3]
    assert "in misbehave" in entry.finish.text


def with_two_ranks(host: Host, notes: str) -> tuple[LedgerAttempt, Path]:
    entry = host.dispatch(notes)
    entry.spec["parallel"] = {"devices": 2}
    return entry, host.launch(entry)


def texts_of(entry: LedgerAttempt, rank: int) -> list[str]:
    return [log["text"] for log in entry.of_kind("log") if log["rank"] == rank]


def test_ranks_share_a_slot_print_each_and_are_told_all(host: Host) -> None:
    entry, directory = with_two_ranks(host, "steps=100000")
    wait_until(entry.steps)
    assert len(marked(mark_of(entry.ref))) == 3, "torchrun and two ranks"
    inputs = Inputs.model_validate_json((directory / "inputs.json").read_bytes())
    assert (inputs.ranks, inputs.devices) == (2, ("cpu0",))
    assert inputs.cache_dir == str(host.settings.cache_dir)
    environment = json.loads((directory / "environ.json").read_text())
    assert environment["OMP_NUM_THREADS"] == str(inputs.threads)
    entry.checkpoint_request = 1
    wait_until(lambda: len(texts_of(entry, 0)) > 1 and len(texts_of(entry, 1)) > 1)
    entry.desired = "stop"
    host.wait_for_finish(entry)
    assert (entry.finish.outcome, entry.finish.exit_code) == (Outcome.STOPPED, 75)
    assert len(entry.of_kind("checkpoint")) == 2
    for rank in (0, 1):
        texts = texts_of(entry, rank)
        assert texts[0] == f"rank {rank} begins" and len(texts) == 3, "begun, a checkpoint asked for, and the last"
        assert all(text.startswith(f"rank {rank} saves") for text in texts[1:])
    launcher_log = (directory / "trainer.log").read_text()
    assert "ChildFailedError" in launcher_log, "torchrun's own words stay on the host"
    assert "death signal" not in launcher_log, "it was never told to stop itself"


def test_one_killed_rank_ends_all_and_is_named(host: Host) -> None:
    entry, directory = with_two_ranks(host, "steps=100000 at=2 then=grandchild")
    # torchrun, two ranks and a grandchild, which has RANK set, too
    wait_until(lambda: len(entry.steps()) > 3 and len(marked(mark_of(entry.ref))) == 4)
    os.kill(int((directory / "pid-1").read_text()), signal.SIGKILL)
    host.wait_for_finish(entry)
    assert json.loads((directory / "outcome.json").read_text())["code"] == 75, "rank 0 took torchrun's TERM for a stop"
    assert (entry.finish.outcome, entry.finish.reason, entry.finish.exit_code) == (Outcome.LOST, "killed", 137)
    assert "rank 1 was ended by SIGKILL" in entry.finish.text
    assert [failure["reason"] for failure in entry.of_kind("failure")] == ["killed"]
    assert marked(mark_of(entry.ref)) == []


def test_ranks_die_with_their_supervisor_by_the_kernels_hand(host: Host) -> None:
    entry, directory = with_two_ranks(host, "steps=100000")
    wait_until(entry.steps)
    assert (directory / "pid-1").exists() and len(marked(mark_of(entry.ref))) == 3
    os.kill(host.supervisor_pid(), signal.SIGKILL)
    wait_until(lambda: not marked(mark_of(entry.ref)))
    assert host.adopt() == "lost"


def test_a_stop_before_there_are_ranks_ends_early(host: Host) -> None:
    entry, directory = with_two_ranks(host, "steps=100000")
    wait_until((directory / "trainer.log").exists)  # torchrun is at its imports
    entry.desired = "stop"
    host.wait_for_finish(entry)
    assert (entry.finish.outcome, entry.finish.reason) == (Outcome.STOPPED, "stopped")
    assert not entry.steps(), "it was told before it began"
    assert "before the trainer was ready" in entry.finish.text


def test_where_each_rank_hangs_is_told(make_host: Callable[..., Host], ledger: Ledger) -> None:
    host = make_host(ledger, hang_s=1.0)
    entry, _ = with_two_ranks(host, "steps=100000 at=3 then=hang")
    host.wait_for_finish(entry)
    assert (entry.finish.outcome, entry.finish.reason) == (Outcome.LOST, "hang")
    assert re.search(r"rank 0 stood in misbehave .*; rank 1 stood in main ", entry.finish.text)
    assert any("in misbehave" in text for text in texts_of(entry, 0))
    assert any("in main" in text for text in texts_of(entry, 1))


def test_a_trial_succeeds_with_its_report_and_uploads_nothing(host: Host) -> None:
    trial = RateProbe(rates=(1e-4, 1e-3), steps=4)
    entry, directory = host.start("steps=3", trial=trial)
    host.wait_for_finish(entry)
    assert Inputs.model_validate_json((directory / "inputs.json").read_bytes()).trial == trial
    assert entry.finish is not None and entry.finish.outcome == Outcome.SUCCEEDED
    assert entry.finish.artifacts == () and not entry.uploads and not (directory / "result").exists()
    assert "upload" not in [phase["name"] for phase in entry.of_kind("phase")]


def test_a_trial_without_a_report_is_none(host: Host) -> None:
    entry, _ = host.start("steps=3 report=none", trial=DryRun())
    host.wait_for_finish(entry)
    assert entry.finish is not None and entry.finish.outcome == Outcome.FAILED
    assert "report.json" in entry.finish.text


def test_a_spec_with_an_unknown_key_fails_before_anything_starts(host: Host) -> None:
    entry = host.dispatch()
    entry.spec["learning_rat"] = 1
    host.launch(entry)
    host.wait_for_finish(entry)
    assert (entry.finish.outcome, entry.finish.reason, entry.finish.exit_code) == (Outcome.FAILED, "bad_spec", 65)
    assert "learning_rat" in entry.finish.text


def test_a_model_that_this_host_lacks_is_named(host: Host) -> None:
    entry = host.dispatch()
    entry.spec["model"] = {"base": "nobody/nothing"}
    host.launch(entry)
    host.wait_for_finish(entry)
    assert entry.finish.reason == "bad_spec"
    assert "nobody/nothing" in entry.finish.text


def test_the_adapter_of_a_job_is_laid_out_for_the_trainer(host: Host) -> None:
    entry = host.dispatch("steps=2", adapter=tuple(host.ledger.put_adapter_file(name) for name in wire.ADAPTER_FILES))
    entry.spec["model"] = {"base": "demo/tiny-llama", "adapter": "job_before"}
    directory = host.launch(entry)
    host.wait_for_finish(entry)
    assert entry.finish.outcome == Outcome.SUCCEEDED
    folder = Path(json.loads((directory / "inputs.json").read_bytes())["adapter_path"])
    assert folder == directory / "adapter"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "adapter_config.json": b"adapter_config.json of job_before",
        "adapter_model.safetensors": b"adapter_model.safetensors of job_before",
    }


def test_an_adapter_that_the_server_lost_is_named(host: Host) -> None:
    entry = host.dispatch("steps=2")
    entry.spec["model"] = {"base": "demo/tiny-llama", "adapter": "job_before"}
    host.launch(entry)
    host.wait_for_finish(entry)
    assert (entry.finish.outcome, entry.finish.reason) == (Outcome.FAILED, "bad_spec")
    assert "no longer has the adapter of job job_before" in entry.finish.text


def test_output_reaches_the_log_clean_and_a_flood_is_counted(
    make_host: Callable[..., Host], ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-token-value")
    host = make_host(ledger)
    entry, directory = host.start("steps=60 pause=0.02 at=2 then=print:3000")
    host.wait_for_finish(entry)
    texts = [log["text"] for log in entry.of_kind("log")]
    assert texts[:2] == ["red and bell", "100 %"]
    assert texts[2] == "[hidden]"
    assert texts[3].endswith("[cut, 5000 characters]")
    dropped = [text for text in texts if text.startswith("dropped ")]
    assert dropped, "3,000 lines are above the limit"
    num_dropped = sum(int(text.split()[1]) for text in dropped)
    assert len(texts) - len(dropped) + num_dropped == 3004
    log = (directory / "trainer.log").read_text()
    assert log.count("\n") == 3004
    assert "secret-token-value" not in log


METACHARACTERS = "$(touch PWNED) `touch PWNED`; touch PWNED & | > PWNED '\"\\ --help -rf \n * ~ ${HOME} %s {0}"


def test_nothing_in_a_spec_reaches_a_command_line_or_the_environment(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEGBOX_WORKER_TOKEN", "a-token-of-the-worker")
    monkeypatch.setenv("SOME_OTHER_SECRET", "not for trainers")
    entry = host.dispatch("steps=2")
    entry.spec["name"] = METACHARACTERS.replace("\n", " ")
    entry.spec["tags"] = ["--help", "$(touch PWNED)"]
    directory = host.launch(entry)
    host.wait_for_finish(entry)
    assert entry.finish.outcome == Outcome.SUCCEEDED
    assert json.loads((directory / "argv.json").read_text()) == [str(directory)]
    assert json.loads((directory / "spec.json").read_text())["name"] == entry.spec["name"]
    environment = json.loads((directory / "environ.json").read_text())
    assert environment["PEGBOX_MARK"] == mark_of(entry.ref)
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert not {"PEGBOX_WORKER_TOKEN", "SOME_OTHER_SECRET"} & environment.keys()
    assert not [value for value in environment.values() if "PWNED" in value]
    assert not list(host.settings.data_dir.rglob("PWNED"))


@pytest.mark.parametrize("job", ["../evil", "a/b", "", "-rf x", "a\0b"])
def test_a_job_id_that_is_no_word_never_becomes_a_path(host: Host, job: str) -> None:
    entry = host.ledger.dispatch(job, host.spec())
    with pytest.raises(ValueError, match="is not a job id"):
        tasks.launch(host.settings, entry.ref)
    del host.ledger.attempts[job, 1]
