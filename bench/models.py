"""Models for benches: the built-in one, a folder, or random weights in the shape of a real one.

Speed and memory depend on a model's shape and not on what it has learned. The tokenizer is always the built-in model's
where none comes with the model: its chat template has generation marks, which TRL needs to train answers alone.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from bench.measure import SCRATCH
from worker.engine.demo_model import ensure_demo_model

MODELS = SCRATCH / "models"

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500_000.0}
SHAPES: Mapping[str, Mapping[str, object]] = {
    # What the built-in model lacks: a vocabulary as large beside its width as real models have it. 15 M parameters.
    "wide": {
        **_LLAMA,
        "vocab_size": 32_000,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        **_LLAMA,
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-3b": {
        **_LLAMA,
        "vocab_size": 128_256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        **_LLAMA,
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
CONTEXT_LENGTH = 32_768  # tokens; positions are computed, so it costs nothing


def find_model(name: str, device: str = "cpu") -> Path:
    """`demo`, a shape's name, or a folder. A shape is made on first use, in fp32 on a CPU and bf16 on a GPU."""
    if name == "demo":
        return demo_model()
    if name not in SHAPES:
        folder = Path(name)
        assert (folder / "config.json").is_file(), (
            f"{name} is neither demo nor {', '.join(SHAPES)} nor a model's folder"
        )
        return folder.resolve()
    folder = MODELS / f"{name}-{device}"
    if not (folder / "config.json").is_file():
        _make(SHAPES[name], folder, device)
    return folder


def demo_model() -> Path:
    """Made in seconds on first use."""
    MODELS.mkdir(parents=True, exist_ok=True)
    return ensure_demo_model(MODELS)


def _make(shape: Mapping[str, object], folder: Path, device: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    values = {**shape, "max_position_embeddings": CONTEXT_LENGTH, "bos_token_id": None}
    model_type = str(values.pop("model_type"))
    config = AutoConfig.for_model(
        model_type, **values, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shutil.rmtree(folder, ignore_errors=True)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    tokenizer.save_pretrained(part)
    model.save_pretrained(part)
    part.rename(folder)
