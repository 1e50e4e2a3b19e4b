"""How full rows get, how near the fewest possible, and what that costs: `python -m bench.packing`.

    --counts N,N     samples of each distribution; 10,000 and 100,000 by default
    --all            also a million samples, and three more distributions: most of an hour for the slowest
    --data FILE      lengths of your own, one whole number a line, in rows of --row-length tokens
    --without-peers  ours alone

Ours packs all samples as one. The others run as their trainers run them (bench/peer/packing.py), most of them on 1,000
samples at a time. "rows / fewest" divides by a lower bound that no packing can beat (Martello and Toth's L2), so 1.000
is as good as it gets and may be out of reach. Seconds are CPU seconds of the packing alone.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench import peers
from bench.measure import ROOT, print_table, test_bed
from core.packing import IntArray, best_fit, fill, lower_bound

PEER_SCRIPT = Path(__file__).resolve().parent / "peer" / "packing.py"
COUNTS = (10_000, 100_000)
MILLION = 1_000_000
# Above this many samples only --all asks those that take minutes.
SLOW_ABOVE = 100_000
SLOW = frozenset({peers.TRL.name, peers.MS_SWIFT.name, peers.AXOLOTL.name})
PEER_TIMEOUT_S = 1800
COLUMNS = ("lengths", "row", "samples", "way", "CPU s", "rows", "rows / fewest", "fill", "cut or dropped")


@dataclass(frozen=True)
class Lengths:
    name: str
    capacity: int  # tokens of a row
    values: IntArray


@dataclass(frozen=True)
class Packed:
    rows: int
    samples: int  # that found a place
    tokens: int
    cpu_s: float


def distributions(count: int, everything: bool) -> Iterator[Lengths]:
    """The first two are shaped like instruction data and like chat logs, the second with its tail above a row's
    length; short samples in long rows are where windows and limits show. The last is a hard case, where a row holds two
    or three and the bound cannot be reached."""
    rng = np.random.default_rng(0)

    def clipped(drawn: npt.NDArray[np.float64], capacity: int) -> IntArray:
        lengths: IntArray = np.clip(drawn, 8, capacity).astype(np.int64)
        return lengths

    chat = rng.lognormal(6.6, 0.9, count)
    yield Lengths("instructions", 4096, clipped(rng.lognormal(4.8, 0.7, count), 4096))
    yield Lengths("chat", 4096, clipped(chat, 4096))
    yield Lengths("chat, some too long", 4096, clipped(chat, 100_000))
    yield Lengths("instructions, long rows", 32_768, clipped(rng.lognormal(4.8, 0.7, count), 4096))
    if everything:
        humps = np.where(rng.random(count) < 0.5, rng.uniform(20, 200, count), rng.uniform(1500, 4000, count))
        yield Lengths("two humps", 4096, clipped(humps, 4096))
        yield Lengths("uniform", 4096, clipped(rng.uniform(1, 4097, count), 4096))
        yield Lengths("all about 1,500", 4096, clipped(rng.normal(1500, 400, count), 4096))


def pack_ours(lengths: Lengths) -> Packed:
    """What is too long is left out and counted, as `overlong: drop` does it."""
    fitting = lengths.values[lengths.values <= lengths.capacity]
    began = time.process_time()
    packs = best_fit(fitting, lengths.capacity)
    cpu_s = time.process_time() - began
    return Packed(len(packs), len(packs.indices), int(fitting[packs.indices].sum()), cpu_s)


def pack_theirs(peer: peers.Peer, lengths: Lengths) -> Packed:
    """Raises peers.Missing."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "asked.npz"
        np.savez(asked, lengths=lengths.values, capacity=lengths.capacity)
        done = subprocess.run(
            [peers.python_of(peer), PEER_SCRIPT, peer.name, asked],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=PEER_TIMEOUT_S,
        )
    if done.returncode != 0:
        raise peers.Missing((done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1])
    return Packed(**json.loads(done.stdout.splitlines()[-1]))


def rows_of(lengths: Lengths, others: Sequence[peers.Peer], everything: bool) -> Iterator[list[str]]:
    fitting = lengths.values[lengths.values <= lengths.capacity]
    bound = lower_bound(fitting, lengths.capacity)
    bound_if_cut = lower_bound(np.minimum(lengths.values, lengths.capacity), lengths.capacity)
    tokens = int(lengths.values.sum())
    first = [lengths.name, f"{lengths.capacity:,}", f"{len(lengths.values):,}"]

    def shown(way: str, packed: Packed) -> list[str]:
        num_dropped = len(lengths.values) - packed.samples
        is_cut = not num_dropped and packed.tokens < tokens
        cut = f"{len(lengths.values) - len(fitting):,} cut, by {tokens - packed.tokens:,} tokens"
        lost = f"{num_dropped:,} dropped" if num_dropped else cut if is_cut else "none"
        full = fill(packed.tokens, packed.rows, lengths.capacity)
        ratio = f"{packed.rows / (bound_if_cut if is_cut else bound):.4f}"
        return [*first, way, f"{packed.cpu_s:.3f}", f"{packed.rows:,}", ratio, f"{full:.2%}", lost]

    yield shown("Pegbox", pack_ours(lengths))
    for peer in others:
        if len(lengths.values) > SLOW_ABOVE and peer.name in SLOW and not everything:
            yield [*first, peer.name, "only with --all", "", "", "", ""]
            continue
        try:
            yield shown(peer.name, pack_theirs(peer, lengths))
        except peers.Missing as problem:
            yield [*first, peer.name, f"not to be had here: {problem}", "", "", "", ""]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--row-length", type=int, default=4096, help="tokens; for --data")
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--short", action="store_true", help="10,000 samples")
    options = parser.parse_args(arguments)
    counts = options.counts or ([10_000] if options.short else [*COUNTS, *([MILLION] if options.all else [])])
    others = () if options.without_peers else peers.PEERS

    print(test_bed())
    for peer in others:
        try:
            print(peers.versions(peer))
        except peers.Missing as problem:
            print(f"{peer.name} is not to be had here: {problem}")
    print()
    if options.data:
        values = np.loadtxt(options.data, dtype=np.int64, ndmin=1)
        sets = iter([Lengths(options.data.name, options.row_length, values)])
    else:
        sets = (lengths for count in counts for lengths in distributions(count, options.all))
    print_table(COLUMNS, (row for lengths in sets for row in rows_of(lengths, others, options.all)))


if __name__ == "__main__":
    main()
