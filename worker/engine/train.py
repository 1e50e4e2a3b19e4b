"""One fine-tune on one device, from a job directory to its result: `python -m worker.engine.train JOB_DIR`.

Read `train` from top to bottom: data, plan, model, probe, longest batch, steps, result. Everything that a step needs
is worked out before it by the same functions that the form's preview calls, so the loop decides nothing but when to
look up: at a step border it stops if asked to, evaluates, saves. What it promises there:

  - A checkpoint holds all that the next step depends on, so a run that was killed and resumed makes the same steps; on
    the CPU, with the same number of threads, the same to the last bit.
  - TERM is obeyed at the next border: checkpoint, then exit 75. Before the first step and while the result is written
    there is nothing to save, so it is obeyed at once. USR1 asks for a checkpoint at the next border and nothing else.
  - A step whose loss or gradient is no number ends the run, before anything is saved over the good checkpoints.
  - outcome.json is the last act, whatever happened. One trainer at a time holds a directory, by a lock.

What it writes beside the files of worker.job_directory: step_samples.bin (see worker.engine.records).
"""

import fcntl
import json
import logging
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from pydantic import TypeAdapter

from core import events
from core.errors import UserError
from core.packing import sample_hash
from core.preflight import JobPlan, plan_job
from core.schedule import lr_at
from core.spec import JobSpec, batch_key, parse_spec
from core.unbuilt import refuse_unbuilt
from core.wire import MeasuredProfile
from worker.engine import checkpoint
from worker.engine.batches import Ahead, make_batch, steps_from
from worker.engine.checkpoint import Manifest, NoSpace, Progress
from worker.engine.data import Corpus, load_corpus
from worker.engine.device import find_device
from worker.engine.emit import Emitter
from worker.engine.ending import Diverged, outcome_of
from worker.engine.evaluate import answer, evaluate
from worker.engine.loading import load_model
from worker.engine.loss import backward
from worker.engine.model import LanguageModel
from worker.engine.models import profile_model
from worker.engine.optimizer import hold_states, make_optimizer
from worker.engine.probe import leaks, measure_leak
from worker.engine.records import SampleRecords
from worker.engine.result import Facts, end_of_turn, save_result, stop_ids
from worker.engine.signals import Signals, Stopped
from worker.engine.tokenizer import HfChatTokenizer
from worker.job_directory import EXIT_CODES, Inputs, OutcomeFile, write_atomically, write_json

log = logging.getLogger(__name__)

MOST_FAILED_SAVES = 3  # in a row, for want of space


# -- the run as it stands --------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """Sums over the steps that this process made, for report.json."""

    steps: int = 0
    tokens: int = 0
    slots: int = 0
    trained_tokens: int = 0
    step_s: float = 0.0
    wait_s: float = 0.0
    memory_peak_bytes: int = 0
    last_loss: float | None = None


@dataclass
class Run:
    """What a process knows of its job, filled as it goes; it outlives a failure, which then says where it happened."""

    directory: Path
    emitter: Emitter
    signals: Signals
    phase: str = "start"
    spec: JobSpec | None = None  # as far as it is resolved
    plan_fields: dict[str, Any] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    saved_step: int = 0  # of the newest checkpoint that stands
    saved_at: float = field(default_factory=time.monotonic)
    failed_saves: int = 0
    measured: Measured = field(default_factory=Measured)

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def enter(self, phase: str, done: int = 0, total: int | None = None) -> None:
        self.phase = phase
        self.emitter.phase(phase, done, total)


@dataclass(frozen=True)
class Ready:
    """All that a step needs, worked out and loaded."""

    plan: JobPlan
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    corpus: Corpus
    tokenizer: HfChatTokenizer
    ends: list[int]  # tokens that end a text
    context_length: int  # tokens
    threads: int

    @property
    def spec(self) -> JobSpec:
        return self.plan.spec


# -- the article -----------------------------------------------------------------------------------------------------


def train(run: Run) -> None:  # noqa: PLR0915 (it reads as one article)
    """Trains the job of `run.directory` to its result; raises what ended it otherwise."""
    emitter, signals = run.emitter, run.signals
    signals.interrupts = True
    inputs = Inputs.model_validate_json((run.directory / "inputs.json").read_bytes())
    asked = parse_spec(json.loads((run.directory / "spec.json").read_bytes()))
    run.spec = asked
    refuse_unbuilt(asked)
    device, device_facts = find_device(inputs.devices[0])
    run.checkpoints.mkdir(exist_ok=True)
    checkpoint.remove_leftovers(run.checkpoints)
    own = checkpoint.checkpoints_in(run.checkpoints)
    # What this directory has reached lies behind whatever it once started from.
    candidates = list(dict.fromkeys(path.resolve() for path in (*own, *map(Path, inputs.resume))))
    resumed = checkpoint.newest_verified(candidates, emitter.warn)
    threads = resumed[1].threads if resumed else inputs.threads
    torch.set_num_threads(threads)

    # Data: rows become samples, each token trained or not.
    run.enter("tokenise")
    model_path = Path(inputs.model_path)
    tokenizer = HfChatTokenizer.load(model_path, asked.model.chat_template)
    corpus = load_corpus(asked, inputs, tokenizer, lambda done, total: run.enter("tokenise", done, total))
    write_profiles(run.directory / "profiles.json", corpus)
    signals.obey()

    # Plan: every step, its samples and its learning rate, before the first of them.
    run.enter("plan")
    profile = profile_model(model_path, inputs.model_name)

    def plan_of(spec: JobSpec) -> JobPlan:
        return plan_job(spec, corpus.profiles, profile, device_facts)

    plan = plan_of(asked)
    run.spec = plan.spec
    signals.obey()

    # Model: weights, adapters, and what its family does differently.
    run.enter("load_model")
    checkpoint.seed_all(asked.seed)
    model = load_model(model_path, plan.spec, asked.compute.attention, device, emitter.warn)
    signals.obey()

    # Probe: a model on which packed samples see each other gets one sample a row, or is refused.
    run.enter("probe")
    if plan.settings.mode in ("packed", "padding_free"):
        leak = measure_leak(model, asked.seed)
        if leaks(model, leak):
            plan = one_sample_a_row(run, plan, asked, leak, plan_of)
    weights = model.trainable()
    run.plan_fields = {
        **plan.plan_event(),
        "trainable_parameters": sum(weight.numel() for weight in weights.values()),
        "total_parameters": model.num_parameters(),
        "attention": model.attention,
    }
    emitter.emit(events.Plan, **run.plan_fields)

    trained_end = end_of_turn(corpus, plan.selection.train.sample_ids.tolist(), tokenizer.tokenizer)
    ends = stop_ids(model, tokenizer.tokenizer, trained_end)
    optimizer = make_optimizer(model.trainable(), plan.spec, device, emitter.warn)
    ready = Ready(plan, model, optimizer, corpus, tokenizer, ends, profile.context_length, threads)
    if resumed:
        resume(run, ready, *resumed)

    # The largest pass first: if memory runs out, then now.
    run.enter("longest_batch")
    try_largest_batch(ready)
    signals.obey()

    signals.interrupts = False
    make_steps(run, ready)

    # Result: saved, opened again, compared.
    signals.interrupts = True
    signals.obey()
    run.enter("save_result")
    eval_loss = run.progress.eval_loss
    if stops_early(plan.spec, run.progress) and take_best_weights(run, weights):
        eval_loss = run.progress.best_eval_loss
    facts = Facts(
        base=inputs.model_name,
        # Of a path only the file's name: the card travels.
        datasets=tuple(Path(part.dataset).name for part in asked.data.train),
        steps=run.progress.step,
        epochs=run.progress.epoch,
        trained_tokens=run.progress.trained_tokens,
        num_samples=len(plan.selection.train),
        loss=run.measured.last_loss,
        eval_loss=eval_loss,
        trainable_parameters=run.plan_fields["trainable_parameters"],
        total_parameters=run.plan_fields["total_parameters"],
    )
    save_result(
        run.directory / "result",
        model,
        tokenizer.tokenizer,
        spec=plan.spec,
        base_path=model_path,
        ends=ends,
        facts=facts,
    )
    signals.interrupts = False


def make_steps(run: Run, ready: Ready) -> None:  # noqa: PLR0915 (the heart of the article)
    """All steps that are left, and what happens at the borders between them."""
    plan, model, optimizer, spec, signals = ready.plan, ready.model, ready.optimizer, ready.spec, run.signals
    weights = list(model.trainable().values())
    run.enter("train", run.progress.step, plan.total_steps)
    run.saved_at = time.monotonic()

    with (
        Ahead(steps_from(run.progress.step + 1, plan.total_steps, plan.step, ready.corpus)) as ahead,
        SampleRecords(run.directory / "step_samples.bin") as records,
    ):
        while True:
            # -- at the border behind step `step`; 0 is the one before the first
            step = run.progress.step
            is_best = False
            if step > run.progress.evaluated_step and plan.evaluates_after(step) and not signals.stop_requested:
                is_best = look_up(run, ready)
            is_last = step == plan.total_steps or stops_early(spec, run.progress)
            is_due = is_last or signals.stop_requested or signals.checkpoint_requested or checkpoint_is_due(run, plan)
            # A best one is saved anew even where one of this step stands, which then lacks its evaluation.
            if (step > run.saved_step and is_due) or (is_best and spec.checkpoint.keep_best > 0):
                save_checkpoint(run, ready, is_best=is_best)
            signals.checkpoint_requested = False
            if signals.stop_requested:
                if run.saved_step < step:
                    raise NoSpace(f"the checkpoint at step {step} could not be saved")
                raise Stopped
            if is_last:
                return

            # -- the step
            began = time.perf_counter()
            batch = ahead.next()
            work = batch.work
            assert work.step == step + 1
            learning_rate = lr_at(plan.schedule, work.step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            sums = []  # of the losses of each sample
            for micro_batch in batch.batches:
                on_device = micro_batch.to(model.device)
                losses_T = backward(model, on_device, batch.num_targets)
                zeros = torch.zeros(len(on_device.sample_ids), device=model.device)
                sums.append(zeros.index_add_(0, on_device.sample_of_target_T, losses_T))
            grad_norm = clip(weights, spec.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # The only place where this thread waits for the device.
            norm, *sample_sums = torch.cat([grad_norm.reshape(1), *sums]).tolist()
            loss = sum(sample_sums) / batch.num_targets
            step_s = time.perf_counter() - began

            records.append(batch, sample_sums)
            digest = sample_hash(work.sample_ids)
            run.progress = run.progress.model_copy(
                update={
                    "step": work.step,
                    "epoch": work.epoch,
                    "consumed": run.progress.consumed + len(work.sample_ids),
                    "trained_tokens": run.progress.trained_tokens + batch.num_targets,
                    "sample_hash": digest,
                }
            )
            layout = work.layout
            assert layout.slots == sum(micro_batch.slots for micro_batch in batch.batches)
            memory_peak_bytes = memory_peak(model.device)
            run.emitter.emit(
                events.Step,
                step=work.step,
                epoch=work.epoch,
                loss=loss,
                learning_rate=learning_rate,
                grad_norm=norm,
                trained_tokens=batch.num_targets,
                tokens=layout.tokens,
                slots=layout.slots,
                rows=layout.rows,
                padding_efficiency=layout.padding_efficiency,
                padded_efficiency=work.padded_efficiency,
                tokens_per_s=layout.tokens / step_s,
                step_s=step_s,
                wait_s=ahead.wait_s,
                memory_peak_bytes=memory_peak_bytes,
                comm_bytes=0,
                sample_hash=digest,
            )
            if not (np.isfinite(loss) and np.isfinite(norm)):
                raise Diverged(work.step, loss, norm, learning_rate)
            measured = run.measured
            measured.steps += 1
            measured.tokens += layout.tokens
            measured.slots += layout.slots
            measured.trained_tokens += batch.num_targets
            measured.step_s += step_s
            measured.wait_s += ahead.wait_s
            measured.memory_peak_bytes = max(measured.memory_peak_bytes, memory_peak_bytes)
            measured.last_loss = loss


# -- before the first step -------------------------------------------------------------------------------------------


def write_profiles(path: Path, corpus: Corpus) -> None:
    measured = [MeasuredProfile(dataset=name, profile=profile) for name, profile in corpus.profiles.items()]
    write_atomically(path, TypeAdapter(list[MeasuredProfile]).dump_json(measured))


def one_sample_a_row(
    run: Run, plan: JobPlan, asked: JobSpec, leak: float, plan_of: Callable[[JobSpec], JobPlan]
) -> JobPlan:
    """The same steps with each sample alone, for a model on which packed ones see each other.

    Raises UserError engine.leak where steps are made of rows, which would then be other steps."""
    if batch_key(asked.batch) == "rows_per_step":
        raise UserError("engine.leak", "packing.mode", leak=leak)
    one_a_row = asked.packing.model_copy(update={"mode": "padded", "algorithm": "best_fit"})
    alone = plan_of(asked.model_copy(update={"packing": one_a_row}))
    packed, padded = plan.packing.mine, plan.packing.of("padded")
    run.spec = alone.spec
    run.emitter.warn(
        "leak",
        f"this model lets packed samples see each other (a changed neighbour moves their hidden states by {leak:.2g} "
        f"of the scale), so each sample gets its own row: the same steps, but {padded.rows:,} rows an epoch "
        f"instead of {packed.rows:,}, with {padded.slots:,} slots instead of {packed.slots:,}; "
        "expect it to take longer",
    )
    return alone


def resume(run: Run, ready: Ready, path: Path, manifest: Manifest) -> None:
    """Everything as it was behind the checkpoint's step. Raises UserError where the checkpoint is of another job."""
    progress = manifest.progress
    plan = ready.plan
    if progress.step > plan.total_steps:
        raise UserError("engine.past_the_end", "schedule.epochs", step=progress.step, total_steps=plan.total_steps)
    if sample_hash(plan.step(progress.step).sample_ids) != progress.sample_hash:
        raise UserError("engine.other_data", "data.train", step=progress.step)
    checkpoint.load_weights(path, progress.step, ready.model.trainable())
    checkpoint.load_optimizer(path, ready.optimizer)
    checkpoint.load_rng(path)
    run.progress = progress
    run.saved_step = progress.step if path.parent == run.checkpoints.resolve() else 0
    log.info("resumed from %s", path)


def try_largest_batch(ready: Ready) -> None:
    """Forward and backward over the largest micro-batch, with room held for AdamW's moments; leaves no trace."""
    state = checkpoint.rng_state()
    model, optimizer = ready.model, ready.optimizer
    held = None if optimizer.state else hold_states(model.trainable(), ready.spec, model.device)
    batch = make_batch(ready.plan.largest_micro_batch(), ready.corpus)
    backward(model, batch.to(model.device), batch.num_targets)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    optimizer.zero_grad(set_to_none=True)
    del held
    checkpoint.set_rng_state(state)


# -- at a border -----------------------------------------------------------------------------------------------------


def look_up(run: Run, ready: Ready) -> bool:
    """The held-out loss and the answers to sample prompts, as events; whether the loss is the best so far."""
    plan, model, tokenizer = ready.plan, ready.model, ready.tokenizer
    step = run.progress.step
    run.enter("evaluate")
    is_best = False
    evaluation = None
    if plan.validation_ids:
        layouts = plan.validation_layouts()
        batches = (make_batch(rows, ready.corpus) for layout in layouts for rows in layout.ranks[0])
        evaluation = evaluate(model, batches, lambda: run.signals.stop_requested)
        if evaluation is None:  # told to stop: it is measured again after the resume
            return False
        run.emitter.emit(
            events.Eval,
            step=step,
            eval_loss=evaluation.loss,
            perplexity=evaluation.perplexity,
            token_accuracy=evaluation.token_accuracy,
        )
        best = run.progress.best_eval_loss
        is_best = bool(np.isfinite(evaluation.loss)) and (best is None or evaluation.loss < best)
    for prompt in plan.spec.evaluation.sample_prompts:
        if run.signals.stop_requested:
            return False
        written = answer(model, prompt_ids(prompt, tokenizer), frozenset(ready.ends), ready.context_length)
        text = tokenizer.tokenizer.decode(written, skip_special_tokens=True)
        run.emitter.emit(events.Sample, step=step, prompt=prompt, text=text)
    update: dict[str, Any] = {"evaluated_step": step}
    if evaluation is not None:
        update |= {
            "eval_loss": events.finite(evaluation.loss),
            "best_eval_loss": evaluation.loss if is_best else run.progress.best_eval_loss,
            "evaluations_since_best": 0 if is_best else run.progress.evaluations_since_best + 1,
        }
    run.progress = run.progress.model_copy(update=update)
    run.enter("train", step, plan.total_steps)
    return is_best


def prompt_ids(prompt: str, tokenizer: HfChatTokenizer) -> list[int]:
    """The prompt as a user's first turn, as the model would be served; as plain text where there is no template."""
    if tokenizer.has_template:
        text = tokenizer.render([{"role": "user", "content": prompt}], None, True).text
        return list(tokenizer.encode(text).ids)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*begin, *tokenizer.encode(prompt).ids]


def stops_early(spec: JobSpec, progress: Progress) -> bool:
    patience = spec.evaluation.early_stopping_patience
    return patience is not None and progress.evaluations_since_best >= patience


def checkpoint_is_due(run: Run, plan: JobPlan) -> bool:
    """By the clock, by steps, at an epoch's end: they add up."""
    wanted, step = plan.spec.checkpoint, run.progress.step
    if step == 0:
        return False
    if wanted.every_steps is not None and step % wanted.every_steps == 0:
        return True
    if wanted.every_epoch and plan.ends_epoch(step):
        return True
    return wanted.every_minutes is not None and time.monotonic() - run.saved_at >= 60 * wanted.every_minutes


def save_checkpoint(run: Run, ready: Ready, *, is_best: bool) -> None:
    """A save for want of space is put off, not fatal; the third in a row raises NoSpace."""
    run.saved_at = time.monotonic()  # also where it fails: the next try comes an interval later
    try:
        path = checkpoint.save(
            run.checkpoints,
            ready.model.trainable(),
            ready.optimizer,
            run.progress,
            spec=ready.spec,
            threads=ready.threads,
        )
    except NoSpace as error:
        run.failed_saves += 1
        if run.failed_saves >= MOST_FAILED_SAVES:
            raise
        run.emitter.warn("disk_full", f"no checkpoint at step {run.progress.step}, training goes on: {error}")
        return
    run.failed_saves = 0
    run.saved_step = run.progress.step
    manifest = checkpoint.read_manifest(path)
    relative = path.relative_to(run.directory).as_posix()
    run.emitter.emit(events.Checkpoint, step=run.progress.step, path=relative, bytes=manifest.bytes, best=is_best)
    checkpoint.prune(run.checkpoints, ready.spec.checkpoint.keep_last, ready.spec.checkpoint.keep_best)


def take_best_weights(run: Run, weights: dict[str, torch.nn.Parameter]) -> bool:
    """A run that stopped because it got worse hands out what it was at its best, where that was kept."""
    best = checkpoint.best_in(run.checkpoints)
    source = "the last step, for none of the best evaluation was kept" if best is None else best.name
    run.emitter.warn("early_stopping", f"stopped early at step {run.progress.step}; the result is that of {source}")
    if best is None:
        return False
    checkpoint.load_weights(best, run.progress.step, weights)
    return True


def clip(weights: list[torch.nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """The gradient's norm as it was; it is shortened to `max_norm` where it is longer."""
    if max_norm is None:
        return torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    return torch.nn.utils.clip_grad_norm_(weights, max_norm)


def memory_peak(device: torch.device) -> int:
    """Bytes: what torch has held at most on a GPU, on a CPU what the process has."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- the process -----------------------------------------------------------------------------------------------------


def main(job_dir: Path) -> int:
    """Trains the job in `job_dir` and returns the exit code that outcome.json holds."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    transformers.utils.logging.disable_progress_bar()
    with (job_dir / ".trainer.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.error("another trainer is at work in %s", job_dir)
            return EXIT_CODES["internal"]
        if _is_finished(job_dir):
            return 0
        (job_dir / "outcome.json").unlink(missing_ok=True)
        with Emitter(job_dir / "events.jsonl") as emitter, Signals().installed() as signals:
            return _end(Run(job_dir, emitter, signals), time.monotonic())


def _is_finished(job_dir: Path) -> bool:
    try:
        outcome = OutcomeFile.model_validate_json((job_dir / "outcome.json").read_bytes())
    except FileNotFoundError:
        return False
    return outcome.code == 0 and (job_dir / "result").is_dir()


def _end(run: Run, began: float) -> int:
    """Runs it, and says how it ended in every place where someone looks."""
    outcome = OutcomeFile(code=0)
    try:
        try:
            train(run)
        finally:
            run.signals.interrupts = False
    except Exception as error:  # noqa: BLE001 (the border of the process: it becomes outcome.json and an event)
        outcome = outcome_of(error, run.phase, run.progress.step, run.spec)
    is_stopped = outcome.reason == "stopped"
    if outcome.reason is not None:
        log.log(
            logging.INFO if is_stopped else logging.ERROR, "%s: %s %s", outcome.reason, outcome.text, outcome.remedy
        )
        if not is_stopped:
            run.emitter.fail(outcome.reason, outcome.text, outcome.remedy)
    run.emitter.emit(
        events.End,
        outcome="succeeded" if outcome.code == 0 else "stopped" if is_stopped else "failed",
        steps=run.progress.step,
        trained_tokens=run.progress.trained_tokens,
        seconds=time.monotonic() - began,
    )
    measured = run.measured
    report = {
        "plan": run.plan_fields,
        "measured": {
            **vars(measured),
            "padding_efficiency": measured.tokens / measured.slots if measured.slots else None,
            "tokens_per_s": measured.tokens / measured.step_s if measured.step_s else None,
            "seconds": time.monotonic() - began,
            "progress": run.progress.model_dump(mode="json"),
        },
        "outcome": outcome.model_dump(mode="json"),
    }
    write_atomically(run.directory / "report.json", json.dumps(report, ensure_ascii=False, indent=1).encode())
    write_json(run.directory / "outcome.json", outcome)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
