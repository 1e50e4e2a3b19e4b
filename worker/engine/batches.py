"""Rows of sample ids become tensors, ahead of the step that needs them.

A row holds segments of samples side by side, each with positions from 0, and a pad tail up to the width of its
micro-batch. The pad has positions and segments of its own, none longer than the micro-batch's longest segment, so that
it stays within the model's context like everything else. A dummy row, of a rank that has nothing left to do in a step,
is one pad token.

The target of position p is the token at p + 1 of the same segment, where that token is trained; nothing is predicted
across a border, so the first token of a segment is no target even where it lies within its sample. Targets are picked
here, on the CPU, so the model's head only ever sees positions that have one.

Shapes: B rows, N positions of a row, T targets of a micro-batch.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from core.arrangement import DUMMY_WIDTH
from core.layout import MicroBatch, pad_pieces
from core.packing import Segment
from core.preflight import StepWork

PAD_TOKEN = 0  # any token does: nothing sees it, and it has no target
STEPS_AHEAD = 2


class Samples(Protocol):
    """Where tokens come from: a corpus, by global sample id."""

    def sample(self, sample_id: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]: ...


@dataclass(frozen=True)
class Batch:
    """One forward pass. `target_index_T` counts through the flattened B x N positions; `segments` are lengths, by row.
    `sample_of_target_T` is the place of the target's segment in the micro-batch, rows in order, and `sample_ids` says
    whose they are."""

    token_ids_BN: Tensor
    position_ids_BN: Tensor
    segments: tuple[tuple[int, ...], ...]
    target_index_T: Tensor
    targets_T: Tensor
    sample_of_target_T: Tensor
    sample_ids: tuple[int, ...]

    @property
    def num_targets(self) -> int:
        return self.targets_T.shape[0]

    @property
    def slots(self) -> int:
        return self.token_ids_BN.numel()

    def last_target_only(self) -> "Batch":
        """For writing on: only the last position is asked for its next token."""
        return replace(
            self,
            target_index_T=self.target_index_T[-1:],
            targets_T=self.targets_T[-1:],
            sample_of_target_T=self.sample_of_target_T[-1:],
        )

    def to(self, device: torch.device) -> "Batch":
        if device.type == "cpu":
            return self

        def moved(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return replace(
            self,
            token_ids_BN=moved(self.token_ids_BN),
            position_ids_BN=moved(self.position_ids_BN),
            target_index_T=moved(self.target_index_T),
            targets_T=moved(self.targets_T),
            sample_of_target_T=moved(self.sample_of_target_T),
        )


@dataclass(frozen=True)
class StepBatch:
    """All that one rank computes of an optimizer step. `num_targets` is the whole step's, over all ranks."""

    work: StepWork
    batches: tuple[Batch, ...]

    @property
    def num_targets(self) -> int:
        return self.work.num_targets


def make_batch(rows: MicroBatch, samples: Samples) -> Batch:
    """The rows of one micro-batch as tensors on the CPU."""
    lengths = [[segment.length for segment in row] for row in rows]
    longest = max((length for row in lengths for length in row), default=DUMMY_WIDTH)
    width = max(sum(row) if row else DUMMY_WIDTH for row in lengths)
    token_ids_BN = np.full((len(rows), width), PAD_TOKEN, dtype=np.int64)
    position_ids_BN = np.zeros((len(rows), width), dtype=np.int64)
    segments = []
    none = np.zeros(0, dtype=np.int64)
    target_indices, targets, owners = [none], [none], [none]
    num_segments = 0
    for row, row_segments in enumerate(rows):
        begin = 0
        for sample_id, start, end in row_segments:
            token_ids, trained = samples.sample(sample_id)
            assert end <= len(token_ids), "the plan knows the sample's length"
            token_ids_BN[row, begin : begin + end - start] = token_ids[start:end]
            predicted = np.flatnonzero(trained[start + 1 : end])
            target_indices.append(row * width + begin + predicted)
            targets.append(token_ids[start + 1 + predicted].astype(np.int64))
            owners.append(np.full(len(predicted), num_segments))
            num_segments += 1
            begin += end - start
        pad = pad_pieces(width - begin, longest)
        segments.append((*lengths[row], *pad))
        position_ids_BN[row] = np.concatenate([np.arange(length) for length in segments[-1]])
    return Batch(
        token_ids_BN=torch.from_numpy(token_ids_BN),
        position_ids_BN=torch.from_numpy(position_ids_BN),
        segments=tuple(segments),
        target_index_T=torch.from_numpy(np.concatenate(target_indices)),
        targets_T=torch.from_numpy(np.concatenate(targets)),
        sample_of_target_T=torch.from_numpy(np.concatenate(owners)),
        sample_ids=tuple(segment.sample for row in rows for segment in row),
    )


def make_step(work: StepWork, samples: Samples, rank: int = 0) -> StepBatch:
    """What one rank computes of a step."""
    return StepBatch(work, tuple(make_batch(rows, samples) for rows in work.layout.ranks[rank]))


Item = TypeVar("Item")


@dataclass(frozen=True)
class _Failed:
    error: BaseException


class Ahead(Generic[Item]):
    """Runs an iterator in a thread, a few items ahead. `wait_s` is what the last `next` waited for its item."""

    def __init__(self, items: Iterable[Item], num_ahead: int = STEPS_AHEAD) -> None:
        self.wait_s = 0.0
        self._ready: queue.Queue[Item | _Failed] = queue.Queue(num_ahead)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(iter(items),), name="batches", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Ahead[Item]":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the thread, whatever it was doing."""
        self._is_closed.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.01)

    def next(self) -> Item:
        """The next item; an error of the thread is raised here."""
        began = time.perf_counter()
        item = self._ready.get()
        self.wait_s = time.perf_counter() - began
        if isinstance(item, _Failed):
            raise item.error
        return item

    def _fill(self, items: Iterator[Item]) -> None:
        try:
            for item in items:
                self._ready.put(item)
                if self._is_closed.is_set():
                    return
        except Exception as error:  # noqa: BLE001 (handed over to the training thread, which raises it)
            self._ready.put(_Failed(error))


def steps_from(
    first: int, last: int, work_of: Callable[[int], StepWork], samples: Samples, rank: int = 0
) -> Iterator[StepBatch]:
    """The batches of one rank for optimizer steps first to last."""
    return (make_step(work_of(step), samples, rank) for step in range(first, last + 1))


def alone(sample_id: int, samples: Samples) -> Batch:
    """One sample in a row of its own."""
    token_ids, _ = samples.sample(sample_id)
    return make_batch(((Segment(sample_id, 0, len(token_ids)),),), samples)


def of_tokens(rows: Sequence[Sequence[Sequence[int]]]) -> Batch:
    """A batch from token ids by row and segment, all of them targets but each segment's first: for probes."""
    contents = [np.array(segment, dtype=np.int32) for row in rows for segment in row]

    class Given:
        def sample(self, sample_id: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
            return contents[sample_id], np.arange(len(contents[sample_id])) > 0

    segments = iter([Segment(number, 0, len(content)) for number, content in enumerate(contents)])
    return make_batch(tuple(tuple(next(segments) for _ in row) for row in rows), Given())
