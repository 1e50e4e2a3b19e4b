"""A job directory such as a supervisor makes, around a model and data small enough to train in a second."""

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from core import events
from core.chat import CHATML
from core.spec import parse_spec
from core.trial import AnyTrial
from tests.engine import tiny
from worker.engine.emit import Emitter
from worker.engine.train import main
from worker.job_directory import InputFile, Inputs, LayoutTrial, OutcomeFile, write_json

END = "<|im_end|>"


def make_model(folder: Path, family: str = "llama", *, knows_chat: bool = True, **changes: object) -> Path:
    """A random model with a byte-level tokenizer and, where it knows chat, the tokens and the template of it."""
    special = ["<|endoftext|>", *(["<|im_start|>", END] if knows_chat else [])]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
        chat_template=CHATML if knows_chat else None,
        model_max_length=512,
    ).save_pretrained(folder)
    sizes = {"vocab_size": len(tokens), "max_position_embeddings": 512, "eos_token_id": 0}
    tiny.tiny_base(family, **{**sizes, **changes}).save_pretrained(folder)
    return folder


def make_data(path: Path, num_rows: int = 24, seed: int = 0) -> Path:
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(num_rows):
            turns = []
            for _ in range(draw.randint(1, 2)):
                number = draw.randrange(100)
                turns.append({"role": "user", "content": f"{number} twice" + "?" * draw.randrange(30)})
                turns.append({"role": "assistant", "content": f"{2 * number}" + "." * draw.choice([1, 3, 40])})
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


SPEC: dict[str, Any] = {
    "name": "a small run",
    "data": {"train": [{"dataset": "given"}], "validation": {"fraction": 0.2}, "max_length": 256},
    "batch": {"samples_per_step": 4, "micro_batch_size": 1},
    "schedule": {"learning_rate": 0.01, "max_steps": 6},
    "method": {"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
    "evaluation": {"every_steps": 3},
    "checkpoint": {"every_steps": 2, "every_epoch": False, "keep_last": 50},
    "seed": 7,
}


def make_job(
    directory: Path,
    model: Path,
    data: Path,
    /,
    *,
    resume: tuple[Path, ...] = (),
    trial: AnyTrial | LayoutTrial | None = None,
    **parts: Any,
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    spec = parse_spec({**SPEC, **parts})
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    names = {part.dataset for part in spec.data.train} | {getattr(spec.data.validation, "dataset", "given")}
    inputs = Inputs(
        model_path=str(model),
        model_name="tests/tiny",
        data=tuple(InputFile(dataset=name, path=str(data), sha256=digest) for name in sorted(names)),
        resume=tuple(map(str, resume)),
        ranks=spec.parallel.devices,
        trial=trial,
        threads=1,
    )
    write_json(directory / "spec.json", spec)
    write_json(directory / "inputs.json", inputs)
    return directory


def events_of(job: Path, kind: str | None = None) -> list[dict]:
    found = [json.loads(line) for line in (job / "events.jsonl").read_text().splitlines()]
    for event in found:
        assert not isinstance(events.parse_event(event), events.RawEvent)
    assert [event["seq"] for event in found] == list(range(1, len(found) + 1))
    return [event for event in found if kind is None or event["kind"] == kind]


def outcome_of(job: Path) -> OutcomeFile:
    return OutcomeFile.model_validate_json((job / "outcome.json").read_bytes())


class Killed(BaseException):
    """As kill -9: nothing is caught, nothing is written."""


def run(job: Path, monkeypatch: pytest.MonkeyPatch, before_event: Callable[[dict], None] | None = None) -> int:
    """main(), with a look at each event before it is written."""
    real = Emitter.emit

    def emit(self: Emitter, kind: type[events.BaseEvent], **fields: Any) -> None:
        if before_event is not None:
            before_event({"kind": kind.model_fields["kind"].default, **fields})
        real(self, kind, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(Emitter, "emit", emit)
        return main(job)


def kill_before(step: int) -> Callable[[dict], None]:
    """Dies after the step was made and before anyone is told."""

    def look(event: dict) -> None:
        if event["kind"] == "step" and event["step"] == step:
            raise Killed

    return look


def wait_until(condition: Callable[[], bool], timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        threading.Event().wait(0.02)
