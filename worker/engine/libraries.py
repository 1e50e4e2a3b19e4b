"""What other people's libraries are told before they speak or look around."""

import os

import torch


def tame_deepspeed() -> None:
    """To be called before a model is loaded or saved, which may import DeepSpeed: told what the device is, it does not
    guess, and does not print on stdout, where commands print JSON, what it guessed."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
