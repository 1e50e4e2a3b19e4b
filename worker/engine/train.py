"""One fine-tune, from a job directory to its result: `python -m worker.engine.train JOB_DIR` on one device, the same
under `torchrun --standalone --nproc-per-node N` on several.

Read `train` from top to bottom: data, plan, model, probe, longest batch, steps, result. Everything that a step needs
is worked out before it by the same functions that the form's preview calls, so the loop decides nothing but when to
look up: at a step border it stops if asked to, evaluates, saves. What it promises there:

  - A checkpoint holds all that the next step depends on, so a run that was killed and resumed makes the same steps; on
    the CPU, with the same number of threads and ranks, the same to the last bit.
  - TERM is obeyed at the next border: checkpoint, then exit 75. Before the first step and while the result is written
    there is nothing to save, so it is obeyed at once (of several ranks, between two phases). USR1 asks for a checkpoint
    at the next border and nothing else.
  - A step whose loss or gradient is no number ends the run, before anything is saved over the good checkpoints.
  - outcome.json is the last act, whatever happened. One trainer at a time holds a directory, by a lock.

All ranks read this article in step (worker.engine.ranks): they compute the same plan, each its own part of every step,
and decide alike, since what they decide on is a sum over all of them. The first one alone writes what others read.

What it writes beside the files of worker.job_directory: step_samples.bin (see worker.engine.records).
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from pydantic import TypeAdapter

from core import events
from core.errors import UserError
from core.packing import sample_hash
from core.peaks import peak_flops
from core.placement import standing_for_all
from core.preflight import JobPlan, plan_job
from core.run_totals import run_totals
from core.schedule import lr_at
from core.spec import JobSpec, batch_key, parse_spec
from core.unbuilt import refuse_unbuilt
from core.verdict import dropped_calls
from core.wire import MeasuredProfile
from core.zero import Loaded, refuse_unproven, uses_deepspeed
from worker.engine import checkpoint
from worker.engine.batches import Ahead, make_batch, steps_from
from worker.engine.begun import plan_as_begun
from worker.engine.checkpoint import Manifest, NoSpace, Progress
from worker.engine.data import Corpus, load_corpus
from worker.engine.device import find_device
from worker.engine.emit import Emitter, NoEmitter
from worker.engine.ending import culprits_outcome, outcome_of, write_first
from worker.engine.evaluate import answer, evaluate
from worker.engine.held import held_to
from worker.engine.learner import Learner, Replica
from worker.engine.loading import load_model, try_out
from worker.engine.model import LanguageModel, Warn
from worker.engine.model_card import Facts
from worker.engine.models import profile_with_hashes
from worker.engine.optimizer import make_optimizer
from worker.engine.probe import leaks, measure_leak
from worker.engine.ranks import Ranks, is_peer_gone, joined
from worker.engine.records import SampleRecords
from worker.engine.result import end_of_turn, save_result, stop_ids
from worker.engine.run import Ready, Run, Wishes
from worker.engine.signals import Signals, Stopped, stacks_on_demand
from worker.engine.step import make_step, note_step
from worker.engine.tokenizer import HfChatTokenizer
from worker.engine.trial import make_trial
from worker.engine.utilisation import Utilisation
from worker.engine.weights import report_weights
from worker.engine.zero import Shards, cut_as_read, stepping_on_the_cpu
from worker.job_directory import EXIT_CODES, Inputs, OutcomeFile, write_atomically

log = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
MOST_FAILED_SAVES = 3  # in a row, for want of space


# -- the article -----------------------------------------------------------------------------------------------------


def train(run: Run) -> None:  # noqa: PLR0915 (it reads as one article)
    """Trains the job of `run.directory` to its result; raises what ended it otherwise."""
    emitter, ranks = run.emitter, run.ranks
    run.let_stop_interrupt(True)
    inputs = Inputs.model_validate_json((run.directory / "inputs.json").read_bytes())
    if not inputs.cache_dir:
        inputs = inputs.model_copy(update={"cache_dir": str(run.directory / "cache")})
    asked = parse_spec(json.loads((run.directory / "spec.json").read_bytes()))
    run.spec = asked
    refuse_unbuilt(asked)
    refuse_other_ranks(ranks, inputs, asked)
    name = inputs.devices[ranks.local_rank % len(inputs.devices)]
    device, own_facts = find_device(name, ranks.local_rank, inputs.cpu_slots)
    device_facts = standing_for_all(ranks.gather(own_facts))
    resumed = None
    if ranks.is_first:
        run.checkpoints.mkdir(exist_ok=True)
        checkpoint.remove_leftovers(run.checkpoints)
        own = checkpoint.checkpoints_in(run.checkpoints)
        # What this directory has reached lies behind whatever it once started from.
        candidates = list(dict.fromkeys(path.resolve() for path in (*own, *map(Path, inputs.resume))))
        resumed = checkpoint.newest_verified(candidates, emitter.warn)
    resumed = ranks.from_first(resumed)
    threads = resumed[1].threads if resumed else inputs.threads
    torch.set_num_threads(threads)

    # Data: rows become samples, each token trained or not. The first rank does it, the others find it done.
    run.enter("tokenise")
    model_path = Path(inputs.model_path)
    tokenizer = HfChatTokenizer.load(model_path, asked.model.chat_template)
    if not ranks.is_first:
        ranks.wait_for_all()
    corpus = load_corpus(asked, inputs, tokenizer, lambda done, total: run.enter("tokenise", done, total))
    if ranks.is_first:
        write_profiles(run.directory / "profiles.json", corpus)
        ranks.wait_for_all()
    run.obey()

    # Plan: every step, its samples and its learning rate, before the first of them.
    run.enter("plan")
    profile = profile_with_hashes(model_path, inputs.model_name, Path(inputs.cache_dir))

    def plan_of(spec: JobSpec) -> JobPlan:
        return plan_job(spec, corpus.profiles, profile, device_facts)

    plan = plan_as_begun(asked, resumed[1] if resumed else None, plan_of, emitter.warn)
    run.spec = plan.spec
    refuse_unproven(plan.spec, Loaded.of(profile.shape, num_new_tokens=len(tokenizer.added_ids)))
    ranks.agree_on("the plan", plan_hash(plan))
    dropped = dropped_calls(plan.all_counts)
    if dropped is not None:
        emitter.warn("calls_dropped", dropped.text())
    run.obey()

    # Model: weights and adapters, in one piece or cut up over the ranks; then what its family does differently.
    run.enter("load_model")

    def load(onto: torch.device) -> LanguageModel:
        return load_model(
            model_path,
            plan.spec,
            onto,
            emitter.warn,
            adapter_path=Path(inputs.adapter_path) if inputs.adapter_path else None,
            new_token_ids=tokenizer.added_ids,
        )

    checkpoint.seed_all(asked.seed)
    with cut_as_read(plan.spec, device):
        model = load(device)
    learner = make_learner(model, plan.spec, ranks, run.directory, emitter.warn)
    try_out(model, plan.spec, asked.compute.attention, emitter.warn)
    ranks.agree_on("the attention", model.attention)
    checkpoint.seed_all(asked.seed + ranks.rank)  # dropout: each rank its own
    run.obey()

    # Probe: a model on which packed samples see each other gets one sample a row, or is refused.
    run.enter("probe")
    if plan.settings.mode in ("packed", "padding_free"):
        leak = ranks.from_first(measure_leak(model, asked.seed))
        if leaks(model, leak):
            plan = one_sample_a_row(run, plan, leak, plan_of)
    run.plan_fields = {
        **plan.plan_event(),
        **report_weights(model.model).plan_event(),
        "totals": run_totals(plan).model_dump(),
        "attention": model.attention,
        "attention_reason": model.attention_reason,
    }
    emitter.emit(events.Plan, **run.plan_fields)

    trained_end = end_of_turn(corpus, plan.selection.train.sample_ids.tolist(), tokenizer.tokenizer)
    ends = stop_ids(model, tokenizer.tokenizer, trained_end)
    utilisation = Utilisation(
        profile.shape,
        None if plan.spec.method.type == "full" else run.plan_fields["trainable_parameters"],
        peak_flops(device_facts, plan.spec.compute.dtype),
        ranks.size,
    )
    ready = Ready(plan, model, learner, corpus, tokenizer, ends, profile.context_length, threads, ranks, utilisation)
    if resumed:
        resume(run, ready, *resumed)

    # The largest pass first: if memory runs out, then now.
    run.enter("longest_batch")
    try_largest_batch(ready)
    run.obey()

    run.let_stop_interrupt(False)
    if inputs.trial is not None:
        make_trial(run, ready, inputs.trial)
        return
    run.plan = plan
    make_steps(run, ready)

    # Result: saved, opened again, compared.
    run.let_stop_interrupt(True)
    run.obey()
    run.enter("save_result")
    eval_loss = run.progress.eval_loss
    if stops_early(plan.spec, run.progress) and take_best_weights(run, learner):
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
    whole = learner.whole(lambda: load_whole(load, plan.spec, asked.compute.attention))
    if whole is not None:
        save_result(
            run.directory / "result",
            whole,
            tokenizer.tokenizer,
            spec=plan.spec,
            base_path=model_path,
            ends=ends,
            facts=facts,
        )
    run.let_stop_interrupt(False)


def make_steps(run: Run, ready: Ready) -> None:
    """All steps that are left, and what happens at the borders between them."""
    plan, spec, ranks = ready.plan, ready.spec, ready.ranks
    run.enter("train", run.progress.step, plan.total_steps)
    run.saved_at = time.monotonic()
    wishes = run.agree()

    with (
        Ahead(steps_from(run.progress.step + 1, plan.total_steps, plan.step, ready.corpus, ranks.rank)) as ahead,
        SampleRecords(run.directory / "step_samples.bin") if ranks.is_first else nullcontext() as records,
    ):
        while True:
            # -- at the border behind step `step`; 0 is the one before the first
            step = run.progress.step
            is_best = False
            if step > run.progress.evaluated_step and plan.evaluates_after(step) and not wishes.stop:
                is_best = look_up(run, ready)
                wishes = run.agree()
            is_last = step == plan.total_steps or stops_early(spec, run.progress)
            is_due = is_last or wishes.stop or wishes.checkpoint or checkpoint_is_due(plan, step, wishes)
            # A best one is saved anew even where one of this step stands, which then lacks its evaluation.
            if (step > run.saved_step and is_due) or (is_best and spec.checkpoint.keep_best > 0):
                save_checkpoint(run, ready, is_best=is_best)
            if wishes.checkpoint:
                run.signals.checkpoint_requested = False
            if wishes.stop:
                if run.saved_step < step:
                    raise NoSpace(f"the checkpoint at step {step} could not be saved")
                raise Stopped
            if is_last:
                return

            # -- the step
            batch = ahead.next()
            work = batch.work
            assert work.step == step + 1
            learning_rate = lr_at(plan.schedule, work.step)
            made = make_step(ready, batch, learning_rate, run.own_wishes)

            if records is not None:
                targets = [work.targets[segment] for segment in made.segments]
                records.append(work.step, [segment.sample for segment in made.segments], targets, made.loss_sums)
            note_step(run, ready, work, made, learning_rate=learning_rate, wait_s=ahead.wait_s)
            # Alone, what is asked for at this very moment counts too.
            wishes = made.wishes if ranks.size > 1 else run.agree()


# -- before the first step -------------------------------------------------------------------------------------------


def refuse_other_ranks(ranks: Ranks, inputs: Inputs, spec: JobSpec) -> None:
    if not ranks.size == inputs.ranks == spec.parallel.devices:
        raise UserError(
            "engine.ranks", "parallel.devices", ranks=ranks.size, given=inputs.ranks, devices=spec.parallel.devices
        )


def plan_hash(plan: JobPlan) -> str:
    """Of what ranks have to have in common before they divide the work."""
    first, last = (plan.step(number) for number in (1, plan.total_steps))
    common = [plan.spec.model_dump(mode="json"), plan.total_steps, first.layout.ranks, last.layout.ranks]
    return hashlib.sha256(json.dumps(common).encode()).hexdigest()


def make_learner(model: LanguageModel, spec: JobSpec, ranks: Ranks, directory: Path, warn: Warn) -> Learner:
    optimizer = make_optimizer(model.trainable(), spec, model.device, warn)
    if uses_deepspeed(spec):
        if spec.parallel.offload != "none":
            optimizer = stepping_on_the_cpu(optimizer, spec)
        return Shards(model, optimizer, spec, ranks, directory)
    return Replica(model, optimizer, spec, ranks)


def load_whole(load: Callable[[torch.device], LanguageModel], spec: JobSpec, asked_attention: str) -> LanguageModel:
    """Where no rank holds all of what was trained: into the memory of the host, which has more room. What there is to
    warn of was said before."""
    model = load(torch.device("cpu"))
    try_out(model, spec, asked_attention, lambda code, text: None)
    return model


def write_profiles(path: Path, corpus: Corpus) -> None:
    measured = [MeasuredProfile(dataset=name, profile=profile) for name, profile in corpus.profiles.items()]
    write_atomically(path, TypeAdapter(list[MeasuredProfile]).dump_json(measured))


def one_sample_a_row(run: Run, plan: JobPlan, leak: float, plan_of: Callable[[JobSpec], JobPlan]) -> JobPlan:
    """The same steps with each sample alone, for a model on which packed ones see each other.

    Raises UserError engine.leak where steps are made of rows, which would then be other steps."""
    if batch_key(plan.spec.batch) == "rows_per_step":
        raise UserError("engine.leak", "packing.mode", leak=leak)
    # The model lies already as the first plan chose, so nothing is chosen anew.
    one_a_row = plan.spec.packing.model_copy(update={"mode": "padded", "algorithm": "best_fit"})
    alone = replace(plan_of(plan.spec.model_copy(update={"packing": one_a_row})), choices=plan.choices)
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
    ready.learner.read(path, manifest)
    if manifest.world == ready.ranks.size:
        checkpoint.load_rng(path, ready.ranks.rank)
    elif getattr(ready.spec.method, "dropout", 0) > 0:
        run.emitter.warn(
            "dropout",
            f"the checkpoint was made on {manifest.world} rank(s) and this run has {ready.ranks.size}, so dropout is "
            "drawn anew: a like run, but not the same",
        )
    run.progress = progress
    run.first_step = progress.step + 1
    run.saved_step = progress.step if path.parent == run.checkpoints.resolve() else 0
    log.info("resumed from %s", path)


def try_largest_batch(ready: Ready) -> None:
    """Forward and backward over the largest micro-batch, on all ranks; leaves no trace."""
    state = checkpoint.rng_state()
    batch = make_batch(ready.plan.largest_micro_batch(), ready.corpus)
    ready.learner.try_batch(batch.to(ready.model.device))
    checkpoint.set_rng_state(state)


# -- at a border -----------------------------------------------------------------------------------------------------


def look_up(run: Run, ready: Ready) -> bool:
    """The held-out loss and the answers to sample prompts, as events; whether the loss is the best so far."""
    plan, model, tokenizer, ranks = ready.plan, ready.model, ready.tokenizer, ready.ranks
    step = run.progress.step

    def should_stop() -> bool:
        return any(ranks.any(run.signals.stop_requested))

    run.enter("evaluate")
    is_best = False
    evaluation = None
    if plan.validation_ids:
        layouts = plan.validation_layouts()
        batches = (make_batch(rows, ready.corpus) for layout in layouts for rows in layout.ranks[ranks.rank])
        evaluation = evaluate(model, batches, should_stop, ranks)
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
        if should_stop():
            return False
        written = answer(model, prompt_ids(prompt, tokenizer), frozenset(ready.ends), ready.context_length, ranks)
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


def checkpoint_is_due(plan: JobPlan, step: int, wishes: Wishes) -> bool:
    """By the clock, by steps, at an epoch's end: they add up."""
    wanted = plan.spec.checkpoint
    if step == 0:
        return False
    if wanted.every_steps is not None and step % wanted.every_steps == 0:
        return True
    return wishes.clock or (wanted.every_epoch and plan.ends_epoch(step))


def save_checkpoint(run: Run, ready: Ready, *, is_best: bool) -> None:
    """A save for want of space is put off, not fatal; the third in a row raises NoSpace."""
    run.saved_at = time.monotonic()  # also where it fails: the next try comes an interval later
    # Named, so that a slow disk is not taken for a hang.
    run.enter("save_checkpoint")
    try:
        path = checkpoint.save(
            run.checkpoints,
            ready.learner,
            run.progress,
            spec=ready.spec,
            threads=ready.threads,
            ranks=ready.ranks,
        )
    except NoSpace as error:
        run.failed_saves += 1
        if run.failed_saves >= MOST_FAILED_SAVES:
            raise
        run.emitter.warn("disk_full", f"no checkpoint at step {run.progress.step}, training goes on: {error}")
        run.enter("train", run.progress.step, ready.plan.total_steps)
        return
    run.failed_saves = 0
    run.saved_step = run.progress.step
    if not ready.ranks.is_first:
        return
    manifest = checkpoint.read_manifest(path)
    relative = path.relative_to(run.directory).as_posix()
    run.emitter.emit(events.Checkpoint, step=run.progress.step, path=relative, bytes=manifest.bytes, best=is_best)
    checkpoint.prune(run.checkpoints, ready.spec.checkpoint.keep_last, ready.spec.checkpoint.keep_best)
    run.enter("train", run.progress.step, ready.plan.total_steps)


def take_best_weights(run: Run, learner: Learner) -> bool:
    """A run that stopped because it got worse hands out what it was at its best, where that was kept."""
    best = run.ranks.from_first(checkpoint.best_in(run.checkpoints))
    source = "the last step, for none of the best evaluation was kept" if best is None else best.name
    run.emitter.warn("early_stopping", f"stopped early at step {run.progress.step}; the result is that of {source}")
    if best is None:
        return False
    learner.read_weights(best, checkpoint.read_manifest(best))
    return True


# -- the process -----------------------------------------------------------------------------------------------------


def main(job_dir: Path) -> int:
    """Trains the job in `job_dir` and returns the exit code that outcome.json holds."""
    if _is_finished(job_dir):
        return 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(stacks_on_demand())
        is_first = os.environ.get("RANK", "0") == "0"
        if is_first:
            lock = stack.enter_context((job_dir / ".trainer.lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.error("another trainer is at work in %s", job_dir)
                return EXIT_CODES["internal"]
            (job_dir / "outcome.json").unlink(missing_ok=True)
        # The others wait in here until the first one holds the lock.
        ranks = stack.enter_context(joined(job_dir))
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=LOG_FORMAT)
        transformers.utils.logging.disable_progress_bar()
        emitter = stack.enter_context(Emitter(job_dir / "events.jsonl")) if is_first else NoEmitter()
        signals = stack.enter_context(Signals().installed())
        return _end(Run(job_dir, emitter, signals, ranks), time.monotonic())


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
        if run.ranks.size > 1 and is_peer_gone(error):
            log.error("a collective failed in the phase %s: %s", run.phase, error)
            outcome = culprits_outcome(run.directory)
        else:
            outcome = outcome_of(error, run.phase, run.progress.step, run.spec)
    is_stopped = outcome.reason == "stopped"
    if outcome.reason is not None:
        log.log(
            logging.INFO if is_stopped else logging.ERROR, "%s: %s %s", outcome.reason, outcome.text, outcome.remedy
        )
        if not is_stopped:
            run.emitter.fail(outcome.reason, outcome.text, outcome.remedy)
    if not run.ranks.is_first:
        # A success or a stop is the first one's to tell, for it is not through before its result is written.
        return write_first(run.directory, outcome).code if outcome.code and not is_stopped else outcome.code
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
        "held_to": held_to(run, time.monotonic() - began),
        "outcome": outcome.model_dump(mode="json"),
    }
    write_atomically(run.directory / "report.json", json.dumps(report, ensure_ascii=False, indent=1).encode())
    return write_first(run.directory, outcome).code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
