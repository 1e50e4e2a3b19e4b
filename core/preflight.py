"""What a job will do, worked out before it does it, by the functions that then do it.

`plan_job` takes a spec and measured facts and resolves everything that was left open: which samples are trained and
which are held out (core.selection), `auto` and its reasons, the optimizer steps (core.packing), their layout
(core.layout), the learning-rate curve (core.schedule). The form's preview and the trainer both call it, so that they
can't differ.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

from core.architecture import Architecture
from core.bounds import LargestPass, StepBounds, step_bounds
from core.errors import USER_FAULTS, Reason, UserError
from core.events import Choice
from core.fix import applied, fixes_of
from core.flops import attention_flops, matrix_flops
from core.layout import (
    MicroBatch,
    PackingReport,
    StepLayout,
    lay_out,
    lay_out_alone,
    num_slots,
    padded_efficiency,
    report,
    spread,
)
from core.memo import Memo
from core.memory import count_adapter_parameters
from core.memory_report import MemoryReport, report_memory
from core.overlap import Overlap, find_overlap
from core.packing import BatchBy, PlanSettings, RunPlan, SampleSet, Segment, Step, plan_run
from core.placement import PLACED_FIELDS, has_room_for, place
from core.presets import auto_attention, auto_dtype, auto_learning_rate
from core.profile import DataProfile, ModelProfile
from core.refusals import refuse
from core.schedule import Schedule, curve, resolve_warmup_steps
from core.selection import Selection, choice, select, selected_by, sets_of
from core.spec import Adapter, JobSpec, batch_key, parse_spec
from core.unbuilt import refuse_unbuilt
from core.wire import Device
from core.zero import Loaded

# Validation samples that are packed together at a time.
VALIDATION_CHUNK = 64
# What a plan made alone keeps: its selection, its bounds, its run, its packing report and its overlap.
KEPT_OF_ONE = 5

_BATCH_BY: dict[str, BatchBy] = {"samples_per_step": "samples", "tokens_per_step": "tokens", "rows_per_step": "rows"}


@dataclass(frozen=True)
class StepWork:
    """One optimizer step: its segments, of samples by global id, in their order, and `layout`, whose rows hold the
    same. `targets` says how many trained tokens each has that something predicts."""

    step: int
    epoch: float  # epochs that are behind once it is done
    segments: tuple[Segment, ...]
    targets: Mapping[Segment, int]
    layout: StepLayout

    @cached_property
    def num_targets(self) -> int:
        """Over all ranks: the divisor of the step's loss, known before its first forward pass."""
        return sum(self.targets[segment] for segment in self.segments)

    @property
    def sample_ids(self) -> tuple[int, ...]:
        return tuple(segment.sample for segment in self.segments)

    @property
    def padded_efficiency(self) -> float:
        """Of the baseline that charts compare with."""
        return padded_efficiency(self.segments)


@dataclass(frozen=True, eq=False)
class JobPlan:
    """A job worked out. `spec` has every `auto` resolved; `choices` says what each became and why."""

    spec: JobSpec
    choices: tuple[Choice, ...]
    selection: Selection
    settings: PlanSettings
    run: RunPlan
    schedule: Schedule
    model: ModelProfile
    device: Device  # that stands for each of the job's
    bounds: StepBounds  # of its steps
    loaded: Loaded
    memo: Memo  # of what other plans have in common with this one

    @property
    def largest(self) -> LargestPass:
        return self.bounds.largest_pass(self.settings.micro_batch_size)

    @property
    def total_steps(self) -> int:
        return self.run.total_steps

    @property
    def has_own_row_length(self) -> bool:
        """Whether it was given, instead of following max_length."""
        return all(choice.field != "packing.row_length" for choice in self.choices)

    @property
    def counts(self) -> dict[str, int]:
        return self.selection.counts

    @cached_property
    def validation_ids(self) -> tuple[int, ...]:
        return tuple(self.selection.validation.sample_ids.tolist())

    def step(self, number: int, *, is_alone: bool = False) -> StepWork:
        """Optimizer step `number`, from 1; `is_alone` gives each of its segments a row of its own."""
        planned = self.run.step_at(number)
        step = self._by_global_id(planned)
        targets = dict(zip(step.segments, self.selection.targets_of(planned.segments), strict=True))
        layout = lay_out_alone(step) if is_alone else lay_out(step, self.settings)
        return StepWork(number, step.epochs_done, step.segments, targets, layout)

    def _by_global_id(self, step: Step) -> Step:
        """A planned segment is a part of a piece, which is a part of a sample."""
        train, positions = self.selection.train, list(step.sample_ids)
        pieces = zip(train.sample_ids[positions].tolist(), train.starts[positions].tolist(), strict=True)
        segments = tuple(
            Segment(sample, first + start, first + end)
            for (sample, first), (_, start, end) in zip(pieces, step.segments, strict=True)
        )
        if step.rows is None:
            return replace(step, segments=segments)
        borders = accumulate(map(len, step.rows), initial=0)
        return replace(step, segments=segments, rows=tuple(segments[a:b] for a, b in pairwise(borders)))

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
        out-of-memory in seconds. Of the first epoch's steps as far as core.layout lays them out, and always of the one
        with the longest sample."""
        epoch = self.run.epoch_plan(1)
        longest = int((epoch.ends - epoch.starts).argmax())
        with_longest = int(epoch.step_offsets.searchsorted(longest, side="right")) - 1
        steps = {index + 1 for index in (*spread(epoch), with_longest)}
        micro_batches = (
            micro_batch
            for number in sorted(steps)
            if number <= self.total_steps
            for passes in self.step(number).layout.ranks
            for micro_batch in passes
        )
        return max(micro_batches, key=_size)

    def validation_layouts(self) -> Iterator[StepLayout]:
        """The held-out samples in rows and micro-batches, VALIDATION_CHUNK samples at a time, similar lengths
        together; a fixed order, so that losses of different evaluations compare."""
        ordered = sorted(self.selection.validation.segments(), key=lambda segment: -segment.length)
        for start in range(0, len(ordered), VALIDATION_CHUNK):
            chunk = tuple(ordered[start : start + VALIDATION_CHUNK])
            yield lay_out(Step(1, 0, 1, chunk), self.settings)

    @cached_property
    def packing(self) -> PackingReport:
        """What this way of laying samples out costs, and each other."""
        is_dense = self.spec.compute.attention in ("sdpa", "eager")
        by = (self.settings, self.spec.seed, self.model.content_hash, self.known_shape is None, is_dense)
        ways = self.memo.get(("packing", *by), (self.selection,), lambda: self._report_ways(is_dense))
        shape, method, train = self.known_shape, self.spec.method, self.selection.train
        if shape is None:
            return ways
        adapter = count_adapter_parameters(shape, method) if isinstance(method, Adapter) else None
        share = float(train.targets.sum() / train.lengths.sum())
        return ways.with_matrices(*matrix_flops(shape, share, num_adapter_parameters=adapter))

    def _report_ways(self, is_dense: bool) -> PackingReport:
        selection, shape = self.selection, self.known_shape
        longest = int(selection.train.lengths.max())
        return report(
            selection.train.lengths,
            self.settings,
            self.spec.seed,
            selection.max_length,
            selection.count_targets if selection.samples.know_their_runs else None,
            count_flops=None if shape is None else attention_flops(shape, longest, is_dense=is_dense),
            own_plan=self.run.epoch_plan(1),
        )

    @property
    def overlap(self) -> Overlap:
        """Validation rows that are trained too."""
        return self.memo.get(("overlap",), (self.selection,), lambda: find_overlap(self.selection))

    @property
    def known_shape(self) -> Architecture | None:
        """The model's, where all of its sizes are known."""
        shape = self.model.shape
        return None if shape is None or shape.missing else shape

    @cached_property
    def all_counts(self) -> dict[str, int]:
        """Beside what the selection counts: what wrapped rows cut in the first epoch; what one sample a turn would
        compute instead of whole conversations, where every set knows it; tool calls that the template leaves out."""
        counts = dict(self.counts)
        if self.settings.algorithm == "wrapped":
            mine = self.packing.mine
            counts |= {
                "cuts": mine.num_cuts,
                "targets_lost_at_row_ends": mine.targets_lost,
                "rows_without_targets": mine.rows_without_targets,
            }
        samples = self.selection.samples
        if samples.tokens_if_split is not None:
            counts |= {"tokens_if_whole": int(samples.lengths.sum()), "tokens_if_split": samples.tokens_if_split}
        num_dropped, num_with_calls = samples.calls_dropped
        if num_dropped:
            counts |= {"calls_dropped": num_dropped, "calls_looked_at": num_with_calls}
        return counts

    @cached_property
    def memory(self) -> MemoryReport:
        most_rows = self.bounds.rows
        if self.settings.batch_by == "tokens":
            # Of the first epoch. A row holds a sample at least.
            offsets = self.run.epoch_plan(1).step_offsets
            most_rows = min(most_rows, -(-int((offsets[1:] - offsets[:-1]).max()) // self.settings.num_ranks))
        return report_memory(
            self.spec,
            self.model.shape,
            self.device,
            self.bounds,
            context_length=self.model.context_length,
            most_rows=most_rows,
            loaded=self.loaded,
        )

    def has_room_for(self, length: int) -> bool:
        """Whether samples of so many tokens, each filling its row, fit by estimate in some way that was not ruled out;
        True where the model's sizes are not known."""
        spec = self.spec_with_auto(self.auto_fields)
        return has_room_for(spec, self.model.shape, self.device, self.bounds, length, loaded=self.loaded)

    @property
    def auto_fields(self) -> frozenset[str]:
        """Of the way to lay the job out, those that were left to `auto`."""
        return frozenset(choice.field for choice in self.choices).intersection(PLACED_FIELDS)

    def spec_with_auto(self, fields: Iterable[str]) -> JobSpec:
        """The resolved spec, some of PLACED_FIELDS left to `auto` again."""
        changed: dict[str, dict[str, str]] = {"parallel": {}, "compute": {}}
        for field in fields:
            part, name = field.split(".")
            changed[part][name] = "auto"
        return self.spec.model_copy(
            update={part: getattr(self.spec, part).model_copy(update=values) for part, values in changed.items()}
        )

    def learning_rates(self) -> list[float]:
        """The planned rate of steps 0 to n."""
        return curve(self.schedule)

    def plan_event(self) -> dict[str, object]:
        """The fields of the `plan` event that the plan knows; the trainer adds what the loaded model tells."""
        mine, epoch = self.packing.mine, self.run.epoch_plan(1)
        num_trained_tokens = int(self.selection.count_targets(epoch.order, epoch.starts, epoch.ends).sum())
        return {
            "total_steps": self.total_steps,
            "steps_per_epoch": self.run.steps_per_epoch,
            "warmup_steps": self.schedule.warmup_steps,
            "peak_learning_rate": self.schedule.peak,
            "decay": self.schedule.decay,
            "min_lr_ratio": self.schedule.min_lr_ratio,
            "max_length": self.selection.max_length,
            "row_length": self.settings.row_length,
            "num_samples": len(self.selection.train),
            "num_validation_samples": len(self.validation_ids),
            "num_tokens": epoch.tokens,
            "num_trained_tokens": num_trained_tokens,
            "num_rows": mine.rows,
            "padding_efficiency": mine.padding_efficiency,
            "padded_efficiency": mine.padded_efficiency,
            "fill": mine.fill,
            "num_slots": mine.slots,
            "num_flops": mine.flops,
            "planned_peak_bytes": self.memory.planned_peak_bytes,
            "counts": self.all_counts,
            "choices": [choice.model_dump() for choice in self.choices],
        }


def _size(micro_batch: MicroBatch) -> tuple[int, int]:
    return num_slots(micro_batch), max((segment.length for row in micro_batch for segment in row), default=0)


def plan_job(
    spec: JobSpec, data: Mapping[str, DataProfile], model: ModelProfile, device: Device, memo: Memo | None = None
) -> JobPlan:
    """Works a job out. `data` holds a profile for each data set reference in the spec. Whoever plans one job after
    another gives all of them one `memo`.

    Raises UserError or UserErrors where the spec does not fit the data, the model or this release.
    """
    refuse_unbuilt(spec)
    loaded = Loaded.of(model.shape, max(facts.num_new_tokens for facts in data.values()))
    refuse(spec, model, device, loaded)
    memo = memo or Memo(KEPT_OF_ONE)
    try:
        selection = memo.get(
            ("selection", *selected_by(spec), model.context_length),
            tuple(data[name] for name in sets_of(spec)),
            lambda: select(spec, data, model.context_length),
        )
    except UserError as error:
        raise _of_what_fits(error, spec, lambda longer: plan_job(longer, data, model, device, memo)) from None
    max_length = selection.max_length
    settings = PlanSettings(
        mode=spec.packing.mode,
        row_length=spec.packing.row_length or max_length,
        batch_by=_BATCH_BY[batch_key(spec.batch)],
        per_step=getattr(spec.batch, batch_key(spec.batch)),
        micro_batch_size=spec.batch.micro_batch_size,
        num_ranks=spec.parallel.devices,
        sets=tuple(
            SampleSet(count, part.weight)
            for count, part in zip(selection.train_of_set, spec.data.train, strict=True)
            if count
        ),
        algorithm=spec.packing.algorithm,
    )
    if settings.algorithm == "wrapped" and not selection.samples.know_their_runs:
        raise UserError("plan.no_runs", "packing.algorithm")
    given = spec.schedule
    run = memo.get(
        ("run", settings, spec.seed, given.epochs, given.max_steps),
        (selection,),
        lambda: plan_run(
            selection.train.lengths,
            settings,
            spec.seed,
            epochs=given.epochs,
            max_steps=given.max_steps,
            count_targets=selection.count_targets,
        ),
    )
    warmup = resolve_warmup_steps(
        run.total_steps, run.steps_per_epoch, given.warmup_ratio, given.warmup_steps, given.warmup_epochs
    )
    bounds = memo.get(("bounds", settings), (selection,), lambda: step_bounds(settings, selection.train.lengths))
    largest = bounds.largest_pass(settings.micro_batch_size)
    resolved, choices = _resolve(spec, data, model, device, max_length=max_length, largest=largest, loaded=loaded)
    choices = (*selection.choices, *choices, choice("schedule.warmup_steps", warmup.steps, warmup.reason))
    assert isinstance(resolved.schedule.learning_rate, float)
    schedule = Schedule(
        peak=resolved.schedule.learning_rate,
        total_steps=run.total_steps,
        warmup_steps=warmup.steps,
        decay=given.decay,
        min_lr_ratio=given.min_lr_ratio,
    )
    return JobPlan(resolved, choices, selection, settings, run, schedule, model, device, bounds, loaded, memo)


def _of_what_fits(error: UserError, spec: JobSpec, plan_of: Callable[[JobSpec], JobPlan]) -> UserError:
    """A limit that takes every sample is no remedy where memory has no room for it: then the fault says so."""
    longer = next((fix for fix in fixes_of(error) if "data.max_length" in fix), None)
    if error.code != "plan.overlong" or longer is None:
        return error
    try:
        memory = plan_of(parse_spec(applied(spec, longer))).memory
    except USER_FAULTS:
        return error
    if memory.chosen is None or memory.chosen.fits:
        return error
    said = {**error.parameters, "fits": memory.largest_max_length, "device": memory.device.name}
    return UserError("plan.overlong_memory", error.field, **said)


def _resolve(
    spec: JobSpec,
    data: Mapping[str, DataProfile],
    model: ModelProfile,
    device: Device,
    *,
    max_length: int,
    largest: LargestPass,
    loaded: Loaded,
) -> tuple[JobSpec, tuple[Choice, ...]]:
    """Every `auto` that the samples don't decide."""
    choices: list[Choice] = []

    def auto(field: str, given: object, value: str | int | float | bool, reason: Reason) -> object:
        if given != "auto" and given is not None:
            return given
        choices.append(choice(field, value, reason))
        return value

    rate = auto(
        "schedule.learning_rate",
        spec.schedule.learning_rate,
        *auto_learning_rate(spec.method, model.num_parameters),
    )
    dtype = auto("compute.dtype", spec.compute.dtype, *auto_dtype(device))
    attention = auto("compute.attention", spec.compute.attention, *auto_attention(device, str(dtype)))
    placement = place(spec, model.shape, device, largest, dtype=str(dtype), attention=str(attention), loaded=loaded)

    def placed(field: str, given: object, value: str | int | bool) -> object:
        return auto(field, given, value, placement.reasons[field])

    asked = spec.compute.gradient_checkpointing
    recomputes = placed("compute.gradient_checkpointing", asked, placement.gradient_checkpointing)
    compute = {"dtype": dtype, "attention": attention, "gradient_checkpointing": recomputes}
    parallel = {
        "zero_stage": placed("parallel.zero_stage", spec.parallel.zero_stage, placement.zero_stage),
        "offload": placed("parallel.offload", spec.parallel.offload, placement.offload),
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
