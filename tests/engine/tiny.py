"""Random models of a few thousand weights, of several families, and samples to train them on."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from core.architecture import Architecture, ParametersByKind
from core.layout import lay_out
from core.packing import PlanSettings, Segment, Step
from core.preflight import StepWork
from core.spec import JobSpec, parse_spec
from worker.engine.batches import StepBatch, make_step
from worker.engine.loading import load_model, try_out
from worker.engine.loss import backward
from worker.engine.model import LanguageModel

VOCABULARY = 96
CONTEXT = 256
WINDOW = 8  # shorter than most samples
_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}
# Of a model that nobody made: without parameters beside its head, for counts that are checked by hand.
SHAPE = Architecture(
    model_type="x",
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    intermediate_size=16,
    is_gated=True,
    vocabulary=10,
    num_unlimited_layers=2,
    parameters=ParametersByKind(),
)
FAMILIES: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
        "query_pre_attn_scalar": 8,
    },
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.4},
    "cohere": {"logit_scale": 0.25},
    "phi": {"num_key_value_heads": 4},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": CONTEXT,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}


def tiny_config(family: str, **changes: object) -> AutoConfig:
    shared = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2} if family == "gpt2" else _SHARED
    values = {**shared, **FAMILIES.get(family, {}), **changes}
    return AutoConfig.for_model(family, **values)


def tiny_base(family: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                # Large enough that attention and soft caps matter: initial weights of 0.02 hide everything.
                weight.normal_(0, 0.6 / weight.shape[-1] ** 0.5 if "embed" not in name else 0.6)
    return model


def save_base(folder: Path, family: str = "llama", **changes: object) -> Path:
    tiny_base(family, **changes).save_pretrained(folder)
    return folder


def spec_of(**parts: dict) -> JobSpec:
    """A spec with every `auto` resolved that the engine reads."""
    compute = {"dtype": "fp32", "attention": "auto", "gradient_checkpointing": False, **parts.pop("compute", {})}
    return parse_spec({"data": {"train": [{"dataset": "given"}]}, "compute": compute, **parts})


def load(folder: Path, attention: str = "flash", new_token_ids: Sequence[int] = (), **parts: dict) -> LanguageModel:
    torch.manual_seed(1)
    warnings: list[tuple[str, str]] = []
    spec = spec_of(**parts)
    model = load_model(
        folder,
        spec,
        torch.device("cpu"),
        lambda code, text: warnings.append((code, text)),
        adapter_path=None if spec.model.adapter is None else Path(spec.model.adapter),
        new_token_ids=new_token_ids,
    )
    try_out(model, spec, attention, lambda code, text: warnings.append((code, text)))
    model.warnings = warnings  # type: ignore[attr-defined]
    return model


@dataclass(frozen=True)
class Given:
    """Samples of very unequal length, of which unequal parts are trained."""

    contents: tuple[tuple[np.ndarray, np.ndarray], ...]

    def sample(self, sample_id: int) -> tuple[np.ndarray, np.ndarray]:
        return self.contents[sample_id]

    @property
    def lengths(self) -> list[int]:
        return [len(token_ids) for token_ids, _ in self.contents]

    @property
    def num_targets(self) -> list[int]:
        return [int(trained[1:].sum()) for _, trained in self.contents]


def some_samples(count: int = 12, longest: int = 60, seed: int = 5) -> Given:
    draw = random.Random(seed)
    contents = []
    for number in range(count):
        length = 3 + int((longest - 3) * draw.random() ** 2)
        token_ids = np.array([draw.randrange(3, VOCABULARY) for _ in range(length)], dtype=np.int32)
        share = (0.2, 0.5, 0.9)[number % 3]
        trained = np.array([position > 0 and draw.random() < share for position in range(length)])
        trained[-1] = True
        contents.append((token_ids, trained))
    return Given(tuple(contents))


def step_of(samples: Given, mode: str = "packed", row_length: int = 80, micro_batch_size: int = 1) -> StepBatch:
    """One step of all the samples, laid out as the trainer lays it out."""
    settings = PlanSettings(mode, row_length, "samples", len(samples.contents), micro_batch_size)
    segments = tuple(Segment(number, 0, length) for number, length in enumerate(samples.lengths))
    layout = lay_out(Step(1, 0, 1, segments), settings)
    targets = dict(zip(segments, samples.num_targets, strict=True))
    return make_step(StepWork(1, 1.0, segments, targets, layout), samples)


def gradients(model: LanguageModel, step: StepBatch) -> tuple[float, dict[str, torch.Tensor]]:
    """The step's loss and the gradient of every trained weight."""
    model.model.zero_grad(set_to_none=True)
    loss = sum(float(backward(model, batch, step.num_targets).sum()) for batch in step.batches) / step.num_targets
    return loss, {name: weight.grad.clone() for name, weight in model.trainable().items() if weight.grad is not None}


def moved(model: LanguageModel) -> LanguageModel:
    """One large step away from where it began."""
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=0.05)
    gradients(model, step_of(some_samples()))
    optimizer.step()
    model.model.eval()
    return model


def norm(parts: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([part.norm() for part in parts.values()]).norm())


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Of two gradients, relative to the norm of the first."""
    assert first.keys() == second.keys()
    return norm({name: first[name] - second[name] for name in first}) / norm(first)
