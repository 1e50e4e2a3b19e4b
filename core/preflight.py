"""What a job will do, worked out before it does it, by the functions that then do it.

`plan_job` takes a spec and measured facts and resolves everything that was left open: which samples are trained and
which are held out, `auto` and its reasons, the optimizer steps, their layout, the learning-rate curve. The form's
preview and the trainer both call it, so that they can't differ.

Samples are numbered over all data sets: the training sets in the spec's order, then the validation set, each in the
order of its rows. These global ids are what a step consists of, what its hash is made from, and what a resumed run
finds again.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from core.errors import Parameter, Reason, UserError
from core.events import Choice
from core.packing import (
    BatchBy,
    IntArray,
    MicroBatch,
    ModeReport,
    PackingReport,
    PlanSettings,
    RunPlan,
    SampleSet,
    Step,
    StepLayout,
    as_lengths,
    lay_out,
    plan_run,
    report,
)
from core.presets import (
    LOSS_TOLERATED,
    auto_attention,
    auto_dtype,
    auto_gradient_checkpointing,
    auto_learning_rate,
    auto_max_length,
    auto_num_validation_rows,
    refuse_above_context,
)
from core.profile import DataProfile, ModelProfile
from core.schedule import Schedule, curve, resolve_warmup_steps
from core.spec import JobSpec, ValidationDataset, ValidationFraction, batch_key
from core.unbuilt import refuse_unbuilt
from core.wire import Device

# Steps that are laid out to find the largest forward pass and to report packing; more are sampled evenly.
MOST_STEPS_LAID_OUT = 1000
# Validation samples that are packed together at a time.
VALIDATION_CHUNK = 64

_BATCH_BY: dict[str, BatchBy] = {"samples_per_step": "samples", "tokens_per_step": "tokens", "rows_per_step": "rows"}


@dataclass(frozen=True)
class StepWork:
    """One optimizer step: `sample_ids` in their order, and `layout`, whose rows hold the same ids. `num_targets` is the
    number of trained tokens over all ranks: the divisor of the step's loss, known before its first forward pass."""

    step: int
    epoch: float  # epochs that are behind once it is done
    sample_ids: tuple[int, ...]
    num_targets: int
    layout: StepLayout


@dataclass(frozen=True)
class Selection:
    """What becomes of every row and sample of the data. `counts` adds up: rows = refused + beyond max_samples +
    held out + taken; samples of taken rows = trained + too long + without a trained token; likewise held out."""

    train: tuple[int, ...]  # global sample ids
    validation: tuple[int, ...]
    train_of_set: tuple[int, ...]  # how many of `train` each training set gives
    counts: dict[str, int]
    max_length: int
    choices: tuple[Choice, ...]


@dataclass(frozen=True, eq=False)
class JobPlan:
    """A job worked out. `spec` has every `auto` resolved; `choices` says what each became and why."""

    spec: JobSpec
    choices: tuple[Choice, ...]
    selection: Selection
    settings: PlanSettings
    run: RunPlan
    schedule: Schedule
    lengths: Sequence[int]  # tokens of every sample, by global id
    trained: Sequence[int]  # targets of every sample, by global id
    train_lengths: IntArray  # tokens of the trained samples, in the order of selection.train

    @property
    def total_steps(self) -> int:
        return self.run.total_steps

    @property
    def counts(self) -> dict[str, int]:
        return self.selection.counts

    @property
    def validation_ids(self) -> tuple[int, ...]:
        return self.selection.validation

    def step(self, number: int) -> StepWork:
        """Optimizer step `number`, from 1."""
        step = self.run.step_at(number)
        sample_ids = self._global_ids(step.sample_ids)
        num_targets = sum(self.trained[sample] for sample in sample_ids)
        return StepWork(number, step.epochs_done, sample_ids, num_targets, self._layout(step))

    def _global_ids(self, positions: Sequence[int]) -> tuple[int, ...]:
        train = self.selection.train
        return tuple(train[position] for position in positions)

    def _layout(self, step: Step) -> StepLayout:
        layout = lay_out(step, self.train_lengths, self.settings)
        ranks = tuple(
            tuple(tuple(self._global_ids(row) for row in micro_batch) for micro_batch in micro_batches)
            for micro_batches in layout.ranks
        )
        return replace(layout, ranks=ranks)

    def evaluates_after(self, number: int) -> bool:
        """Whether the validation loss is measured, and sample prompts answered, after this step."""
        if not self.validation_ids and not self.spec.evaluation.sample_prompts:
            return False
        if number == self.total_steps:
            return True
        evaluation = self.spec.evaluation
        if evaluation.every_steps is not None:
            return number % evaluation.every_steps == 0
        if evaluation.per_epoch is None:
            return False
        step = self.run.step_at(number)
        done = (step.index + 1) * evaluation.per_epoch // step.steps_in_epoch
        return done > step.index * evaluation.per_epoch // step.steps_in_epoch

    def ends_epoch(self, number: int) -> bool:
        return self.run.step_at(number).ends_epoch

    def largest_micro_batch(self) -> MicroBatch:
        """The forward pass with the most slots, and of those the one with the longest sample: run first, it meets an
        out-of-memory in seconds. Exact up to MOST_STEPS_LAID_OUT steps an epoch, else the largest of so many."""
        return max(self._first_micro_batches(), key=self._size)

    def _size(self, micro_batch: MicroBatch) -> tuple[int, int]:
        widths = [sum(self.lengths[sample] for sample in row) for row in micro_batch]
        longest = max((self.lengths[sample] for row in micro_batch for sample in row), default=0)
        return len(widths) * max(widths), longest

    def _first_micro_batches(self) -> Iterator[MicroBatch]:
        steps = min(self.run.steps_of_epoch[0], self.total_steps)
        stride = max(1, steps // MOST_STEPS_LAID_OUT)
        for number in range(1, steps + 1, stride):
            for micro_batches in self.step(number).layout.ranks:
                yield from micro_batches

    def validation_layouts(self) -> Iterator[StepLayout]:
        """The held-out samples in rows and micro-batches, VALIDATION_CHUNK samples at a time, similar lengths
        together; a fixed order, so that losses of different evaluations compare."""
        ordered = sorted(self.validation_ids, key=lambda sample: -self.lengths[sample])
        lengths = as_lengths(self.lengths)
        for start in range(0, len(ordered), VALIDATION_CHUNK):
            chunk = tuple(ordered[start : start + VALIDATION_CHUNK])
            yield lay_out(Step(1, 0, 1, chunk), lengths, self.settings)

    def packing_report(self) -> PackingReport:
        return report(self.train_lengths, self.settings, self.spec.seed, self.selection.max_length, MOST_STEPS_LAID_OUT)

    def mode_report(self, packing: PackingReport) -> ModeReport:
        """The part of the report that is this job's own mode."""
        return packing.packed if self.settings.mode == "packed" else packing.padded

    def learning_rates(self) -> list[float]:
        """The planned rate of steps 0 to n."""
        return curve(self.schedule)

    def plan_event(self) -> dict[str, object]:
        """The fields of the `plan` event that the plan knows; the trainer adds what the loaded model tells."""
        packing = self.packing_report()
        mine = self.mode_report(packing)
        train = self.selection.train
        return {
            "total_steps": self.total_steps,
            "steps_per_epoch": self.run.steps_per_epoch,
            "warmup_steps": self.schedule.warmup_steps,
            "peak_learning_rate": self.schedule.peak,
            "decay": self.schedule.decay,
            "min_lr_ratio": self.schedule.min_lr_ratio,
            "max_length": self.selection.max_length,
            "row_length": self.settings.row_length,
            "num_samples": len(train),
            "num_validation_samples": len(self.validation_ids),
            "num_tokens": sum(self.lengths[sample] for sample in train),
            "num_trained_tokens": sum(self.trained[sample] for sample in train),
            "num_rows": mine.rows,
            "padding_efficiency": mine.padding_efficiency,
            "padded_efficiency": mine.padded_efficiency,
            "fill": mine.fill,
            "counts": self.counts,
            "choices": [choice.model_dump() for choice in self.choices],
        }


def plan_job(spec: JobSpec, data: Mapping[str, DataProfile], model: ModelProfile, device: Device) -> JobPlan:
    """Works a job out. `data` holds a profile for each data set reference in the spec.

    Raises UserError or UserErrors where the spec does not fit the data, the model or this release.
    """
    refuse_unbuilt(spec)
    selection = select(spec, data, model.context_length)
    order = [*(part.dataset for part in spec.data.train), *_validation_set(spec)]
    lengths = [length for name in order for length in data[name].sample_length]
    trained = [targets for name in order for targets in data[name].sample_trained]
    max_length = selection.max_length
    row_length = spec.packing.row_length or max_length
    settings = PlanSettings(
        mode="packed" if spec.packing.mode == "packed" else "padded",
        row_length=row_length,
        batch_by=_BATCH_BY[batch_key(spec.batch)],
        per_step=getattr(spec.batch, batch_key(spec.batch)),
        micro_batch_size=spec.batch.micro_batch_size,
        num_ranks=spec.parallel.devices,
        sets=tuple(
            SampleSet(count, part.weight)
            for count, part in zip(selection.train_of_set, spec.data.train, strict=True)
            if count
        ),
    )
    train_lengths = as_lengths(lengths[sample] for sample in selection.train)
    run = plan_run(
        train_lengths,
        settings,
        spec.seed,
        epochs=spec.schedule.epochs,
        max_steps=spec.schedule.max_steps,
    )
    given = spec.schedule
    warmup = resolve_warmup_steps(
        run.total_steps, run.steps_per_epoch, given.warmup_ratio, given.warmup_steps, given.warmup_epochs
    )
    resolved, choices = _resolve(spec, data, model, device, max_length)
    choices = (*selection.choices, *choices, _choice("schedule.warmup_steps", warmup.steps, warmup.reason))
    assert isinstance(resolved.schedule.learning_rate, float)
    schedule = Schedule(
        peak=resolved.schedule.learning_rate,
        total_steps=run.total_steps,
        warmup_steps=warmup.steps,
        decay=given.decay,
        min_lr_ratio=given.min_lr_ratio,
    )
    return JobPlan(resolved, choices, selection, settings, run, schedule, lengths, trained, train_lengths)


def _choice(field: str, value: str | int | float | bool | None, reason: Reason) -> Choice:
    return Choice(field=field, value=value, code=reason.code, parameters=dict(reason.parameters))


def _validation_set(spec: JobSpec) -> list[str]:
    return [spec.data.validation.dataset] if isinstance(spec.data.validation, ValidationDataset) else []


def _resolve(
    spec: JobSpec, data: Mapping[str, DataProfile], model: ModelProfile, device: Device, max_length: int
) -> tuple[JobSpec, tuple[Choice, ...]]:
    """Every `auto` that the samples don't decide."""
    choices: list[Choice] = []

    def auto(field: str, given: object, value: str | int | float | bool, reason: Reason) -> object:
        if given != "auto" and given is not None:
            return given
        choices.append(_choice(field, value, reason))
        return value

    rate = auto(
        "schedule.learning_rate",
        spec.schedule.learning_rate,
        *auto_learning_rate(spec.method, model.num_parameters),
    )
    compute = {
        "dtype": auto("compute.dtype", spec.compute.dtype, *auto_dtype(device)),
        "attention": auto("compute.attention", spec.compute.attention, *auto_attention(device)),
        "gradient_checkpointing": auto(
            "compute.gradient_checkpointing", spec.compute.gradient_checkpointing, *auto_gradient_checkpointing(device)
        ),
    }
    parallel = {
        "zero_stage": auto("parallel.zero_stage", spec.parallel.zero_stage, 0, Reason("auto.zero_one_device", {})),
        "offload": auto("parallel.offload", spec.parallel.offload, "none", Reason("auto.offload", {})),
    }
    row_length = auto("packing.row_length", spec.packing.row_length, max_length, Reason("auto.row_length", {}))
    first = data[spec.data.train[0].dataset]
    multi_turn = spec.data.multi_turn if spec.data.multi_turn != "auto" else first.multi_turn
    resolved = spec.model_copy(
        update={
            "data": spec.data.model_copy(update={"max_length": max_length, "multi_turn": multi_turn}),
            "packing": spec.packing.model_copy(update={"row_length": row_length}),
            "parallel": spec.parallel.model_copy(update=parallel),
            "schedule": spec.schedule.model_copy(update={"learning_rate": rate}),
            "compute": spec.compute.model_copy(update=compute),
        }
    )
    return resolved, tuple(choices)


# -- which samples ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    id: int  # global
    row: tuple[int, int]  # data set's place in the spec, row
    length: int
    trained: int
    hash: int


def _samples(profile: DataProfile, place: int, first_id: int) -> list[_Sample]:
    facts = zip(profile.sample_row, profile.sample_length, profile.sample_trained, profile.sample_hash, strict=True)
    return [
        _Sample(first_id + index, (place, row), length, trained, digest)
        for index, (row, length, trained, digest) in enumerate(facts)
    ]


def select(spec: JobSpec, data: Mapping[str, DataProfile], context_length: int) -> Selection:
    """Decides for every row and every sample of the data what becomes of it, and counts each under its reason.

    Raises UserError plan.above_context, plan.overlong, plan.no_samples.
    """
    if isinstance(spec.data.max_length, int):
        refuse_above_context(spec.data.max_length, context_length)
    by_set: list[list[_Sample]] = []
    first_id = 0
    for place, part in enumerate(spec.data.train):
        by_set.append(_samples(data[part.dataset], place, first_id))
        first_id += len(by_set[-1])
    own_validation = [
        sample for name in _validation_set(spec) for sample in _samples(data[name], len(by_set), first_id)
    ]
    samples = [sample for part in by_set for sample in part]
    rows = list(dict.fromkeys(sample.row for sample in samples))
    profiles = [data[part.dataset] for part in spec.data.train]
    counts = {
        "rows": sum(profile.num_rows for profile in profiles),
        "rows_refused": sum(profile.num_refused for profile in profiles),
    }

    taken = _draw_rows(rows, spec.data.max_samples, spec.seed)
    counts["rows_beyond_max_samples"] = len(rows) - len(taken)
    samples = [sample for sample in samples if sample.row in taken]

    held_out, choices = _hold_out(spec, samples, len(taken))
    counts["rows_held_out"] = len(held_out)
    counts["rows_taken"] = len(taken) - len(held_out)
    validation = own_validation or [sample for sample in samples if sample.row in held_out]
    train = [sample for sample in samples if sample.row not in held_out]

    teaching = [sample for sample in train if sample.trained > 0]
    if not teaching:
        raise _no_samples(counts, {"without a trained token": len(train)})
    max_length = spec.data.max_length
    if max_length == "auto":
        max_length, reason = auto_max_length(
            [sample.length for sample in teaching],
            [sample.trained for sample in teaching],
            context_length,
            spec.packing.row_length,
        )
        choices = (*choices, _choice("data.max_length", max_length, reason))
    kept = [sample for sample in teaching if sample.length <= max_length]
    if not kept:
        raise _no_samples(
            counts, {"without a trained token": len(train) - len(teaching), f"over {max_length} tokens": len(teaching)}
        )
    _refuse_great_loss(spec, teaching, kept, max_length, context_length)
    validation_kept = [sample for sample in validation if sample.trained > 0 and sample.length <= max_length]
    counts |= {
        "samples": len(train),
        "samples_without_trained_tokens": len(train) - len(teaching),
        "samples_too_long": len(teaching) - len(kept),
        "samples_trained": len(kept),
        "samples_validation": len(validation_kept),
        "samples_validation_dropped": len(validation) - len(validation_kept),
    }
    of_set = [0] * len(by_set)
    for sample in kept:
        of_set[sample.row[0]] += 1
    return Selection(
        train=tuple(sample.id for sample in kept),
        validation=tuple(sample.id for sample in validation_kept),
        train_of_set=tuple(of_set),
        counts=counts,
        max_length=max_length,
        choices=choices,
    )


def _draw_rows(rows: list[tuple[int, int]], most: int | None, seed: int) -> set[tuple[int, int]]:
    if most is None or most >= len(rows):
        return set(rows)
    # random() alone is promised to give the same numbers in every version of Python.
    generator = random.Random(seed)
    return set(sorted(rows, key=lambda _: generator.random())[:most])


def _hold_out(
    spec: JobSpec, samples: Sequence[_Sample], num_rows: int
) -> tuple[set[tuple[int, int]], tuple[Choice, ...]]:
    """Rows held out for validation, chosen by the hash of their content alone: equal rows fall on the same side, and
    another seed or a longer file moves as few as can be."""
    wanted, reason = 0, None
    if spec.data.validation == "auto":
        wanted, reason = auto_num_validation_rows(num_rows)
    elif isinstance(spec.data.validation, ValidationFraction):
        wanted = max(1, round(spec.data.validation.fraction * num_rows))
    by_hash: dict[int, set[tuple[int, int]]] = {}
    for sample in samples:
        by_hash.setdefault(sample.hash, set()).add(sample.row)
    held_out: set[tuple[int, int]] = set()
    for digest in sorted(by_hash):
        if len(held_out) >= wanted or len(held_out) + len(by_hash[digest]) >= num_rows:
            break
        held_out |= by_hash[digest]
    if reason is None and wanted:
        reason = Reason("auto.validation_given", {"held_out": len(held_out), "num_rows": num_rows})
    return held_out, (_choice("data.validation", len(held_out), reason),) if reason else ()


def _refuse_great_loss(
    spec: JobSpec, teaching: Sequence[_Sample], kept: Sequence[_Sample], max_length: int, context_length: int
) -> None:
    """overlong: null drops, but only what nobody would miss."""
    if spec.data.overlong is not None:
        return
    total = sum(sample.trained for sample in teaching)
    lost = total - sum(sample.trained for sample in kept)
    if lost > LOSS_TOLERATED * total:
        raise UserError(
            "plan.overlong" if max_length < context_length else "plan.overlong_context",
            "data.max_length",
            num_dropped=len(teaching) - len(kept),
            num_samples=len(teaching),
            max_length=max_length,
            share=f"{lost / total:.1%}",
            longest=max(sample.length for sample in teaching),
        )


def _no_samples(counts: Mapping[str, int], samples: Mapping[str, int]) -> UserError:
    reasons = [f"{counts['rows_refused']} were refused", f"{counts['rows_held_out']} held out"]
    reasons += [f"{count} samples {what}" for what, count in samples.items() if count]
    parameters: dict[str, Parameter] = {"rows": counts["rows"], "reasons": ", ".join(reasons)}
    return UserError("plan.no_samples", "data.train", **parameters)
