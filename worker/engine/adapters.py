"""Adapters: which weights of a model get one, and how they are laid on.

`all-linear` means every linear layer of the decoder but the head and routers, and the experts of a mixture. Those that
transformers keeps as one tensor for all experts of a layer (experts x out x in) are no linear layers; PEFT lays an
adapter of its own on each expert of such a tensor. A vision tower beside the decoder never gets one: text tuning does
not run it. A name that nothing bears is refused: it would leave out in silence what a person wants trained.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from core.architecture import ROUTERS
from core.errors import UserError
from core.spec import Adapter
from worker.engine.model import Warn, quiet_libraries

# In a model whose experts share a tensor, PEFT 0.21 takes layers of these names for experts as transformers 4 kept
# them, and lays the adapter on the experts instead: at wrapping and at every later loading. A dense layer or a shared
# expert is therefore named by its weight.
TAKEN_FOR_EXPERTS = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
ADAPTABLE = (nn.Linear, nn.Embedding, Conv1D)  # bitsandbytes' 4-bit layer is a Linear too


@dataclass(frozen=True)
class Targets:
    """Full names: of layers that get an adapter, of single weights, and of those that hold all experts of a layer."""

    layers: tuple[str, ...]
    weights: tuple[str, ...]
    experts: tuple[str, ...]


def with_adapters(
    base: PreTrainedModel, method: Adapter, start_from: Path | None, warn: Warn, new_token_ids: Sequence[int] = ()
) -> PeftModel:
    """`new_token_ids` are rows of the embeddings that the base model never learned, trained beside the adapters.

    Raises UserError."""
    if start_from is not None:
        return _from_adapter(base, method, start_from, warn, new_token_ids)
    refuse_unknown_modules(base, method)
    targets = find_targets(base, method)
    expert_rank = _expert_rank(base, method)
    if targets.weights or targets.experts:
        _refuse_for_experts(method)
    if targets.experts:
        warn("experts", _what_experts_get(base, method, targets, expert_rank))
    # By the end of their names: PEFT reads these as patterns.
    fused = sorted({".".join(name.split(".")[-2:]) for name in targets.experts})
    saved = _modules_to_save(base, method)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        lora_alpha=_whole(method.alpha),
        lora_dropout=method.dropout,
        target_modules=list(targets.layers),
        target_parameters=[*targets.weights, *targets.experts] or None,
        rank_pattern={re.escape(name): expert_rank for name in fused},
        # So that alpha / rank is the same for all.
        alpha_pattern={re.escape(name): _whole(method.alpha * expert_rank / method.rank) for name in fused},
        fan_in_fan_out=any(isinstance(base.get_submodule(name), Conv1D) for name in targets.layers),  # GPT-2 transposes
        modules_to_save=saved or None,
        trainable_token_indices={name: list(new_token_ids) for name in _vocabulary_layers(base, saved)}
        if new_token_ids
        else None,
        use_rslora=method.use_rslora,
        use_dora=method.use_dora,
        ensure_weight_tying=_saves_a_tied_layer(base, method),
    )
    tied_before = is_tied(base)
    # Adapters in fp32 also over a base in bf16: autocast_adapter_dtype is PEFT's name for it.
    with quiet_libraries():
        model = get_peft_model(base, config, autocast_adapter_dtype=True)
    if tied_before and not is_tied(base):
        raise UserError("engine.untied", "method.modules_to_save", names=", ".join(method.modules_to_save))
    ranks = _ranks(base)
    wanted = dict.fromkeys((*targets.layers, *targets.weights), method.rank)
    assert ranks == wanted | dict.fromkeys(targets.experts, expert_rank), "PEFT adapts what it was asked to"
    return model


def _ranks(base: PreTrainedModel) -> dict[str, int]:
    """Of every adapter in `base`, by the full name of the layer or weight that it is laid on."""
    ranks = {}
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLayer):
            bare = name.replace(".base_layer", "")  # wrappers of several weights of a module lie in each other
            if isinstance(layer, ParamWrapper):
                bare = f"{bare}.{layer.parameter_name}"
            ranks[bare] = layer.r["default"]
    return ranks


def _whole(alpha: float) -> float:
    """Servers read alpha as a whole number where it is one."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _from_adapter(
    base: PreTrainedModel, method: Adapter, folder: Path, warn: Warn, new_token_ids: Sequence[int]
) -> PeftModel:
    if not (folder / "adapter_config.json").is_file():
        raise UserError("engine.adapter_missing", "model.adapter", folder=str(folder))
    given = LoraConfig.from_pretrained(folder)
    if not isinstance(given, LoraConfig):
        raise UserError(
            "engine.adapter_unfit", "model.adapter", problem=f"it is of the kind {given.peft_type}, not LoRA"
        )
    known = tokens_of(given)
    if known != sorted(new_token_ids):
        raise UserError("engine.adapter_tokens", "model.chat_template", known=len(known), added=len(new_token_ids))
    try:
        with quiet_libraries(), warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
            model = PeftModel.from_pretrained(base, folder, is_trainable=True, autocast_adapter_dtype=True)
    except (ValueError, RuntimeError, UserWarning) as error:
        problem = " ".join(str(error).split())[:300]
        raise UserError("engine.adapter_unfit", "model.adapter", problem=problem) from error
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        unused = set(file.keys()) - get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    # PEFT turns what older releases saved of experts into tensors of other names.
    if unused and not fused_experts(base):
        problem = f"nothing in it takes {min(unused)}"
        raise UserError("engine.adapter_unfit", "model.adapter", problem=problem)
    if (given.r, given.lora_alpha) != (method.rank, method.alpha):
        warn(
            "adapter",
            f"training goes on with the adapter's own rank {given.r} and alpha {given.lora_alpha}, "
            f"not with method.rank {method.rank} and method.alpha {method.alpha}",
        )
    return model


def tokens_of(config: LoraConfig) -> list[int]:
    """The tokens that an adapter brings rows for, beyond those of its base."""
    indices = config.trainable_token_indices or ()
    lists = indices.values() if isinstance(indices, dict) else [indices]
    return sorted({token for tokens in lists for token in tokens})


# -- targets ---------------------------------------------------------------------------------------------------------


def find_targets(base: PreTrainedModel, method: Adapter) -> Targets:
    """Raises UserError where nothing is left, or a name means a layer that can bear no adapter."""
    experts = fused_experts(base)
    has_experts = bool(experts)
    if method.target_modules == "all-linear":
        layers = linear_layers(base)
    else:
        asked = method.target_modules
        layers = [name for name in _text_modules(base) if is_named(name, asked) and not _holds(name, experts)]
        experts = [name for name in experts if _names_experts(name, asked)]
        for name in layers:
            layer = base.get_submodule(name)
            if not isinstance(layer, ADAPTABLE):
                kind = type(layer).__name__
                raise UserError("engine.not_adaptable", "method.target_modules", name=name, kind=kind)
    left_out = method.exclude_modules + method.modules_to_save
    layers = [name for name in layers if not is_named(name, left_out)]
    experts = [name for name in experts if not _names_experts(name, left_out)]
    mistaken = [name for name in layers if has_experts and name.rsplit(".", 1)[-1] in TAKEN_FOR_EXPERTS]
    targets = Targets(
        tuple(name for name in layers if name not in mistaken),
        tuple(f"{name}.weight" for name in mistaken),
        tuple(experts),
    )
    if not (layers or experts):
        raise UserError("engine.no_targets", "method.exclude_modules")
    shared = set(targets.layers) & set(_vocabulary_names(base)) if is_tied(base) else set()
    if shared:
        raise UserError("engine.tied_target", "method.target_modules", names=", ".join(sorted(shared)))
    return targets


def linear_layers(base: PreTrainedModel) -> list[str]:
    """Full names of the linear layers that `all-linear` means: the decoder's, without the head and routers."""
    head = base.get_output_embeddings()
    return [
        name
        for name, module in _text_modules(base).items()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and name.rsplit(".", 1)[-1] not in ROUTERS
    ]


def routers(base: PreTrainedModel) -> list[str]:
    """Full names of the linear layers that choose experts."""
    return [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in ROUTERS
    ]


def fused_experts(base: PreTrainedModel) -> list[str]:
    """Full names of the parameters that hold all experts of a layer, one matrix each."""
    return [
        f"{module_name}.{name}"
        for module_name, module in _text_modules(base).items()
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3 and getattr(module, "num_experts", None) == weight.shape[0]
    ]


def _text_modules(base: PreTrainedModel) -> dict[str, nn.Module]:
    """Decoder and head by full name: all that text goes through."""
    inside = {id(module) for module in base.get_decoder().modules()} | {id(base.get_output_embeddings())}
    return {name: module for name, module in base.named_modules() if id(module) in inside}


def is_named(module: str, names: Sequence[str]) -> bool:
    """By the whole name or its last parts, as PEFT reads them: q_proj, self_attn.q_proj, model.layers.0.mlp.up_proj."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def _names_experts(parameter: str, names: Sequence[str]) -> bool:
    """Fused experts are named by their parameter (gate_up_proj) or by what holds it (experts)."""
    return is_named(parameter, names) or is_named(parameter.rsplit(".", 1)[0], names)


def _holds(module: str, parameters: Sequence[str]) -> bool:
    return any(parameter.rsplit(".", 1)[0] == module for parameter in parameters)


def refuse_unknown_modules(base: PreTrainedModel, method: Adapter) -> None:
    """A name that no layer bears would leave out in silence what a person wants trained."""
    experts = fused_experts(base)
    names = [*_text_modules(base), *experts]
    known = sorted({name.rsplit(".", 1)[-1] for name in [*linear_layers(base), *experts]})
    asked: list[tuple[str, tuple[str, ...]]] = [
        ("method.exclude_modules", method.exclude_modules),
        ("method.modules_to_save", method.modules_to_save),
    ]
    if method.target_modules != "all-linear":
        asked.append(("method.target_modules", method.target_modules))
    for field, wanted in asked:
        for name in wanted:
            if not any(is_named(module, (name,)) for module in names):
                raise UserError("engine.unknown_module", field, name=name, known=", ".join(known))


# -- experts ---------------------------------------------------------------------------------------------------------


def _expert_rank(base: PreTrainedModel, method: Adapter) -> int:
    """The rank shared out among the experts that a token meets, so that a mixture trains the same share of what it
    computes with as a dense model does (Schulman et al. 2025, LoRA Without Regret)."""
    return max(1, method.rank // _experts_per_token(base))


def _experts_per_token(base: PreTrainedModel) -> int:
    config = base.config.get_text_config()
    for key in ("num_experts_per_tok", "moe_top_k", "moe_topk", "top_k_experts"):
        count = getattr(config, key, None)
        if isinstance(count, int):
            return count
    return 1


def _refuse_for_experts(method: Adapter) -> None:
    """A dropped input or a magnitude of its own would have to reach into the experts' shared computation."""
    for field, is_set in (("method.dropout", method.dropout > 0), ("method.use_dora", method.use_dora)):
        if is_set:
            raise UserError("engine.fused_experts", field, knob=field)


def _what_experts_get(base: PreTrainedModel, method: Adapter, targets: Targets, rank: int) -> str:
    num_experts = base.get_parameter(targets.experts[0]).shape[0]
    layers = len({name.rsplit(".", 1)[0] for name in targets.experts})
    text = (
        f"each of the {num_experts} experts of {layers} layers gets an adapter of rank {rank}: method.rank "
        f"{method.rank} shared out among the {_experts_per_token(base)} experts that a token meets"
    )
    return f"{text}; routers stay as they are, so no balancing loss is needed"


# -- what is trained beside them ---------------------------------------------------------------------------------------


def is_tied(base: PreTrainedModel) -> bool:
    """Whether head and embedding are one weight, both of the model itself and, where they are trained, of the copy."""
    head = base.get_output_embeddings()
    if head is None:
        return False
    first, second = (_trained_weight(layer) for layer in (base.get_input_embeddings(), head))
    # Under ZeRO-3 all lie nowhere.
    return first is second or (first.numel() > 0 and first.data_ptr() == second.data_ptr())


def _trained_weight(layer: nn.Module) -> nn.Parameter:
    """Of PEFT's wrappers what is trained: a copy of the layer, or rows of it. Else the layer's own weight."""
    copies, rows = getattr(layer, "modules_to_save", None), getattr(layer, "token_adapter", None)
    if rows is not None:
        weight = rows.trainable_tokens_delta["default"]
    else:
        weight = (copies["default"] if copies else layer).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _saves_a_tied_layer(base: PreTrainedModel, method: Adapter) -> bool:
    """Where head and embedding share their weight, training one in full means training both."""
    return is_tied(base) and any(is_named(name, method.modules_to_save) for name in _vocabulary_names(base))


def _modules_to_save(base: PreTrainedModel, method: Adapter) -> list[str]:
    """PEFT knows a tied layer by the names embed_tokens and lm_head only, so both are named where one is wanted; and it
    goes by the ends of names, which a vision tower's layers may share."""
    saved = list(method.modules_to_save)
    text = _text_modules(base)
    matched = [name for name, _ in base.named_modules() if is_named(name, saved)]
    if any(name not in text for name in matched):
        saved = [name for name in matched if name in text]
    if _saves_a_tied_layer(base, method):
        saved += [name for name in _vocabulary_names(base) if not is_named(name, saved)]
    return saved


def _vocabulary_names(base: PreTrainedModel) -> list[str]:
    """Full names of the embedding and the head."""
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    return [name for name, module in base.named_modules() if module in layers]


def _vocabulary_layers(base: PreTrainedModel, saved: Sequence[str]) -> list[str]:
    """Those whose new rows are to be trained: not where the whole layer is, and a tied head follows by itself."""
    names = [name for name in _vocabulary_names(base) if not is_named(name, saved)]
    embedding = base.get_input_embeddings()
    return [name for name in names if base.get_submodule(name) is embedding] if is_tied(base) else names
