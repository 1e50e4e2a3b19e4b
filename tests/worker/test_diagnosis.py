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
    stacks=st.just("it stood in wait (work.py:1)"),
    rank=st.sampled_from([None, 0, 3]),
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


@pytest.mark.parametrize(
    ("returncode", "outcome", "reason", "words"),
    [
        (-9, Outcome.LOST, "killed", "rank 3 was ended by SIGKILL"),
        (-11, Outcome.FAILED, "internal", "rank 3 crashed with SIGSEGV"),
        (1, Outcome.FAILED, "internal", "rank 3 ended with code 1"),
    ],
)
def test_a_rank_that_fell_without_a_word_is_named(returncode: int, outcome: Outcome, reason: str, words: str) -> None:
    end = diagnose(replace(GOOD, outcome=None, rank=3, returncode=returncode))
    assert (end.outcome, end.reason) == (outcome, reason)
    assert words in end.text


def test_what_the_neighbours_of_a_killed_rank_say_is_hearsay() -> None:
    for hearsay in (
        OutcomeFile(code=70, reason="internal", text="another rank is gone"),
        OutcomeFile(code=75, reason="stopped", text="stopped as asked"),
    ):
        end = diagnose(replace(GOOD, outcome=hearsay, rank=1, returncode=-9))
        assert (end.outcome, end.reason) == (Outcome.LOST, "killed")
    out_of_memory = OutcomeFile(code=71, reason="oom", text="out of memory")
    assert diagnose(replace(GOOD, outcome=out_of_memory, rank=1, returncode=-9)).reason == "oom"
    assert diagnose(replace(GOOD, outcome=hearsay, rank=1, returncode=-9, wish="stop")).outcome == Outcome.STOPPED
    assert diagnose(replace(GOOD, outcome=hearsay, rank=1, returncode=75)).outcome == Outcome.PREEMPTED


def test_a_hang_tells_where() -> None:
    end = diagnose(
        replace(GOOD, outcome=None, deed="hang", returncode=-9, silence_s=700, stacks="it stood in wait (a:1)")
    )
    assert end.text.endswith("11.7 minutes, so it was killed as hung; it stood in wait (a:1)")
