import threading
from pathlib import Path

import pytest
import torch

from worker.engine import ending
from worker.engine.ending import culprits_outcome, outcome_of, write_first
from worker.engine.ranks import is_peer_gone
from worker.job_directory import OutcomeFile

FIRST = OutcomeFile(code=71, reason="oom", text="out of memory", remedy="less of it")


def test_the_first_failures_words_stand(tmp_path: Path) -> None:
    assert write_first(tmp_path, FIRST) == FIRST
    second = outcome_of(ZeroDivisionError("later"), "train", 3, None)
    assert write_first(tmp_path, second) == FIRST
    assert OutcomeFile.model_validate_json((tmp_path / "outcome.json").read_bytes()) == FIRST
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.json"]


def test_of_many_at_once_one_is_written_and_all_are_told_which(tmp_path: Path) -> None:
    told: list[OutcomeFile] = []
    at_once = threading.Barrier(8)

    def write(code: int) -> None:
        at_once.wait()
        told.append(write_first(tmp_path, OutcomeFile(code=code)))

    threads = [threading.Thread(target=write, args=(code,)) for code in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 8 and len({outcome.code for outcome in told}) == 1


def test_a_rank_whose_peer_is_gone_waits_for_its_words(tmp_path: Path) -> None:
    waiting = threading.Timer(0.2, lambda: write_first(tmp_path, FIRST))
    waiting.start()
    assert culprits_outcome(tmp_path) == FIRST
    waiting.join()


def test_a_peer_that_said_nothing_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "CULPRIT_MAY_TAKE_S", 0.1)
    outcome = culprits_outcome(tmp_path)
    assert outcome.code == 70 and "without a word" in outcome.text


@pytest.mark.parametrize(
    ("error", "is_gone"),
    [
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1"), True),
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [::1]:1: Connection reset"), True),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_what_a_rank_sees_when_a_peer_is_gone(error: Exception, is_gone: bool) -> None:
    assert is_peer_gone(error) == is_gone
