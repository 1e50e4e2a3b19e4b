"""Ways to compute attention over a row, forward and backward, on one CPU thread: `python -m bench.attention`.

`eager` writes the formula out over the whole row, `mask` is one call of SDPA with a mask of N x N, `causal` one causal
call over the row as if it were a single sample, `flash` what the trainer does: a causal call for each sample. With one
sample a row causal and flash are the same; with several, causal sees over borders and is here for its time alone.

Each cell runs in a process of its own, for its peak memory over that before the first call; rounds go through all ways
in turn, and the medians of their CPU seconds are shown. Nothing is computed on a GPU here: see bench/gpu/attention.py.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.measure import ONE_THREAD, mebibytes, median, print_table, run_child, test_bed

WAYS = ("eager", "mask", "causal", "flash")
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384)
HEADS, HEAD_SIZE = 4, 64
# Scores of N x N for each head, several times over: beyond this eager attention needs more than a test bed has.
MOST_EAGER = 8192
SEED = 0


def cell(way: str, length: int, samples: int) -> dict[str, float]:
    """CPU seconds and bytes of one forward and backward pass, after one that warms up; runs in a child."""
    import resource
    import time

    import torch
    import torch.nn.functional as F

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    query, key, value = (torch.randn(1, HEADS, length, HEAD_SIZE, requires_grad=True) for _ in range(3))
    sample = torch.arange(length) // (length // samples)

    def sees() -> torch.Tensor:
        return (sample[:, None] == sample) & torch.ones(length, length, dtype=torch.bool).tril()

    def eager() -> torch.Tensor:
        scores = query @ key.transpose(2, 3) / math.sqrt(HEAD_SIZE)
        return scores.masked_fill(~sees(), float("-inf")).softmax(dim=-1) @ value

    def flash() -> torch.Tensor:
        return segmented_attention(module, query, key, value, None, segments=cuts)[0]

    if way == "flash":  # transformers takes seconds to import
        from worker.engine.attention import segmented_attention
        from worker.engine.segments import Segments

        module = torch.nn.Module()
        cuts = Segments(((length // samples,) * samples,), torch.device("cpu"))

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "eager": eager,
        "mask": lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=sees()),
        "causal": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True),
        "flash": flash,
    }

    def peak_bytes() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    small = torch.randn(1, HEADS, 64, HEAD_SIZE, requires_grad=True)
    torch.autograd.backward(F.scaled_dot_product_attention(small, small, small, is_causal=True).sum())
    before = peak_bytes()
    torch.autograd.backward(ways[way]().sum())
    peak = peak_bytes() - before
    began = time.process_time()
    torch.autograd.backward(ways[way]().sum())
    return {"cpu_s": time.process_time() - began, "bytes": peak}


def run_cell(way: str, length: int, samples: int, folder: Path) -> dict[str, float]:
    output = folder / "cell.json"
    command = [sys.executable, "-m", "bench.attention", "--cell", way, str(length), str(samples), str(output)]
    run_child(command, ONE_THREAD, folder / "cell.log")
    measured: dict[str, float] = json.loads(output.read_bytes())
    return measured


def rows_of(lengths: Sequence[int], samples_a_row: Sequence[int], rounds: int) -> Iterator[Sequence[str]]:
    with tempfile.TemporaryDirectory(prefix="bench-attention-") as folder:
        for samples in samples_a_row:
            for length in lengths:
                ways = [way for way in WAYS if way != "eager" or length <= MOST_EAGER]
                found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
                for _ in range(rounds):
                    for way in ways:
                        found[way].append(run_cell(way, length, samples, Path(folder)))
                yield row_of(length, samples, found)


def row_of(length: int, samples: int, found: dict[str, list[dict[str, float]]]) -> Sequence[str]:
    seconds = {way: median(one["cpu_s"] for one in cells) for way, cells in found.items()}
    peaks = {way: median(one["bytes"] for one in cells) for way, cells in found.items()}
    shown = [f"{length:,}", str(samples)]
    shown += [f"{seconds[way]:.3f}" if way in seconds else "" for way in WAYS]
    shown += [mebibytes(peaks[way]) if way in peaks else "" for way in WAYS]
    if "eager" in seconds:
        shown += [f"{seconds['eager'] / seconds['flash']:.1f}x", f"1/{peaks['eager'] / peaks['flash']:.1f}"]
    else:
        shown += ["", ""]
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a row")
    parser.add_argument("--samples", type=int, nargs="+", default=(1, 8), help="of one length in a row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.cell:
        way, length, samples, output = options.cell
        Path(output).write_text(json.dumps(cell(way, int(length), int(samples))))
        return
    print(f"{test_bed()}; {HEADS} heads of {HEAD_SIZE}, fp32, one thread")
    columns = ["tokens", "samples", *(f"{way}: s" for way in WAYS), *(f"{way}: MiB" for way in WAYS)]
    columns += ["flash to eager: time", "memory"]
    print_table(columns, rows_of(options.lengths, options.samples, options.rounds))


if __name__ == "__main__":
    main()
