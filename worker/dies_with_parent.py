"""`python dies_with_parent.py PARENT_PID ARGV...`: becomes ARGV, and is killed when its parent ends, however it ends.

The kernel's parent-death signal has to be asked for by the child itself, after the fork; Python's preexec_fn would do
that in a copy of a process with threads, where any lock may be held for ever. So the child starts as this script, asks,
and turns into the real command (the signal survives exec). It belongs to the parent's *thread* that forked: spawn from
one that lives as long as the child should. Run by its path and with nothing but the standard library, it costs about
15 ms.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """This process is killed when its parent, of that pid, ends. Ends it at once where that has happened already."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit("the parent ended before its child began")


def main(argv: list[str]) -> None:
    parent, *command = argv
    die_with(int(parent))
    os.execvp(command[0], command)  # noqa: S606  an argv list, no shell


if __name__ == "__main__":
    main(sys.argv[1:])
