"""One optimizer step, and how it is told."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from core import events
from core.packing import Segment, sample_hash
from core.preflight import StepWork
from worker.engine.batches import StepBatch
from worker.engine.ending import Diverged
from worker.engine.run import Ready, Run, Wishes

MOST_STEPS_LEFT_OUT = 20  # in a row: each halves the loss scale, which begins at 65,536, so no scale helps by then


@dataclass(frozen=True)
class Made:
    """An optimizer step as it went, the same on every rank."""

    loss: float
    grad_norm: float  # before clipping
    segments: tuple[Segment, ...]  # of all ranks, in the order of the layout
    loss_sums: tuple[float, ...]  # of each of them
    wishes: Wishes
    seconds: float
    memory_peak_bytes: int  # of the rank that had the most
    comm_bytes: int  # of this rank


def make_step(
    ready: Ready, batch: StepBatch, learning_rate: float, own_wishes: Callable[[], tuple[bool, bool, bool]]
) -> Made:
    """One optimizer step. Ranks meet for the gradient, and once more at its end, where this thread waits for its device
    for the only time: each puts the loss sums of its samples at their places among all, its wishes and its peak."""
    model, learner, ranks, layout = ready.model, ready.learner, ready.ranks, batch.work.layout
    began, bytes_before = time.perf_counter(), ranks.traffic.bytes
    of_rank = [[segment for rows in passes for row in rows for segment in row] for passes in layout.ranks]
    first = sum(map(len, of_rank[: ranks.rank]))
    num_samples = sum(map(len, of_rank))

    sums = []  # of the losses of each sample
    for number, micro_batch in enumerate(batch.batches, start=1):
        on_device = micro_batch.to(model.device)
        losses_T = learner.backward(on_device, batch.num_targets, is_last=number == len(batch.batches))
        zeros = torch.zeros(len(on_device.sample_ids), device=model.device)
        sums.append(zeros.index_add_(0, on_device.sample_of_target_T, losses_T))
    grad_norm = learner.update(learning_rate)

    told = torch.zeros(num_samples + 4 + ranks.size, dtype=torch.float64, device=model.device)
    told[first : first + len(of_rank[ranks.rank])] = torch.cat(sums)
    told[num_samples : num_samples + 3] = torch.tensor(own_wishes())
    if ranks.is_first:  # all have the same norm, but only one has to be believed
        told[num_samples + 3] = grad_norm
    told[num_samples + 4 + ranks.rank] = memory_peak(model.device)
    *loss_sums, stop, save, clock, norm = (values := ranks.sum_(told).tolist())[: num_samples + 4]
    return Made(
        loss=sum(loss_sums) / batch.num_targets,
        grad_norm=norm,
        segments=tuple(segment for segments in of_rank for segment in segments),
        loss_sums=tuple(loss_sums),
        wishes=Wishes(stop > 0, save > 0, clock > 0),
        seconds=time.perf_counter() - began,
        memory_peak_bytes=int(max(values[num_samples + 4 :])),
        comm_bytes=ranks.traffic.bytes - bytes_before,
    )


def note_step(run: Run, ready: Ready, work: StepWork, made: Made, *, learning_rate: float, wait_s: float) -> None:
    """A step that was made, in the run's own books and as an event. Raises Diverged where it came to no number."""
    digest = sample_hash(work.sample_ids)
    run.progress = run.progress.model_copy(
        update={
            "step": work.step,
            "epoch": work.epoch,
            "consumed": run.progress.consumed + len(work.sample_ids),
            "trained_tokens": run.progress.trained_tokens + work.num_targets,
            "sample_hash": digest,
        }
    )
    layout = work.layout
    run.emitter.emit(
        events.Step,
        step=work.step,
        epoch=work.epoch,
        loss=made.loss,
        learning_rate=learning_rate,
        grad_norm=made.grad_norm,
        trained_tokens=work.num_targets,
        tokens=layout.tokens,
        slots=layout.slots,
        rows=layout.rows,
        padding_efficiency=layout.padding_efficiency,
        padded_efficiency=work.padded_efficiency,
        tokens_per_s=layout.tokens / made.seconds,
        step_s=made.seconds,
        wait_s=wait_s,
        memory_peak_bytes=made.memory_peak_bytes,
        comm_bytes=made.comm_bytes,
        sample_hash=digest,
        mfu=ready.utilisation.of(work, made.seconds),
    )
    # Under fp16 a gradient may overflow though all is well: the scaler left the step out and scales less.
    may_overflow = ready.spec.compute.dtype == "fp16" and run.steps_left_out < MOST_STEPS_LEFT_OUT
    if not np.isfinite(made.loss) or not (np.isfinite(made.grad_norm) or may_overflow):
        raise Diverged(work.step, made.loss, made.grad_norm, learning_rate)
    if np.isfinite(made.grad_norm):
        run.steps_left_out = 0
    else:
        run.steps_left_out += 1
        run.emitter.warn("overflow", f"step {work.step} changed nothing: its gradient overflowed in fp16")
    measured = run.measured
    measured.steps += 1
    measured.tokens += layout.tokens
    measured.slots += layout.slots
    measured.rows += layout.rows
    measured.trained_tokens += work.num_targets
    measured.step_s += made.seconds
    measured.wait_s += wait_s
    measured.memory_peak_bytes = max(measured.memory_peak_bytes, made.memory_peak_bytes)
    measured.last_loss = made.loss


def memory_peak(device: torch.device) -> int:
    """Bytes: what torch has held at most on a GPU, on a CPU what the process has."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
