"""How full rows get, how near the fewest possible, and what that costs: `python -m bench.packing`.

Beside ours stands decreasing best fit over windows of 1,000 samples, one sample after the other: the common way, since
that needs no view of the whole set. Both run here, in one process, on the same lengths; times are CPU seconds.
`--data FILE` takes lengths of your own, one whole number a line.
"""

import argparse
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core.packing import IntArray, best_fit, fill, lower_bound

WINDOW = 1000
COLUMNS = (
    "lengths",
    "row",
    "samples",
    "fewest rows",
    "ours: s",
    "rows / fewest",
    "fill",
    "windows: s",
    "rows / fewest",
    "fill",
    "times faster",
    "rows saved",
)


def rows_by_windows(lengths: IntArray, capacity: int) -> int:
    """The baseline's number of rows."""
    num_rows = 0
    for start in range(0, len(lengths), WINDOW):
        rows: list[list[int]] = []
        spaces: list[tuple[int, int]] = []  # (space left, row), rising
        window = lengths[start : start + WINDOW]
        for position in np.argsort(-window, kind="stable").tolist():
            length = int(window[position])
            tightest = bisect_left(spaces, (length, -1))
            if tightest < len(spaces):
                space, row = spaces.pop(tightest)
            else:
                space, row = capacity, len(rows)
                rows.append([])
            rows[row].append(start + position)
            insort(spaces, (space - length, row))
        num_rows += len(rows)
    return num_rows


def distributions(count: int) -> Iterator[tuple[str, int, IntArray]]:
    """Name, row length, lengths. The first two are shaped like instruction data and like chat logs; the last one is a
    hard case, where a row holds two or three and the lower bound cannot be reached."""
    rng = np.random.default_rng(0)

    def clipped(drawn: npt.NDArray[np.float64], capacity: int) -> IntArray:
        lengths: IntArray = np.clip(drawn, 8, capacity).astype(np.int64)
        return lengths

    yield "instructions", 4096, clipped(rng.lognormal(4.8, 0.7, count), 4096)
    yield "chat", 4096, clipped(rng.lognormal(6.6, 0.9, count), 4096)
    yield "uniform", 4096, clipped(rng.uniform(1, 4097, count), 4096)
    humps = np.where(rng.random(count) < 0.5, rng.uniform(20, 200, count), rng.uniform(1500, 4000, count))
    yield "two humps", 4096, clipped(humps, 4096)
    yield "instructions, long rows", 32_768, clipped(rng.lognormal(4.8, 0.7, count), 4096)
    yield "chat, long rows", 32_768, clipped(rng.lognormal(7.5, 1.1, count), 32_768)
    yield "all about 1,500", 4096, clipped(rng.normal(1500, 400, count), 4096)


def timed(count_rows: Callable[[IntArray, int], int], lengths: IntArray, capacity: int) -> tuple[int, float]:
    start = time.process_time()
    return count_rows(lengths, capacity), time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="samples of each distribution")
    parser.add_argument("--data", type=Path, help="a file of lengths, one a line, in place of the distributions")
    parser.add_argument("--row-length", type=int, default=4096, help="tokens; for --data")
    options = parser.parse_args()
    sets = distributions(options.count)
    if options.data:
        lengths = np.loadtxt(options.data, dtype=np.int64, ndmin=1)
        sets = iter([(options.data.name, options.row_length, lengths)])

    print(f"| {' | '.join(COLUMNS)} |")
    print("|---|" + "---:|" * (len(COLUMNS) - 1))
    for name, capacity, lengths in sets:
        bound, tokens = lower_bound(lengths, capacity), int(lengths.sum())
        rows, seconds = timed(lambda *of: len(best_fit(*of)), lengths, capacity)
        others, others_s = timed(rows_by_windows, lengths, capacity)
        print(
            f"| {name} | {capacity:,} | {len(lengths):,} | {bound:,} | {seconds:.3f} | {rows / bound:.5f} "
            f"| {fill(tokens, rows, capacity):.2%} | {others_s:.2f} | {others / bound:.5f} "
            f"| {fill(tokens, others, capacity):.2%} | {others_s / seconds:.0f}x | {1 - rows / others:.2%} |"
        )


if __name__ == "__main__":
    main()
