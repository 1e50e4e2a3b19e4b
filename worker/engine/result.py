"""What a job hands out: result/, opened again and compared with the model in memory before anyone is told of success.

    LoRA   adapter_model.safetensors, adapter_config.json
    full   model.safetensors (in shards where large), config.json; in the type that the base model came in
    both   the tokenizer with the chat template that was trained, generation_config.json whose end of text is the one
           that was trained (a base model given a chat template would otherwise never stop), README.md

It is built in a temporary folder and renamed when everything holds: names and shapes as trained, every number finite,
an adapter that differs from nothing, the logits of a probe equal to the trained model's, and for an adapter those of
the merged weights too.
"""

import copy
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from core.chat import BUILT_IN_TEMPLATES
from core.spec import Adapter, JobSpec
from worker.engine.batches import Batch, Samples, of_tokens
from worker.engine.loss import logits_of
from worker.engine.model import ATTENTION_NAMES, LanguageModel, quiet_libraries, relative_difference
from worker.job_directory import sync_folder

# The same sums in another order, relative to the largest logit.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
MERGE_TOLERANCE = 1e-4  # in fp32
PROBE_TOKENS = 16
# Samples that are looked at for the token that ends a turn, and how many of them have to end with it.
SAMPLES_ASKED = 500
SHARE_NEEDED = 0.9


class BrokenResult(Exception):
    """What was saved is not what was trained: nothing that a user did."""


@dataclass(frozen=True)
class Facts:
    """What the model card says of the run."""

    base: str
    datasets: tuple[str, ...]
    steps: int
    epochs: float
    trained_tokens: int
    num_samples: int
    loss: float | None  # of the last step
    eval_loss: float | None
    trainable_parameters: int
    total_parameters: int


def end_of_turn(samples: Samples, sample_ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the trained part of nearly every sample ends; None where there is no such token."""
    last: Counter[int] = Counter()
    for sample_id, _ in zip(sample_ids, range(SAMPLES_ASKED), strict=False):
        token_ids, trained = samples.sample(sample_id)
        last[int(token_ids[trained.nonzero()[0][-1]])] += 1
    if not last:
        return None
    (token, count), *_ = last.most_common(1)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return token if count >= SHARE_NEEDED * last.total() and token in special else None


def stop_ids(model: LanguageModel, tokenizer: PreTrainedTokenizerBase, trained_end: int | None) -> list[int]:
    """Where the model ends its text: the end that was trained first, then what it had before."""
    own = model.base.generation_config.eos_token_id if model.base.generation_config is not None else None
    before = own if isinstance(own, list) else [own]
    return list(dict.fromkeys(end for end in (trained_end, *before, tokenizer.eos_token_id) if end is not None))


def save_result(
    folder: Path,
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    spec: JobSpec,
    base_path: Path,
    ends: list[int],
    facts: Facts,
) -> None:
    """Writes `folder` whole. A model trained in full is brought to its base's type in place, so this comes last.

    Raises BrokenResult where what is on disk is not what was trained."""
    for leftover in folder.parent.glob(".tmp-result-*"):
        shutil.rmtree(leftover)
    staging = folder.with_name(f".tmp-result-{secrets.token_hex(4)}")
    staging.mkdir()
    try:
        model.model.eval()
        if model.has_adapters:
            _save_adapter(staging, model, facts.base)
        else:
            model.base.to(AutoConfig.from_pretrained(base_path, trust_remote_code=False).dtype or torch.float32)
        _save_generation_config(staging, model, ends)
        if not model.has_adapters:
            model.base.save_pretrained(staging)
        if spec.model.chat_template is not None:
            tokenizer.chat_template = BUILT_IN_TEMPLATES[spec.model.chat_template]
        tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(model_card(spec, facts))
        if model.has_adapters:
            verify_adapter(staging, model, base_path)
        else:
            verify_model(staging, model)
        for path in (path for path in staging.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(staging)
        if folder.exists():  # of a run that was stopped between here and its outcome
            shutil.rmtree(folder)
        staging.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _save_adapter(staging: Path, model: LanguageModel, base: str) -> None:
    assert isinstance(model.model, PeftModel)
    model.model.peft_config["default"].base_model_name_or_path = base
    # Without "auto", for which PEFT would ask a hub whether the vocabulary grew; we never grow it.
    model.model.save_pretrained(staging, save_embedding_layers=False)


def _save_generation_config(staging: Path, model: LanguageModel, ends: list[int]) -> None:
    config = model.base.generation_config or GenerationConfig()
    config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    if config.pad_token_id is None and ends:
        config.pad_token_id = ends[0]
    model.base.generation_config = config
    config.save_pretrained(staging)


# -- verified --------------------------------------------------------------------------------------------------------


def _probe(model: LanguageModel) -> Batch:
    tokens = [1 + number * 11 % (model.vocabulary - 1) for number in range(2 * PROBE_TOKENS)]
    return of_tokens([[tokens[:PROBE_TOKENS], tokens[PROBE_TOKENS:]]]).to(model.device)


def verify_adapter(folder: Path, model: LanguageModel, base_path: Path) -> None:
    """Opens the saved adapter beside the trained one on the same base, then merges the trained one."""
    assert isinstance(model.model, PeftModel)
    tensors = _read(folder, ["adapter_model.safetensors"])
    trained = get_peft_model_state_dict(model.model, save_embedding_layers=False)
    in_it = {tensor.data_ptr() for tensor in trained.values()}
    assert all(weight.data_ptr() in in_it for weight in model.trainable().values()), "PEFT saves all that was trained"
    _demand_same(tensors, trained)
    ups = [tensor for name, tensor in tensors.items() if "lora_B" in name or "lora_embedding_B" in name]
    if not any(bool(tensor.any()) for tensor in ups):
        raise BrokenResult("every B of the adapter is zero, so it changes nothing")
    probe = _probe(model)
    applied = logits_of(model, probe)
    reopened = _reopened_adapter_logits(folder, model, base_path, probe)
    _demand_equal("the adapter read back", applied, reopened, TOLERANCE[model.dtype])
    if model.base.dtype == torch.float32:
        model.model.merge_adapter()
        merged = logits_of(model, probe)
        model.model.unmerge_adapter()
        _demand_equal("the merged adapter", applied, merged, MERGE_TOLERANCE)
    else:
        _demand_layers_merge(model)


@torch.no_grad()
def _demand_layers_merge(model: LanguageModel) -> None:
    """Merged equals applied, one layer at a time and in fp32: merging into bf16 rounds every weight, which moves logits
    by some percent and would hide what is looked for here."""
    draw = torch.Generator().manual_seed(0)
    for name, layer in model.base.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        alone = copy.deepcopy(layer).float()
        if isinstance(alone.get_base_layer(), nn.Embedding):
            inputs = torch.arange(4)
        else:
            inputs = torch.randn(4, alone.in_features, generator=draw)
        applied = alone(inputs.to(model.device))
        alone.merge()
        _demand_equal(f"{name}, merged,", applied, alone(inputs.to(model.device)), MERGE_TOLERANCE)


def _reopened_adapter_logits(folder: Path, model: LanguageModel, base_path: Path, probe: Batch) -> Tensor:
    """With the adapter as read from disk, as a second one on the same base: the base may fill the device."""
    assert isinstance(model.model, PeftModel)
    if model.model.peft_config["default"].ensure_weight_tying:
        # PEFT ties head and embedding for the first adapter of a model only, so this one needs a base of its own.
        base = AutoModelForCausalLM.from_pretrained(base_path, dtype=model.base.dtype, use_safetensors=True)
        with quiet_libraries():
            return logits_of(_as_trained(PeftModel.from_pretrained(base, folder), model), probe)
    model.model.load_adapter(folder, adapter_name="reopened")
    model.model.set_adapter("reopened")
    logits = logits_of(model, probe)
    model.model.set_adapter("default")
    model.model.delete_adapter("reopened")
    return logits


def _as_trained(again: PreTrainedModel | PeftModel, model: LanguageModel) -> LanguageModel:
    """A model read from disk, computed as `model` is."""
    ready = LanguageModel(again.to(model.device).eval(), model.device, model.dtype)
    ready.base.set_attn_implementation(ATTENTION_NAMES[model.attention])
    ready.attention = model.attention
    ready.find_head(lambda code, text: None)
    return ready


def verify_model(folder: Path, model: LanguageModel) -> None:
    """Opens the saved model a second time and compares names, shapes and logits."""
    tensors = _read(folder, sorted(path.name for path in folder.glob("*.safetensors")))
    own = model.base.state_dict()
    _demand_same(tensors, {name: tensor for name, tensor in own.items() if name in tensors})
    again, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=model.base.dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    amiss = {what: names for what, names in report.items() if names}
    if amiss:
        raise BrokenResult(f"the model on disk does not open whole: {amiss}")
    probe = _probe(model)
    reopened = logits_of(_as_trained(again, model), probe)
    _demand_equal("the model read back", logits_of(model, probe), reopened, TOLERANCE[model.dtype])


def _read(folder: Path, names: list[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise BrokenResult(f"{name} on disk holds a number that is none")
    return tensors


def _demand_same(saved: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    for name in sorted(saved.keys() | trained.keys()):
        if name not in saved or name not in trained:
            raise BrokenResult(f"{name} is only {'on disk' if name in saved else 'in memory'}")
        if not torch.equal(saved[name], trained[name].cpu()):
            raise BrokenResult(f"{name} on disk is not what was trained")


def _demand_equal(what: str, trained: Tensor, other: Tensor, tolerance: float) -> None:
    difference = relative_difference(trained, other)
    if not difference <= tolerance:
        raise BrokenResult(f"{what} differs from the trained model: off by {difference:.2g} of the scale")


# -- the model card --------------------------------------------------------------------------------------------------


def model_card(spec: JobSpec, facts: Facts) -> str:
    """README.md with the facts of the run, in the form that model hubs read."""
    method = spec.method
    share = facts.trainable_parameters / facts.total_parameters
    if isinstance(method, Adapter):
        kind = f"A LoRA adapter (rank {method.rank}, alpha {method.alpha:g})"
        use = f"""```python
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{facts.base}")
model = PeftModel.from_pretrained(base, "PATH OF THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS FOLDER")
```"""
        head = f"base_model: {facts.base}\nlibrary_name: peft\n"
    else:
        kind = "A model fine-tuned in full"
        use = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH OF THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS FOLDER")
```"""
        head = f"base_model: {facts.base}\nlibrary_name: transformers\n"
    rows = [
        ("Base model", facts.base),
        ("Data", ", ".join(facts.datasets)),
        ("Samples trained an epoch", f"{facts.num_samples:,}"),
        ("Epochs", f"{facts.epochs:g}"),
        ("Optimizer steps", f"{facts.steps:,}"),
        ("Trained tokens", f"{facts.trained_tokens:,}"),
        ("Trained parameters", f"{facts.trainable_parameters:,} of {facts.total_parameters:,} ({share:.2%})"),
        ("Peak learning rate", f"{spec.schedule.learning_rate:g}, {spec.schedule.decay}"),
        ("Longest sample", f"{spec.data.max_length} tokens"),
        (
            "Trained on",
            {"assistant": "assistant turns", "last": "the last turn", "all": "every token"}[spec.data.train_on],
        ),
        ("Seed", str(spec.seed)),
    ]
    if facts.loss is not None:  # a run that was resumed behind its last step made none
        rows.append(("Loss of the last step", f"{facts.loss:.4f}"))
    if facts.eval_loss is not None:
        rows.append(("Loss on held-out samples", f"{facts.eval_loss:.4f}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
{head}tags: [pegbox]
---

# {spec.name or facts.base}

{kind}, made by Pegbox.

| | |
|---|---|
{table}

{use}
"""
