"""What a job hands out: result/, opened again and compared with the model in memory before anyone is told of success.

    LoRA   adapter_model.safetensors, adapter_config.json
    full   model.safetensors (in shards where large), config.json; in the type and form that the base model came in,
           with the tower of a vision model and the files of its processor
    both   the tokenizer with the chat template that was trained, generation_config.json whose end of text is the one
           that was trained (a base model given a chat template would otherwise never stop), README.md

It is built in a temporary folder and renamed when everything holds: names and shapes as trained, every number finite,
an adapter that differs from nothing, the logits of a probe equal to the trained model's, and for an adapter those of
the merged weights too.

Where the base is not in fp32, merging rounds every weight, which moves logits by some percent and would hide what is
looked for. There each layer is merged by itself, in fp32 (a 4-bit one into what its numbers stand for), and compared
with the layer as applied: the same sums in another order, so 1e-4 of the scale is ample and a wrong scale is far off.
"""

import copy
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from core.chat import BUILT_IN_TEMPLATES
from core.spec import Adapter, JobSpec, Lora, Qlora
from worker.engine.adapters import tokens_of
from worker.engine.batches import Batch, Samples, of_tokens
from worker.engine.loading import auto_class, load_base, make_room_for, open_model, own_dtype, read_config
from worker.engine.loss import logits_of
from worker.engine.model import ATTENTION_NAMES, LanguageModel, quiet_libraries, relative_difference
from worker.engine.model_card import AdapterFacts, Facts, model_card
from worker.job_directory import sync_folder

# The same sums in another order, relative to the largest logit.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
MERGE_TOLERANCE = 1e-4  # in fp32
PROBE_TOKENS = 16
# Samples that are looked at for the token that ends a turn, and how many of them have to end with it.
SAMPLES_ASKED = 500
SHARE_NEEDED = 0.9
# How a vision model's images are prepared: nothing that was trained, and without them it cannot be served.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


class BrokenResult(Exception):
    """What was saved is not what was trained: nothing that a user did."""


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
            bring_to(own_dtype(read_config(base_path)), model.base)
        _save_generation_config(staging, model, ends)
        if not model.has_adapters:
            model.base.save_pretrained(staging)
            for name in PROCESSOR_FILES:
                if (base_path / name).is_file():
                    shutil.copyfile(base_path / name, staging / name)
        if spec.model.chat_template is not None:
            tokenizer.chat_template = BUILT_IN_TEMPLATES[spec.model.chat_template]
        tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(_card(model, spec, facts))
        if isinstance(spec.method, Adapter):
            verify_adapter(staging, model, base_path, spec.method)
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


def _card(model: LanguageModel, spec: JobSpec, facts: Facts) -> str:
    model_class = auto_class(model.base.config).__name__
    if not isinstance(model.model, PeftModel):
        return model_card(spec, facts, model_class, None)
    config = model.model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    is_plain = not (config.modules_to_save or config.target_parameters or config.use_dora or tokens_of(config))
    rows = model.base.get_input_embeddings().weight.shape[0] if tokens_of(config) else None
    return model_card(spec, facts, model_class, AdapterFacts(config.r, config.lora_alpha, is_plain, rows))


def bring_to(dtype: torch.dtype, base: PreTrainedModel) -> None:
    """What is saved of `base` as from_pretrained reads it in `dtype`: but for what a family always keeps in fp32 (the
    bias of a router, say). What is not saved, as the frequencies of positions, is left in fp32 by it too."""
    strict = getattr(base, "_keep_in_fp32_modules_strict", None)
    kept = {*(base._keep_in_fp32_modules or ()), *(strict or ())} if dtype is torch.float16 else set(strict or ())

    def wanted(name: str, tensor: Tensor) -> bool:
        return tensor.is_floating_point() and not kept & set(name.split("."))

    for name, weight in base.named_parameters():
        if wanted(name, weight):
            weight.data = weight.data.to(dtype)
    saved = base.state_dict().keys()
    for prefix, module in base.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            full = f"{prefix}.{name}"
            if full in saved and wanted(full, buffer):
                setattr(module, name, buffer.to(dtype))


def _save_generation_config(staging: Path, model: LanguageModel, ends: list[int]) -> None:
    config = model.base.generation_config or GenerationConfig()
    config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    if config.pad_token_id is None and ends:
        config.pad_token_id = ends[0]
    model.base.generation_config = config
    config.save_pretrained(staging)


# -- verified --------------------------------------------------------------------------------------------------------


def probe_of(model: LanguageModel) -> Batch:
    tokens = [1 + number * 11 % (model.vocabulary - 1) for number in range(2 * PROBE_TOKENS)]
    return of_tokens([[tokens[:PROBE_TOKENS], tokens[PROBE_TOKENS:]]]).to(model.device)


def verify_adapter(folder: Path, model: LanguageModel, base_path: Path, method: Lora | Qlora) -> None:
    """Opens the saved adapter beside the trained one on the same base, then merges the trained one."""
    assert isinstance(model.model, PeftModel)
    tensors = _read(folder, ["adapter_model.safetensors"])
    trained = get_peft_model_state_dict(model.model, save_embedding_layers=False)
    in_it = {tensor.data_ptr() for tensor in trained.values()}
    assert all(weight.data_ptr() in in_it for weight in model.trainable().values()), "PEFT saves all that was trained"
    demand_same(tensors, trained)
    ups = [tensor for name, tensor in tensors.items() if "lora_B" in name or "lora_embedding_B" in name]
    if not any(bool(tensor.any()) for tensor in ups):
        raise BrokenResult("every B of the adapter is zero, so it changes nothing")
    probe = probe_of(model)
    applied = logits_of(model, probe)
    reopened = _reopened_adapter_logits(folder, model, base_path, method, probe)
    _demand_equal("the adapter read back", applied, reopened, TOLERANCE[model.dtype])
    if method.type != "qlora" and model.base.dtype == torch.float32:
        model.model.merge_adapter()
        merged = logits_of(model, probe)
        model.model.unmerge_adapter()
        _demand_equal("the merged adapter", applied, merged, MERGE_TOLERANCE)
    else:
        demand_layers_merge(model)


@torch.no_grad()
def demand_layers_merge(model: LanguageModel) -> None:
    draw = torch.Generator().manual_seed(0)
    for name, layer in model.base.named_modules():
        if isinstance(layer, LoraLayer):
            applied, merged = _applied_and_merged(copy.deepcopy(layer).float(), draw, model.device)
            _demand_equal(f"{name}, merged,", applied, merged, MERGE_TOLERANCE)


def _applied_and_merged(layer: LoraLayer, draw: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a layer gives with its adapter beside it, and with its adapter in it. `layer` is a copy in fp32."""
    if isinstance(layer, ParamWrapper):
        with layer._activate_lora(layer.active_adapters):
            applied = getattr(layer.get_base_layer(), layer.parameter_name).clone()
        layer.merge()
        return applied, layer.get_param()
    base_layer = layer.get_base_layer()
    if isinstance(base_layer, nn.Embedding):
        inputs = torch.arange(4, device=device)
    else:
        inputs = torch.randn(4, layer.in_features, generator=draw).to(device)
    if not isinstance(base_layer, Linear4bit):
        applied = layer(inputs)
        layer.merge()
        return applied, layer(inputs)
    assert isinstance(base_layer.weight, Params4bit)
    state = base_layer.weight.quant_state
    base_layer.compute_dtype = state.dtype = torch.float32
    weight = dequantize_4bit(base_layer.weight.data, state)
    (adapter,) = layer.active_adapters
    variant = layer.lora_variant.get(adapter)
    merged = variant.merge_safe(layer, adapter, weight) if variant else weight + layer.get_delta_weight(adapter)
    return layer(inputs), F.linear(inputs, merged, base_layer.bias)


def _reopened_adapter_logits(
    folder: Path, model: LanguageModel, base_path: Path, method: Lora | Qlora, probe: Batch
) -> Tensor:
    """With the adapter as read from disk, as a second one on the same base: the base may fill the device."""
    assert isinstance(model.model, PeftModel)
    config = model.model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    if config.ensure_weight_tying or config.trainable_token_indices:
        # PEFT ties head and embedding for the first adapter of a model only, so this one needs a base of its own. In 4
        # bits the device has room for both, else the trained one makes way.
        if method.type != "qlora":
            model.model.to("cpu")
        base = load_base(base_path, method, model.device, model.dtype)
        make_room_for(base, tokens_of(config))
        with quiet_libraries():
            logits = logits_of(as_trained(PeftModel.from_pretrained(base, folder), model), probe)
        del base
        model.model.to(model.device)
        return logits
    with quiet_libraries():
        model.model.load_adapter(folder, adapter_name="reopened")
    model.model.set_adapter("reopened")
    logits = logits_of(model, probe)
    model.model.set_adapter("default")
    model.model.delete_adapter("reopened")
    return logits


def as_trained(again: PreTrainedModel | PeftModel, model: LanguageModel) -> LanguageModel:
    """A model read from disk, computed as `model` is."""
    ready = LanguageModel(again.eval(), model.device, model.dtype)
    ready.base.set_attn_implementation(ATTENTION_NAMES[model.attention])
    ready.attention = model.attention
    ready.find_head(lambda code, text: None)
    return ready


def verify_model(folder: Path, model: LanguageModel) -> None:
    """Opens the saved model a second time and compares names, values and logits."""
    _read(folder, sorted(path.name for path in folder.glob("*.safetensors")))
    config = read_config(folder)
    again, report = open_model(folder, config, dtype=own_dtype(config), output_loading_info=True)
    amiss = {what: names for what, names in report.items() if names}
    if amiss:
        raise BrokenResult(f"the model on disk does not open whole: {amiss}")
    # Not tensor by tensor as they lie on disk: experts that share a tensor here lie there one by one.
    demand_same(again.state_dict(), model.base.state_dict())
    probe = probe_of(model)
    reopened = logits_of(as_trained(again.to(model.device), model), probe)
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


def demand_same(saved: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    for name in sorted(saved.keys() | trained.keys()):
        if name not in saved or name not in trained:
            raise BrokenResult(f"{name} is only {'on disk' if name in saved else 'in memory'}")
        if saved[name].dtype != trained[name].dtype or not torch.equal(saved[name].cpu(), trained[name].cpu()):
            raise BrokenResult(f"{name} on disk is not what was trained")


def _demand_equal(what: str, trained: Tensor, other: Tensor, tolerance: float) -> None:
    difference = relative_difference(trained, other)
    if not difference <= tolerance:
        raise BrokenResult(f"{what} differs from the trained model: off by {difference:.2g} of the scale")
