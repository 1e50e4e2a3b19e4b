"""The processes that train one job together: how they find each other, agree, and notice that one is gone.

torchrun starts them and says in the environment who each is; a trainer started alone is the first of one. Rank 0 alone
writes what the outside reads; the others say what they have to say in rank-<k>.log.

Whatever a rank decides has to be decided by all alike, or the next collective hangs. So signals, clocks and evaluations
are put together (`any`, `sum`) and decided on afterwards, and what only one rank can know (a path, a token, which
checkpoint verifies) is told by the first (`from_first`). What can be had from the plan alone needs no agreement.

A rank that goes takes its connections with it: the others' next collective fails. That is the *second* failure; the
first one's own words count, so the others wait for them a moment (see worker.engine.ending).
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from worker.dies_with_parent import die_with

# Longer than the largest file takes to be tokenised by rank 0 alone; a hang is noticed by the supervisor long before.
TIMEOUT = timedelta(hours=2)
# What gloo says, in words only, when a peer is gone; NCCL raises a DistError.
PEER_IS_GONE = re.compile(r"Connection (closed|reset|refused)|Broken pipe|Read error|Write error|peer", re.IGNORECASE)

T = TypeVar("T")


@dataclass
class Traffic:
    """Bytes that this rank has put through collectives: an all_reduce counts twice its payload (it is a reduce and a
    gather), everything else its full payload once."""

    bytes: int = 0
    _originals: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def watch(self) -> None:
        """Counts from now on. DeepSpeed takes torch's functions when it is imported, so this comes before."""
        for name, payload in _PAYLOADS.items():
            original = self._originals[name] = getattr(dist, name)
            setattr(dist, name, self._counting(original, payload))

    def unwatch(self) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)
        self._originals.clear()

    def _counting(self, original: Callable[..., T], payload: Callable[..., int]) -> Callable[..., T]:
        def counted(*arguments: Any, **named: Any) -> T:
            self.bytes += payload(*arguments, **named)
            return original(*arguments, **named)

        return counted


def _size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# Collectives of torch.distributed that a step may run, with what each moves. The outer ones only: what they call of
# their own module in turn is the same bytes.
_PAYLOADS: dict[str, Callable[..., int]] = {
    "all_reduce": lambda tensor, *_, **__: 2 * _size(tensor),
    "reduce": lambda tensor, *_, **__: _size(tensor),
    "broadcast": lambda tensor, *_, **__: _size(tensor),
    "all_gather_into_tensor": lambda output_tensor, *_, **__: _size(output_tensor),
    "all_gather": lambda tensor_list, *_, **__: _size(*tensor_list),
    "reduce_scatter_tensor": lambda output, input, *_, **__: _size(input),
    "reduce_scatter": lambda output, input_list, *_, **__: _size(*input_list),
    "all_to_all_single": lambda output, *_, **__: _size(output),
}


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """In place, over all ranks: the same bits on each."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, *claims: bool) -> tuple[bool, ...]:
        """Each claim, if any rank makes it."""
        if self.size == 1:
            return claims
        return tuple(bool(count) for count in self.sum_(torch.tensor(claims, dtype=torch.int32)).tolist())

    def from_first(self, value: T) -> T:
        """What rank 0 gives, on all ranks; the others' own value is not looked at."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        return told[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait_for_all(self) -> None:
        self.any(False)  # of an empty tensor gloo waits for nobody

    def agree_on(self, what: str, value: object) -> None:
        """Raises Disagreement where ranks computed different things that have to be equal: a fault of ours."""
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise Disagreement(f"ranks differ in {what}: {values}")


ALONE = Ranks()


class Disagreement(Exception):
    """Two ranks hold different things for what has to be one."""


@contextmanager
def joined(directory: Path) -> Iterator[Ranks]:
    """The ranks of this job, as torchrun's environment tells; a process started without it is alone."""
    if "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    die_with(os.getppid())  # torchrun gives each rank a session of its own, and no rank may outlive it
    if size == 1:
        yield ALONE
        return
    print_into(directory / f"rank-{rank}.log")
    dist.init_process_group(backend(), timeout=TIMEOUT)
    ranks = Ranks(rank, size, local_rank)
    ranks.traffic.watch()
    yield ranks
    # Not where it failed: with a peer gone or in the middle of something, taking leave may wait for ever.
    ranks.traffic.unwatch()
    dist.destroy_process_group()


def backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def open_group_of_one(device: torch.device) -> None:
    """For DeepSpeed, which wants a group, and the place that torchrun gives, from a process that is alone too."""
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    dist.init_process_group(backend(), store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)


def print_into(path: Path) -> None:
    """Whatever this process prints from now on, libraries in C included, is appended to a file of its own.

    Nobody stands between who prints and the file, so secrets are hidden only from what is read out of it later; the
    file itself is for this account alone."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def is_peer_gone(error: BaseException) -> bool:
    """Whether this is what a rank sees when another one has ended in the middle of their work."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error) and PEER_IS_GONE.search(str(error)) is not None
