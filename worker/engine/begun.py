"""What a resumed run keeps of how it began, where its spec leaves that to `auto`.

ZeRO stage, offload and gradient checkpointing are chosen for a device. A resume may come to another host, or under a
memory plan that has been calibrated since, and would then be computed in another way: the same steps, but not to the
last bit. So a checkpoint tells what was chosen, and that stands, as one whole. It is chosen anew on another number of
ranks, where a person has set a part of it otherwise, and, said aloud, where it doesn't fit by estimate.
"""

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter

from core.certify import with_changes
from core.errors import Reason
from core.preflight import JobPlan
from core.selection import choice
from core.spec import JobSpec
from worker.engine.checkpoint import Manifest
from worker.engine.model import Warn


def plan_as_begun(
    asked: JobSpec, manifest: Manifest | None, plan_of: Callable[[JobSpec], JobPlan], warn: Warn
) -> JobPlan:
    """The plan of `asked`, where it goes on from the checkpoint of `manifest`, if there is one."""
    plan = plan_of(asked)
    if manifest is None or manifest.world != asked.parallel.devices:
        return plan
    begun = {
        "parallel.zero_stage": manifest.zero_stage,
        "parallel.offload": manifest.offload,
        "compute.gradient_checkpointing": manifest.gradient_checkpointing,
    }
    given = {field: attrgetter(field)(asked) for field in begun}
    if None in begun.values() or any(given[field] not in ("auto", value) for field, value in begun.items()):
        return plan
    changed = {field: value for field, value in begun.items() if attrgetter(field)(plan.spec) != value}
    if not changed:
        return plan
    kept = plan_of(with_changes(asked, begun))
    way = kept.memory.chosen
    if way is not None and not way.fits:
        told = ", ".join(f"{field} {value}" for field, value in changed.items())
        warn(
            "placement", f"the run began with {told}, which doesn't fit by estimate here; the plan says what it has now"
        )
        return plan
    reason = Reason("auto.as_begun", {"step": manifest.step})
    choices = (choice(field, value, reason) for field, value in begun.items() if given[field] == "auto")
    return replace(kept, choices=(*kept.choices, *choices))
