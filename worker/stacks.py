"""Where a hung trainer stands: the stacks that its ranks print when asked, in a sentence.

At SIGUSR2 Python's faulthandler writes the stack of each thread into the rank's output, from a signal handler in C, so
that it does so inside a collective that never returns, too. All lines become log events; the sentence names the
innermost calls of the thread that took the signal, which is the main one, and which ranks stand at the same place: a
rank that stands elsewhere than the others is the one to look at.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import PurePath

# Not at a line's start alone: the signal may come between a text and its line end.
_THREAD = re.compile(r"(?P<kind>Current thread|Thread) 0x[0-9a-f]+.*\(most recent call first\):$")
_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)$')
_FRAMES_SHOWN = 3


def innermost_calls(printed: Iterable[str]) -> str:
    """The innermost calls in one rank's dump: `wait (work.py:12), called by ...`; "" where there is no dump."""
    threads: list[tuple[bool, list[str]]] = []
    for line in printed:
        if thread := _THREAD.search(line):
            threads.append((thread["kind"] == "Current thread", []))
        elif threads and (frame := _FRAME.match(line)):
            threads[-1][1].append(f"{frame['function']} ({PurePath(frame['file']).name}:{frame['line']})")
    # The last one where none is marked: faulthandler prints the main thread at the end.
    frames = next((frames for is_current, frames in reversed(threads) if is_current), threads[-1][1] if threads else [])
    return ", called by ".join(frames[:_FRAMES_SHOWN])


def describe(printed: Mapping[int, Iterable[str]], num_ranks: int) -> str:
    """What each rank of `num_ranks` was doing, ranks at one place named together."""
    ranks_at: dict[str, list[int]] = defaultdict(list)
    for rank in range(num_ranks):
        ranks_at[innermost_calls(printed.get(rank, ()))].append(rank)
    told = []
    for calls, ranks in ranks_at.items():
        names = "it" if num_ranks == 1 else ("ranks " if len(ranks) > 1 else "rank ") + ", ".join(map(str, ranks))
        told.append(f"{names} stood in {calls}" if calls else f"{names} gave no stack when asked")
    return "; ".join(told)
