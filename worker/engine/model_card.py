"""README.md of a result: the facts of its run, in the form that model hubs read, and how to serve it.

A server takes a plain LoRA beside its base. What else was trained with it (whole layers, rows for new tokens, experts,
magnitudes) most of them refuse or pass over, so such an adapter is to be merged first.
"""

from dataclasses import dataclass

from core.spec import JobSpec


@dataclass(frozen=True)
class Facts:
    """What the model card says of the run."""

    base: str
    datasets: tuple[str, ...]
    steps: int
    epochs: float
    trained_tokens: int
    num_samples: int
    loss: float | None  # of the last step
    eval_loss: float | None
    trainable_parameters: int
    total_parameters: int


@dataclass(frozen=True)
class AdapterFacts:
    """What decides how an adapter is served. `num_embeddings`: the rows that the base's embedding has to have before
    the adapter fits, where tokens were added."""

    rank: int
    alpha: float
    is_plain: bool
    num_embeddings: int | None


def model_card(spec: JobSpec, facts: Facts, model_class: str, adapter: AdapterFacts | None) -> str:
    """`model_class`: the class of transformers that opens the model."""
    method = spec.method
    library = "transformers" if adapter is None else "peft"
    head = f"base_model: {facts.base}\nlibrary_name: {library}\n"
    if adapter is not None:
        over = " over its base in 4 bits" if method.type == "qlora" else ""
        kind = f"A LoRA adapter (rank {adapter.rank}, alpha {adapter.alpha:g}), trained{over} by Pegbox."
        use = _adapter_use(facts.base, model_class, adapter.num_embeddings)
        serve = _serve_adapter(facts.base, adapter.rank) if adapter.is_plain else _serve_merged(facts.base)
    else:
        kind = "A model fine-tuned in full by Pegbox."
        use = _model_use(model_class)
        serve = _serve_model("PATH OF THIS FOLDER")
    return f"""---
{head}tags: [pegbox]
---

# {spec.name or facts.base}

{kind}

| | |
|---|---|
{_table(spec, facts)}

## In Python

{use}

## Served

{serve}
"""


def merged_card(base: str, name: str) -> str:
    return f"""---
base_model: {base}
library_name: transformers
tags: [pegbox]
---

# {name}

{base} with a LoRA adapter merged into its weights by Pegbox.

## Served

{_serve_model("PATH OF THIS FOLDER")}
"""


def _table(spec: JobSpec, facts: Facts) -> str:
    share = facts.trainable_parameters / facts.total_parameters
    rows = [
        ("Base model", facts.base),
        ("Data", ", ".join(facts.datasets)),
        ("Samples trained an epoch", f"{facts.num_samples:,}"),
        ("Epochs", f"{facts.epochs:g}"),
        ("Optimizer steps", f"{facts.steps:,}"),
        ("Trained tokens", f"{facts.trained_tokens:,}"),
        ("Trained parameters", f"{facts.trainable_parameters:,} of {facts.total_parameters:,} ({share:.2%})"),
        ("Peak learning rate", f"{spec.schedule.learning_rate:g}, {spec.schedule.decay}"),
        ("Longest sample", f"{spec.data.max_length} tokens"),
        (
            "Trained on",
            {"assistant": "assistant turns", "last": "the last turn", "all": "every token"}[spec.data.train_on],
        ),
        ("Seed", str(spec.seed)),
    ]
    if facts.loss is not None:  # a run that was resumed behind its last step made none
        rows.append(("Loss of the last step", f"{facts.loss:.4f}"))
    if facts.eval_loss is not None:
        rows.append(("Loss on held-out samples", f"{facts.eval_loss:.4f}"))
    return "\n".join(f"| {name} | {value} |" for name, value in rows)


# -- in Python -------------------------------------------------------------------------------------------------------


def _adapter_use(base: str, model_class: str, num_embeddings: int | None) -> str:
    grown = "" if num_embeddings is None else f"\nbase.resize_token_embeddings({num_embeddings}, mean_resizing=False)"
    return f"""```python
from peft import PeftModel
from transformers import {model_class}, AutoTokenizer

base = {model_class}.from_pretrained("{base}", dtype="auto"){grown}
model = PeftModel.from_pretrained(base, "PATH OF THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS FOLDER")
```"""


def _model_use(model_class: str) -> str:
    return f"""```python
from transformers import {model_class}, AutoTokenizer

model = {model_class}.from_pretrained("PATH OF THIS FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS FOLDER")
```"""


# -- served ----------------------------------------------------------------------------------------------------------


def _serve_adapter(base: str, rank: int) -> str:
    return f"""vLLM loads the adapter beside its base:

```sh
vllm serve {base} --enable-lora --max-lora-rank {_vllm_rank(rank)} --lora-modules tuned="PATH OF THIS FOLDER"
```

Or as one model, with no adapter left:

{_serve_merged(base)}"""


def _serve_merged(base: str) -> str:
    return f"""```sh
pegbox merge "PATH OF THIS FOLDER" --out merged --base "PATH OF {base}"
```

{_serve_model("merged")}"""


def _serve_model(folder: str) -> str:
    return f"""```sh
vllm serve "{folder}"
```

Ollama imports a folder of safetensors, of the families that it knows:

```sh
echo 'FROM {folder}' > Modelfile
ollama create tuned -f Modelfile
ollama run tuned
```"""


def _vllm_rank(rank: int) -> int:
    """The least of the ranks that vLLM reserves room for."""
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if rank <= size), rank)
