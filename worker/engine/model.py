"""A model ready to be trained: loaded, given its adapters, its attention and its head found and tried.

Weights that are trained are always fp32, and so are their gradients, whatever the arithmetic: under bf16 the forward
pass casts them as it goes (autocast), since AdamW in pure bf16 rounds most small updates away. Frozen weights are kept
in the arithmetic's own type.

Two things differ between families and are found by trying, not by a list of names. *The head*: what the model does
between its last hidden state and its logits (a soft cap, a scale, neither) is read from its config and compared with
the model's own logits on a few tokens; where they differ, the model's own forward pass is used and all logits of a
row are made at once. *The attention*: each way is run once on a few tokens; `auto` goes on to the next where one fails
and says so, one that was asked for by name is refused with what the model said.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from core.errors import UserError
from core.spec import Adapter, JobSpec
from worker.engine import attention
from worker.engine.attention import SEGMENTED, UnsupportedAttention
from worker.engine.batches import Batch, of_tokens

Attention = Literal["flash", "sdpa", "eager"]
ATTENTION_NAMES: dict[Attention, str] = {"flash": SEGMENTED, "sdpa": "sdpa", "eager": "eager"}
# In the order in which `auto` tries them.
ATTENTIONS: tuple[Attention, ...] = ("flash", "sdpa", "eager")

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# Last names of linear layers that choose experts: an adapter there changes who computes, not what is computed.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})

TRIAL_TOKENS = 12
# Equal up to the order of sums, relative to the largest logit. A soft cap or scale that is missed is off by far more.
HEAD_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Warn = Callable[[str, str], None]  # code, text


@dataclass(frozen=True)
class Head:
    """Hidden rows to logits, without the decoder."""

    module: nn.Module
    scale: float
    softcap: float | None

    def __call__(self, hidden_TD: Tensor) -> Tensor:
        logits_TV: Tensor = self.module(hidden_TD) * self.scale
        return logits_TV if self.softcap is None else self.softcap * torch.tanh(logits_TV / self.softcap)


class LanguageModel:
    """What the loop needs of a model. `model` is what is saved: the transformers model, or PEFT's wrapper of it;
    `base` is always the transformers model (with adapters inside its layers). Shapes as in batches.py."""

    def __init__(self, model: PreTrainedModel | PeftModel, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model
        self.base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        self.device = device
        self.dtype = dtype
        self.attention: Attention = "eager"
        self.vocabulary: int = self.base.config.get_text_config().vocab_size
        self._decoder: nn.Module = self.base.get_decoder()
        self._head: Head | None = None

    @property
    def has_adapters(self) -> bool:
        return isinstance(self.model, PeftModel)

    @property
    def computes_head_apart(self) -> bool:
        return self._head is not None

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32)

    def trainable(self) -> dict[str, nn.Parameter]:
        """By name; a weight that two layers share stands once."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters())

    def features(self, batch: Batch) -> Tensor:
        """What `logits` takes, at the batch's targets: hidden states, or logits where the head can't be had apart.

        Never a cache and never a mask: with either, transformers takes a packed row for one sample."""
        module = self._decoder if self._head is not None else self.base
        output = module(
            input_ids=batch.token_ids_BN,
            position_ids=batch.position_ids_BN,
            attention_mask=None,
            use_cache=False,
            **({"segments": batch.segments} if self.attention == "flash" else {}),
        )
        states_BND: Tensor = output.last_hidden_state if self._head is not None else output.logits
        return states_BND.flatten(0, 1)[batch.target_index_T]

    def logits(self, features_TD: Tensor) -> Tensor:
        return self._head(features_TD) if self._head is not None else features_TD

    # -- found by trying ---------------------------------------------------------------------------------------------

    def choose_attention(self, asked: Literal["auto", "flash", "flex", "sdpa", "eager"], warn: Warn) -> None:
        """Raises UserError engine.attention_refused where the one that was asked for does not run."""
        assert asked != "flex", "refused before"
        candidates: Sequence[Attention] = ATTENTIONS if asked == "auto" else (asked,)
        problems: list[str] = []
        for candidate in candidates:
            problem = self._try_attention(candidate)
            if problem is None:
                if problems:
                    cost = "it builds a mask of N x N for each row, so memory and time grow with the square of a row"
                    warn("attention", f"attention {candidate} is used: {'; '.join(problems)}; {cost}")
                return
            problems.append(f"{candidate} does not run on this model ({problem})")
        raise UserError("engine.attention_refused", "compute.attention", problem="; ".join(problems))

    def _try_attention(self, candidate: Attention) -> str | None:
        name = ATTENTION_NAMES[candidate]
        text_config = self.base.config.get_text_config()
        if candidate == "flash" and "chunked_attention" in (getattr(text_config, "layer_types", None) or ()):
            return "its layers attend in chunks"
        try:
            self.base.set_attn_implementation(name)
            if self.base.config._attn_implementation != name:
                return "its class does not let attention be chosen"
            self.attention = candidate
            with torch.no_grad(), self.autocast():
                self.features(self._trial_batch())
        except (UnsupportedAttention, ValueError, TypeError, KeyError) as error:
            return str(error).splitlines()[0].split(". ")[0]
        return None

    def find_head(self, warn: Warn) -> None:
        """Decides whether decoder and head can run apart; says so where they can't."""
        config = self.base.config.get_text_config()
        module = self.base.get_output_embeddings()
        if module is not None:
            # Granite divides, Cohere multiplies, Gemma caps.
            scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
            head = Head(module, float(scale), getattr(config, "final_logit_softcapping", None))
            own_TV = self._trial_logits(None)
            if own_TV.shape[-1] == self.vocabulary and _are_close(own_TV, self._trial_logits(head), self.dtype):
                self._head = head
                return
        self._head = None
        warn(
            "head", "the model's head cannot run apart from it, so logits of whole rows are made: more memory and time"
        )

    @torch.no_grad()
    def _trial_logits(self, head: Head | None) -> Tensor:
        self._head = head
        batch = self._trial_batch()
        with self.autocast():
            return self.logits(self.features(batch)).float()

    def _trial_batch(self) -> Batch:
        token_ids = [1 + number * 7 % (self.vocabulary - 1) for number in range(2 * TRIAL_TOKENS)]
        return of_tokens([[token_ids[:TRIAL_TOKENS], token_ids[TRIAL_TOKENS:]]]).to(self.device)


def _are_close(first: Tensor, second: Tensor, dtype: torch.dtype) -> bool:
    return bool(relative_difference(first, second) <= HEAD_TOLERANCE[dtype])


def relative_difference(first: Tensor, second: Tensor) -> float:
    """The largest difference of two tensors over the largest magnitude of the first."""
    return float((first - second).abs().max() / first.abs().max().clamp_min(1e-30))


# -- loading ---------------------------------------------------------------------------------------------------------


def load_model(path: Path, spec: JobSpec, asked_attention: str, device: torch.device, warn: Warn) -> LanguageModel:
    """The model of `spec` (every `auto` but attention resolved) on `device`, in training mode.

    Adapters are drawn from torch's generator as it stands. Raises UserError."""
    attention.register()
    dtype = TORCH_DTYPES[spec.compute.dtype]
    is_full = spec.method.type == "full"
    base = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32 if is_full else dtype,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    base.config.use_cache = False
    base.to(device)
    model: PreTrainedModel | PeftModel = base
    if not is_full:
        assert isinstance(spec.method, Adapter)
        model = _with_adapters(base, spec.method, spec.model.adapter, warn)
    ready = LanguageModel(model, device, dtype)
    for weight in ready.trainable().values():  # PEFT leaves modules_to_save in the base's type
        weight.data = weight.data.float()
    ready.model.eval()
    ready.choose_attention(asked_attention, warn)  # type: ignore[arg-type]  # a Literal of the spec
    ready.find_head(warn)
    if spec.compute.gradient_checkpointing is True:
        with quiet_libraries():
            ready.base.gradient_checkpointing_enable({"use_reentrant": False})
    ready.model.train()
    return ready


def _with_adapters(base: PreTrainedModel, method: Adapter, start_from: str | None, warn: Warn) -> PeftModel:
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


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences what a user can do nothing about: transformers 5.23 renamed gradient checkpointing, and PEFT 0.21 and
    transformers 5.17 only know the old names; PEFT doubts GPT-2's tied weights, which come back equal all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "You have requested `ensure_weight_tying`", UserWarning)
        yield


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
