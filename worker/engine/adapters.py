"""Adapters: which layers of a model get one, and how they are laid on.

`all-linear` means every linear layer but the head and routers. A name that no layer bears is refused: it would leave
out in silence what a person wants trained.
"""

from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from core.errors import UserError
from core.spec import Adapter
from worker.engine.model import Warn, quiet_libraries

# Last names of linear layers that choose experts: an adapter there changes who computes, not what is computed.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


def with_adapters(base: PreTrainedModel, method: Adapter, start_from: str | None, warn: Warn) -> PeftModel:
    if start_from is not None:
        return _from_adapter(base, method, Path(start_from), warn)
    refuse_unknown_modules(base, method)
    targets = _targets(base, method)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        # Servers read alpha as a whole number where it is one.
        lora_alpha=int(method.alpha) if float(method.alpha).is_integer() else method.alpha,
        lora_dropout=method.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(base.get_submodule(name), Conv1D) for name in targets),  # GPT-2 transposes
        modules_to_save=list(method.modules_to_save) or None,
        use_rslora=method.use_rslora,
        use_dora=method.use_dora,
        ensure_weight_tying=_saves_a_tied_layer(base, method),
    )
    # Adapters in fp32 also over a base in bf16: autocast_adapter_dtype is PEFT's name for it.
    with quiet_libraries():
        return get_peft_model(base, config, autocast_adapter_dtype=True)


def _from_adapter(base: PreTrainedModel, method: Adapter, folder: Path, warn: Warn) -> PeftModel:
    if not (folder / "adapter_config.json").is_file():
        raise UserError("engine.adapter_missing", "model.adapter", folder=str(folder))
    with quiet_libraries():
        model = PeftModel.from_pretrained(base, folder, is_trainable=True, autocast_adapter_dtype=True)
    given = model.peft_config["default"]
    if (given.r, given.lora_alpha) != (method.rank, method.alpha):
        warn(
            "adapter",
            f"training goes on with the adapter's own rank {given.r} and alpha {given.lora_alpha}, "
            f"not with method.rank {method.rank} and method.alpha {method.alpha}",
        )
    return model


def linear_layers(base: PreTrainedModel) -> list[str]:
    """Full names of the layers that `all-linear` means: all but the head and routers."""
    head = base.get_output_embeddings()
    return [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and name.rsplit(".", 1)[-1] not in ROUTERS
    ]


def _targets(base: PreTrainedModel, method: Adapter) -> list[str]:
    names = linear_layers(base)
    if method.target_modules != "all-linear":
        names = [name for name, _ in base.named_modules() if _is_named(name, method.target_modules)]
    targets = [name for name in names if not _is_named(name, method.exclude_modules + method.modules_to_save)]
    if not targets:
        raise UserError("engine.no_targets", "method.exclude_modules")
    return targets


def _saves_a_tied_layer(base: PreTrainedModel, method: Adapter) -> bool:
    """Where head and embedding share their weight, training one in full means training both."""
    if not base.config.get_text_config().tie_word_embeddings:
        return False
    saved = [module for name, module in base.named_modules() if _is_named(name, method.modules_to_save)]
    return any(module in (base.get_input_embeddings(), base.get_output_embeddings()) for module in saved)


def refuse_unknown_modules(base: PreTrainedModel, method: Adapter) -> None:
    """A name that no layer bears would leave out in silence what a person wants trained."""
    names = [name for name, _ in base.named_modules()]
    known = sorted({name.rsplit(".", 1)[-1] for name in linear_layers(base)})
    asked: list[tuple[str, tuple[str, ...]]] = [
        ("method.exclude_modules", method.exclude_modules),
        ("method.modules_to_save", method.modules_to_save),
    ]
    if method.target_modules != "all-linear":
        asked.append(("method.target_modules", method.target_modules))
    for field, wanted in asked:
        for name in wanted:
            if not any(_is_named(module, (name,)) for module in names):
                raise UserError("engine.unknown_module", field, name=name, known=", ".join(known))


def _is_named(module: str, names: Sequence[str]) -> bool:
    """By the whole name or its last parts, as PEFT reads them: q_proj, self_attn.q_proj, model.layers.0.mlp.up_proj."""
    return any(module == name or module.endswith(f".{name}") for name in names)
