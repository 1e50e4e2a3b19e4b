"""Steps that are made for what they tell (core.trial, and the layouts of a certificate): no evaluation, no
checkpoint, no result.

A probe begins anew for each rate. What it begins from is written to disk once, as a checkpoint at step 0, and read
back before every rate, also the first: by the code that resumes a run, under whatever stage and on however many ranks,
and with the same promise. On a CPU a rate makes the same steps to the last bit whatever was tried before it.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from core import events
from core.certify import Curve
from core.schedule import lr_at
from core.trial import AnyTrial, Certify, DryRun, RateProbe, has_diverged, probe_schedule
from worker.engine import checkpoint
from worker.engine.batches import Ahead, steps_from
from worker.engine.checkpoint import Progress
from worker.engine.run import Ready, Run
from worker.engine.signals import Stopped
from worker.engine.step import Made, make_step, note_step
from worker.job_directory import LayoutTrial, write_json

NOTHING_KEPT = "a trial keeps nothing to go on from"


def make_trial(run: Run, ready: Ready, trial: AnyTrial | LayoutTrial) -> None:
    """Raises Stopped at the next border where somebody asks for it."""
    match trial:
        case DryRun():
            make_first_steps(run, ready, trial)
        case RateProbe():
            probe_rates(run, ready, trial)
        case LayoutTrial():
            curve = try_layout(run, ready, trial)
            if ready.ranks.is_first:
                write_json(run.directory / "trial.json", curve)
        case Certify():
            raise AssertionError("worker.certifier starts a trainer for each layout of it")


def make_first_steps(run: Run, ready: Ready, trial: DryRun) -> None:
    """As the job itself makes them, with its own learning rates; told as its steps."""
    plan = ready.plan
    steps = min(trial.steps, plan.total_steps)
    run.enter("train", 0, steps)
    with Ahead(steps_from(1, steps, plan.step, ready.corpus, ready.ranks.rank)) as ahead:
        for _ in range(steps):
            batch = ahead.next()
            learning_rate = lr_at(plan.schedule, batch.work.step)
            made = make_step(ready, batch, learning_rate, run.own_wishes)
            note_step(run, ready, batch.work, made, learning_rate=learning_rate, wait_s=ahead.wait_s)
            _obey(made)


def probe_rates(run: Run, ready: Ready, trial: RateProbe) -> None:
    """Rate after rate from the same beginning, told as `probe` events."""
    steps = min(trial.steps, ready.plan.total_steps)
    with beginning_of(run, ready) as begin_again:
        for number, rate in enumerate(trial.rates):
            run.enter("probe_rates", number * steps, len(trial.rates) * steps)
            begin_again()
            _probe_rate(run, ready, rate, steps)


def _probe_rate(run: Run, ready: Ready, rate: float, steps: int) -> None:
    """All ranks see the same numbers, so they stop alike."""
    schedule = probe_schedule(rate, steps)
    # Under fp16 an overflow is the scaler's to mend, and no word on the rate.
    may_overflow = ready.spec.compute.dtype == "fp16"
    first_loss: float | None = None
    for batch in steps_from(1, steps, ready.plan.step, ready.corpus, ready.ranks.rank):
        made = make_step(ready, batch, lr_at(schedule, batch.work.step), run.own_wishes)
        run.progress = run.progress.model_copy(
            update={
                "step": run.progress.step + 1,  # of all rates
                "trained_tokens": run.progress.trained_tokens + batch.num_targets,
            }
        )
        first_loss = made.loss if first_loss is None else first_loss
        diverged = has_diverged(first_loss, made.loss, 0.0 if may_overflow else made.grad_norm)
        run.emitter.emit(
            events.Probe,
            learning_rate=rate,
            step=batch.work.step,
            loss=made.loss,
            grad_norm=made.grad_norm,
            diverged=diverged,
        )
        _obey(made)
        if diverged:
            return


@contextmanager
def beginning_of(run: Run, ready: Ready) -> Iterator[Callable[[], None]]:
    """What puts everything back to where it is now: weights, moments, the loss scale, buffers and generators."""
    folder = run.directory / "beginning"
    path = checkpoint.save(folder, ready.learner, Progress(), spec=ready.spec, threads=ready.threads, ranks=ready.ranks)
    manifest = checkpoint.read_manifest(path)
    # Small tables that a model may change as it computes, such as the frequencies of positions; no checkpoint has them.
    buffers = [(buffer, buffer.detach().clone()) for buffer in ready.model.model.buffers()]

    def begin_again() -> None:
        ready.learner.read(path, manifest)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        checkpoint.load_rng(path, ready.ranks.rank)

    try:
        yield begin_again
    finally:
        if ready.ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)


def try_layout(run: Run, ready: Ready, trial: LayoutTrial) -> Curve:
    """The first steps for their numbers alone: nothing is told on the way."""
    plan, ranks = ready.plan, ready.ranks
    last = min(trial.steps, plan.total_steps)
    work_of = partial(plan.step, is_alone=trial.is_alone)
    made: list[Made] = []
    slots = most_segments = 0
    for batch in steps_from(1, last, work_of, ready.corpus, ranks.rank):
        work = batch.work
        made.append(make_step(ready, batch, lr_at(plan.schedule, work.step), run.own_wishes))
        _obey(made[-1])
        slots += work.layout.slots
        rows = (row for passes in work.layout.ranks for rows in passes for row in rows)
        most_segments = max(most_segments, *map(len, rows))
    return Curve(
        losses=tuple(step.loss for step in made),
        grad_norms=tuple(step.grad_norm for step in made),
        slots=slots,
        most_segments_in_a_row=most_segments,
        ranks=ranks.size,
        attention=ready.model.attention,
        seconds=sum(step.seconds for step in made),
    )


def _obey(made: Made) -> None:
    if made.wishes.stop:
        raise Stopped(NOTHING_KEPT)
