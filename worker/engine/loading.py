"""From a folder and a spec to a model that can be trained."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from core.spec import Adapter, JobSpec
from worker.engine import attention
from worker.engine.adapters import with_adapters
from worker.engine.libraries import tame_deepspeed
from worker.engine.model import TORCH_DTYPES, LanguageModel, Warn, quiet_libraries


def load_model(path: Path, spec: JobSpec, asked_attention: str, device: torch.device, warn: Warn) -> LanguageModel:
    """The model of `spec` (every `auto` but attention resolved) on `device`, in training mode.

    Adapters are drawn from torch's generator as it stands. Raises UserError."""
    attention.register()
    tame_deepspeed()
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
        model = with_adapters(base, spec.method, spec.model.adapter, warn)
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
