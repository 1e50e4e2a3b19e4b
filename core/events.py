"""What a job emits: the trainer one event an optimizer step and at every turn of its way, the supervisor the rest.

An event is flat: `seq`, `ts` (seconds since the epoch by the emitter's clock: shown, never decided on), `kind`, and
the fields of its kind. Numbers that are no numbers (NaN, infinity) travel as null, so that every reader of JSON can
read them; a `failure` then tells why. A kind that this release doesn't know is kept as it came (`RawEvent`), so that a
newer worker loses nothing at an older server.
"""

import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, TypeAdapter, ValidationError

from core.errors import TEXTS, Reason, Translate

FailureReason = Literal[
    "oom", "nan", "bad_spec", "bad_data", "disk_full", "killed", "hang", "lost", "preempted", "stopped", "internal"
]
Level = Literal["debug", "info", "warning", "error"]


class BaseEvent(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    seq: int = Field(ge=1)
    ts: float


class Phase(BaseEvent):
    """Where the job is: fetch, load_model, tokenise, plan, probe, longest_batch, train, probe_rates, certify,
    evaluate, save_checkpoint, save_result, ..."""

    kind: Literal["phase"] = "phase"
    name: str
    done: int = 0
    total: int | None = None


class Choice(BaseModel):
    """A value that `auto` became, or that was derived, and why: a code of the catalogue with its parameters, so that
    a page can say it in its reader's language."""

    model_config = ConfigDict(frozen=True)

    field: str
    value: str | int | float | bool | None
    code: str
    parameters: dict[str, str | int | float] = {}

    def text(self, translate: Translate = str) -> str:
        """A code of a newer release, which this one's catalogue lacks, is shown as it is."""
        return Reason(self.code, self.parameters).text(translate) if self.code in TEXTS else self.code


class RunTotals(BaseModel):
    """What all steps of a run come to; a run may end earlier."""

    model_config = ConfigDict(frozen=True)

    steps: int
    rows: int
    tokens: int
    trained_tokens: int
    slots: int
    is_exact: bool  # each step was laid out; else the first epoch stands for all

    @property
    def padding_efficiency(self) -> float | None:
        return self.tokens / self.slots if self.slots else None

    def of_first(self, num_steps: int) -> "RunTotals":
        """Of so many of its steps, as an estimate where these are not all."""
        if num_steps == self.steps:
            return self
        share = num_steps / self.steps
        parts = {name: round(share * getattr(self, name)) for name in ("rows", "tokens", "trained_tokens", "slots")}
        return RunTotals(steps=num_steps, **parts, is_exact=False)


class Plan(BaseEvent):
    """What the job will do, known before its first step; the planned curve is drawn from it."""

    kind: Literal["plan"] = "plan"
    total_steps: int
    steps_per_epoch: int
    warmup_steps: int
    peak_learning_rate: float
    decay: str
    min_lr_ratio: float
    max_length: int
    row_length: int
    num_samples: int
    num_validation_samples: int
    num_tokens: int  # of one epoch
    num_trained_tokens: int  # of one epoch
    num_rows: int  # rows of the first epoch
    padding_efficiency: float
    padded_efficiency: float
    fill: float
    num_slots: int | None = None  # of the first epoch
    num_flops: int | None = None  # that its passes compute; None where the model's sizes are not known
    totals: RunTotals | None = None  # of the whole run
    planned_peak_bytes: int | None = None  # of a device; to hold against the steps' memory_peak_bytes
    trainable_parameters: int
    total_parameters: int
    quantised_parameters: int = 0  # of them, those that lie in 4 bits
    trainable_by_kind: dict[str, int] = {}  # parameters by the last name of their layer: q_proj, experts, ...
    weight_bytes: dict[str, int] = {}  # what the weights take, by the type that they lie in: nf4, bfloat16, float32
    attention: str
    attention_reason: str = ""
    counts: dict[str, int]  # every row of the data under what became of it
    choices: tuple[Choice, ...] = ()


class Step(BaseEvent):
    kind: Literal["step"] = "step"
    step: int
    epoch: float
    loss: float | None
    learning_rate: float
    grad_norm: float | None
    trained_tokens: int
    tokens: int
    slots: int
    rows: int
    padding_efficiency: float
    padded_efficiency: float
    tokens_per_s: float
    step_s: float
    wait_s: float
    memory_peak_bytes: int | None = None
    comm_bytes: int | None = None
    sample_hash: str
    mfu: float | None = None


class Eval(BaseEvent):
    kind: Literal["eval"] = "eval"
    step: int
    eval_loss: float | None
    perplexity: float | None
    token_accuracy: float


class Probe(BaseEvent):
    """A step of a probe of learning rates: `learning_rate` is the one that is probed, which the step's own may not have
    reached yet. Steps count from 1 anew for each rate."""

    kind: Literal["probe"] = "probe"
    learning_rate: float
    step: int
    loss: float | None
    grad_norm: float | None
    diverged: bool = False  # and so the last of its rate


class Layout(BaseEvent):
    """A layout of a certificate (core.certify): its first steps and how far they are from the reference's, relative;
    or, with a `cause`, the reason why it has made none."""

    kind: Literal["layout"] = "layout"
    name: str
    dtype: str  # the job's own arithmetic
    is_reference: bool = False
    losses: tuple[float | None, ...] = ()  # of steps 1, 2, ...
    grad_norms: tuple[float | None, ...] = ()
    slots: int = 0
    most_segments_in_a_row: int = 0
    ranks: int = 0
    attention: str = ""
    seconds: float = 0.0  # of its steps, without loading
    loss_deviation: float | None = None
    norm_deviation: float | None = None
    allowed: float | None = None
    is_equal: bool | None = None
    reason: str = ""
    cause: FailureReason | None = None


class Checkpoint(BaseEvent):
    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str
    bytes: int
    best: bool = False


class Sample(BaseEvent):
    kind: Literal["sample"] = "sample"
    step: int
    prompt: str
    text: str


class Log(BaseEvent):
    kind: Literal["log"] = "log"
    rank: int = 0
    level: Level = "info"
    text: str


class Gpu(BaseEvent):
    kind: Literal["gpu"] = "gpu"
    index: int
    utilisation: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    temperature_c: float | None = None


class Warning(BaseEvent):
    kind: Literal["warning"] = "warning"
    code: str
    text: str


class Failure(BaseEvent):
    kind: Literal["failure"] = "failure"
    reason: FailureReason
    text: str
    remedy: str = ""


class End(BaseEvent):
    kind: Literal["end"] = "end"
    outcome: Literal["succeeded", "failed", "stopped"]
    steps: int
    trained_tokens: int
    seconds: float


class RawEvent(BaseModel):
    """A kind that this release doesn't know, whole."""

    model_config = ConfigDict(frozen=True, extra="allow")

    seq: int = Field(ge=1)
    ts: float
    kind: str = Field(max_length=64)


Event = Phase | Plan | Step | Eval | Probe | Layout | Checkpoint | Sample | Log | Gpu | Warning | Failure | End
KNOWN_KINDS: dict[str, type[BaseEvent]] = {
    event.model_fields["kind"].default: event
    for event in (Phase, Plan, Step, Eval, Probe, Layout, Checkpoint, Sample, Log, Gpu, Warning, Failure, End)
}
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Discriminator("kind")])

# Series that the charts and /metrics know, by the kind of event that carries them.
STEP_METRICS = (
    "loss",
    "learning_rate",
    "grad_norm",
    "epoch",
    "trained_tokens",
    "tokens",
    "slots",
    "rows",
    "padding_efficiency",
    "padded_efficiency",
    "tokens_per_s",
    "step_s",
    "wait_s",
    "memory_peak_bytes",
    "comm_bytes",
    "mfu",
)
EVAL_METRICS = ("eval_loss", "perplexity", "token_accuracy")


def parse_event(data: dict[str, Any]) -> Event | RawEvent:
    """Raises pydantic's ValidationError on an event of a known kind with a wrong field."""
    if data.get("kind") in KNOWN_KINDS:
        return _EVENT.validate_python(data)
    return RawEvent.model_validate(data)


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def to_line(event: dict[str, Any]) -> bytes:
    """One strict JSON line; an event with NaN in it is a programmer's mistake and raises ValueError."""
    return json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


__all__ = [
    "EVAL_METRICS",
    "KNOWN_KINDS",
    "STEP_METRICS",
    "BaseEvent",
    "Checkpoint",
    "Choice",
    "End",
    "Eval",
    "Event",
    "Failure",
    "FailureReason",
    "Gpu",
    "Layout",
    "Level",
    "Log",
    "Phase",
    "Plan",
    "Probe",
    "RawEvent",
    "Sample",
    "Step",
    "ValidationError",
    "Warning",
    "finite",
    "parse_event",
    "to_line",
]
