"""Attention on a GPU, forward and backward over packed rows: `python -m bench.gpu.attention`.

Every way that is to be had computes the same rows, in bf16: `eager` and `mask` over the whole row with a mask of N x N,
`flex`, and the trainer's varlen path through PyTorch's own flash attention and, where they are installed, through
FlashAttention 2 and 3. Times are medians of runs between CUDA events, ways in turn; memory is what torch's allocator
held at most beyond the inputs. A way that runs out of memory shows so. Before anything is timed, each way is compared
with the others on a short row.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import mebibytes, median, print_table, test_bed
from worker.engine.attention import Asked, FlashPackage, Heads, flash_packages, flexible_attention, take_all_at_once
from worker.engine.segments import Segments

LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
HEADS, SHARED_HEADS, HEAD_SIZE = 32, 8, 128  # of an 8 B model
TOLERANCE = 2e-2  # of bf16, relative to the largest output
WARM_UPS = 3

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def ways_for(segments: Segments) -> Mapping[str, Way]:
    """Each takes B x H x N x D and gives B x N x H x D."""
    asked = Asked(HEAD_SIZE**-0.5, 0.0, None, None, None)
    lengths = torch.tensor(segments.lengths, device=segments.device)
    sample = torch.repeat_interleave(lengths)
    sees = (sample[:, None] == sample).tril_()

    def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = Heads(query, key, value).as_many(dim=1)
        scores = (query @ key.transpose(2, 3) / math.sqrt(HEAD_SIZE)).masked_fill(~sees, float("-inf"))
        return (scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value).transpose(1, 2)

    def mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = Heads(query, key, value).as_many(dim=1)
        return F.scaled_dot_product_attention(*heads, attn_mask=sees).transpose(1, 2)

    def flex(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flexible_attention(torch.nn.Module(), query, key, value, None, segments=segments)[0]

    def at_once(run: Callable[[Heads, Segments, Asked], Tensor]) -> Way:
        def way(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            heads = Heads(query, key, value).each(lambda tensor: tensor.transpose(1, 2).flatten(0, 1))
            return run(heads, segments, asked)[None]

        return way

    packages: Mapping[str, FlashPackage] = flash_packages()
    named = {name: at_once(package.run) for name, package in packages.items()}
    return {"eager": eager, "mask": mask, "flex": flex, "varlen": at_once(take_all_at_once), **named}


def heads_for(length: int) -> tuple[Tensor, Tensor, Tensor]:
    def drawn(num_heads: int) -> Tensor:
        # As projections leave it: heads lie side by side, then positions.
        plain = torch.randn(1, length, num_heads, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
        return plain.transpose(1, 2).requires_grad_()

    return drawn(HEADS), drawn(SHARED_HEADS), drawn(SHARED_HEADS)


def cut(length: int, samples: int) -> Segments:
    return Segments(((length // samples,) * samples,), torch.device("cuda"))


def compare(samples: int) -> None:
    heads = heads_for(1024)
    outputs = {name: way(*heads).detach().float() for name, way in ways_for(cut(1024, samples)).items()}
    reference = outputs["eager"]
    for name, output in outputs.items():
        apart = float((output - reference).abs().max() / reference.abs().max())
        assert apart < TOLERANCE, f"{name} is {apart:.2g} from eager"


def milliseconds_and_bytes(way: Way, heads: tuple[Tensor, Tensor, Tensor]) -> tuple[float, int] | None:
    """Of one forward and backward pass; None where memory does not suffice."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        began.record()
        torch.autograd.grad(way(*heads).sum(), heads)
        ended.record()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return began.elapsed_time(ended), torch.cuda.max_memory_allocated() - before


def row_of(length: int, samples: int, rounds: int, names: Sequence[str]) -> Sequence[str]:
    ways, heads = ways_for(cut(length, samples)), heads_for(length)
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    lacking: set[str] = set()
    for number in range(WARM_UPS + rounds):
        for name in names:
            measured = None if name in lacking else milliseconds_and_bytes(ways[name], heads)
            if measured is None:
                lacking.add(name)
            elif number >= WARM_UPS:
                found[name].append(measured)
    times = ["out of memory" if name in lacking else f"{median(ms for ms, _ in found[name]):.2f}" for name in names]
    peaks = ["" if name in lacking else mebibytes(median(peak for _, peak in found[name])) for name in names]
    return [f"{length:,}", str(samples), *times, *peaks]


def rows_of(options: argparse.Namespace, names: Sequence[str]) -> Iterator[Sequence[str]]:
    for samples in options.samples:
        compare(samples)
        for length in options.lengths:
            yield row_of(length, samples, options.rounds, names)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a row")
    parser.add_argument("--samples", type=int, nargs="+", default=(1, 8), help="of one length in a row")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use: nothing was measured")
    torch.manual_seed(0)
    print(
        f"{test_bed()}; {torch.cuda.get_device_name(0)}, torch {torch.__version__}; bf16, {HEADS} heads on "
        f"{SHARED_HEADS} of {HEAD_SIZE}"
    )
    names = tuple(ways_for(cut(512, 1)))
    columns = ["tokens", "samples", *(f"{name}: ms" for name in names), *(f"{name}: MiB" for name in names)]
    print_table(columns, rows_of(options, names))


if __name__ == "__main__":
    main()
