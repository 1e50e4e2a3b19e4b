"""What becomes of every row, sample and target of the data, before any step is made of them.

A row of the data gives one sample or several. Rows are refused when they are read, left out beyond max_samples, or held
out for validation; the samples of what remains teach, unless they have no trained token. A sample longer than
max_length is then dropped, truncated or split (`data.overlong`), so that what is trained are *pieces*: tokens from
start to end of a sample, as a rule all of them. Each of these fates is counted, and the counts add up.

Samples are numbered over all data sets: the training sets in the spec's order, then the validation set, each in the
order of its rows. These global ids are what a step consists of, what its hash is made from, and what a resumed run
finds again.

A piece is cut where a turn ends, if one ends within the limit: at the end of a run of trained tokens, whose positions
the profile holds. Then no target is lost, since what follows a run's end is not trained. Only where a single turn is
longer than the limit is it cut in the middle, and the token behind the cut, now the first of its piece, has nothing to
be predicted from.

A million samples are arrays here, never objects: that is the difference between a second and a minute.
"""

import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from core.errors import Parameter, Reason, UserError
from core.events import Choice
from core.lengths import choose_length
from core.packing import IntArray, Segment
from core.presets import LOSS_TOLERATED, auto_num_validation_rows, refuse_above_context
from core.profile import Column, DataProfile
from core.spec import JobSpec, ValidationDataset, ValidationFraction

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Pieces:
    """What is taken of samples, columns side by side: tokens starts[i] to ends[i] of sample_ids[i] (global), of which
    so many are targets."""

    sample_ids: IntArray
    starts: IntArray
    ends: IntArray
    targets: IntArray

    def __len__(self) -> int:
        return len(self.sample_ids)

    @cached_property
    def lengths(self) -> IntArray:
        return self.ends - self.starts

    def segments(self) -> tuple[Segment, ...]:
        return tuple(map(Segment, self.sample_ids.tolist(), self.starts.tolist(), self.ends.tolist()))

    @property
    def columns(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        return self.sample_ids, self.starts, self.ends, self.targets

    def at(self, chosen: BoolArray | IntArray) -> "Pieces":
        return Pieces(*(column[chosen] for column in self.columns))

    @property
    def num_samples(self) -> int:
        """That they are of; the pieces of one lie side by side."""
        return int(begins_anew(self.sample_ids).sum())

    @classmethod
    def in_order(cls, *parts: "Pieces") -> "Pieces":
        """All of them, by sample and start."""
        together = cls(*map(np.concatenate, zip(*(part.columns for part in parts), strict=True)))
        return together.at(np.lexsort((together.starts, together.sample_ids)))


@dataclass(frozen=True, eq=False)
class Samples:
    """All samples of a job by global id."""

    profiles: tuple[DataProfile, ...]  # in the order of the ids; a set that is named twice has ids for each time

    @cached_property
    def lengths(self) -> IntArray:
        return _joined([profile.sample_length for profile in self.profiles])

    @cached_property
    def trained(self) -> IntArray:
        """Targets of the whole sample."""
        return _joined([profile.sample_trained for profile in self.profiles])

    @property
    def tokens_if_split(self) -> int | None:
        """What all would come to with a sample for each turn; None where a set doesn't know, or is split already."""
        tokens = [p.num_tokens_if_split if p.multi_turn == "whole" else None for p in self.profiles]
        known = [number for number in tokens if number is not None]
        return sum(known) if len(known) == len(tokens) else None

    @property
    def calls_dropped(self) -> tuple[int, int]:
        """Conversations whose tool calls the template leaves out, and all with calls that were looked at."""
        return sum(p.num_calls_dropped for p in self.profiles), sum(p.num_with_calls for p in self.profiles)

    @property
    def know_their_runs(self) -> bool:
        return all(profile.sample_runs is not None for profile in self.profiles)

    @cached_property
    def _first_token(self) -> IntArray:
        """Where each sample begins if all lie one after another; one more for the end."""
        return np.concatenate(([0], np.cumsum(self.lengths)))

    @cached_property
    def _runs(self) -> tuple[IntArray, IntArray, IntArray]:
        """Start and end of every trained run in that line of tokens, and the trained tokens before each; behind the
        last stands one that is never reached."""
        runs = [profile.sample_runs for profile in self.profiles]
        bounds = [profile.run_bounds for profile in self.profiles]
        assert None not in runs and None not in bounds
        of_sample = np.repeat(self._first_token[:-1], _joined([column for column in runs if column is not None]))
        starts, ends = _joined([column for column in bounds if column is not None]).reshape(-1, 2).T + of_sample
        never = np.iinfo(np.int64).max
        return np.append(starts, never), np.append(ends, never), np.concatenate(([0], np.cumsum(ends - starts)))

    def count_targets(self, sample_ids: IntArray, starts: IntArray, ends: IntArray) -> IntArray:
        """Of the pieces from `starts` to `ends`: their trained tokens but the first token, which nothing predicts."""
        first = self._first_token[sample_ids]
        return self._trained_before(first + ends) - self._trained_before(first + starts + 1)

    def _trained_before(self, positions: IntArray) -> IntArray:
        starts, ends, before = self._runs
        num_ended = np.searchsorted(ends, positions, side="right")
        found: IntArray = before[num_ended] + np.maximum(0, positions - starts[num_ended])
        return found

    def last_run_end(self, sample_ids: IntArray, after: IntArray, up_to: IntArray) -> IntArray:
        """The last end of a trained run in (after, up_to], positions within the samples; 0 where there is none."""
        _, ends, _ = self._runs
        first = self._first_token[sample_ids]
        num_ended = np.searchsorted(ends, first + up_to, side="right")
        found = ends[num_ended - 1] - first
        return np.where((num_ended > 0) & (found > after), found, 0)

    def whole(self, sample_ids: IntArray) -> Pieces:
        return Pieces(sample_ids, np.zeros_like(sample_ids), self.lengths[sample_ids], self.trained[sample_ids])


def begins_anew(numbers: npt.NDArray[Any]) -> BoolArray:
    """Where a number is not the one before it."""
    return np.concatenate((np.ones(min(1, len(numbers)), np.bool_), numbers[1:] != numbers[:-1]))


def _joined(columns: Sequence[Column]) -> IntArray:
    return np.concatenate([np.zeros(0, np.int64), *(np.asarray(column.numbers) for column in columns)]).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Selection:
    """What becomes of every row and sample of the data. `counts` adds up: rows = refused + beyond max_samples +
    held out + taken; samples of taken rows = trained + too long + cut to nothing + without a trained token; targets =
    trained + too long + lost by cuts."""

    samples: Samples
    teaching: IntArray  # global ids of the samples that have something to teach, before max_length is applied
    train: Pieces
    validation: Pieces
    train_of_set: tuple[int, ...]  # how many of `train` each training set gives
    counts: dict[str, int]
    max_length: int
    choices: tuple[Choice, ...]

    def count_targets(self, positions: IntArray, starts: IntArray, ends: IntArray) -> IntArray:
        """Of parts of the pieces at `positions` of `train`, from `starts` to `ends` within them."""
        targets = self.train.targets[positions]
        is_part = (starts > 0) | (ends < self.train.lengths[positions])
        if is_part.any():
            positions, starts, ends = positions[is_part], starts[is_part], ends[is_part]
            first = self.train.starts[positions]
            parts = self.samples.count_targets(self.train.sample_ids[positions], first + starts, first + ends)
            targets[is_part] = parts
        return targets

    def targets_of(self, segments: Sequence[Segment]) -> list[int]:
        """Of each segment of a step, whose `sample` is a position in `train`."""
        targets: list[int] = self.count_targets(*np.array(segments).T).tolist()
        return targets


def selected_by(spec: JobSpec) -> tuple[Hashable, ...]:
    """All of a spec that `select` asks."""
    return (
        spec.data,
        spec.seed if spec.data.max_samples is not None else None,
        spec.packing.row_length if spec.data.max_length == "auto" else None,
    )


def sets_of(spec: JobSpec) -> tuple[str, ...]:
    """Every data set that it names, once."""
    return tuple(dict.fromkeys((*(part.dataset for part in spec.data.train), *validation_set(spec))))


def validation_set(spec: JobSpec) -> list[str]:
    """The data set that is all for validation, if there is one."""
    return [spec.data.validation.dataset] if isinstance(spec.data.validation, ValidationDataset) else []


def choice(field: str, value: str | int | float | bool | None, reason: Reason) -> Choice:
    return Choice(field=field, value=value, code=reason.code, parameters=dict(reason.parameters))


def select(spec: JobSpec, data: Mapping[str, DataProfile], context_length: int) -> Selection:
    """Decides for every row and every sample of the data what becomes of it, and counts each under its reason.

    Raises UserError plan.above_context, plan.overlong, plan.no_runs, plan.no_samples.
    """
    if isinstance(spec.data.max_length, int):
        refuse_above_context(spec.data.max_length, context_length)
    train_sets = [data[part.dataset] for part in spec.data.train]
    own_validation = [data[name] for name in validation_set(spec)]
    samples = Samples((*train_sets, *own_validation))
    sizes = [len(profile.sample_length) for profile in train_sets]
    num_train = sum(sizes)
    rows = _Rows.of(train_sets)
    counts = {
        "rows": sum(profile.num_rows for profile in train_sets),
        "rows_refused": sum(profile.num_refused for profile in train_sets),
    }

    taken = _draw_rows(len(rows), spec.data.max_samples, spec.seed)
    held_out, choices = _hold_out(spec, rows.hashes, taken)
    num_taken, num_held_out = int(taken.sum()), int(held_out.sum())
    counts["rows_beyond_max_samples"] = len(rows) - num_taken
    counts["rows_held_out"] = num_held_out
    counts["rows_taken"] = num_taken - num_held_out
    train = np.flatnonzero((taken & ~held_out)[rows.of_sample])
    if own_validation:
        validation = np.arange(num_train, len(samples.lengths))
    else:
        validation = np.flatnonzero(held_out[rows.of_sample])

    teaching = train[samples.trained[train] > 0]
    if not len(teaching):
        raise _no_samples(counts, {"without a trained token": len(train)})
    max_length = spec.data.max_length
    if max_length == "auto":
        max_length, reason = choose_length(
            samples.lengths[teaching], samples.trained[teaching], context_length, spec.packing.row_length
        )
        choices = (*choices, choice("data.max_length", max_length, reason))
    if spec.data.overlong is None:
        _refuse_great_loss(samples, teaching, max_length, context_length, spec.packing.row_length)
    kept, fates = _fit(samples, teaching, max_length, spec.data.overlong)
    if not len(kept):
        reasons = {
            "without a trained token": len(train) - len(teaching),
            f"over {max_length} tokens": fates["samples_too_long"],
            "cut to nothing": fates["samples_cut_to_nothing"],
        }
        raise _no_samples(counts, reasons)
    held, _ = _fit(samples, validation[samples.trained[validation] > 0], max_length, spec.data.overlong)
    num_held = held.num_samples
    counts |= {
        "samples": len(train),
        "samples_without_trained_tokens": len(train) - len(teaching),
        **fates,
        "samples_validation": num_held,
        "samples_validation_dropped": len(validation) - num_held,
    }
    borders = np.searchsorted(kept.sample_ids, np.cumsum([0, *sizes]))
    return Selection(
        samples=samples,
        teaching=teaching,
        train=kept,
        validation=held,
        train_of_set=tuple(np.diff(borders).tolist()),
        counts=counts,
        max_length=max_length,
        choices=choices,
    )


# -- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of the training sets that gave a sample, numbered in their order over all sets."""

    of_sample: IntArray
    hashes: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.hashes)

    @classmethod
    def of(cls, profiles: Sequence[DataProfile]) -> "_Rows":
        of_sample, hashes = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        num_rows = 0
        for profile in profiles:
            is_first = begins_anew(np.asarray(profile.sample_row.numbers))
            of_sample.append(np.cumsum(is_first) - 1 + num_rows)
            hashes.append(np.asarray(profile.sample_hash.numbers).astype(np.uint64)[is_first])
            num_rows += int(is_first.sum())
        return cls(np.concatenate(of_sample), np.concatenate(hashes))


def _draw_rows(num_rows: int, most: int | None, seed: int) -> BoolArray:
    taken = np.ones(num_rows, dtype=np.bool_)
    if most is not None and most < num_rows:
        # random() alone is promised to give the same numbers in every version of Python.
        generator = random.Random(seed)
        drawn = np.fromiter((generator.random() for _ in range(num_rows)), dtype=np.float64)
        taken[np.argsort(drawn, kind="stable")[most:]] = False
    return taken


def _hold_out(spec: JobSpec, hashes: npt.NDArray[np.uint64], taken: BoolArray) -> tuple[BoolArray, tuple[Choice, ...]]:
    """Rows held out for validation, chosen by the hash of their content alone: equal rows fall on the same side, and
    another seed or a longer file moves as few as can be."""
    num_rows = int(taken.sum())
    wanted, reason = 0, None
    if spec.data.validation == "auto":
        wanted, reason = auto_num_validation_rows(num_rows)
    elif isinstance(spec.data.validation, ValidationFraction):
        wanted = max(1, round(spec.data.validation.fraction * num_rows))
    distinct, counts = np.unique(hashes[taken], return_counts=True)
    up_to = np.cumsum(counts)
    is_enough = (up_to - counts >= wanted) | (up_to >= num_rows)
    num_chosen = int(np.argmax(is_enough)) if is_enough.any() else 0
    held_out = taken & (hashes <= distinct[num_chosen - 1]) if num_chosen else np.zeros_like(taken)
    num_held_out = int(held_out.sum())
    if reason is None and wanted:
        reason = Reason("auto.validation_given", {"held_out": num_held_out, "num_rows": num_rows})
    return held_out, (choice("data.validation", num_held_out, reason),) if reason else ()


# -- lengths ---------------------------------------------------------------------------------------------------------


def _refuse_great_loss(
    samples: Samples, teaching: IntArray, max_length: int, context_length: int, row_length: int | None
) -> None:
    """overlong: null drops, but only what nobody would miss."""
    lengths, trained = samples.lengths[teaching], samples.trained[teaching]
    is_lost = lengths > max_length
    total, lost = int(trained.sum()), int(trained[is_lost].sum())
    if lost > LOSS_TOLERATED * total and not is_lost.all():
        raise UserError(
            "plan.overlong" if max_length < context_length else "plan.overlong_context",
            "data.max_length",
            num_dropped=int(is_lost.sum()),
            num_samples=len(teaching),
            max_length=max_length,
            share=f"{lost / total:.1%}",
            longest=int(lengths.max()),
            context_length=context_length,
            row_length=row_length or 0,
        )


def _fit(
    samples: Samples, sample_ids: IntArray, max_length: int, overlong: Literal["drop", "truncate", "split"] | None
) -> tuple[Pieces, dict[str, int]]:
    """The samples within max_length, in their order, and what became of those that are longer."""
    whole = samples.whole(sample_ids)
    is_long = whole.lengths > max_length
    fates = {
        "samples_too_long": 0,
        "samples_truncated": 0,
        "samples_split": 0,
        "samples_cut_to_nothing": 0,
        "pieces_without_targets": 0,
        "targets": int(whole.targets.sum()),
        "targets_too_long": 0,
    }
    if overlong in (None, "drop") or not is_long.any():
        kept = whole.at(~is_long)
        fates["samples_too_long"] = int(is_long.sum())
        fates["targets_too_long"] = int(whole.targets[is_long].sum())
    else:
        if not samples.know_their_runs:
            raise UserError("plan.no_runs", "data.overlong")
        cut = (_truncate if overlong == "truncate" else _split)(samples, whole.at(is_long), max_length)
        teaches = cut.targets > 0
        num_cut = len(np.unique(cut.sample_ids[teaches]))
        fates["samples_truncated" if overlong == "truncate" else "samples_split"] = num_cut
        fates["samples_cut_to_nothing"] = int(is_long.sum()) - num_cut
        fates["pieces_without_targets"] = int((~teaches).sum()) if overlong == "split" else 0
        kept = Pieces.in_order(whole.at(~is_long), cut.at(teaches))
    trained = int(kept.targets.sum())
    fates |= {
        "samples_trained": kept.num_samples,
        "pieces": len(kept),
        "targets_lost": fates["targets"] - fates["targets_too_long"] - trained,
        "targets_trained": trained,
    }
    return kept, fates


def _truncate(samples: Samples, long: Pieces, max_length: int) -> Pieces:
    """The beginning of each, up to the last end of a turn within max_length; where not even the first turn ends in it,
    max_length tokens."""
    limit = np.full(len(long), max_length)
    turn_end = samples.last_run_end(long.sample_ids, np.zeros_like(limit), limit)
    ends = np.where(turn_end > 0, turn_end, limit)
    targets = samples.count_targets(long.sample_ids, long.starts, ends)
    return Pieces(long.sample_ids, long.starts, ends, targets)


def _split(samples: Samples, long: Pieces, max_length: int) -> Pieces:
    """Each in pieces one after another, each as long as fits and to the end of a turn where one ends in it. All samples
    at once, a piece of each a round."""
    ids, starts, all_ends = long.sample_ids, long.starts, long.ends
    parts: list[tuple[IntArray, IntArray, IntArray]] = []
    while len(ids):
        limit = np.minimum(starts + max_length, all_ends)
        turn_end = samples.last_run_end(ids, starts, limit)
        ends = np.where((limit == all_ends) | (turn_end == 0), limit, turn_end)
        parts.append((ids, starts, ends))
        goes_on = ends < all_ends
        ids, starts, all_ends = ids[goes_on], ends[goes_on], all_ends[goes_on]
    ids, starts, ends = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Pieces.in_order(Pieces(ids, starts, ends, samples.count_targets(ids, starts, ends)))


def _no_samples(counts: Mapping[str, int], samples: Mapping[str, int]) -> UserError:
    reasons = [f"{counts['rows_refused']} were refused", f"{counts['rows_held_out']} held out"]
    reasons += [f"{count} samples {what}" for what, count in samples.items() if count]
    parameters: dict[str, Parameter] = {"rows": counts["rows"], "reasons": ", ".join(reasons)}
    return UserError("plan.no_samples", "data.train", **parameters)
