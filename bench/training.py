"""One and the same training by us and by TRL: the work, the runs, and what each run took.

A `Task` says what is learned: a model, conversations that both read from one file of messages, a limit of length that
none of them passes, so many samples a step, the rate, the seed, the adapter that both start from. A `Way` says how TRL
is set. Ours is always the whole trainer on a job directory, as a person runs it: packed, attention auto.

The learning rate is constant and there is no warm-up, since the two count a warm-up's steps differently; everything
else of the arithmetic is the same: AdamW without decay, gradients clipped at norm 1, a step's loss the mean over its
trained tokens. In order that a padded TRL step learns from the very samples of our step, TRL gets our plan's order.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import ours, peers
from bench.measure import ONE_THREAD, Usage, run_child
from core.chat import build_samples_many
from core.conversation import Conversation, detect_format, parse_row, to_template_messages
from core.demo_data import dialogues
from core.errors import UserError
from core.preflight import plan_job
from core.rows import Row, read_rows
from core.spec import parse_spec
from worker.by_hand import prepare_directory
from worker.engine.data import load_corpus
from worker.engine.device import find_device
from worker.engine.model import quiet_libraries
from worker.engine.models import profile_model
from worker.engine.tokenizer import HfChatTokenizer
from worker.job_directory import Inputs

TRAIN_TRL = Path(__file__).resolve().parent / "peer" / "train_trl.py"
ADAPTER = {"rank": 16, "alpha": 32}
CHUNK_BYTES = 1 << 20

Message = dict[str, object]


# -- conversations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Talk:
    messages: tuple[Message, ...]
    length: int  # tokens
    trained: int  # tokens


@dataclass(frozen=True)
class Talks:
    """Conversations that both trainers can read, and how many were left out and why."""

    kept: tuple[Talk, ...]
    left_out: dict[str, int]


def read_talks(path: Path | None, model: Path, max_length: int) -> Talks:
    """All of a file of alpaca, sharegpt or messages rows, or of our own dialogues; none above `max_length`, which TRL
    would cut and we would leave out."""
    tokenizer = HfChatTokenizer.load(model)
    rows = list(_rows(path))
    format = detect_format(rows)
    left_out = {"not readable": 0, "with tools": 0, f"above {max_length} tokens": 0}
    conversations: list[Conversation] = []
    for row in rows:
        try:
            parsed = parse_row(row, format)
        except UserError:
            left_out["not readable"] += 1
            continue
        assert isinstance(parsed, Conversation), "texts without turns have no answers to train"
        # The table that TRL reads from gives every row's arguments the keys of all, so its samples would be others.
        if parsed.tools or any(message.tool_calls for message in parsed.messages):
            left_out["with tools"] += 1
            continue
        conversations.append(parsed)
    kept = []
    built = build_samples_many(conversations, tokenizer, train_on="assistant", multi_turn="whole")
    for conversation, samples in zip(conversations, built, strict=True):
        if isinstance(samples, UserError) or len(samples) != 1:
            left_out["not readable"] += 1
            continue
        (sample,) = samples
        if len(sample.token_ids) > max_length:
            left_out[f"above {max_length} tokens"] += 1
            continue
        messages, _ = to_template_messages(conversation)
        kept.append(Talk(tuple(messages), len(sample.token_ids), sample.num_trained))
    return Talks(tuple(kept), {reason: count for reason, count in left_out.items() if count})


def _rows(path: Path | None) -> Iterator[Mapping[str, object]]:
    if path is None:
        yield from dialogues()
        return
    with path.open("rb") as file:
        for row in read_rows(iter(lambda: file.read(CHUNK_BYTES), b"")):
            if isinstance(row, Row):
                yield row.value


def write_messages(talks: Sequence[Talk], path: Path) -> None:
    path.write_text("".join(json.dumps({"messages": talk.messages}, ensure_ascii=False) + "\n" for talk in talks))


# -- the work --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    model: Path
    data: Path  # rows of messages
    max_length: int  # tokens
    samples_per_step: int
    epochs: int = 1
    max_steps: int | None = None
    learning_rate: float = 1e-3
    method: str = "lora"
    adapter: Path | None = None  # that both start from; None: each draws its own
    seed: int = 42
    device: str = "cpu"
    dtype: str = "fp32"
    gradient_checkpointing: bool = False

    def spec(self, **parts: object) -> dict[str, object]:
        """Ours. Nothing is evaluated, and only the last step saved."""
        method: dict[str, object] = {"type": self.method}
        if self.method != "full":
            method |= ADAPTER
        return {
            "name": "bench",
            "model": {"base": str(self.model), "adapter": str(self.adapter) if self.adapter else None},
            "data": {
                "train": [{"dataset": str(self.data)}],
                "validation": None,
                "max_length": self.max_length,
                "multi_turn": "whole",
            },
            "batch": {"samples_per_step": self.samples_per_step},
            "method": method,
            "schedule": {
                "learning_rate": self.learning_rate,
                "decay": "constant",
                "warmup_steps": 0,
                **({"max_steps": self.max_steps} if self.max_steps else {"epochs": self.epochs}),
            },
            "compute": {"dtype": self.dtype, "gradient_checkpointing": self.gradient_checkpointing},
            "checkpoint": {"every_minutes": None, "every_epoch": False},
            "seed": self.seed,
            **parts,
        }


def make_adapter(model: Path, folder: Path, seed: int) -> Path:
    """An adapter as LoRA begins: A drawn, B zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=ADAPTER["rank"], lora_alpha=ADAPTER["alpha"], target_modules="all-linear"
    )
    with quiet_libraries():
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    return folder


# -- the runs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    usage: Usage  # end to end: from the start of the process to its end
    losses: tuple[float, ...]  # one a step
    slots: int  # positions that the forward passes of the steps computed
    trained_tokens: int
    loop_cpu_s: float
    loop_wall_s: float
    rss_before_bytes: int  # when the model stood ready
    attention: str
    step_s: tuple[float, ...]
    step_tokens: tuple[int, ...]
    gpu_allocated_bytes: int = 0  # at most
    gpu_reserved_bytes: int = 0


@dataclass(frozen=True)
class Way:
    """How TRL is set."""

    name: str
    packing: bool
    batch_size: int  # conversations a forward pass, or packs
    accumulation: int
    follows_our_order: bool = False
    attention: str | None = None  # None: what it takes by itself
    use_liger_kernel: bool = False
    uses_unsloth: bool = False


def prepare_ours(task: Task, folder: Path, **parts: object) -> Path:
    """The job directory."""
    job = folder / "job"
    # A cache of its own: every run reads its data for the first time.
    prepare_directory(parse_spec(task.spec(**parts)), job, (folder,), folder / "cache", fresh=True)
    return job


def run_ours(task: Task, folder: Path, **parts: object) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    job = prepare_ours(task, folder, **parts)
    usage = run_child([sys.executable, "-m", "bench.ours", job], _environment(task), folder / "log.txt")
    steps = ours.read_steps(job)
    loop = ours.read_loop(job)
    events = [json.loads(line) for line in (job / "events.jsonl").read_text().splitlines()]
    return Run(
        usage=usage,
        losses=tuple(step["loss"] for step in steps),
        slots=sum(step["slots"] for step in steps),
        trained_tokens=sum(step["trained_tokens"] for step in steps),
        loop_cpu_s=loop.cpu_s,
        loop_wall_s=loop.wall_s,
        rss_before_bytes=loop.rss_before_bytes,
        attention=next(event["attention"] for event in events if event["kind"] == "plan"),
        step_s=tuple(step["step_s"] for step in steps),
        step_tokens=tuple(step["tokens"] for step in steps),
        gpu_allocated_bytes=loop.gpu_allocated_bytes,
        gpu_reserved_bytes=loop.gpu_reserved_bytes,
    )


def run_trl(task: Task, way: Way, folder: Path, order: Sequence[int] | None = None, python: Path | None = None) -> Run:
    """Raises peers.Missing and ChildFailed. `order`: row numbers of all epochs in a row, for a way that follows it.
    `python` has TRL; None: that of the peers' own environment."""
    folder.mkdir(parents=True, exist_ok=True)
    python = python or peers.python_of(peers.TRL)
    asked = {
        "model": str(task.model),
        "adapter": str(task.adapter) if task.adapter else None,
        "lora": None if task.adapter or task.method == "full" else ADAPTER,
        "data": str(task.data),
        "max_length": task.max_length,
        "packing": way.packing,
        "batch_size": way.batch_size,
        "accumulation": way.accumulation,
        # Our order already holds every epoch.
        "epochs": 1 if way.follows_our_order else task.epochs,
        "max_steps": task.max_steps,
        "learning_rate": task.learning_rate,
        "seed": task.seed,
        "device": task.device,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[task.dtype],
        "attention": way.attention,
        "gradient_checkpointing": task.gradient_checkpointing,
        "use_liger_kernel": way.use_liger_kernel,
        "quantised": task.method == "qlora",
        "sample_ids": list(order) if way.follows_our_order and order is not None else None,
    }
    (folder / "asked.json").write_text(json.dumps(asked))
    command: list[str | Path] = [python, TRAIN_TRL, folder / "asked.json", folder / "result.json"]
    command += ["unsloth"] if way.uses_unsloth else []
    usage = run_child(command, {**_environment(task), "HF_HOME": str(folder / "hf")}, folder / "log.txt")
    result = json.loads((folder / "result.json").read_text())
    return Run(
        usage=usage,
        losses=tuple(result["losses"]),
        slots=result["slots"],
        trained_tokens=result["trained_tokens"],
        loop_cpu_s=result["loop_cpu_s"],
        loop_wall_s=result["loop_wall_s"],
        rss_before_bytes=result["rss_before_bytes"],
        attention=result["attention"],
        step_s=tuple(result["step_s"]),
        step_tokens=tuple(result["step_tokens"]),
        gpu_allocated_bytes=result["gpu_allocated_bytes"],
        gpu_reserved_bytes=result["gpu_reserved_bytes"],
    )


def _environment(task: Task) -> dict[str, str]:
    if task.device == "cpu":
        return {**ONE_THREAD, "CUDA_VISIBLE_DEVICES": ""}
    return {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}


def planned_order(job: Path) -> list[tuple[int, ...]]:
    """The row numbers of each step of our run, by the functions that the run itself plans with."""
    inputs = Inputs.model_validate_json((job / "inputs.json").read_bytes())
    spec = parse_spec(json.loads((job / "spec.json").read_bytes()))
    model = Path(inputs.model_path)
    corpus = load_corpus(spec, inputs, HfChatTokenizer.load(model, spec.model.chat_template))
    plan = plan_job(spec, corpus.profiles, profile_model(model, inputs.model_name), find_device(inputs.devices[0])[1])
    return [plan.step(number).sample_ids for number in range(1, plan.total_steps + 1)]
