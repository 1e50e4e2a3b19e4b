"""QLoRA's base: frozen weights in 4 bits (NF4, block scales quantised once more), read in the type that is computed in.

bitsandbytes quantises linear layers and nothing else. Head and embedding stay as they are, so do routers, which choose
and must not be rounded into other choices, and layers that are trained in full. The experts of a mixture that
transformers keeps as one tensor are no linear layers: of such a model next to nothing would be quantised, and a person
who counted on a quarter of the memory would run out of it. So what would become of the model is worked out on a
skeleton without weights, before a byte of them is read.

The share is taken of the decoder's weights outside of embeddings and head. These stay in any model, and are so much of
a small one that a rule over all weights would refuse what works: 42 % of demo/tiny-llama, a quarter of a Qwen3 of
0.6 B. A vision tower counts on neither side; its linear layers are quantised too, as text does not run it.
"""

from collections import Counter
from collections.abc import Iterator

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from core.errors import UserError
from core.spec import Adapter
from worker.engine.adapters import is_named, refuse_unknown_modules, routers

LEAST_QUANTISED = 0.8  # of the weights outside of embeddings and head


def plan_quantisation(skeleton: PreTrainedModel, method: Adapter, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers is told for this model; `skeleton` is on the meta device. Raises UserError."""
    refuse_unknown_modules(skeleton, method)
    kept = _kept(skeleton, method)
    quantised = {id(layer.weight) for name, layer in _linear(skeleton) if name not in kept}
    vocabulary = _vocabulary(skeleton)
    sizes = {True: 0, False: 0}
    kinds: Counter[str] = Counter()  # of what would stay as it is
    for name, weight in skeleton.get_decoder().named_parameters():
        if id(weight) not in vocabulary:
            sizes[id(weight) in quantised] += weight.numel()
            if id(weight) not in quantised:
                kinds[".".join(name.split(".")[-2:])] += weight.numel()
    share = sizes[True] / (sizes[True] + sizes[False])
    if share < LEAST_QUANTISED:
        raise UserError(
            "engine.too_few_quantised",
            "method.type",
            share=share,
            least=LEAST_QUANTISED,
            num_kept=sizes[False],
            kept=", ".join(name for name, _ in kinds.most_common(2)),
            num_bytes=sizes[True] // 2 + sizes[False] * dtype.itemsize,
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=sorted(kept),
    )


def _linear(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """What transformers hands to bitsandbytes: linear layers proper, no subclass of them, and GPT-2's."""
    return (
        (name, module) for name, module in model.named_modules() if type(module) is nn.Linear or type(module) is Conv1D
    )


def _kept(skeleton: PreTrainedModel, method: Adapter) -> set[str]:
    head = skeleton.get_output_embeddings()
    named = {name for name, module in _linear(skeleton) if module is head or is_named(name, method.modules_to_save)}
    return named | set(routers(skeleton))


def _vocabulary(skeleton: PreTrainedModel) -> set[int]:
    """Identities of the weights of embeddings and head."""
    layers: list[nn.Module] = [module for module in skeleton.modules() if isinstance(module, nn.Embedding)]
    head = skeleton.get_output_embeddings()
    return {id(layer.weight) for layer in (*layers, *([] if head is None else [head]))}


def keep_canonical(model: PreTrainedModel) -> None:
    """On CPUs with AVX-512 and bf16, bitsandbytes repacks a layer for inference at its first pass in eval mode, for
    good: from then on no gradient passes through it, so training behind an evaluation would learn from nothing."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
