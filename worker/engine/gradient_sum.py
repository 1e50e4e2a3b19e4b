"""Gradients summed over ranks while the backward pass that completes them is still under way."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Large enough to fill a link, small enough that the first is under way early.
BUCKET_BYTES = 32 << 20


class GradientSum:
    """Which bucket follows which is fixed beforehand: a bucket that is complete waits for the one before it, so that
    all ranks send the same in the same order even where autograd finishes in another. A bucket lives from its sending
    to the end of the step: until then gradients lie where autograd puts them, afterwards they are views of it."""

    def __init__(self, weights: Sequence[nn.Parameter], bucket_bytes: int = BUCKET_BYTES) -> None:
        # Backward passes complete the last layers first.
        self._buckets = _in_buckets(list(reversed(weights)), bucket_bytes)
        self._bucket_of = {weight: number for number, bucket in enumerate(self._buckets) for weight in bucket}
        self._missing: list[set[nn.Parameter]] = []
        self._under_way: list[tuple[dist.Work, Tensor]] = []
        self._is_open = False
        for weight in weights:
            weight.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]  # torch

    @contextmanager
    def as_they_come(self) -> Iterator[None]:
        """Around the last backward pass of a step; behind it every weight's gradient is the sum over all ranks, that of
        a weight which no rank's pass has reached is 0."""
        self._missing = [set(bucket) for bucket in self._buckets]
        self._is_open = True
        yield
        self._is_open = False
        while len(self._under_way) < len(self._buckets):
            self._send_next()
        for work, _ in self._under_way:
            work.wait()
        self._under_way.clear()

    def _arrived(self, weight: Tensor) -> None:
        if not self._is_open:
            return
        assert isinstance(weight, nn.Parameter)
        self._missing[self._bucket_of[weight]].discard(weight)
        while len(self._under_way) < len(self._buckets) and not self._missing[len(self._under_way)]:
            self._send_next()

    def _send_next(self) -> None:
        bucket = self._buckets[len(self._under_way)]
        parts = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in bucket]
        flat = torch.cat([part.reshape(-1) for part in parts])
        start = 0
        for weight in bucket:
            weight.grad = flat[start : start + weight.numel()].view_as(weight)
            start += weight.numel()
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self._under_way.append((work, flat))


def _in_buckets(weights: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Filled in their order; a weight larger than a bucket has one of its own."""
    buckets: list[list[nn.Parameter]] = []
    size = bucket_bytes
    for weight in weights:
        assert weight.dtype == torch.float32, "what is trained is fp32, whatever the arithmetic"
        num_bytes = 4 * weight.numel()
        if size + num_bytes > bucket_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(weight)
        size += num_bytes
    return buckets
