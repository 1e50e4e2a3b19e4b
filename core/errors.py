"""What a person did that cannot be carried out, said so that they can mend it.

A `UserError` is a code with parameters; its sentence stands in the one catalogue below, marked for gettext, so that
the page, the API, the command line and a failed job's card all say the same and a second language needs no code.
Texts say what happened, the number, and what to change. A programmer's mistake is an `assert`, the world's is left
to rise; neither is a UserError.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Parameter = str | int | float
Translate = Callable[[str], str]


def N_(text: str) -> str:
    """Marks a text for extraction by Babel; it is translated where it is shown."""
    return text


# code -> text with {named} parameters. Keep each section sorted by code.
TEXTS: dict[str, str] = {
    # -- spec: a single field ------------------------------------------------------------------------------------
    "spec.alternatives": N_("{first} and {second} cannot both be given; they set the same thing, so keep one of them"),
    "spec.not_a_mapping": N_("a job spec is a mapping of keys to values, not {kind}"),
    "spec.one_of": N_("one of {names} is needed; give one of them a value"),
    "spec.choice": N_("{value} is not one of {choices}"),
    "spec.missing": N_("{field} is missing; give it a value"),
    "spec.number": N_("{value} is not a number; write for example {example}"),
    "spec.integer": N_("{value} is not a whole number; write for example {example}"),
    "spec.boolean": N_("{value} is neither true nor false"),
    "spec.at_least": N_("{value} is too small; set at least {limit}"),
    "spec.above": N_("{value} is too small; set a number above {limit}"),
    "spec.at_most": N_("{value} is too large; set at most {limit}"),
    "spec.below": N_("{value} is too large; set a number below {limit}"),
    "spec.too_long": N_("this has {length} characters; write at most {limit}"),
    "spec.too_many": N_("{length} entries are too many; give at most {limit}"),
    "spec.too_few": N_("at least {limit} is needed here"),
    "spec.text": N_("{value} is not a text"),
    "spec.kind": N_("{value} does not fit here; {expected} is expected"),
    "spec.control_character": N_("a control character stands at position {position}; remove it"),
    "spec.other_choice": N_(
        "{key} belongs to another choice of its part of the spec; leave it out or change the choice"
    ),
    "spec.unknown_key": N_("{key} is not a key of the job spec"),
    "spec.unknown_key_hint": N_("{key} is not a key of the job spec; did you mean {suggestion}?"),
    "spec.yaml": N_("this is not valid YAML: {problem}, line {line}"),
    # -- spec: two fields ----------------------------------------------------------------------------------------
    "spec.row_shorter_than_sample": N_(
        "packing.row_length {row_length} is below data.max_length {max_length}, so a long sample would fit no row; "
        "set packing.row_length to at least {max_length}, or data.max_length to at most {row_length}"
    ),
    "spec.warmup_longer_than_run": N_(
        "the warm-up of {warmup_steps} steps does not end within the run of {total_steps} steps; "
        "set schedule.warmup_steps below {total_steps}, or train longer"
    ),
    "spec.wrapped_needs_rows": N_(
        "packing.algorithm wrapped cuts samples across steps, so it needs batch.rows_per_step; "
        "give batch.rows_per_step in place of {given}, or choose packing.algorithm best_fit"
    ),
    "spec.algorithm_needs_packed": N_(
        "packing.algorithm {algorithm} applies to packing.mode packed only, not to {mode}; leave it out or choose packed"
    ),
    # -- spec: what this release does not run yet ----------------------------------------------------------------
    "spec.not_built": N_("{field} {value} is not built yet in this release; {remedy}"),
    # -- plan ----------------------------------------------------------------------------------------------------
    "plan.sample_longer_than_row": N_(
        "a sample of {length} tokens is longer than a row of {row_length}; set packing.row_length to at least {length}"
    ),
    "plan.no_samples": N_("no sample is left to train on: of {rows} rows, {reasons}"),
    # -- warm-up: where its number of steps comes from -----------------------------------------------------------
    "warmup.default": N_("3 % of {total_steps} steps, which is the default"),
    "warmup.default_short": N_("a short run of {total_steps} steps: 10 % of them, at most 10, which is the default"),
    "warmup.epochs": N_("{epochs} epochs of {steps_per_epoch} steps"),
    "warmup.ratio": N_("{ratio} of {total_steps} steps"),
    "warmup.single_step": N_("the run has a single step, so there is none to warm up on"),
    "warmup.steps": N_("as given, of {total_steps} steps"),
    # -- wait: why a queued job does not run yet -----------------------------------------------------------------
    "wait.cpu_slot": N_("waits for a free device: {busy} of {total} CPU slots on {host} are busy"),
    "wait.cpu_slots": N_("waits for {num_devices} free devices: {busy} of {total} CPU slots on {host} are busy"),
    "wait.device": N_("waits for a free device: {busy} of {total} on {num_hosts} hosts are busy"),
    "wait.devices": N_(
        "waits for {num_devices} free devices on one host: {busy} of {total} on {num_hosts} hosts are busy"
    ),
    "wait.excluded": N_("it failed to start on, or was kept from, each host that could run it: {hosts}"),
    "wait.features": N_("no host that has the model offers {features}"),
    "wait.gpu": N_("waits for a free device: {busy} of {total} GPUs on {host} are busy"),
    "wait.gpus": N_("waits for {num_devices} free devices: {busy} of {total} GPUs on {host} are busy"),
    "wait.host_full": N_("waits for host {host}, where its checkpoint is: {busy} of {total} devices there are busy"),
    "wait.host_gone": N_("waits for host {host}, where its checkpoint is; that host is silent or draining"),
    "wait.host_unfit": N_(
        "waits for host {host}, where its checkpoint is, but that host no longer has the model {model}, "
        "{num_devices} devices or a feature that it needs; mend the host, or start over elsewhere"
    ),
    "wait.kept": N_("free devices of {host} are kept for job {ahead}, which stands before it"),
    "wait.no_host": N_("no host is connected"),
    "wait.no_host_accepts": N_("each host that could run it is silent or draining: {hosts}"),
    "wait.no_model": N_("no host has the model {model}"),
    "wait.position": N_("position {position} in the queue: {reason}"),
    "wait.too_many_devices": N_("asks for {num_devices} devices, the largest host that could run it has {largest}"),
    # -- data: the file and its rows -----------------------------------------------------------------------------
    "data.array_broken": N_(
        "the JSON array breaks here: {problem}; the rows before are kept, nothing after is read, so mend it here"
    ),
    "data.array_row_too_deep": N_(
        "this row is nested too deep to be read; the rows before are kept, nothing after is read"
    ),
    "data.array_row_too_long": N_(
        "this row is longer than {limit:,} bytes; the rows before are kept, nothing after is read, "
        "so shorten it, or write one JSON object a line (JSONL), where reading goes on after a long row"
    ),
    "data.kind_not_built": N_(
        "{kind} files are not read yet in this release; give JSONL (one JSON object a line) or a JSON array of objects"
    ),
    "data.kind_unknown": N_(
        "the file begins with {start}; JSONL (one JSON object a line) or a JSON array of objects in UTF-8 is expected "
        "(CSV is not built yet in this release)"
    ),
    "data.row_broken": N_("this is not valid JSON: {problem}; one JSON object is expected on the line"),
    "data.row_half_character": N_(
        "a \\u escape stands for half a character (a lone surrogate); write the character itself or both halves"
    ),
    "data.row_not_finite": N_("{constant} is no number of JSON; write a finite number or null"),
    "data.row_not_object": N_("this row is {found}; a JSON object is expected"),
    "data.row_not_utf8": N_("byte {position} of this row is not UTF-8; save the file in UTF-8"),
    "data.row_too_deep": N_("this row is nested too deep to be read; a conversation needs a few levels"),
    "data.row_too_long": N_("this row has {size:,} bytes; at most {limit:,} are allowed, so shorten or split it"),
    # -- data: what a row holds ----------------------------------------------------------------------------------
    "data.expected": N_("{field} is {found}; {expected} is expected"),
    "data.format_unknown": N_(
        "no known format fits: the rows have the keys {keys}. Expected is one of: {expected}. "
        "Rename the keys, or set data.format"
    ),
    "data.no_assistant": N_("{field} holds no assistant turn, so there is nothing to learn; add one or drop the row"),
    "data.no_rows": N_("the data holds no row; one JSON object a row is expected"),
    "data.result_without_call": N_(
        "{field} is a tool's result, but no assistant turn stands before it; put the call before its result"
    ),
    "data.two_systems": N_("{field} and the first turn both give a system text; keep one of them"),
    # -- chat ----------------------------------------------------------------------------------------------------
    "chat.no_border": N_(
        "the chat template rewrites what stands before turn {turn} when the turn is added, so nobody can say "
        "which tokens are the turn; set model.chat_template to chatml, or data.train_on to all"
    ),
    "chat.no_template": N_(
        "the model has no chat template, which conversations need; set model.chat_template to chatml"
    ),
    "chat.template_refused": N_("the chat template refuses this conversation: {problem}"),
}


class UserError(Exception):
    """One fault of the input: `field` is the dotted spec key, form field or file it belongs to ("" = the whole)."""

    def __init__(self, code: str, field: str = "", **parameters: Parameter) -> None:
        assert code in TEXTS, f"no text for {code}"
        super().__init__(code, field, parameters)
        self.code = code
        self.field = field
        self.parameters = parameters

    def text(self, translate: Translate = str) -> str:
        """The sentence, in the language of `translate` (English by default)."""
        return translate(TEXTS[self.code]).format(**{"field": self.field, **self.parameters})

    def __str__(self) -> str:
        return self.text()

    @property
    def errors(self) -> tuple["UserError", ...]:
        return (self,)


@dataclass(frozen=True)
class Reason:
    """Why something was chosen, or has to wait: no fault, but told from the same catalogue."""

    code: str
    parameters: Mapping[str, Parameter]

    def __post_init__(self) -> None:
        assert self.code in TEXTS, f"no text for {self.code}"

    def text(self, translate: Translate = str) -> str:
        return translate(TEXTS[self.code]).format(**self.parameters)

    def __str__(self) -> str:
        return self.text()


class UserErrors(Exception):
    """Several faults found in one look, so that a person mends them in one go."""

    def __init__(self, errors: Sequence[UserError]) -> None:
        assert errors
        super().__init__(*errors)
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n".join(f"{error.field}: {error.text()}" if error.field else error.text() for error in self.errors)


USER_FAULTS = (UserError, UserErrors)
