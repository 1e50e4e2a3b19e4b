"""Buckets of gradients on a group of one, where a sum changes nothing: order, idle weights, several passes."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from worker.engine.gradient_sum import GradientSum
from worker.engine.ranks import Ranks, Traffic


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def weights(*sizes: int) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(size)) for size in sizes]


def test_gradients_are_what_autograd_made_of_all_passes() -> None:
    layers, plain = weights(3, 5, 2), weights(3, 5, 2)
    gradients = GradientSum(layers, bucket_bytes=24)
    for number in range(2):
        sum((weight**2).sum() for weight in plain).backward()
        loss = sum((weight**2).sum() for weight in layers)
        if number == 0:
            loss.backward()
        else:
            with gradients.as_they_come():
                loss.backward()
    for ours, theirs in zip(layers, plain, strict=True):
        assert ours.grad is not None and torch.equal(ours.grad, theirs.grad)


def test_buckets_go_out_in_their_fixed_order_whatever_autograd_finishes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = weights(1, 2, 3)
    gradients = GradientSum(layers, bucket_bytes=1)
    sent: list[int] = []
    real = dist.all_reduce

    def watch(tensor: torch.Tensor, **named: object) -> object:
        sent.append(tensor.numel())
        return real(tensor, **named)

    monkeypatch.setattr(dist, "all_reduce", watch)
    with gradients.as_they_come():
        for weight in layers:  # the first layer's is completed first, where a real pass completes the last
            (weight**2).sum().backward()
            assert not sent or weight is layers[2]
    assert sent == [3, 2, 1]


def test_a_weight_that_no_pass_has_reached_counts_as_zero() -> None:
    reached, idle = weights(3, 4)
    with GradientSum([reached, idle]).as_they_come():
        reached.sum().backward()
    assert idle.grad is not None and not idle.grad.any()
    assert reached.grad is not None and reached.grad.all()


def test_bytes_are_counted_by_what_a_collective_moves() -> None:
    traffic = Traffic()
    traffic.watch()
    try:
        dist.all_reduce(torch.zeros(10))
        assert traffic.bytes == 2 * 40
        dist.broadcast(torch.zeros(10), src=0)
        assert traffic.bytes == 3 * 40
    finally:
        traffic.unwatch()
    dist.all_reduce(torch.zeros(10))
    assert traffic.bytes == 3 * 40


def test_alone_nothing_is_asked_of_anybody() -> None:
    alone = Ranks()
    assert alone.any(True, False) == (True, False)
    assert alone.from_first("a") == "a" and alone.gather(1) == [1]
