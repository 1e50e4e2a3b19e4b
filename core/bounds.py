"""What no step of a job exceeds, known from the lengths of its samples before any step is laid out:
rows and tokens of one forward pass, for the memory plan."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from core.packing import IntArray, PlanSettings


@dataclass(frozen=True)
class LargestPass:
    """An upper bound of one device's forward pass, in tokens."""

    tokens: int  # slots, over its rows
    longest_row: int
    longest_sample: int


@dataclass(frozen=True, eq=False)
class StepBounds:
    """What no step of a job exceeds, before any is laid out; lengths are tokens."""

    rows: int  # of one rank: packed rows, or samples
    row: int  # the widest
    longest: int  # sample
    side_by_side: IntArray | None  # [i] = the i + 1 longest samples of a step together, where a pass is one row of them

    def largest_pass(self, micro_batch_size: int) -> LargestPass:
        """What no forward pass of so many rows exceeds."""
        rows = min(micro_batch_size, self.rows)
        if self.side_by_side is not None:
            tokens = int(self.side_by_side[rows - 1])
            return LargestPass(tokens, tokens, self.longest)
        return LargestPass(rows * self.row, self.row, self.longest)

    def of_length(self, length: int, micro_batch_size: int, *, is_one_row: bool) -> LargestPass:
        """With samples of so many tokens instead, each of which fills its row."""
        tokens = min(micro_batch_size, self.rows) * length
        return LargestPass(tokens, tokens if is_one_row else length, length)


def step_bounds(settings: PlanSettings, lengths: Sequence[int] | IntArray) -> StepBounds:
    """`lengths` are those of the trained samples; a set of weight w may bring each of them ceil(w) times a step."""
    epoch = np.asarray(lengths)
    if any(part.weight > 1 for part in settings.sets):
        copies = [ceil(part.weight) for part in settings.sets]
        epoch = np.repeat(epoch, np.repeat(copies, [part.num_samples for part in settings.sets]))
    longest = int(epoch.max())
    samples, tokens = len(epoch), int(epoch.sum())
    if settings.batch_by == "samples" or (settings.batch_by == "rows" and settings.mode != "packed"):
        samples = min(samples, settings.per_step)
        tokens = int(np.partition(epoch, len(epoch) - samples)[len(epoch) - samples :].sum())
    elif settings.batch_by == "tokens":  # it closes with the sample that brings it there
        tokens = min(tokens, settings.per_step - 1 + longest)
    row, side_by_side = longest, None
    if settings.mode == "packed":
        row = min(settings.row_length, tokens)
        samples = min(samples, _most_rows(settings, tokens))
    rows = -(-samples // settings.num_ranks)
    if settings.mode == "padding_free":
        side_by_side = np.minimum(np.cumsum(np.sort(epoch)[::-1][:rows]), tokens)
    return StepBounds(rows, row, longest, side_by_side)


def _most_rows(settings: PlanSettings, tokens: int) -> int:
    """Packed rows of one step that holds so many tokens. What opens a row fits in none of those before (best fit) or
    not in the last (sequential): so any two rows, or any two neighbours, hold more than a row's capacity together."""
    if settings.algorithm == "wrapped":
        most = -(-tokens // settings.row_length)
    else:
        most = -(-2 * tokens // settings.row_length) - (settings.algorithm == "best_fit")
    most = max(1, most)
    return min(most, settings.per_step) if settings.batch_by == "rows" else most


def largest_pass(settings: PlanSettings, lengths: Sequence[int] | IntArray) -> LargestPass:
    """What no forward pass exceeds."""
    return step_bounds(settings, lengths).largest_pass(settings.micro_batch_size)
