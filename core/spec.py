"""The job spec: every knob of a fine-tune, once.

The form, the REST schema, the command line, the reference in docs/spec.md and every check derive from these classes:
a field's type, default and bounds are pydantic's, its title, help, unit and group stand in `knob(...)`. A spec is
parsed once, at the border, by `parse_spec`, and is frozen afterwards; unknown keys are refused with a did-you-mean.

Alternatives, of which naming one switches the others' defaults off, are fields of one class (`schedule.epochs` and
`max_steps`) or a union of classes (`batch`, `method`), whose unchosen keys are then always null.
"""

import difflib
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from core.demo_data import DEMO_MODEL
from core.errors import N_, UserError, UserErrors
from core.schedule import Decay

SPEC_VERSION = 1

# A data set's name in the web service; `pegbox train` also takes paths.
DATASET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
DATASET_REFERENCE = re.compile(r"(?P<name>[a-z0-9][a-z0-9._-]{0,127})(@(?P<version>[0-9a-f]{6,64}))?")

Group = Literal[
    "Job",
    "Model",
    "Data",
    "Packing",
    "Batch",
    "Method",
    "ZeRO and hosts",
    "Schedule and optimizer",
    "Precision and attention",
    "Evaluation and checkpoints",
]
# Marked here, so that the form's headings are in the catalogue.
GROUPS: tuple[Group, ...] = (
    N_("Job"),  # type: ignore[assignment]  # N_ returns str; the literals are checked by the test of the form
    N_("Model"),
    N_("Data"),
    N_("Packing"),
    N_("Batch"),
    N_("Method"),
    N_("ZeRO and hosts"),
    N_("Schedule and optimizer"),
    N_("Precision and attention"),
    N_("Evaluation and checkpoints"),
)


def knob(
    default: Any, title: str, help: str, *, group: Group, unit: str = "", advanced: bool = False, **bounds: Any
) -> Any:
    """A field of the spec with everything that a form, a schema and a page of docs need to show it."""
    return Field(
        default,
        title=title,
        description=help,
        json_schema_extra={"group": group, "unit": unit, "advanced": advanced},
        validate_default=False,
        **bounds,
    )


def _number(value: Any) -> Any:
    """Text such as 2e-4 or 1_000 counts as a number (YAML 1.1 reads 2e-4 as text); true and false don't."""
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "{value} is not a number", {"value": str(value).lower()})
    if isinstance(value, str):
        try:
            number = float(value.strip())
        except ValueError:
            return value
        return int(number) if number.is_integer() else number
    return value


def _text(value: Any) -> Any:
    if isinstance(value, str):
        for position, character in enumerate(value, 1):
            if (ord(character) < 32 and character not in "\n\t") or ord(character) == 127:
                raise PydanticCustomError("control_character", "control character", {"position": position})
    return value


def _exclusive(data: Any, names: Sequence[str], prefix: str) -> Any:
    """Of `names` at most one has a value; naming one switches the others' defaults off."""
    if not isinstance(data, Mapping):
        return data
    given = [name for name in names if data.get(name) is not None]
    if len(given) > 1:
        raise PydanticCustomError(
            "alternatives", "alternatives", {"first": f"{prefix}.{given[0]}", "second": f"{prefix}.{given[1]}"}
        )
    return {**data, **{name: None for name in names if name not in given}} if given else data


Number = BeforeValidator(_number)
Text = Annotated[str, BeforeValidator(_text)]
Count = Annotated[int, Number, Field(ge=1)]
Real = Annotated[float, Number, Field(allow_inf_nan=False)]
LARGEST_LEARNING_RATE = 10
LearningRate = Annotated[Real, Field(gt=0, le=LARGEST_LEARNING_RATE)]
Name = Annotated[Text, Field(min_length=1, max_length=512)]
ModuleName = Annotated[Text, Field(min_length=1, max_length=200)]


class Part(BaseModel):
    """A frozen part of the spec that refuses keys it doesn't know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Part):
    base: Name = knob(
        DEMO_MODEL,
        "Base model",
        N_("The model to start from: a name that a host reports, or a hub id. demo/tiny-llama is built in."),
        group="Model",
    )
    source: Literal["auto", "local", "huggingface", "modelscope"] = knob(
        "auto", "Source", N_("Where the model comes from; auto takes a local one first."), group="Model", advanced=True
    )
    revision: Name | None = knob(
        None,
        "Revision",
        N_("Branch, tag or commit of a hub model; recorded as a commit."),
        group="Model",
        advanced=True,
    )
    chat_template: Name | None = knob(
        None,
        "Chat template",
        N_("Empty: the model's own. chatml gives a base model without one a template."),
        group="Model",
        advanced=True,
    )
    adapter: Name | None = knob(
        None,
        "Start from adapter",
        N_("Continue training the adapter of this finished job, by its id; pegbox train takes a folder."),
        group="Model",
        advanced=True,
    )


class TrainingSet(Part):
    dataset: Name = knob(
        ..., "Data set", N_("Name, or name@version; pegbox train takes a file path or hf:ORG/NAME."), group="Data"
    )
    weight: Annotated[Real, Field(gt=0, le=1000)] = knob(
        1.0,
        "Weight",
        N_("How often an epoch goes through it: 2 = each row twice, 0.5 = half of its rows."),
        group="Data",
    )


class ValidationFraction(Part):
    fraction: Annotated[Real, Field(gt=0, lt=1)] = knob(
        ..., "Fraction", N_("This share of the training rows is held out."), group="Data"
    )


class ValidationDataset(Part):
    dataset: Name = knob(..., "Validation set", N_("A data set of its own."), group="Data")


def _validation_tag(value: Any) -> str | None:
    if value is None:
        return "as none"
    if isinstance(value, Mapping):
        return "as set" if "dataset" in value else "as fraction"
    if isinstance(value, ValidationFraction | ValidationDataset):
        return "as set" if isinstance(value, ValidationDataset) else "as fraction"
    return "as auto"


AnyValidation = Annotated[
    Annotated[Literal["auto"], Tag("as auto")]
    | Annotated[ValidationFraction, Tag("as fraction")]
    | Annotated[ValidationDataset, Tag("as set")]
    | Annotated[None, Tag("as none")],
    Discriminator(_validation_tag),
]


class Data(Part):
    train: Annotated[tuple[TrainingSet, ...], Field(min_length=1, max_length=64)] = knob(
        ..., "Training data", N_("One data set or several with weights."), group="Data"
    )
    validation: AnyValidation = knob(
        "auto",
        "Validation",
        N_("Held out to measure the loss on unseen rows. auto: 2 %, 50 to 500 rows, none under 500 rows."),
        group="Data",
    )
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = knob(
        "auto", "Format", N_("How a row is read; auto detects it from the rows."), group="Data", advanced=True
    )
    train_on: Literal["assistant", "last", "all"] = knob(
        "assistant",
        "Train on",
        N_("Which tokens have a loss: all assistant turns, the last one only, or every token."),
        group="Data",
    )
    multi_turn: Literal["auto", "whole", "split"] = knob(
        "auto",
        "Multi-turn",
        N_("whole: a conversation is one sample, every turn trained; split: one sample an assistant turn."),
        group="Data",
        advanced=True,
    )
    max_length: Literal["auto"] | Count = knob(
        "auto",
        "Maximum length",
        N_("A sample's limit. auto: the shortest that loses at most 0.5 % of the trained tokens."),
        group="Data",
        unit="tokens",
    )
    overlong: Literal["drop", "truncate", "split"] | None = knob(
        None,
        "Overlong samples",
        N_(
            "drop leaves them out; truncate keeps the turns that fit; split makes several samples of one, each without "
            "what came before. Empty drops them, but refuses the job when that loses over 0.5 % of the trained tokens."
        ),
        group="Data",
        advanced=True,
    )
    max_samples: Count | None = knob(
        None, "Maximum samples", N_("Only this many rows, drawn by the seed."), group="Data", unit="rows", advanced=True
    )


class Packing(Part):
    mode: Literal["packed", "padding_free", "grouped", "padded"] = knob(
        "packed",
        "Packing",
        N_(
            "packed computes no pad: short samples share a row, isolated from each other. padding_free likewise, the "
            "samples of a micro-batch in one row without a limit. grouped pads samples of like length, padded as they "
            "come."
        ),
        group="Packing",
    )
    algorithm: Literal["best_fit", "wrapped", "sequential"] = knob(
        "best_fit",
        "Algorithm",
        N_(
            "Packed only. best_fit takes the fewest rows; sequential a few more, in the samples' order; wrapped fills "
            "every row by cutting samples at its end, which loses a trained token a cut (by rows only)."
        ),
        group="Packing",
        advanced=True,
    )
    row_length: Count | None = knob(
        None,
        "Row length",
        N_("A row's capacity; empty: the maximum length."),
        group="Packing",
        unit="tokens",
        advanced=True,
    )


class Batch(Part):
    micro_batch_size: Annotated[Count, Field(le=4096)] = knob(
        1,
        "Micro-batch size",
        N_(
            "Rows (padding_free: samples) a forward pass and device; changes memory and speed, not the step. "
            "Padding needs 2 or more to show."
        ),
        group="Batch",
        unit="rows",
    )


class BatchBySamples(Batch):
    samples_per_step: Annotated[Count, Field(le=1_000_000)] = knob(
        32,
        "Samples per step",
        N_("What one optimizer step learns from: the same step whatever the packing or the devices."),
        group="Batch",
        unit="samples",
    )
    tokens_per_step: None = None
    rows_per_step: None = None


class BatchByTokens(Batch):
    samples_per_step: None = None
    tokens_per_step: Annotated[Count, Field(le=1_000_000_000)] = knob(
        ...,
        "Tokens per step",
        N_("Samples until this many tokens; likewise the same step whatever the layout."),
        group="Batch",
        unit="tokens",
    )
    rows_per_step: None = None


class BatchByRows(Batch):
    samples_per_step: None = None
    tokens_per_step: None = None
    rows_per_step: Annotated[Count, Field(le=1_000_000)] = knob(
        ...,
        "Rows per step",
        N_("The classic: the whole epoch is packed, this many rows a step. Packing then changes the step itself."),
        group="Batch",
        unit="rows",
    )


BATCH_KEYS = ("samples_per_step", "tokens_per_step", "rows_per_step")


def batch_key(value: Any) -> str:
    """Which of the three keys a batch, or a mapping that becomes one, is given by."""
    given = [
        key
        for key in BATCH_KEYS
        if (value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)) is not None
    ]
    return given[0] if given else BATCH_KEYS[0]


def _batch_tag(value: Any) -> str:
    return f"by {batch_key(value).split('_')[0]}"


def _one_batch_key(value: Any) -> Any:
    value = _exclusive(value, BATCH_KEYS, "batch")
    if isinstance(value, Mapping) and all(key in value and value[key] is None for key in BATCH_KEYS):
        raise PydanticCustomError("one_of", "one of", {"names": ", ".join(BATCH_KEYS)})
    return value


AnyBatch = Annotated[
    Annotated[BatchBySamples, Tag("by samples")]
    | Annotated[BatchByTokens, Tag("by tokens")]
    | Annotated[BatchByRows, Tag("by rows")],
    Discriminator(_batch_tag),
    BeforeValidator(_one_batch_key),
]


class Adapter(Part):
    """What LoRA and QLoRA share (Hu et al. 2021, arXiv 2106.09685; Dettmers et al. 2023, arXiv 2305.14314)."""

    rank: Annotated[Count, Field(le=4096)] = knob(
        16, "Rank", N_("Width of the adapters: more learns more, and costs memory."), group="Method"
    )
    alpha: Annotated[Real, Field(gt=0, le=100_000)] = knob(
        32, "Alpha", N_("The adapter's output is scaled by alpha / rank."), group="Method"
    )
    dropout: Annotated[Real, Field(ge=0, lt=1)] = knob(
        0.0, "Dropout", N_("On the adapter's input, against overfitting."), group="Method", advanced=True
    )
    target_modules: Literal["all-linear"] | Annotated[tuple[ModuleName, ...], Field(min_length=1, max_length=256)] = (
        knob(
            "all-linear",
            "Target modules",
            N_("Which layers get an adapter; all-linear: all but the head."),
            group="Method",
            advanced=True,
        )
    )
    exclude_modules: Annotated[tuple[ModuleName, ...], Field(max_length=256)] = knob(
        (), "Exclude modules", N_("Layers to leave out."), group="Method", advanced=True
    )
    modules_to_save: Annotated[tuple[ModuleName, ...], Field(max_length=256)] = knob(
        (), "Modules to save", N_("Layers trained in full beside the adapters."), group="Method", advanced=True
    )
    use_rslora: bool = knob(
        False, "rsLoRA", N_("Scale by alpha / sqrt(rank): steadier at high rank."), group="Method", advanced=True
    )
    use_dora: bool = knob(
        False,
        "DoRA",
        N_("Train magnitude and direction apart: slower, sometimes better."),
        group="Method",
        advanced=True,
    )


class Lora(Adapter):
    type: Literal["lora"] = knob("lora", "Method", N_("Small adapters over a frozen base."), group="Method")


class Qlora(Adapter):
    type: Literal["qlora"] = knob("qlora", "Method", N_("Adapters over a 4-bit base."), group="Method")


class Full(Part):
    type: Literal["full"] = knob("full", "Method", N_("Every weight is trained."), group="Method")


def _method_type(value: Any) -> str:
    # `method: {rank: 8}` means LoRA, the default.
    kind = value.get("type", "lora") if isinstance(value, dict) else getattr(value, "type", "lora")
    return kind if isinstance(kind, str) else ""


AnyMethod = Annotated[
    Annotated[Lora, Tag("lora")] | Annotated[Qlora, Tag("qlora")] | Annotated[Full, Tag("full")],
    Discriminator(
        _method_type,
        custom_error_type="method_type",
        custom_error_message="method type",
        custom_error_context={"choices": "lora, qlora, full"},
    ),
]


class Parallel(Part):
    devices: Annotated[Count, Field(le=4096)] = knob(
        1,
        "Devices",
        N_("GPUs that train one job together; on a CPU, processes that share one slot."),
        group="ZeRO and hosts",
    )
    zero_stage: Literal["auto", 0, 1, 2, 3] = knob(
        "auto",
        "ZeRO stage",
        N_("What is sharded over the devices: 1 optimizer states, 2 gradients too, 3 parameters too."),
        group="ZeRO and hosts",
    )
    offload: Literal["auto", "none", "optimizer", "optimizer_and_params"] = knob(
        "auto",
        "Offload",
        N_("Keep shards in CPU memory: fits more, runs slower."),
        group="ZeRO and hosts",
        advanced=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _stage_from_text(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("zero_stage") in ("0", "1", "2", "3"):
            return {**data, "zero_stage": int(data["zero_stage"])}
        return data


class Schedule(Part):
    learning_rate: Literal["auto"] | LearningRate = knob(
        "auto", "Learning rate", N_("The peak, reached after the warm-up."), group="Schedule and optimizer"
    )
    decay: Decay = knob(
        "cosine",
        "Decay",
        N_("How the learning rate falls after the warm-up; wsd stays at the peak and falls in the last fifth."),
        group="Schedule and optimizer",
    )
    warmup_ratio: Annotated[Real, Field(ge=0, lt=1)] | None = knob(
        None,
        "Warm-up ratio",
        N_("Share of all steps in which the learning rate rises from 0."),
        group="Schedule and optimizer",
    )
    warmup_steps: Annotated[int, Number, Field(ge=0, le=10_000_000)] | None = knob(
        None, "Warm-up steps", N_("The same as a number of steps."), group="Schedule and optimizer", unit="steps"
    )
    warmup_epochs: Annotated[Real, Field(ge=0, le=1000)] | None = knob(
        None,
        "Warm-up epochs",
        N_("The same as a number of epochs."),
        group="Schedule and optimizer",
        unit="epochs",
        advanced=True,
    )
    min_lr_ratio: Annotated[Real, Field(ge=0, le=1)] = knob(
        0.0,
        "Floor",
        N_("The decay ends at this share of the peak."),
        group="Schedule and optimizer",
        advanced=True,
    )
    epochs: Annotated[Real, Field(gt=0, le=10_000)] | None = knob(
        3.0, "Epochs", N_("Passes over the data; fractions are allowed."), group="Schedule and optimizer", unit="epochs"
    )
    max_steps: Annotated[Count, Field(le=10_000_000)] | None = knob(
        None,
        "Maximum steps",
        N_("In place of epochs: exactly this many optimizer steps."),
        group="Schedule and optimizer",
        unit="steps",
        advanced=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _alternatives(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and all(key in data and data[key] is None for key in ("epochs", "max_steps")):
            raise PydanticCustomError("one_of", "one of", {"names": "epochs, max_steps"})
        data = _exclusive(data, ("epochs", "max_steps"), "schedule")
        return _exclusive(data, ("warmup_ratio", "warmup_steps", "warmup_epochs"), "schedule")


class Optimizer(Part):
    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = knob(
        "adamw",
        "Optimizer",
        N_("AdamW. 8-bit moments take a quarter of the memory; paged ones move to the host when a GPU is full."),
        group="Schedule and optimizer",
    )
    weight_decay: Annotated[Real, Field(ge=0, le=10)] = knob(
        0.0, "Weight decay", N_("Pulls weights to 0 at each step."), group="Schedule and optimizer", advanced=True
    )
    betas: tuple[Annotated[Real, Field(ge=0, lt=1)], Annotated[Real, Field(ge=0, lt=1)]] = knob(
        (0.9, 0.999), "Betas", N_("Memory of Adam's two moments."), group="Schedule and optimizer", advanced=True
    )
    eps: Annotated[Real, Field(gt=0, le=1)] = knob(
        1.0e-8, "Epsilon", N_("Added to Adam's denominator."), group="Schedule and optimizer", advanced=True
    )
    max_grad_norm: Annotated[PositiveFloat, Number, Field(allow_inf_nan=False)] | None = knob(
        1.0,
        "Gradient clipping",
        N_("A gradient longer than this is shortened to it; empty: no clipping."),
        group="Schedule and optimizer",
        advanced=True,
    )


class Compute(Part):
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = knob(
        "auto", "Precision", N_("auto: bf16 where the GPU has it, fp32 on a CPU."), group="Precision and attention"
    )
    attention: Literal["auto", "flash", "flex", "sdpa", "eager"] = knob(
        "auto",
        "Attention",
        N_("flash: exact, O(N) memory, one segment a sample; sdpa: one call with a dense block mask; eager: plain."),
        group="Precision and attention",
    )
    gradient_checkpointing: Literal["auto"] | bool = knob(
        "auto",
        "Gradient checkpointing",
        N_("Recomputes activations in the backward pass: less memory, about a third more compute."),
        group="Precision and attention",
    )
    compile: bool = knob(
        False, "Compile", N_("torch.compile: slow start, faster steps."), group="Precision and attention", advanced=True
    )


class Evaluation(Part):
    every_steps: Count | None = knob(
        None,
        "Evaluate every",
        N_("Measure the validation loss each so many steps."),
        group="Evaluation and checkpoints",
        unit="steps",
        advanced=True,
    )
    per_epoch: Annotated[Count, Field(le=1000)] | None = knob(
        2, "Evaluations per epoch", N_("The same as times an epoch."), group="Evaluation and checkpoints"
    )
    sample_prompts: Annotated[
        tuple[Annotated[Text, Field(min_length=1, max_length=20_000)], ...], Field(max_length=50)
    ] = knob(
        (),
        "Sample prompts",
        N_("Answered by the model at each evaluation."),
        group="Evaluation and checkpoints",
        advanced=True,
    )
    early_stopping_patience: Count | None = knob(
        None,
        "Early stopping",
        N_("Stop after this many evaluations without a better loss."),
        group="Evaluation and checkpoints",
        unit="evaluations",
        advanced=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _alternatives(cls, data: Any) -> Any:
        return _exclusive(data, ("every_steps", "per_epoch"), "evaluation")


class Checkpoint(Part):
    every_minutes: Annotated[Real, Field(gt=0, le=100_000)] | None = knob(
        30, "Checkpoint every", N_("So much work is lost at most."), group="Evaluation and checkpoints", unit="minutes"
    )
    every_steps: Count | None = knob(
        None,
        "or every",
        N_("Also each so many steps."),
        group="Evaluation and checkpoints",
        unit="steps",
        advanced=True,
    )
    every_epoch: bool = knob(True, "At each epoch's end", N_("Also there."), group="Evaluation and checkpoints")
    keep_last: Annotated[Count, Field(le=1000)] = knob(
        2, "Keep last", N_("Older ones are deleted."), group="Evaluation and checkpoints", advanced=True
    )
    keep_best: Annotated[int, Number, Field(ge=0, le=1000)] = knob(
        1, "Keep best", N_("By validation loss."), group="Evaluation and checkpoints", advanced=True
    )


class JobSpec(Part):
    """One fine-tune, whole. `spec_version` is stored with it; every past version still loads."""

    spec_version: Literal[1] = 1
    name: Annotated[Text, Field(max_length=200)] = knob(
        "", "Name", N_("Empty: made from model, method and date."), group="Job"
    )
    tags: Annotated[tuple[Annotated[Text, Field(min_length=1, max_length=64)], ...], Field(max_length=32)] = knob(
        (), "Tags", N_("To find it again."), group="Job"
    )
    notes: Annotated[Text, Field(max_length=20_000)] = knob(
        "", "Notes", N_("Why this run, what you expect."), group="Job"
    )
    priority: Annotated[int, Number, Field(ge=-10, le=10)] = knob(
        0, "Priority", N_("Higher goes first in the queue."), group="Job", advanced=True
    )
    model: Model = Model()
    data: Data
    packing: Packing = Packing()
    batch: AnyBatch = BatchBySamples()
    method: AnyMethod = Lora()
    parallel: Parallel = Parallel()
    schedule: Schedule = Schedule()
    optimizer: Optimizer = Optimizer()
    compute: Compute = Compute()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    seed: Annotated[int, Number, Field(ge=0, lt=2**32)] = knob(
        42, "Seed", N_("Order of the data, initial adapters, dropout."), group="Schedule and optimizer", advanced=True
    )


# -- parsing -------------------------------------------------------------------------------------------------------


def parse_spec(data: object) -> JobSpec:
    """A mapping, as JSON or YAML gives it, becomes a frozen spec; all its faults are found in one look.

    Raises UserErrors, one UserError a fault, whose `field` is the dotted key (`data.train.0.weight`)."""
    if isinstance(data, JobSpec):
        return data
    if not isinstance(data, Mapping):
        raise UserError("spec.not_a_mapping", kind=type(data).__name__)
    try:
        spec = JobSpec.model_validate(data)
    except ValidationError as error:
        raise_faults(error)
    faults = list(_cross_field_faults(spec))
    if faults:
        raise UserErrors(faults)
    return spec


def _cross_field_faults(spec: JobSpec) -> Iterator[UserError]:
    packing, data, schedule = spec.packing, spec.data, spec.schedule
    if packing.row_length is not None and isinstance(data.max_length, int) and packing.row_length < data.max_length:
        yield UserError(
            "spec.row_shorter_than_sample",
            "packing.row_length",
            row_length=packing.row_length,
            max_length=data.max_length,
        )
    if packing.mode != "packed" and packing.algorithm != "best_fit":
        yield UserError(
            "spec.algorithm_needs_packed", "packing.algorithm", algorithm=packing.algorithm, mode=packing.mode
        )
    elif packing.algorithm == "wrapped" and not isinstance(spec.batch, BatchByRows):
        yield UserError("spec.wrapped_needs_rows", "packing.algorithm", given=f"batch.{batch_key(spec.batch)}")
    if spec.model.adapter is not None and spec.method.type == "full":
        yield UserError("spec.adapter_needs_method", "model.adapter", adapter=spec.model.adapter)
    if spec.optimizer.name != "adamw" and spec.parallel.offload not in ("auto", "none"):
        yield UserError(
            "spec.offload_needs_adamw", "optimizer.name", name=spec.optimizer.name, offload=spec.parallel.offload
        )
    if schedule.warmup_steps and schedule.max_steps is not None and schedule.warmup_steps >= schedule.max_steps:
        yield UserError(
            "spec.warmup_longer_than_run",
            "schedule.warmup_steps",
            warmup_steps=schedule.warmup_steps,
            total_steps=schedule.max_steps,
        )


def spec_fields(part: type[BaseModel] = JobSpec, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every knob as (dotted key, field), unions flattened, each key once; list items under `data.train`."""
    seen = set[str]()
    for name, field in part.model_fields.items():
        parts = list(_parts_of(field.annotation))
        key = f"{prefix}{name}"
        if not parts or name in ("train", "validation"):
            yield key, field
        for inner in parts:
            for inner_key, inner_field in spec_fields(inner, f"{key}."):
                if inner_key in seen or inner_field.annotation is type(None):
                    continue
                seen.add(inner_key)
                yield inner_key, inner_field


def _parts_of(annotation: Any) -> Iterator[type[Part]]:
    if isinstance(annotation, type) and issubclass(annotation, Part):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _parts_of(argument)


_LEAVES: dict[str, list[str]] = {}
for _key, _field in spec_fields():
    _LEAVES.setdefault(_key.rsplit(".", 1)[-1], []).append(_key)
_SECTIONS = tuple(JobSpec.model_fields)
_KNOWN_PARTS = frozenset(
    part for key in (*_SECTIONS, *(k for keys in _LEAVES.values() for k in keys)) for part in key.split(".")
)


def suggest_key(path: str, known: Sequence[str] | None = None) -> str | None:
    """The dotted key that an unknown one most likely means: a sibling with a similar name, else a like-named
    knob elsewhere (`lora_rank` and a top-level `rank` both mean `method.rank`)."""
    parent, _, leaf = path.rpartition(".")
    siblings = [key for keys in _LEAVES.values() for key in keys if key.rpartition(".")[0] == parent]
    if not parent:
        siblings += list(_SECTIONS)
    names = {key.rpartition(".")[2]: key for key in siblings}
    close = difflib.get_close_matches(leaf, names, n=1, cutoff=0.7)
    if close:
        return names[close[0]]
    if leaf in _LEAVES:
        return _LEAVES[leaf][0]
    for prefix in ("lora_", "num_", "train_", "per_device_"):
        if leaf.startswith(prefix) and leaf.removeprefix(prefix) in _LEAVES:
            return _LEAVES[leaf.removeprefix(prefix)][0]
    close = difflib.get_close_matches(leaf, _LEAVES, n=1, cutoff=0.75)
    return _LEAVES[close[0]][0] if close else None


def raise_faults(error: ValidationError) -> NoReturn:
    """Pydantic's findings as UserErrors: one a field, in our words."""
    raise UserErrors(faults_of(error))


def faults_of(error: ValidationError, known: Container[str] = _KNOWN_PARTS) -> list[UserError]:
    """Of a place, only the parts that are `known` are told: nobody has written the names of a union's branches."""
    by_field: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        parts = [part for part in detail["loc"] if isinstance(part, int) or part in known]
        if detail["type"] == "extra_forbidden" and (not parts or parts[-1] != detail["loc"][-1]):
            parts.append(detail["loc"][-1])
        by_field.setdefault(".".join(str(part) for part in parts), []).append(detail)
    # A union reports each branch; a fault deeper inside one branch says more than "none of the branches fits".
    fields = [f for f in by_field if not any(other.startswith(f"{f}.") for other in by_field)]
    return [_fault(field, by_field[field]) for field in fields]


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, str | int | float) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _fault(field: str, details: list[ErrorDetails]) -> UserError:  # noqa: PLR0911, PLR0912 - one case a kind of fault
    # Of a union's branches, the one that says most: a bound, then a wrong type, then "not one of".
    order = ("greater", "less", "finite", "too_", "string_too", "int_", "float_", "not_a_number")
    details = sorted(details, key=lambda d: next((i for i, name in enumerate(order) if d["type"].startswith(name)), 9))
    detail = details[0]
    kind, context, value = detail["type"], detail.get("ctx", {}), _shown(detail["input"])
    choices = ", ".join(dict.fromkeys(str(d["ctx"]["expected"]) for d in details if d["type"] == "literal_error"))
    match kind:
        case "extra_forbidden":
            suggestion = suggest_key(field)
            if suggestion == field:
                return UserError("spec.other_choice", field, key=field)
            if suggestion:
                return UserError("spec.unknown_key_hint", field, key=field, suggestion=suggestion)
            return UserError("spec.unknown_key", field, key=field)
        case "alternatives":
            return UserError("spec.alternatives", str(context["first"]), **context)
        case "one_of":
            return UserError("spec.one_of", field, **context)
        case "control_character":
            return UserError("spec.control_character", field, **context)
        case "method_type":
            tag = detail["input"].get("type") if isinstance(detail["input"], dict) else detail["input"]
            return UserError("spec.choice", "method.type", value=_shown(tag), choices=str(context["choices"]))
        case "missing":
            return UserError("spec.missing", field)
        case "greater_than_equal":
            return UserError("spec.at_least", field, value=value, limit=context["ge"])
        case "greater_than":
            return UserError("spec.above", field, value=value, limit=context["gt"])
        case "less_than_equal":
            return UserError("spec.at_most", field, value=value, limit=context["le"])
        case "less_than":
            return UserError("spec.below", field, value=value, limit=context["lt"])
        case "string_too_long":
            return UserError("spec.too_long", field, length=len(detail["input"]), limit=context["max_length"])
        case "too_long":
            return UserError("spec.too_many", field, length=context["actual_length"], limit=context["max_length"])
        case "too_short" | "string_too_short":
            return UserError("spec.too_few", field, limit=context["min_length"])
        case "int_parsing" | "int_from_float" | "int_type" | "int_parsing_size":
            if choices:
                return UserError("spec.choice", field, value=value, choices=f"{choices} or a whole number")
            return UserError("spec.integer", field, value=value, example="1000")
        case "float_parsing" | "float_type" | "finite_number" | "not_a_number":
            if choices:
                return UserError("spec.choice", field, value=value, choices=f"{choices} or a number such as 2e-4")
            return UserError("spec.number", field, value=value, example="2e-4")
        case "bool_parsing" | "bool_type":
            if choices:
                return UserError("spec.choice", field, value=value, choices=f"{choices}, true, false")
            return UserError("spec.boolean", field, value=value)
        case "string_type":
            return UserError("spec.text", field, value=value)
        case "literal_error":
            return UserError("spec.choice", field, value=value, choices=choices)
    expected = {"tuple_type": "a list", "model_type": "a mapping", "model_attributes_type": "a mapping"}
    return UserError("spec.kind", field, value=value, expected=expected.get(kind, detail["msg"]))


def job_name(spec: JobSpec, day: str) -> str:
    """The name a job gets when it has none: model, method and date (`day` as 2026-11-24)."""
    return spec.name or f"{spec.model.base.rsplit('/', 1)[-1]} {spec.method.type} {day}"


def is_path(dataset: str) -> bool:
    """`pegbox train`: a data set holding a slash or ending like a file is a path."""
    return "/" in dataset or dataset.endswith((".json", ".jsonl", ".csv", ".parquet", ".gz"))
