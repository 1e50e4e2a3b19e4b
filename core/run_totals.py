"""What a run comes to: the layouts of its steps, added up before it makes them, to hold against what it made."""

from core.events import RunTotals
from core.preflight import JobPlan

# Up to so many steps and samples each step is laid out; more are taken from the report of the first epoch.
MOST_STEPS = 1000
MOST_SAMPLES = 1 << 14


def run_totals(
    plan: JobPlan, first: int = 1, last: int | None = None, *, most_samples: int = MOST_SAMPLES
) -> RunTotals:
    """Of the steps `first` to `last` of a run, or to its last one."""
    last = plan.total_steps if last is None else last
    num_steps = last - first + 1
    samples_of_step = len(plan.run.epoch_plan(1).order) / plan.run.steps_per_epoch
    if num_steps > MOST_STEPS or num_steps * samples_of_step > most_samples:
        return _from_epoch(plan, num_steps)
    rows = tokens = trained_tokens = slots = 0
    for number in range(first, last + 1):
        work = plan.step(number)
        rows += work.layout.rows
        tokens += work.layout.tokens
        trained_tokens += work.num_targets
        slots += work.layout.slots
    return RunTotals(
        steps=max(0, num_steps), rows=rows, tokens=tokens, trained_tokens=trained_tokens, slots=slots, is_exact=True
    )


def _from_epoch(plan: JobPlan, num_steps: int) -> RunTotals:
    mine, epoch = plan.packing.mine, plan.run.epoch_plan(1)
    targets = int(plan.selection.count_targets(epoch.order, epoch.starts, epoch.ends).sum())
    share = num_steps / plan.run.steps_per_epoch
    return RunTotals(
        steps=num_steps,
        rows=round(share * mine.rows),
        tokens=round(share * mine.tokens),
        trained_tokens=round(share * targets),
        slots=round(share * mine.slots),
        is_exact=False,
    )
