"""One run of TRL's SFTTrainer, in an environment that has nothing of ours.

`python train_trl.py ASKED.json RESULT.json [unsloth]`: the first says what to train and how (bench.training writes it),
the second what came out, the losses and what they took; `unsloth` trains through it. What the first does not say is
TRL's default, but for what would make the runs unlike each other: a constant rate, no recomputation of activations
where ours has none (it is TRL's default, and costs about a third more time), no bf16 on a CPU, no progress bars. Slots
and trained tokens are counted where batches enter the model, without making the host wait for the device.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if "unsloth" in sys.argv[3:]:  # it patches transformers and TRL, so it comes before them
    import unsloth
else:
    unsloth = None

import psutil
import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel
from torch.utils.data import Sampler
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

IGNORED = -100


class InOrder(Sampler[int]):
    def __init__(self, sample_ids: list[int]) -> None:
        self._sample_ids = sample_ids

    def __len__(self) -> int:
        return len(self._sample_ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._sample_ids)


class Trainer(SFTTrainer):
    """With the given order of samples, where one is given, and the losses kept as they were computed."""

    order: list[int] | None = None

    def _get_train_sampler(self, *arguments: Any) -> Any:
        return super()._get_train_sampler(*arguments) if self.order is None else InOrder(self.order)


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.begin: dict[str, float] = {}
        self.end: dict[str, float] = {}
        self.step_s: list[float] = []
        self.step_tokens: list[int] = []
        self.pass_tokens: list[int | torch.Tensor] = []  # of the step under way
        self._step_begin = 0.0

    @staticmethod
    def _now() -> dict[str, float]:
        return {"cpu_s": time.process_time(), "wall_s": time.perf_counter()}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begin = self._now()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.pass_tokens = []
        self._step_begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.step_s.append(time.perf_counter() - self._step_begin)
        self.step_tokens.append(sum(map(int, self.pass_tokens)))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.end = self._now()


def load(asked: dict[str, Any]) -> tuple[torch.nn.Module, LoraConfig | None]:
    """The model, and the adapters that TRL is to lay on it."""
    dtype = getattr(torch, asked["dtype"])
    if unsloth is not None:
        base, _ = unsloth.FastLanguageModel.from_pretrained(
            asked["model"], max_seq_length=asked["max_length"], dtype=dtype, load_in_4bit=asked["quantised"]
        )
        recompute = "unsloth" if asked["gradient_checkpointing"] else False
        rank, alpha = asked["lora"]["rank"], asked["lora"]["alpha"]
        model = unsloth.FastLanguageModel.get_peft_model(
            base, r=rank, lora_alpha=alpha, lora_dropout=0.0, use_gradient_checkpointing=recompute
        )
        return model, None
    quantisation = None
    if asked["quantised"]:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        asked["model"], dtype=dtype, attn_implementation=asked["attention"], quantization_config=quantisation
    )
    if asked["adapter"]:
        return PeftModel.from_pretrained(model, asked["adapter"], is_trainable=True), None
    if not asked["lora"]:
        return model, None
    return model, LoraConfig(
        task_type="CAUSAL_LM", r=asked["lora"]["rank"], lora_alpha=asked["lora"]["alpha"], target_modules="all-linear"
    )


def main(asked_path: Path, result_path: Path) -> None:
    asked = json.loads(asked_path.read_text())
    is_cpu = asked["device"] == "cpu"
    if is_cpu:
        torch.set_num_threads(1)
    model, adapter = load(asked)
    data = load_dataset("json", data_files=asked["data"], split="train", cache_dir=str(result_path.parent / "cache"))
    config = SFTConfig(
        output_dir=str(result_path.parent / "trl"),
        max_length=asked["max_length"],
        packing=asked["packing"],
        per_device_train_batch_size=asked["batch_size"],
        gradient_accumulation_steps=asked["accumulation"],
        num_train_epochs=asked["epochs"],
        max_steps=asked["max_steps"] or -1,
        learning_rate=asked["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        assistant_only_loss=True,
        gradient_checkpointing=asked["gradient_checkpointing"],
        bf16=asked["dtype"] == "bfloat16",
        use_cpu=is_cpu,
        dataloader_pin_memory=not is_cpu,
        seed=asked["seed"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_liger_kernel=asked["use_liger_kernel"],
    )
    clock = Clock()
    trainer = Trainer(
        model=model,
        args=config,
        train_dataset=data,
        peft_config=adapter,
        processing_class=AutoTokenizer.from_pretrained(asked["model"]),
        callbacks=[clock],
    )
    trainer.order = asked["sample_ids"]
    slots: list[int] = []
    targets: list[torch.Tensor] = []

    def count(module: torch.nn.Module, positional: tuple[()], inputs: dict[str, Any]) -> None:
        slots.append(inputs["input_ids"].numel())
        targets.append((inputs["labels"][:, 1:] != IGNORED).sum())
        mask = inputs.get("attention_mask")
        clock.pass_tokens.append(slots[-1] if mask is None else mask.sum())

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    rss_before_bytes = psutil.Process().memory_info().rss
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.save_model(str(result_path.parent / "result"))
    result = {
        "slots": sum(slots),
        "passes": len(slots),
        "trained_tokens": sum(map(int, targets)),
        "losses": losses,
        "num_rows": len(trainer.train_dataset),
        "loop_cpu_s": clock.end["cpu_s"] - clock.begin["cpu_s"],
        "loop_wall_s": clock.end["wall_s"] - clock.begin["wall_s"],
        "rss_before_bytes": rss_before_bytes,
        "step_s": clock.step_s,
        "step_tokens": clock.step_tokens,
        "gpu_allocated_bytes": 0 if is_cpu else torch.cuda.max_memory_allocated(),
        "gpu_reserved_bytes": 0 if is_cpu else torch.cuda.max_memory_reserved(),
        "attention": model.config._attn_implementation,
    }
    result_path.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
