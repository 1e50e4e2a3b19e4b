"""At which borders between steps a run looks up, and how often: worked out without laying out a step.

`JobPlan.evaluates_after` and the trainer decide at each border by itself; these are the same borders at once.
"""

from collections.abc import Iterator
from itertools import accumulate

from core.preflight import JobPlan


def evaluation_steps(plan: JobPlan) -> list[int]:
    """Steps after which the held-out loss is measured and sample prompts are answered, rising."""
    evaluation = plan.spec.evaluation
    if not plan.validation_ids and not evaluation.sample_prompts:
        return []
    steps = {plan.total_steps}
    if evaluation.every_steps is not None:
        steps.update(range(evaluation.every_steps, plan.total_steps + 1, evaluation.every_steps))
    elif evaluation.per_epoch is not None:
        times = evaluation.per_epoch
        for first, made, whole in _epochs(plan):
            borders = (-(-number * whole // times) for number in range(1, times + 1))
            steps.update(first + border for border in borders if border <= made)
    return sorted(steps)


def checkpoint_steps(plan: JobPlan) -> list[int]:
    """Steps after which a checkpoint is written, rising: those that are certain, and those where the held-out loss may
    be the best so far, which an evaluation's is at most. Those by the clock come on top."""
    steps = set(certain_checkpoint_steps(plan))
    if plan.spec.checkpoint.keep_best and plan.validation_ids:
        steps.update(evaluation_steps(plan))
    return sorted(steps)


def certain_checkpoint_steps(plan: JobPlan) -> list[int]:
    """By steps, at epochs' ends, at the last one."""
    wanted = plan.spec.checkpoint
    steps = {plan.total_steps}
    if wanted.every_steps is not None:
        steps.update(range(wanted.every_steps, plan.total_steps + 1, wanted.every_steps))
    if wanted.every_epoch:
        steps.update(first + made for first, made, whole in _epochs(plan) if made == whole)
    return sorted(steps)


def _epochs(plan: JobPlan) -> Iterator[tuple[int, int, int]]:
    """Of each epoch how many steps are behind, how many of it are made, and how many it has."""
    run = plan.run
    behind = accumulate(run.steps_of_epoch, initial=0)
    last = len(run.steps_of_epoch)
    for number, (first, made) in enumerate(zip(behind, run.steps_of_epoch, strict=False), start=1):
        # Only the last may be cut.
        whole = made
        if number == last:
            differ = plan.settings.epochs_differ_in_steps
            whole = len(run.epoch_plan(last)) if differ else run.steps_per_epoch
        yield first, made, whole
