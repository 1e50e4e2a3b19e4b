import signal
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.states import Outcome
from worker.diagnosis import Evidence, diagnose, num_oom_kills
from worker.job_directory import EXIT_CODES, OutcomeFile

GOOD = Evidence(
    returncode=0,
    outcome=OutcomeFile(code=0),
    has_end_event=True,
    has_result=True,
    wish="run",
    deed="none",
    log_tail=("loading", "", "Traceback: boom"),
    num_oom_kills=0,
    grace_s=60.0,
)
OUTCOMES = st.one_of(
    st.none(),
    st.builds(OutcomeFile, code=st.sampled_from([0, *EXIT_CODES.values()]), reason=st.none(), text=st.just("because")),
)
EVIDENCE = st.builds(
    Evidence,
    returncode=st.one_of(st.integers(-31, 255)),
    outcome=OUTCOMES,
    has_end_event=st.booleans(),
    has_result=st.booleans(),
    wish=st.sampled_from(["run", "stop", "cancel", "preempt"]),
    deed=st.sampled_from(["none", "grace", "hang", "stale"]),
    log_tail=st.just(("a line",)),
    num_oom_kills=st.integers(0, 2),
    grace_s=st.just(60.0),
    silence_s=st.just(700.0),
)


@given(EVIDENCE)
def test_success_needs_all_three_witnesses(evidence: Evidence) -> None:
    end = diagnose(evidence)
    is_success = (
        evidence.outcome is not None
        and evidence.outcome.code == 0
        and evidence.has_end_event
        and evidence.has_result
        and evidence.deed != "stale"
    )
    assert (end.outcome == Outcome.SUCCEEDED) == is_success


@given(EVIDENCE)
def test_every_other_end_has_a_reason_and_a_sentence(evidence: Evidence) -> None:
    end = diagnose(evidence)
    if end.outcome != Outcome.SUCCEEDED:
        assert end.reason is not None
        assert end.text
        assert "{" not in end.text
    if end.outcome == Outcome.STOPPED:
        assert evidence.wish in ("stop", "cancel")
    if end.outcome == Outcome.PREEMPTED:
        assert evidence.wish in ("run", "preempt"), "a person's wish is never taken for the host's"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_kill_from_outside_is_lost_and_tried_again(number: signal.Signals) -> None:
    end = diagnose(replace(GOOD, outcome=None, returncode=-number))
    assert (end.outcome, end.reason, end.exit_code) == (Outcome.LOST, "killed", 128 + number)
    assert number.name in end.text


def test_a_kill_by_the_kernel_for_memory_says_so() -> None:
    end = diagnose(replace(GOOD, outcome=None, returncode=-9, num_oom_kills=1))
    assert (end.outcome, end.reason) == (Outcome.LOST, "killed")
    assert "out-of-memory killer" in end.text
    assert "main memory" in end.remedy


def test_a_launcher_that_passes_the_kill_on_as_137_is_understood() -> None:
    assert diagnose(replace(GOOD, outcome=None, returncode=137)).reason == "killed"


def test_a_crash_in_native_code_fails_and_shows_the_log() -> None:
    end = diagnose(replace(GOOD, outcome=None, returncode=-signal.SIGSEGV))
    assert (end.outcome, end.reason, end.exit_code) == (Outcome.FAILED, "internal", 139)
    assert "SIGSEGV" in end.text
    assert "loading / Traceback: boom" in end.text


def test_exit_zero_without_outcome_json_is_no_success() -> None:
    end = diagnose(replace(GOOD, outcome=None))
    assert (end.outcome, end.reason) == (Outcome.FAILED, "internal")


def test_what_the_trainer_says_counts_even_if_it_crashed_afterwards() -> None:
    outcome = OutcomeFile(code=71, reason="oom", text="CUDA out of memory", remedy="halve the rows")
    end = diagnose(replace(GOOD, outcome=outcome, returncode=-signal.SIGABRT))
    assert (end.outcome, end.reason, end.text, end.remedy, end.exit_code) == (
        Outcome.FAILED,
        "oom",
        "CUDA out of memory",
        "halve the rows",
        71,
    )


@pytest.mark.parametrize(
    ("wish", "outcome", "reason"),
    [
        ("stop", Outcome.STOPPED, "stopped"),
        ("cancel", Outcome.STOPPED, "stopped"),
        ("preempt", Outcome.PREEMPTED, "preempted"),
        ("run", Outcome.PREEMPTED, "preempted"),
    ],
)
def test_exit_75_means_what_was_wished(wish: str, outcome: Outcome, reason: str) -> None:
    end = diagnose(replace(GOOD, wish=wish, outcome=OutcomeFile(code=75, reason="stopped"), returncode=75))
    assert (end.outcome, end.reason) == (outcome, reason)


def test_a_success_that_was_faster_than_the_wish_to_stop_stays_one() -> None:
    assert diagnose(replace(GOOD, wish="cancel")).outcome == Outcome.SUCCEEDED


def test_the_kernel_is_asked_for_its_kills() -> None:
    assert num_oom_kills() >= 0
