"""What a job changes against another one, and whether the optimisation itself is another.

The optimisation is which samples each step learns from, at which rate, and what is done with their gradient. Packing,
row length, micro-batches, devices, ZeRO, attention and checkpointing are only how that is computed, as long as steps
are made of samples or tokens. With batch.rows_per_step the rows make the steps, and then packing makes them fewer and
larger. Both kinds are held against a baseline here: the plain padding of the same job, the preset that it began from,
the job that it was cloned from.

Nothing is inferred from settings that the plans themselves can answer: two runs have the same steps if step by step
the same parts of the same samples lie in them, whatever the specs say. `keeps` are the fields that give a job its
baseline's optimisation again, and leave alone how it is computed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from core.errors import Parameter, Reason, UserError
from core.fix import BATCHES, DURATIONS, WARMUPS, Fix, Value, one_of, told, value_text
from core.layout import lay_out, spread
from core.packing import EpochPlan, PlanSettings, Segment, plan_run
from core.preflight import JobPlan
from core.profile import DataProfile
from core.schedule import Schedule, resolve_warmup_steps
from core.selection import Pieces
from core.spec import Adapter, JobSpec, batch_key

# What is laid out of an epoch to know its slots: a tenth more or less is all that is told of them.
MOST_STEPS, MOST_SAMPLES = 40, 1 << 12
LEAST_RATIO = 1.05  # of slots: less is as many

# Of a data set read otherwise; each of them gives it another profile.
_READING = ("data.format", "data.train_on", "data.multi_turn", "model.chat_template")
_CHOOSING = ("data.max_length", "data.overlong", "data.max_samples", "data.validation")
# What is done with a step's samples, besides all of method and optimizer. fp32 against bf16 rounds every number anew.
_DOING = ("seed", "compute.dtype", "model.adapter", "evaluation.early_stopping_patience", "schedule.decay")


@dataclass(frozen=True)
class Change:
    """`keeps`, by field of the spec, makes the optimisation the baseline's again (null: given up for another way to
    say the same); empty where it is, or where other data or another model leave nothing to keep."""

    is_same_optimisation: bool
    lines: tuple[Reason, ...]
    keeps: Fix


@dataclass(frozen=True)
class Slots:
    """Positions that an epoch's forward passes compute."""

    job: int
    baseline: int


def against_plain_padding(plan: JobPlan) -> Change | None:
    """The same job with each sample in a row of its own; None where it is that already. Slots are held against the
    baseline that the packing report names."""
    settings = replace(plan.settings, mode="padded", algorithm="best_fit")
    if plan.settings.mode == "padded":
        return None
    given, selection = plan.spec.schedule, plan.selection
    run = plan.run
    if plan.settings.rows_are_planned:
        run = plan_run(
            selection.train.lengths, settings, plan.spec.seed, epochs=given.epochs, max_steps=given.max_steps
        )
    warmup = _warmup_of(plan.spec, run.total_steps, run.steps_per_epoch)
    if warmup is None:
        return None
    packing = plan.spec.packing.model_copy(update={"mode": "padded", "algorithm": "best_fit"})
    padded = replace(
        plan,
        spec=plan.spec.model_copy(update={"packing": packing}),
        settings=settings,
        run=run,
        schedule=replace(plan.schedule, total_steps=run.total_steps, warmup_steps=warmup),
    )
    mine = plan.packing.mine
    return compare(plan, padded, Slots(mine.slots, mine.padded_slots))


def compare(plan: JobPlan, baseline: JobPlan, slots: Slots | None = None) -> Change:
    """What `plan` changes against `baseline`. Slots are estimated from some of the first epoch's steps if not given."""
    slots = slots or _slots_of(plan, baseline)
    if _is_same(plan, baseline):
        lines = (_same(plan, slots), *_dropout(plan, baseline))
        return Change(True, lines, {})
    lines = (*_counted(plan, baseline), *_set_otherwise(plan, baseline))
    if not lines:
        lines = (Reason("change.order", {}),)
    lines = (*lines, *_cost(slots))
    keeps = dict(_keeps(plan, baseline)) if _can_keep(plan, baseline) else {}
    if keeps:
        lines = (*lines, Reason("change.keep", {"settings": told(keeps)}))
    return Change(False, lines, keeps)


# -- whether it is the same ------------------------------------------------------------------------------------------


def _is_same(plan: JobPlan, baseline: JobPlan) -> bool:
    return (
        plan.model.content_hash == baseline.model.content_hash
        and _curve_of(plan) == _curve_of(baseline)
        and not any(_differing(plan, baseline, _doing(plan, baseline)))
        and _have_same_data(plan, baseline)
        and _have_same_steps(plan, baseline)
    )


def _curve_of(plan: JobPlan) -> Schedule:
    """What decides the rate of every step: a warm-up of one step runs at the peak as none does, and `constant` has no
    floor."""
    schedule = plan.schedule
    return replace(
        schedule,
        warmup_steps=schedule.warmup_steps if schedule.warmup_steps > 1 else 0,
        min_lr_ratio=0.0 if schedule.decay == "constant" else schedule.min_lr_ratio,
    )


def _have_same_data(plan: JobPlan, baseline: JobPlan) -> bool:
    mine, theirs = (_train_profiles(each) for each in (plan, baseline))
    return len(mine) == len(theirs) and all(map(_equal_profiles, mine, theirs))


def _train_profiles(plan: JobPlan) -> tuple[DataProfile, ...]:
    return plan.selection.samples.profiles[: len(plan.spec.data.train)]


def _equal_profiles(mine: DataProfile, theirs: DataProfile) -> bool:
    """Whether they hold the same samples with the same tokens to learn, as far as a profile tells."""
    if mine is theirs:
        return True
    columns = ("sample_row", "sample_length", "sample_trained", "sample_hash")
    return all(getattr(mine, name).numbers == getattr(theirs, name).numbers for name in columns)


def _have_same_pieces(plan: JobPlan, baseline: JobPlan) -> bool:
    mine, theirs = plan.selection.train, baseline.selection.train
    return len(mine) == len(theirs) and all(
        bool((a == b).all()) for a, b in zip(mine.columns, theirs.columns, strict=True)
    )


def _have_same_steps(plan: JobPlan, baseline: JobPlan) -> bool:
    if plan.run.steps_of_epoch != baseline.run.steps_of_epoch:
        return False
    if _rule(plan) == _rule(baseline) and _have_same_pieces(plan, baseline):
        return True
    # Two rules may come to the same: all samples in one step, or lengths that are all equal. As a rule the first step
    # tells them apart.
    return all(
        _have_same_steps_in(epoch, num_steps, plan, baseline)
        for epoch, num_steps in enumerate(plan.run.steps_of_epoch, start=1)
    )


def _rule(plan: JobPlan) -> tuple[object, ...]:
    """What samples are dealt into steps by."""
    return (_steps_by(plan.settings), plan.settings.sets, plan.spec.seed)


def _steps_by(settings: PlanSettings) -> tuple[object, ...]:
    if settings.rows_are_planned:
        return ("rows", settings.per_step, settings.algorithm, settings.row_length)
    # A row of its own for each sample: then so many rows are so many samples.
    return ("tokens" if settings.batch_by == "tokens" else "samples", settings.per_step)


def _have_same_steps_in(epoch: int, num_steps: int, plan: JobPlan, baseline: JobPlan) -> bool:
    mine, theirs = plan.run.epoch_plan(epoch), baseline.run.epoch_plan(epoch)
    return all(
        _learns_from(mine, index, plan.selection.train) == _learns_from(theirs, index, baseline.selection.train)
        for index in range(num_steps)
    )


def _learns_from(epoch: EpochPlan, index: int, train: Pieces) -> list[Segment]:
    """A step's parts of samples by global id; a sum does not know their order."""
    segments = epoch.step(index).segments
    positions = [segment.sample for segment in segments]
    ids, starts = train.sample_ids[positions].tolist(), train.starts[positions].tolist()
    return sorted(
        Segment(sample, first + start, first + end)
        for sample, first, (_, start, end) in zip(ids, starts, segments, strict=True)
    )


# -- in words --------------------------------------------------------------------------------------------------------


def _same(plan: JobPlan, slots: Slots) -> Reason:
    steps: dict[str, Parameter] = {"steps": plan.total_steps}
    for way, ratio in (("fewer", slots.baseline / slots.job), ("more", slots.job / slots.baseline)):
        if ratio >= LEAST_RATIO:
            return Reason(f"change.same_{way}_slots", steps | {"ratio": _ratio(ratio)})
    return Reason("change.same", steps)


def _dropout(plan: JobPlan, baseline: JobPlan) -> Iterator[Reason]:
    method = plan.spec.method
    if isinstance(method, Adapter) and method.dropout > 0 and plan.settings != baseline.settings:
        yield Reason("change.dropout", {"dropout": method.dropout})


def _counted(plan: JobPlan, baseline: JobPlan) -> Iterator[Reason]:
    """What comes out of it, before and after."""
    steps: dict[str, Parameter] = {"before": baseline.total_steps, "after": plan.total_steps}
    warmup: dict[str, Parameter] = {
        "warmup_before": baseline.schedule.warmup_steps,
        "warmup_after": plan.schedule.warmup_steps,
    }
    is_longer_warmup = warmup["warmup_before"] != warmup["warmup_after"]
    if plan.total_steps != baseline.total_steps:
        yield Reason("change.steps_and_warmup", steps | warmup) if is_longer_warmup else Reason("change.steps", steps)
    elif is_longer_warmup:
        yield Reason("change.warmup", warmup)
    if plan.run.steps_per_epoch != baseline.run.steps_per_epoch:
        yield _before_after("change.steps_per_epoch", baseline.run.steps_per_epoch, plan.run.steps_per_epoch)
    before, after = (_shown(_samples_per_step(each)) for each in (baseline, plan))
    if before != after:
        yield _before_after("change.samples_per_step", before, after)
    if not _have_same_pieces(plan, baseline):
        before_samples, after_samples = len(baseline.selection.train), len(plan.selection.train)
        if before_samples != after_samples:
            yield _before_after("change.num_samples", before_samples, after_samples)
        else:
            yield Reason("change.samples", {})
    before_tokens, after_tokens = _trained_tokens(baseline), _trained_tokens(plan)
    if before_tokens != after_tokens:
        yield _before_after("change.trained_tokens", before_tokens, after_tokens)
    if plan.schedule.peak != baseline.schedule.peak:
        yield _before_after("change.peak", value_text(baseline.schedule.peak), value_text(plan.schedule.peak))


def _set_otherwise(plan: JobPlan, baseline: JobPlan) -> Iterator[Reason]:
    if plan.model.content_hash != baseline.model.content_hash:
        yield _before_after("change.model", baseline.model.name, plan.model.name)
    fields = list(_doing(plan, baseline))
    if not _have_same_data(plan, baseline):
        reading = list(_differing(plan, baseline, _READING))
        if not reading or _names(plan) != _names(baseline):
            yield Reason("change.data", {})
        fields += reading
    for field in (*_differing(plan, baseline, fields), *_other_weights(plan, baseline)):
        values = {"before": value_text(_value(baseline.spec, field)), "after": value_text(_value(plan.spec, field))}
        yield Reason("change.value", {"field": field, **values})


def _cost(slots: Slots) -> Iterator[Reason]:
    for way, ratio in (("fewer", slots.baseline / slots.job), ("more", slots.job / slots.baseline)):
        if ratio >= LEAST_RATIO:
            yield Reason(f"change.{way}_slots", {"ratio": _ratio(ratio)})


def _before_after(code: str, before: Parameter, after: Parameter) -> Reason:
    return Reason(code, {"before": before, "after": after})


def _samples_per_step(plan: JobPlan) -> float:
    epoch = plan.run.epoch_plan(1)
    return (len(epoch.order) - epoch.num_cuts) / len(epoch)


def _trained_tokens(plan: JobPlan) -> int:
    """Over the run, as many in each epoch as in the first."""
    epoch = plan.run.epoch_plan(1)
    of_epoch = int(plan.selection.count_targets(epoch.order, epoch.starts, epoch.ends).sum())
    return round(of_epoch * plan.total_steps / len(epoch))


def _slots_of(plan: JobPlan, baseline: JobPlan) -> Slots:
    mine = _slots(plan)
    is_alike = plan.settings == baseline.settings and _have_same_pieces(plan, baseline)
    return Slots(mine, mine if is_alike else _slots(baseline))


def _slots(plan: JobPlan) -> int:
    epoch = plan.run.epoch_plan(1)
    layouts = [lay_out(epoch.step(index), plan.settings) for index in spread(epoch, MOST_STEPS, MOST_SAMPLES)]
    return round(sum(layout.slots for layout in layouts) * epoch.tokens / sum(layout.tokens for layout in layouts))


def _ratio(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}"


def _shown(number: float) -> str:
    return f"{number:,.1f}".removesuffix(".0")


# -- which fields ----------------------------------------------------------------------------------------------------


def _value(spec: JobSpec, field: str) -> Any:
    part: Any = spec
    for name in field.split("."):
        part = part[int(name)] if isinstance(part, tuple) else getattr(part, name, None)
    if isinstance(part, tuple):
        return list(part)
    return part.model_dump(mode="json") if isinstance(part, BaseModel) else part


def _differing(plan: JobPlan, baseline: JobPlan, fields: Sequence[str]) -> Iterator[str]:
    return (field for field in fields if _value(plan.spec, field) != _value(baseline.spec, field))


def _doing(plan: JobPlan, baseline: JobPlan) -> tuple[str, ...]:
    method, optimizer = plan.spec.method, plan.spec.optimizer
    names = ["type"]
    if isinstance(method, Adapter) and isinstance(baseline.spec.method, Adapter):
        names += [name for name in type(method).model_fields if name != "type"]
    fields = (
        *(f"method.{name}" for name in names),
        *(f"optimizer.{name}" for name in type(optimizer).model_fields),
        *_DOING,
    )
    if {plan.schedule.decay, baseline.schedule.decay} != {"constant"}:
        fields = (*fields, "schedule.min_lr_ratio")
    if plan.spec.evaluation.early_stopping_patience is not None:  # then it matters when there is an evaluation
        fields = (*fields, "evaluation.every_steps", "evaluation.per_epoch", "data.validation")
    return fields


def _names(plan: JobPlan) -> list[str]:
    return [part.dataset for part in plan.spec.data.train]


def _other_weights(plan: JobPlan, baseline: JobPlan) -> list[str]:
    fields = [f"data.train.{index}.weight" for index in range(len(plan.spec.data.train))]
    return list(_differing(plan, baseline, fields)) if _names(plan) == _names(baseline) else []


def _can_keep(plan: JobPlan, baseline: JobPlan) -> bool:
    """Other rows or another model have no optimisation in common; the same rows read otherwise do."""
    return (
        plan.model.content_hash == baseline.model.content_hash
        and _names(plan) == _names(baseline)
        and (_have_same_data(plan, baseline) or any(_differing(plan, baseline, _READING)))
    )


def _keeps(plan: JobPlan, baseline: JobPlan) -> Iterator[tuple[str, Value]]:
    spec = baseline.spec
    has_same_data = _have_same_data(plan, baseline)
    choosing = () if has_same_data else _READING
    if not has_same_data or not _have_same_pieces(plan, baseline):
        choosing = (*choosing, *_CHOOSING)
    for field in (*_differing(plan, baseline, choosing), *_other_weights(plan, baseline)):
        yield field, _value(spec, field)
    yield from _keeps_steps(plan, baseline, changes_length="data.max_length" in choosing)
    yield from _keeps_schedule(plan, baseline)
    if plan.spec.method.type != spec.method.type:
        yield "method", spec.method.model_dump(mode="json")
    for field in _differing(plan, baseline, _doing(plan, baseline)):
        if field not in choosing and (not field.startswith("method.") or plan.spec.method.type == spec.method.type):
            yield field, _value(spec, field)


def _keeps_steps(plan: JobPlan, baseline: JobPlan, *, changes_length: bool) -> Iterator[tuple[str, Value]]:
    """How samples are dealt into steps, and a row that takes the samples."""
    max_length = baseline.selection.max_length if changes_length else plan.selection.max_length
    rows = baseline.settings
    if _steps_by(plan.settings) != _steps_by(rows):
        unit = "rows" if rows.rows_are_planned else "tokens" if rows.batch_by == "tokens" else "samples"
        yield from one_of(
            BATCHES, f"batch.{unit}_per_step", rows.per_step, f"batch.{batch_key(plan.spec.batch)}"
        ).items()
        if rows.rows_are_planned:
            packing = ("packing.mode", "packing.algorithm", "packing.row_length")
            yield from ((field, _value(baseline.spec, field)) for field in _differing(plan, baseline, packing))
            if not changes_length and max_length > rows.row_length:
                yield "data.max_length", baseline.selection.max_length
            return
        if plan.settings.algorithm == "wrapped":
            yield "packing.algorithm", "best_fit"
    if plan.has_own_row_length and plan.settings.row_length < max_length:
        yield "packing.row_length", max_length


def _keeps_schedule(plan: JobPlan, baseline: JobPlan) -> Iterator[tuple[str, Value]]:
    mine, theirs = plan.spec.schedule, baseline.spec.schedule
    if (mine.epochs, mine.max_steps) != (theirs.epochs, theirs.max_steps) and mine.max_steps != baseline.total_steps:
        chosen = "schedule.epochs" if theirs.epochs is not None else "schedule.max_steps"
        given = "schedule.epochs" if mine.epochs is not None else "schedule.max_steps"
        yield from one_of(DURATIONS, chosen, _value(baseline.spec, chosen), given).items()
    # Of a run as long as the baseline's.
    warmup = _warmup_of(plan.spec, baseline.total_steps, baseline.run.steps_per_epoch)
    if warmup != baseline.schedule.warmup_steps:
        asked = next((field for field in WARMUPS if _value(plan.spec, field) is not None), None)
        yield from one_of(WARMUPS, "schedule.warmup_steps", baseline.schedule.warmup_steps, asked).items()
    if plan.schedule.peak != baseline.schedule.peak:
        yield "schedule.learning_rate", baseline.schedule.peak


def _warmup_of(spec: JobSpec, total_steps: int, steps_per_epoch: int) -> int | None:
    """None where it would not end."""
    given = spec.schedule
    try:
        return resolve_warmup_steps(
            total_steps, steps_per_epoch, given.warmup_ratio, given.warmup_steps, given.warmup_epochs
        ).steps
    except UserError:
        return None
