import faulthandler
import re
import threading
from pathlib import Path

from worker.stacks import describe, innermost_calls

DUMP = """\
a line that was printed before
Thread 0x00007f0a (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait
  File "/usr/lib/python3.11/queue.py", line 180 in get

Current thread 0x00007f0b (most recent call first):
  File "/site-packages/torch/distributed/distributed_c10d.py", line 3000 in all_reduce
  File "/opt/my work/loss.py", line 60 in backward
  File "/opt/my work/train.py", line 240 in make_steps
  File "/opt/my work/train.py", line 90 in train
a line that was printed after
""".splitlines()


def test_the_thread_that_took_the_signal_is_the_one_told_of() -> None:
    told = "all_reduce (distributed_c10d.py:3000), called by backward (loss.py:60), called by make_steps (train.py:240)"
    assert innermost_calls(DUMP) == told
    unmarked = [line.replace("Current thread", "Thread") for line in DUMP]
    assert innermost_calls(unmarked) == told, "the main thread comes last"


def test_what_is_no_dump_tells_nothing() -> None:
    assert innermost_calls(["Traceback:", '  File "x.py", line 1 in f']) == ""
    assert describe({}, 1) == "it gave no stack when asked"


def test_ranks_at_one_place_are_named_together() -> None:
    elsewhere = ["Current thread 0x1 (most recent call first):", '  File "/a/data.py", line 7 in read']
    told = describe({0: DUMP, 1: elsewhere, 2: DUMP}, 4)
    assert re.fullmatch(
        r"ranks 0, 2 stood in all_reduce .*; rank 1 stood in read \(data.py:7\); rank 3 gave no stack when asked", told
    )


def test_a_dump_that_begins_within_a_line_is_read() -> None:
    dump = ["still hereCurrent thread 0x1 (most recent call first):", '  File "/a/data.py", line 7 in read']
    assert innermost_calls(dump) == "read (data.py:7)"


def test_a_real_dump_is_read(tmp_path: Path) -> None:
    """With a second thread, so that there is a choice."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    with (tmp_path / "dump").open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    done.set()
    thread.join()
    dump = (tmp_path / "dump").read_text()
    assert dump.count("most recent call first") >= 2  # a test runner may have threads of its own
    assert innermost_calls(dump.splitlines()).startswith("test_a_real_dump_is_read (test_stacks.py:")
