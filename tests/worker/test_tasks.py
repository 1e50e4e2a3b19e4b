import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import HTTPException

from core import wire
from tests.worker.conftest import Host
from tests.worker.ledger import Ledger, wait_until
from worker import tasks
from worker.adoption import live_attempts
from worker.processes import marked


@pytest.fixture
def prepare_host(make_host: Callable[..., Host], ledger: Ledger) -> Host:
    return make_host(
        ledger,
        prepare_argv=(sys.executable, str(Path(__file__).with_name("script_prepare.py"))),
        prepare_limit_s=3.0,
        prepare_tell_s=0.1,
    )


def prepare(host: Host, content: bytes, model: str = "demo/tiny-llama") -> wire.ProfileResult:
    order = wire.ProfileOrder(
        id="p1",
        model=model,
        chat_template=None,
        data=host.ledger.put_blob(content),
        format="messages",
        train_on="assistant",
        multi_turn="auto",
        num_rows=9000,
    )
    host.ledger.profile_orders["p1"] = order
    tasks.prepare(host.settings, "p1")
    assert not list(host.settings.worker_dir.glob("prepare-*")), "its folder is gone"
    return host.ledger.profile_results["p1"]


def go_on(host: Host, content: bytes) -> None:
    """To the stand-in, once it has told what it tells."""
    (host.settings.blobs_dir / f"{hashlib.sha256(content).hexdigest()}.go").touch()


def test_a_profile_is_measured_and_posted(prepare_host: Host) -> None:
    result = prepare(prepare_host, b"good")
    assert result.profile is not None
    assert result.profile.format == "messages"
    assert result.error == ""


def test_a_profile_is_measured_by_whoever_claims_it_first(prepare_host: Host) -> None:
    prepare(prepare_host, b"good")
    tasks.prepare(prepare_host.settings, "p1")
    posts = [request for request in prepare_host.ledger.requests if request.endswith("/result")]
    assert len(posts) == 1


def test_what_the_child_says_of_the_data_is_passed_on(prepare_host: Host) -> None:
    result = prepare(prepare_host, b"refuse")
    assert (result.error, result.field) == ("no row is left", "data.format")


def test_a_child_that_crashes_is_told_with_its_last_line(prepare_host: Host) -> None:
    assert "no memory for the tokenizer" in prepare(prepare_host, b"crash").error


def test_a_child_that_takes_too_long_is_ended_with_all_it_started(prepare_host: Host) -> None:
    assert "longer than" in prepare(prepare_host, b"hang").error
    assert marked("profile.p1") == []


def test_the_server_hears_of_the_sample_at_once_and_of_the_progress_behind_it(prepare_host: Host) -> None:
    ledger = prepare_host.ledger

    def hear(message: wire.ProfileProgress) -> None:
        if message.fraction > 0:
            go_on(prepare_host, b"slow")

    ledger.on_progress = hear
    result = prepare(prepare_host, b"slow")
    assert result.profile is not None and result.profile.num_rows == 9000
    (with_sample,) = [message for message in ledger.profile_progress if message.sampled is not None]
    assert with_sample.sampled is not None and with_sample.sampled.num_rows == 1
    assert ledger.profile_progress[-1].fraction == 0.5


def test_what_the_server_missed_of_the_sample_is_told_again(prepare_host: Host) -> None:
    ledger = prepare_host.ledger
    answers = iter([503, 404])  # away; of before there was progress

    def hear(message: wire.ProfileProgress) -> None:
        if message.sampled is None:
            return
        if status := next(answers, None):
            raise HTTPException(status, "not now")
        go_on(prepare_host, b"slow")

    ledger.on_progress = hear
    assert prepare(prepare_host, b"slow").profile is not None
    assert sum(message.sampled is not None for message in ledger.profile_progress) == 3


def test_a_profile_that_another_host_has_by_now_is_given_up(prepare_host: Host) -> None:
    def hear(message: wire.ProfileProgress) -> None:
        raise HTTPException(409, "another's")

    prepare_host.ledger.on_progress = hear
    with pytest.raises(KeyError):
        prepare(prepare_host, b"slow")
    assert len(prepare_host.ledger.profile_progress) == 1
    assert marked("profile.p1") == []
    assert not list(prepare_host.settings.worker_dir.glob("prepare-*"))


def test_a_model_that_is_not_here_is_named(prepare_host: Host) -> None:
    result = prepare(prepare_host, b"good", model="nobody/nothing")
    assert "nobody/nothing" in result.error
    assert result.field == "model.base"


def test_a_launch_without_a_server_is_refused_and_leaves_nothing(host: Host) -> None:
    entry = host.dispatch()
    host.ledger.stop()
    assert tasks.launch(host.settings, entry.ref).startswith("refused: ")
    wait_until(lambda: not host.settings.attempt_dir(entry.ref).exists())
    assert not live_attempts(host.settings)
