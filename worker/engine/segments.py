"""Where the segments of a micro-batch lie: worked out once a batch, used by every layer.

A row is cut into segments, one a sample, the pad at its end too; none may see another. Each way to compute attention
wants those cuts in a form of its own, made when it is first asked for and kept until the batch is done, gradient
checkpointing included: `cumulative_lengths` for kernels that take all segments in one call, `block_mask` for
flex_attention. A kernel that takes a batch of equally long sequences runs once for each segment, or once if all are
equal.

To gather segments of about the same length and fill them up to the longest (which is exact, as attention is causal)
does not pay on a CPU: the calls' own cost is 3 to 14 % of attention (one thread, 4 heads of 32, forward and backward,
15 samples in 1,771 tokens: 13.3 ms, of which 12.1 in the kernel), and the copies cost as much. Measured so: 14.5 ms,
with 9 calls instead of 15; at best, for 47 samples of 20 to 60 tokens, 7.7 instead of 8.5 ms.

Shapes: B rows, N positions of a row, T = B x N positions, flattened; Q blocks of queries, K of keys.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # positions; flex_attention's own default


@dataclass(frozen=True)
class Segments:
    """`rows`: the lengths of each row's segments, which add up to its width."""

    rows: tuple[tuple[int, ...], ...]
    device: torch.device
    # The kernels that ran and why, for who wants to know what was chosen.
    used: set[tuple[str, str]] = field(default_factory=set)
    _block_masks: dict[int | None, BlockMask] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert all(sum(row) == self.width for row in self.rows), "a row is as wide as its segments"
        assert all(length > 0 for row in self.rows for length in row)

    @cached_property
    def width(self) -> int:
        return sum(self.rows[0])

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Of all rows, one after the other: a row's end is a segment's end."""
        return tuple(length for row in self.rows for length in row)

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def cumulative_lengths(self) -> Tensor:
        """0, then where each segment ends, int32, on the device."""
        return self._on_device(torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32))

    @cached_property
    def are_equal(self) -> bool:
        return len(set(self.lengths)) == 1

    def block_mask(self, window: int | None) -> BlockMask:
        """For flex_attention. Which blocks of positions meet is worked out from the cuts, never from N x N pairs."""
        if window not in self._block_masks:
            self._block_masks[window] = self._make_block_mask(window)
        return self._block_masks[window]

    def _make_block_mask(self, window: int | None) -> BlockMask:
        first_seen_BN = np.stack([np.repeat(np.array([0, *accumulate(row[:-1])]), row) for row in self.rows])
        if window is not None:
            first_seen_BN = np.maximum(first_seen_BN, np.arange(self.width)[None] - window + 1)
        # First seen positions never fall along a row, so what a block sees goes from its first query's to its own end.
        block_starts = np.arange(0, self.width, BLOCK)
        block_lasts = np.minimum(block_starts + BLOCK, self.width) - 1
        keys_K = np.arange(len(block_starts))[None, None]
        from_BQ1 = (first_seen_BN[:, block_starts] // BLOCK)[..., None]
        own_Q1 = keys_K[0, 0][None, :, None]
        is_met_BQK = (keys_K >= from_BQ1) & (keys_K <= own_Q1)
        # Wholly seen: no key before the last query's first, none behind the first query.
        is_whole_BQK = (block_starts[None, None] >= first_seen_BN[:, block_lasts][..., None]) & (keys_K < own_Q1)
        first_seen = self._on_device(torch.from_numpy(first_seen_BN.astype(np.int32)))
        num_cut, cut = self._chosen(is_met_BQK & ~is_whole_BQK)
        num_whole, whole = self._chosen(is_met_BQK & is_whole_BQK)
        return BlockMask.from_kv_blocks(
            num_cut,
            cut,
            num_whole,
            whole,
            BLOCK_SIZE=BLOCK,
            mask_mod=_sees(first_seen),
            seq_lengths=(self.width, self.width),
        )

    def _chosen(self, is_chosen_BQK: npt.NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        """How many blocks, and which, the chosen first; one for all heads."""
        counts = torch.from_numpy(is_chosen_BQK.sum(axis=-1, dtype=np.int32))
        indices = torch.from_numpy(np.argsort(~is_chosen_BQK, axis=-1, kind="stable").astype(np.int32))
        return self._on_device(counts[:, None]), self._on_device(indices[:, None])

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)


def _sees(first_seen_BN: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first_seen_BN[row, query])

    return sees
