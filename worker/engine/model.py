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
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from core.errors import UserError
from worker.engine.attention import FLEX, SEGMENTED, UnsupportedAttention, register
from worker.engine.batches import Batch, of_tokens
from worker.engine.segments import Segments

Attention = Literal["flash", "flex", "sdpa", "eager"]
ATTENTION_NAMES: dict[Attention, str] = {"flash": SEGMENTED, "flex": FLEX, "sdpa": "sdpa", "eager": "eager"}
# In the order in which `auto` tries them.
ATTENTIONS: tuple[Attention, ...] = ("flash", "sdpa", "eager")

COSTLIEST_FIRST = ("plain", "sdpa", "flash_attn", "varlen", "flex")  # kernels of attention.py
DENSE_COST = "it builds a mask of N x N for each row, so memory and time grow with the square of a row"

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

TRIAL_TOKENS = 12
# Equal up to the order of sums, relative to the largest logit. A soft cap or scale that is missed is off by far more.
HEAD_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}

Warn = Callable[[str, str], None]  # code, text


@dataclass(frozen=True)
class Head:
    """Hidden rows to logits, without the decoder."""

    module: nn.Module
    scale: float
    softcap: float | None

    def __call__(self, hidden_TD: Tensor) -> Tensor:
        # Not module(...): on that ZeRO-3 hangs a gather and a release, and ranks have unequal numbers of chunks;
        # `enter_head` gathers it once for all of them.
        logits_TV: Tensor = self.module.forward(hidden_TD)
        if self.scale != 1.0:  # a pass over all logits, and one more on the way back
            logits_TV = logits_TV * self.scale
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
        self.attention_reason = "nothing was chosen"
        self._kernel: str | None = None
        self.vocabulary: int = self.base.config.get_text_config().vocab_size
        self._decoder: nn.Module = self.base.get_decoder()
        self._head: Head | None = None
        # Where no rank holds the whole model (worker.engine.zero), a pass has to begin at a root that gathers it in
        # step with the other ranks, and the head is gathered around all that is done with it.
        self.enter: Callable[..., Any] = lambda task, *arguments: task(*arguments)
        self.enter_head: Callable[..., Any] = lambda task, features_TD, *arguments: task(features_TD, *arguments)
        self.scores_in_one_piece = False

    @property
    def has_adapters(self) -> bool:
        return isinstance(self.model, PeftModel)

    @property
    def computes_head_apart(self) -> bool:
        return self._head is not None

    def head_parameters(self) -> list[nn.Parameter]:
        return [] if self._head is None else list(self._head.module.parameters())

    def autocast(self) -> AbstractContextManager[object]:
        # Without its cache: a weight is used once a pass, and the copies of all would be kept until the pass is
        # through, whole ones under checkpointing and ZeRO-3 too.
        is_mixed = self.dtype is not torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=is_mixed, cache_enabled=False)

    def trainable(self) -> dict[str, nn.Parameter]:
        """By name; a weight that two layers share stands once."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters())

    def features(self, batch: Batch) -> Tensor:
        """What `logits` takes, at the batch's targets: hidden states, or logits where the head can't be had apart."""
        return self._run(batch, self._segments_of(batch))

    def _segments_of(self, batch: Batch) -> Segments:
        return Segments(batch.segments, self.device)

    def _run(self, batch: Batch, segments: Segments) -> Tensor:
        """Never a cache and never a mask: with either, transformers takes a packed row for one sample."""
        module = self._decoder if self._head is not None else self.base
        output = module(
            input_ids=batch.token_ids_BN,
            position_ids=batch.position_ids_BN,
            attention_mask=None,
            use_cache=False,
            **({"segments": segments} if self.attention in ("flash", "flex") else {}),
        )
        states_BND: Tensor = output.last_hidden_state if self._head is not None else output.logits
        return states_BND.flatten(0, 1)[batch.target_index_T]

    def logits(self, features_TD: Tensor) -> Tensor:
        return self._head(features_TD) if self._head is not None else features_TD

    # -- found by trying ---------------------------------------------------------------------------------------------

    def choose_attention(self, asked: Literal["auto", "flash", "flex", "sdpa", "eager"], warn: Warn) -> None:
        """Raises UserError engine.attention_refused where the one that was asked for does not run."""
        candidates: Sequence[Attention] = ATTENTIONS if asked == "auto" else (asked,)
        problems: list[str] = []
        for candidate in candidates:
            problem = self._try_attention(candidate)
            if problem is None:
                break
            problems.append(f"{candidate} does not run on this model ({problem})")
        else:
            raise UserError("engine.attention_refused", "compute.attention", problem="; ".join(problems))
        if self.device.type == "cuda" and self._kernel == "plain":
            written_out = self.attention_reason
            # flex computes caps and sinks too, and no scores of L x L.
            if asked == "auto" and self._try_attention("flex") is None:
                self.attention_reason += "; no flash kernel here computes this model's soft caps or sinks"
                return
            assert self._try_attention("flash") is None
            problems.append(written_out)
        elif self.device.type == "cuda" and self._kernel == "sdpa":
            problems.append(f"{self.attention_reason}: more calls than flash attention's one, and slower")
        if problems:
            cost = f"; {DENSE_COST}" if self.attention in ("sdpa", "eager") else ""
            warn("attention", f"attention {self.attention} is used: {'; '.join(problems)}{cost}")

    def _try_attention(self, candidate: Attention) -> str | None:
        """What is wrong with it, or None, and then it is the one in use."""
        name = ATTENTION_NAMES[candidate]
        text_config = self.base.config.get_text_config()
        is_ours = candidate in ("flash", "flex")
        if is_ours and "chunked_attention" in (getattr(text_config, "layer_types", None) or ()):
            return "its layers attend in chunks"
        try:
            self.base.set_attn_implementation(name)
            if self.base.config._attn_implementation != name:
                return "its class does not let attention be chosen"
            self.attention = candidate
            batch = self._trial_batch()
            segments = self._segments_of(batch)
            # flex_attention has devices where all is there but the gradient.
            with torch.set_grad_enabled(candidate == "flex"), self.autocast():
                features_TD = self.enter(self._run, batch, segments)
            if features_TD.requires_grad:
                some_weight = next(iter(self.trainable().values()))
                torch.autograd.grad(features_TD.float().sum(), some_weight, allow_unused=True)
        except (UnsupportedAttention, NotImplementedError, ValueError, TypeError, KeyError) as error:
            return str(error).splitlines()[0].split(". ")[0]
        kernels = dict(segments.used)
        # Layers may differ; the costliest decides.
        self._kernel = next((name for name in COSTLIEST_FIRST if name in kernels), None)
        if not is_ours:
            self.attention_reason = DENSE_COST
        elif not kernels:
            self.attention_reason = "this model has no attention that could be chosen"
        else:
            self.attention_reason = "; ".join(kernels[name] for name in COSTLIEST_FIRST if name in kernels)
        return None

    def compile_layers(self, warn: Warn, backend: str = "inductor") -> None:
        """torch.compile of each part of the decoder's layers, for batches of any shape. Attention stays outside of the
        graphs: its kernels are compiled already, and its cuts differ from batch to batch. Parts, not layers: of a layer
        that recomputes its activations torch would compile nothing, and not say so. Raises UserError."""
        kinds = set(self.base._no_split_modules or ())
        layers = [module for module in self.base.modules() if type(module).__name__ in kinds]
        if not layers:
            raise UserError("engine.no_layers", "compute.compile")
        register(torch.compiler.disable)
        for layer in layers:
            for part in layer.children():
                part.compile(dynamic=True, backend=backend)
        warn(
            "compile",
            f"{len(layers)} layers are compiled during the first steps, which takes minutes; a resumed run goes on as "
            "it would have but for rounding, since compiled code depends on the shapes that it meets first",
        )

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
            logits_TV: Tensor = self.enter(self._features_to_logits, batch)
        return logits_TV.float()

    def _features_to_logits(self, batch: Batch) -> Tensor:
        logits_TV: Tensor = self.enter_head(self.logits, self.features(batch))
        return logits_TV

    def _trial_batch(self) -> Batch:
        token_ids = [1 + number * 7 % (self.vocabulary - 1) for number in range(2 * TRIAL_TOKENS)]
        return of_tokens([[token_ids[:TRIAL_TOKENS], token_ids[TRIAL_TOKENS:]]]).to(self.device)


def _are_close(first: Tensor, second: Tensor, dtype: torch.dtype) -> bool:
    return bool(relative_difference(first, second) <= HEAD_TOLERANCE[dtype])


def relative_difference(first: Tensor, second: Tensor) -> float:
    """The largest difference of two tensors over the largest magnitude of the first."""
    return float((first - second).abs().max() / first.abs().max().clamp_min(1e-30))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences what a user can do nothing about: transformers 5.23 renamed gradient checkpointing, and PEFT 0.21 and
    transformers 5.17 only know the old names; PEFT doubts GPT-2's tied weights, which come back equal all the same, and
    looks for the ranks of experts among the names of modules alone, though it heeds them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        warnings.filterwarnings("ignore", "You have requested `ensure_weight_tying`", UserWarning)
        yield
