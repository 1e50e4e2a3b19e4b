"""`pegbox merge`: an adapter becomes part of its base, and what comes out is a model like any other.

It is what a server takes that knows no adapters, or not all that was trained beside them. The base is read in the type
that it was saved in; an adapter that was trained over 4 bits too is laid on the base's own weights, which is what it
approximated. Each layer is merged in fp32 and rounded once: adding in bf16 would round the change before it is added.

What is written is checked in three ways: each layer merges into what it does when applied, in fp32; the folder, opened
again, holds what was merged to the last bit; and its logits are those of base and adapter side by side. In 16 bits
these differ by the rounding of all weights, some percent of their scale, and by more where a token close to the border
between two experts goes to the other one: it then has to be much nearer to what was trained than the base alone is.
"""

import secrets
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from core.errors import UserError
from worker.engine import attention
from worker.engine.adapters import is_tied, tokens_of
from worker.engine.loading import make_room_for, open_model, own_dtype, read_config
from worker.engine.loss import logits_of
from worker.engine.model import LanguageModel, quiet_libraries, relative_difference
from worker.engine.model_card import merged_card
from worker.engine.result import (
    MERGE_TOLERANCE,
    PROCESSOR_FILES,
    BrokenResult,
    bring_to,
    demand_layers_merge,
    demand_same,
    probe_of,
)

ROUNDED_TOLERANCE = 5e-2  # of the largest logit, where weights are rounded to 16 bits
SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Merged:
    """Differences of logits, relative to the largest: what the adapter does, and what merging cost of it."""

    dtype: torch.dtype
    effect: float
    rounding: float


def merge(adapter: Path, base_path: Path, out: Path) -> Merged:
    """Writes the folder `out` whole. Raises UserError, and BrokenResult where the merged model is not what was
    trained."""
    if out.exists():
        raise UserError("merge.out_exists", "--out", folder=str(out))
    attention.register()
    config = LoraConfig.from_pretrained(adapter)
    dtype = own_dtype(read_config(base_path))
    base = open_model(base_path, read_config(base_path), dtype=dtype)
    make_room_for(base, tokens_of(config))
    was_tied = is_tied(base)
    with quiet_libraries():
        model = PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=True)
    ready = _ready(model, dtype)
    probe = probe_of(ready)
    applied = logits_of(ready, probe)
    with model.disable_adapter():
        effect = relative_difference(logits_of(ready, probe), applied)
    demand_layers_merge(ready)
    merged = _folded(model, dtype, was_tied=was_tied)
    staging = out.with_name(f".tmp-{out.name}-{secrets.token_hex(4)}")
    staging.mkdir(parents=True)
    try:
        if (adapter / "generation_config.json").is_file():
            merged.generation_config = GenerationConfig.from_pretrained(adapter)
        merged.save_pretrained(staging, max_shard_size=SHARD_SIZE)
        AutoTokenizer.from_pretrained(adapter, local_files_only=True).save_pretrained(staging)
        for name in PROCESSOR_FILES:
            if (base_path / name).is_file():
                shutil.copyfile(base_path / name, staging / name)
        (staging / "README.md").write_text(merged_card(str(config.base_model_name_or_path), out.name))
        again = open_model(staging, read_config(staging), dtype=dtype)
        demand_same(again.state_dict(), merged.state_dict())
        rounding = relative_difference(applied, logits_of(_ready(again, dtype), probe))
        tolerated = MERGE_TOLERANCE if dtype is torch.float32 else max(ROUNDED_TOLERANCE, effect / 2)
        if not rounding <= tolerated:
            raise BrokenResult(f"the merged model's logits are off by {rounding:.2g} of their scale")
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Merged(dtype, effect, rounding)


def _ready(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> LanguageModel:
    ready = LanguageModel(model.eval(), torch.device("cpu"), dtype)
    ready.choose_attention("auto", lambda code, text: None)
    ready.find_head(lambda code, text: None)
    return ready


@torch.no_grad()
def _folded(model: PeftModel, dtype: torch.dtype, *, was_tied: bool) -> PreTrainedModel:
    """The base with everything that was trained in it, in `dtype`; the adapter is gone."""
    with warnings.catch_warnings():
        # What is merged here is not merged once more below, which PEFT finds worth a warning.
        warnings.filterwarnings("ignore", "All adapters are already merged", UserWarning)
        for layer in [layer for layer in model.modules() if isinstance(layer, LoraLayer)]:
            weights = list(layer.get_base_layer().parameters())
            types = [weight.dtype for weight in weights]
            for weight in weights:
                weight.data = weight.data.float()
            layer.merge()
            for weight, own in zip(weights, types, strict=True):
                weight.data = weight.data.to(own)
        # Of layers that were trained as one it leaves two that are equal, and notes in the config that they are two.
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied", UserWarning)
        base: PreTrainedModel = model.merge_and_unload()
    if was_tied:
        assert torch.equal(base.get_input_embeddings().weight, base.get_output_embeddings().weight)
        base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = True
        base.tie_weights()
    bring_to(dtype, base)
    return base
