"""What a person should know of a model before they fine-tune it: its build, and the licence that binds a result."""

from dataclasses import dataclass

from app.pages import format
from app.pages.environment import translate
from core.architecture import Kind
from core.errors import N_
from core.profile import ModelProfile

KIND_TITLES: dict[Kind, str] = {
    "embedding": N_("embedding"),
    "attention": N_("attention"),
    "mlp": N_("MLP"),
    "experts": N_("experts"),
    "norms": N_("norms"),
    "head": N_("head"),
    "other": N_("other parts"),
}


@dataclass(frozen=True)
class PartOfModel:
    title: str
    num_parameters: int
    share: str


@dataclass(frozen=True)
class ModelDetails:
    profile: ModelProfile
    parts: tuple[PartOfModel, ...]  # none where a release of before measured it
    built_in_template: str | None  # the job's choice, in place of the model's own


def model_details(profile: ModelProfile, chat_template: str | None) -> ModelDetails:
    """`chat_template` is the spec's."""
    counts = {} if profile.shape is None else dict(profile.shape.parameters)
    total = sum(counts.values())
    parts = tuple(
        PartOfModel(translate(title), counts[kind], format.percent(counts[kind] / total))
        for kind, title in KIND_TITLES.items()
        if counts.get(kind)
    )
    return ModelDetails(profile, parts, chat_template)
