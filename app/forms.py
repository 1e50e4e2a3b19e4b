"""The form of a new job: derived from the spec, and read back into one.

Every input is named by its dotted spec key, and its id is that name too, so that an error, a link and a label find it.
Values travel as the text that a person typed: `spec_of_form` turns them into the mapping that core.spec parses (the
only judge of them), `state_of_spec` turns a mapping into texts again. What could not be parsed therefore stands in the
form as it was typed.

Of alternatives (samples, tokens or rows a step; epochs or steps; ...) one is chosen by a radio button, and only the
chosen one is read. An input left empty is the spec's null where the knob knows one, else its default.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from core.errors import N_, UserError
from core.fix import Fix, Value
from core.spec import BATCH_KEYS, GROUPS, JobSpec, batch_key, spec_fields
from core.unbuilt import UNBUILT_VALUES


def as_text(value: object) -> str:
    """A value of a spec as a person would type it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _number_text(value)
    if isinstance(value, list | tuple):
        return ", ".join(as_text(item) for item in value)
    return str(value)


def _number_text(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    mantissa, _, exponent = f"{value:e}".partition("e")
    if abs(value) < 1e-3 and float(f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}") == value:
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return repr(value)


Kind = Literal["text", "area", "number", "choice", "words", "lines"]


@dataclass(frozen=True)
class Control:
    """One knob as an input."""

    key: str
    title: str
    help: str
    unit: str
    group: str
    kind: Kind
    default: str
    is_advanced: bool = False
    is_nullable: bool = False
    choices: tuple[tuple[str, bool], ...] = ()  # value, whether this release can run it


@dataclass(frozen=True)
class Option:
    value: str
    title: str
    key: str = ""  # the input that belongs to it; none: the choice says all


@dataclass(frozen=True)
class Alternatives:
    """Inputs of which one is chosen: `key` names the radio buttons."""

    key: str
    title: str
    help: str
    group: str
    options: tuple[Option, ...]


ALTERNATIVES = (
    Alternatives(
        "data.validation",
        N_("Validation"),
        N_("Rows that are held out to measure the loss on what the model has not seen."),
        "Data",
        (
            Option("auto", N_("auto: 2 %, 50 to 500 rows, none under 500")),
            Option("none", N_("none")),
            Option("fraction", N_("a share of the training rows"), "data.validation.fraction"),
            Option("dataset", N_("a data set of its own"), "data.validation.dataset"),
        ),
    ),
    Alternatives(
        "batch",
        N_("One step learns from"),
        N_("By samples or tokens a step stays the same whatever the packing; by rows packing changes the step itself."),
        "Batch",
        (
            Option("samples_per_step", N_("samples"), "batch.samples_per_step"),
            Option("tokens_per_step", N_("tokens"), "batch.tokens_per_step"),
            Option("rows_per_step", N_("rows"), "batch.rows_per_step"),
        ),
    ),
    Alternatives(
        "schedule.duration",
        N_("Train for"),
        N_("Passes over the data, or an exact number of optimizer steps."),
        "Schedule and optimizer",
        (
            Option("epochs", N_("epochs"), "schedule.epochs"),
            Option("max_steps", N_("steps"), "schedule.max_steps"),
        ),
    ),
    Alternatives(
        "schedule.warmup",
        N_("Warm-up"),
        N_("The learning rate rises from 0 to its peak: Adam's first estimates are noise, and LoRA starts at zero."),
        "Schedule and optimizer",
        (
            Option("none", N_("auto: 3 % of the steps, in a short run up to 10 steps")),
            Option("warmup_ratio", N_("share of all steps"), "schedule.warmup_ratio"),
            Option("warmup_steps", N_("steps"), "schedule.warmup_steps"),
            Option("warmup_epochs", N_("epochs"), "schedule.warmup_epochs"),
        ),
    ),
    Alternatives(
        "evaluation.when",
        N_("Evaluate"),
        N_("How often the validation loss is measured."),
        "Evaluation and checkpoints",
        (
            Option("per_epoch", N_("times an epoch"), "evaluation.per_epoch"),
            Option("every_steps", N_("each so many steps"), "evaluation.every_steps"),
            Option("none", N_("at the end only")),
        ),
    ),
)
# What the form shows in its own way: as alternatives, as rows, or not at all.
_ALTERNATIVE_KEYS = {option.key for choice in ALTERNATIVES for option in choice.options if option.key}
_OWN_WAY = {"spec_version", "data.train", "data.train.dataset", "data.train.weight", "data.validation"}
_AREAS = {"notes": "area", "evaluation.sample_prompts": "lines"}
METHOD_KEYS_OF_ADAPTERS = tuple(key for key, _ in spec_fields() if key.startswith("method.") and key != "method.type")


def _leaves(annotation: Any) -> Iterator[Any]:
    """The types and literal values of which a field takes one."""
    origin = get_origin(annotation)
    if origin is Literal or origin is tuple or not get_args(annotation):
        yield annotation
    elif hasattr(annotation, "__metadata__"):
        yield from _leaves(get_args(annotation)[0])
    else:
        for argument in get_args(annotation):
            yield from _leaves(argument)


def _control(key: str, info: FieldInfo) -> Control:
    leaves = list(_leaves(info.annotation))
    literals = [value for leaf in leaves if get_origin(leaf) is Literal for value in get_args(leaf)]
    types = [leaf for leaf in leaves if get_origin(leaf) is not Literal]
    is_nullable = type(None) in types
    if key == "method.type":
        literals = ["lora", "qlora", "full"]
    if key in _AREAS:
        kind: Kind = "lines" if _AREAS[key] == "lines" else "area"
    elif any(get_origin(leaf) is tuple for leaf in types):
        kind = "words"
    elif bool in types:
        kind, literals = "choice", [*literals, True, False]
    elif float in types or int in types:
        kind = "number"
    elif literals:
        kind = "choice"
    else:
        kind = "text"
    lacking = UNBUILT_VALUES.get(key, frozenset())
    extra = info.json_schema_extra
    assert isinstance(extra, dict)
    return Control(
        key=key,
        title=str(info.title),
        help=str(info.description),
        unit=str(extra["unit"]),
        group=str(extra["group"]),
        kind=kind,
        default="" if info.default is PydanticUndefined else as_text(info.default),
        is_advanced=bool(extra["advanced"]),
        is_nullable=is_nullable,
        choices=tuple((as_text(value), value not in lacking) for value in literals) if kind == "choice" else (),
    )


CONTROLS: Mapping[str, Control] = {key: _control(key, info) for key, info in spec_fields() if key not in _OWN_WAY}
_INPUTS = frozenset((*CONTROLS, *(choice.key for choice in ALTERNATIVES)))


@dataclass(frozen=True)
class Section:
    """A group of the form: what is always shown, and what stands under "advanced"."""

    title: str
    alternatives: tuple[Alternatives, ...]
    basic: tuple[Control, ...]
    advanced: tuple[Control, ...]


def _section(title: str) -> Section:
    controls = [c for c in CONTROLS.values() if c.group == title and c.key not in _ALTERNATIVE_KEYS]
    # What kind of a thing it is comes before its numbers.
    controls.sort(key=lambda control: not control.key.endswith(".type"))
    return Section(
        title,
        tuple(choice for choice in ALTERNATIVES if choice.group == title),
        tuple(control for control in controls if not control.is_advanced),
        tuple(control for control in controls if control.is_advanced),
    )


SECTIONS = tuple(_section(title) for title in GROUPS)


# -- what stands in it ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FormState:
    """What stands in the form: texts by input name, and each input's errors."""

    values: Mapping[str, str]
    train: tuple[tuple[str, str], ...]  # data set, weight
    errors: Mapping[str, tuple[UserError, ...]] = field(default_factory=dict)

    def value(self, key: str) -> str:
        control = CONTROLS.get(key)
        return self.values.get(key, control.default if control else "")

    def of(self, key: str) -> tuple[UserError, ...]:
        return self.errors.get(key, ())

    @property
    def all_errors(self) -> tuple[UserError, ...]:
        return tuple(error for errors in self.errors.values() for error in errors)

    def with_inputs(self, texts: Mapping[str, str]) -> "FormState":
        """With other texts in some inputs, by their ids (radio buttons: by their name)."""
        known = {key: text for key, text in texts.items() if key in _INPUTS}
        train = tuple(
            (name, texts.get(f"data.train.{index}.weight", weight)) for index, (name, weight) in enumerate(self.train)
        )
        return FormState({**self.values, **known}, train)

    def with_errors(self, errors: Iterable[UserError]) -> "FormState":
        by_input: dict[str, list[UserError]] = {}
        for error in errors:
            by_input.setdefault(input_of(error.field, len(self.train)), []).append(error)
        return FormState(self.values, self.train, {key: tuple(found) for key, found in by_input.items()})


def input_of(key: str, num_train: int = 1) -> str:
    """The input at which an error about this spec key is shown; "" = above the form."""
    if key in CONTROLS or any(key == choice.key for choice in ALTERNATIVES):
        return key
    if key in ("data", "data.train") or key.startswith("data.train."):
        parts = key.split(".")
        index = int(parts[2]) if len(parts) > 2 and parts[2].isdigit() and int(parts[2]) < num_train else 0
        return f"data.train.{index}.{'weight' if parts[-1] == 'weight' else 'dataset'}"
    # An item of a list (tags.3, optimizer.betas.0) belongs to the list.
    parent = key.rpartition(".")[0]
    return input_of(parent, num_train) if parent else ""


# -- form -> spec ----------------------------------------------------------------------------------------------------


def state_of_form(pairs: Sequence[tuple[str, str]]) -> FormState:
    """Keeps what was typed. Repeated names (the rows of the training data) stay in their order."""
    texts = [(key, text.replace("\r\n", "\n")) for key, text in pairs]
    names = [text.strip() for key, text in texts if key == "data.train.dataset"]
    weights = [text.strip() for key, text in texts if key == "data.train.weight"]
    weights += ["1"] * (len(names) - len(weights))
    train = tuple((name, weight) for name, weight in zip(names, weights, strict=False) if name)
    values = {key: text if key in _AREAS else text.strip() for key, text in texts if key in _INPUTS}
    return FormState(values, train)


def spec_of_form(state: FormState) -> dict[str, Any]:
    """The mapping that `parse_spec` reads. Texts are passed on as typed; nothing is mended."""
    spec: dict[str, Any] = {"data": {"train": [_training_set(*row) for row in state.train]}}
    skipped = _ALTERNATIVE_KEYS | (set(METHOD_KEYS_OF_ADAPTERS) if state.value("method.type") == "full" else set())
    for key, control in CONTROLS.items():
        if key not in skipped and key in state.values:
            _put(spec, control, state.values[key])
    for choice in ALTERNATIVES:
        _put_choice(spec, choice, state)
    return spec


def _training_set(name: str, weight: str) -> dict[str, Any]:
    return {"dataset": name} if weight in ("", "1") else {"dataset": name, "weight": weight}


def _put(spec: dict[str, Any], control: Control, text: str) -> None:
    if text == "" and control.default == "":
        return
    if text == "" and not control.is_nullable and control.kind != "words":
        return
    part = spec
    *parents, leaf = control.key.split(".")
    for parent in parents:
        part = part.setdefault(parent, {})
    part[leaf] = _parsed(control, text)


def _parsed(control: Control, text: str) -> object:
    if text == "" and control.is_nullable:
        return None
    if control.kind == "words":
        # A list and a word that stands for one (all-linear) share an input.
        return text if text == control.default and "," not in text and text else _words(text)
    if control.kind == "lines":
        return [line for line in text.split("\n") if line.strip()]
    return text


def _words(text: str) -> list[str]:
    return [word for word in (part.strip() for part in text.replace("\n", ",").split(",")) if word]


def _put_choice(spec: dict[str, Any], choice: Alternatives, state: FormState) -> None:
    chosen = next((o for o in choice.options if o.value == state.values.get(choice.key)), None)
    if chosen is None:
        return
    text = state.value(chosen.key).strip() if chosen.key else ""
    if choice.key == "data.validation":
        given: dict[str, Any] = {"auto": "auto", "none": None}
        spec["data"]["validation"] = given.get(chosen.value, {chosen.value: text})
        return
    part = spec.setdefault(choice.key.split(".")[0], {})
    if chosen.key:
        # An empty input is a missing number, and is refused as such, not replaced by a default.
        part[chosen.value] = text or ""
    if choice.key == "evaluation.when" and not chosen.key:
        part["per_epoch"] = None


# -- spec -> form ----------------------------------------------------------------------------------------------------


def state_of_spec(spec: Mapping[str, Any]) -> FormState:
    """The form filled with a spec as it was written: a preset, pasted YAML, another job's. It may be an invalid one."""
    values: dict[str, str] = {}
    for key, control in CONTROLS.items():
        found, value = _find(spec, key)
        if found:
            values[key] = "\n".join(map(as_text, value)) if _is_lines(control, value) else as_text(value)
    for choice in ALTERNATIVES:
        values[choice.key] = _chosen(choice, spec)
    data = spec.get("data")
    rows = data.get("train") if isinstance(data, Mapping) else None
    train = tuple(
        (as_text(row.get("dataset")), as_text(row.get("weight", 1)))
        for row in (rows if isinstance(rows, list | tuple) else ())
        if isinstance(row, Mapping)
    )
    return FormState(values, train)


def _is_lines(control: Control, value: object) -> bool:
    return control.kind == "lines" and isinstance(value, list | tuple)


def _find(spec: Mapping[str, Any], key: str) -> tuple[bool, Any]:
    part: Any = spec
    for name in key.split("."):
        if not isinstance(part, Mapping) or name not in part:
            return False, None
        part = part[name]
    return True, part


def _chosen(choice: Alternatives, spec: Mapping[str, Any]) -> str:
    if choice.key == "data.validation":
        return _chosen_validation(*_find(spec, "data.validation"))
    if choice.key == "batch":
        batch = spec.get("batch")
        return batch_key(batch) if isinstance(batch, Mapping) else BATCH_KEYS[0]
    part = spec.get(choice.key.split(".")[0])
    part = part if isinstance(part, Mapping) else {}
    given = [option.value for option in choice.options if option.key and part.get(option.value) is not None]
    if given:
        return given[0]
    if choice.key == "evaluation.when" and part.get("per_epoch", 2) is None:
        return "none"
    return "none" if choice.key == "schedule.warmup" else choice.options[0].value


def _chosen_validation(is_given: bool, value: object) -> str:
    if not is_given or value == "auto":
        return "auto"
    if isinstance(value, Mapping):
        return "dataset" if "dataset" in value else "fraction"
    return "none"


def inputs_of(fix: Fix) -> dict[str, str]:
    """What these fields are in the form, as `FormState.with_inputs` takes it. Empty where the form has no input for one
    of them: then a button could not keep its promise."""
    spec: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for key, value in fix.items():
        if re.fullmatch(r"data\.train\.\d+\.weight", key):
            texts[key] = as_text(value)
        elif key == "method" or key in _INPUTS:
            _put_value(spec, key, value)
        else:
            return {}
    filled = state_of_spec(spec)
    # An alternative that is given up keeps its number; another one is chosen.
    texts |= {
        key: text for key, text in filled.values.items() if key in CONTROLS and (text or key not in _ALTERNATIVE_KEYS)
    }
    for choice in ALTERNATIVES:
        if not fix.keys().isdisjoint({choice.key, *(option.key for option in choice.options)}):
            texts[choice.key] = filled.values[choice.key]
    return texts


def _put_value(spec: dict[str, Any], key: str, value: Value) -> None:
    part = spec
    *parents, leaf = key.split(".")
    for parent in parents:
        part = part.setdefault(parent, {})
    part[leaf] = value


def written_spec(spec: JobSpec) -> dict[str, Any]:
    """What differs from the defaults, as one would write it: for YAML, curl and cloning."""
    written: dict[str, Any] = spec.model_dump(mode="json", exclude_defaults=True)
    if spec.method.type != "lora":
        # Each method's own default is its name, so the dump leaves it out.
        written["method"] = {"type": spec.method.type, **written.get("method", {})}
    return written
