"""From a folder and a spec to a model that can be trained."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from core.errors import UserError
from core.spec import Adapter, AnyMethod, JobSpec
from worker.engine import attention
from worker.engine.adapters import is_tied, with_adapters
from worker.engine.libraries import tame_deepspeed
from worker.engine.lora_linear import fuse
from worker.engine.model import TORCH_DTYPES, LanguageModel, Warn, quiet_libraries
from worker.engine.quantisation import keep_canonical, plan_quantisation

# Rows of an embedding are kept a multiple of the largest of these that they were a multiple of: kernels like it.
ROW_MULTIPLES = (128, 64, 8, 1)


def load_model(
    path: Path,
    spec: JobSpec,
    device: torch.device,
    warn: Warn,
    *,
    adapter_path: Path | None = None,
    new_token_ids: Sequence[int] = (),
) -> LanguageModel:
    """The model of `spec` (every `auto` but attention resolved) on `device`, not tried yet, from the adapter in
    `adapter_path` where there is one. `new_token_ids` are those that the tokenizer was given for this job: the model
    gets rows for them, which are trained under every method.

    Adapters and new rows are drawn from torch's generator as it stands. Raises UserError."""
    attention.register()
    dtype = TORCH_DTYPES[spec.compute.dtype]
    base = load_base(path, spec.method, device, dtype)
    make_room_for(base, new_token_ids)
    model: PreTrainedModel | PeftModel = base
    if isinstance(spec.method, Adapter):
        model = with_adapters(base, spec.method, adapter_path, warn, new_token_ids)
        if spec.parallel.zero_stage != 3 and not spec.compute.compile:
            fuse(model)
    else:
        freeze_all_but_text(base, own_dtype(read_config(path)))
        _warn_of_routers(base, warn)
    loaded = LanguageModel(model, device, dtype)
    for weight in loaded.trainable().values():  # PEFT leaves modules_to_save in the base's type
        weight.data = weight.data.float()
    return loaded


def try_out(model: LanguageModel, spec: JobSpec, asked_attention: str, warn: Warn) -> None:
    """Finds by trying what differs between families, and puts the model in training mode. Raises UserError."""
    model.model.eval()
    model.choose_attention(asked_attention, warn)  # type: ignore[arg-type]  # a Literal of the spec
    model.find_head(warn)
    if spec.compute.gradient_checkpointing is True:
        with quiet_libraries():
            model.base.gradient_checkpointing_enable({"use_reentrant": False})
    if spec.compute.compile:
        if spec.parallel.zero_stage == 3:
            raise UserError("engine.compile_sharded", "compute.compile")
        model.compile_layers(warn)
    model.model.train()


def load_base(path: Path, method: AnyMethod, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The weights as the method wants them: in 4 bits, or in `dtype`, or in fp32 where they are trained."""
    config = read_config(path)
    if getattr(config, "quantization_config", None) is not None:
        kind = dict(config.quantization_config).get("quant_method", "?")
        raise UserError("engine.quantised_base", "model.base", kind=str(kind))
    if method.type != "qlora":
        base = open_model(path, config, dtype=torch.float32 if method.type == "full" else dtype)
        base.to(device)
    else:
        with torch.device("meta"):
            skeleton = auto_class(config).from_config(config)
        plan = plan_quantisation(skeleton, method, dtype)
        # Each tensor is quantised on the device as it is read, so the whole never lies there unquantised.
        base = open_model(path, config, dtype=dtype, quantization_config=plan, device_map={"": device})
        if device.type == "cpu":
            keep_canonical(base)
    return base


def open_model(path: Path, config: PreTrainedConfig, **how: object) -> PreTrainedModel:
    """From safetensors in a folder: never from the network, never with code that comes along."""
    tame_deepspeed()
    model: PreTrainedModel = auto_class(config).from_pretrained(
        path, config=config, use_safetensors=True, trust_remote_code=False, local_files_only=True, **how
    )
    return model


def read_config(path: Path) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    return config


def own_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The type that a model's weights were saved in."""
    return config.dtype or config.get_text_config().dtype or torch.float32


def auto_class(config: PreTrainedConfig) -> type[_BaseAutoModelClass]:
    """A vision model keeps its own class, whose saved form is the one that it came in, tower and all. A config that is
    both (a text model of a vision family) goes by the class that it was saved as."""
    vision = AutoModelForImageTextToText._model_mapping
    text = AutoModelForCausalLM._model_mapping
    if type(config) not in vision:
        return AutoModelForCausalLM  # type: ignore[no-any-return]  # transformers leaves its auto classes untyped
    named = set(config.architectures or ())
    is_text = type(config) in text and text[type(config)].__name__ in named
    return AutoModelForCausalLM if is_text else AutoModelForImageTextToText  # type: ignore[no-any-return]


def make_room_for(base: PreTrainedModel, new_token_ids: Sequence[int]) -> None:
    """Rows for tokens that the model never saw, in embedding and head, each the mean of the rows that it has learned,
    as a random row lies far from all of them. Where a model has rows to spare these are used, and no others touched."""
    if not new_token_ids:
        return
    num_rows = base.get_input_embeddings().weight.shape[0]
    known = min(*new_token_ids, num_rows)
    if max(new_token_ids) >= num_rows:
        multiple = next(multiple for multiple in ROW_MULTIPLES if num_rows % multiple == 0)
        base.resize_token_embeddings(max(new_token_ids) + 1, pad_to_multiple_of=multiple, mean_resizing=False)
    fresh = sorted({*new_token_ids, *range(num_rows, base.get_input_embeddings().weight.shape[0])})
    layers = [base.get_input_embeddings()]
    if base.get_output_embeddings() is not None and not is_tied(base):
        layers.append(base.get_output_embeddings())
    for layer in layers:
        for tensor in (layer.weight, getattr(layer, "bias", None)):
            if tensor is not None:
                tensor.data[fresh] = tensor.data[:known].float().mean(dim=0).to(tensor.dtype)


def freeze_all_but_text(base: PreTrainedModel, frozen_dtype: torch.dtype) -> None:
    """What text does not go through (a vision tower, its projector) is not trained, and stays in the type that it came
    in, so that it is handed out to the last bit."""
    trained = {id(weight) for weight in base.get_decoder().parameters()}
    head: nn.Module | None = base.get_output_embeddings()
    trained |= {id(weight) for weight in (head.parameters() if head is not None else ())}
    for weight in base.parameters():
        if id(weight) not in trained:
            weight.requires_grad_(False)
            weight.data = weight.data.to(frozen_dtype)


def _warn_of_routers(base: PreTrainedModel, warn: Warn) -> None:
    coefficient = getattr(base.config.get_text_config(), "router_aux_loss_coef", None)
    if coefficient is not None:
        warn(
            "routers",
            "the routers of this mixture of experts are trained without a balancing loss (its config names "
            f"router_aux_loss_coef {coefficient:g}): the loss is that of the trained tokens alone, so experts may fall "
            "out of use; watch the held-out loss",
        )
