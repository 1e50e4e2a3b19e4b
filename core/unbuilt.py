"""What the spec can say and this release does not run yet: refused at once, with what to choose instead.

Each line goes when the feature comes; an empty table means that this file can go too.
"""

from collections.abc import Callable, Iterator

from core.errors import N_, UserError, UserErrors
from core.spec import JobSpec

# field, its value in a spec, values that are lacking, what to do instead
UNBUILT: tuple[tuple[str, Callable[[JobSpec], object], frozenset[object], str], ...] = (
    ("model.source", lambda s: s.model.source, frozenset({"huggingface", "modelscope"}), N_("use a local model")),
)

# The same for a form, which shows these choices as not yet to be had.
UNBUILT_VALUES = {field: lacking for field, _, lacking, _ in UNBUILT}


def unbuilt(spec: JobSpec) -> Iterator[UserError]:
    """One UserError for each thing that the spec asks for and this release lacks."""
    for field, value_of, lacking, remedy in UNBUILT:
        value = value_of(spec)
        if value in lacking:
            yield UserError("spec.not_built", field, value=str(value).lower(), remedy=remedy)
    if spec.model.revision is not None:
        remedy = N_("leave it empty: a local model is recorded by the hash of its content")
        yield UserError("spec.not_built", "model.revision", value=spec.model.revision, remedy=remedy)


def refuse_unbuilt(spec: JobSpec) -> None:
    """Raises UserErrors naming all that this release lacks."""
    faults = list(unbuilt(spec))
    if faults:
        raise UserErrors(faults)
