"""Other people's libraries: which are here, and what they are told before they speak or look around."""

import importlib.metadata
import os
import platform
from contextlib import suppress

import torch

# What a run's numbers may depend on.
TOLD = ("bitsandbytes", "deepspeed", "numpy", "peft", "safetensors", "tokenizers", "transformers")


def versions() -> dict[str, str]:
    """By name; what isn't installed is left out."""
    found = {"python": platform.python_version()}
    for name in TOLD:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["torch"] = str(torch.__version__)  # the wheel's own name for itself, such as 2.13.0+cpu
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def tame_deepspeed() -> None:
    """To be called before a model is loaded or saved, which may import DeepSpeed: told what the device is, it does not
    guess, and does not print on stdout, where commands print JSON, what it guessed."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
