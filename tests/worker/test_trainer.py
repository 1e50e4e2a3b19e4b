"""What torchrun says of its ranks, and what a rank's file holds while it grows."""

from pathlib import Path

import pytest

from worker.trainer import Death, RankLog, read_death

CLOSED = (
    "W1124 07:07:00.681000 20290 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process {pid} closing "
)
FIRST = "E1124 07:07:00.685000 20290 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: {code}) "


def report(closed: list[int], first: tuple[int, int, int], *others: tuple[int, int, int]) -> list[str]:
    """As torchrun prints it: whom it closed, then (rank, exit code, pid) of the first that failed, then of all."""
    rank, code, pid = first
    lines = [CLOSED.format(pid=pid) + "signal SIGTERM" for pid in closed]
    lines.append(FIRST.format(code=code) + f"local_rank: {rank} (pid: {pid}) of binary: /usr/bin/python")
    for rank, code, pid in (*others, first):
        lines += ["[0]:", f"  rank      : {rank} (local_rank: {rank})", f"  exitcode  : {code} (pid: {pid})  (SIGKILL)"]
    return lines


@pytest.mark.parametrize(
    ("lines", "death"),
    [
        ([], None),
        (["ImportError: torchrun itself did not start"], None),
        (report([100], (1, -9, 101), (0, -15, 100)), Death(1, -9)),
        # Rank 0 stood deaf in a collective and was killed by torchrun itself: the error of rank 1 is the cause.
        (report([100], (1, 1, 101), (0, -9, 100)), Death(1, 1)),
        # Both had ended when torchrun looked: rank 0 failed because rank 1 was gone.
        (report([], (0, 70, 100), (1, -11, 101)), Death(1, -11)),
        (report([], (1, 70, 101), (0, 71, 100)), Death(0, 71)),
    ],
)
def test_the_rank_that_fell_by_itself_is_the_one_to_blame(lines: list[str], death: Death | None) -> None:
    assert read_death(lines) == death


def test_a_ranks_file_is_read_from_where_it_stood(tmp_path: Path) -> None:
    path = tmp_path / "rank-1.log"
    assert RankLog(path, ()).read() == b""
    path.write_bytes(b"of an earlier run\n")
    log = RankLog(path, ())
    with path.open("ab") as file:
        file.write(b"new\nhalf a li")
    assert list(log.lines.feed(log.read())) == ["new"]
    with path.open("ab") as file:
        file.write(b"ne\n")
    assert list(log.lines.feed(log.read())) == ["half a line"]
    assert log.read() == b""
