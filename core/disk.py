"""Bytes that a job leaves on the disk of its host, worked out before it writes any.

What is written is known: what is trained and its two moments, in fp32, the generators of every rank, and around each
tensor a few hundred bytes of headers, which weigh in small models alone. Those are measured on what safetensors 0.8
and torch 2.13 write. docs/forecast.md has the terms; a test holds them against real runs.

Not counted: what `modules_to_save` and new tokens train beside the adapters, and the data file itself, which the host
keeps as it came.
"""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from core.architecture import Architecture
from core.memory import FP32, OptimizerName, adapters_of_layer
from core.profile import ModelProfile
from core.spec import Adapter, JobSpec

# A tensor's entry in a safetensors header, without its name, and names as they are usual.
HEADER_BYTES = 64
NAME_BYTES = {"adapter": 68, "full": 35}
SAVED_NAME_BYTES = 60  # of an adapter in a result
# Two moments and a counter in torch's format, each a file within a zip; in 8 bits the counter is no tensor.
MOMENT_HEADER_BYTES = {"adamw": 843, "adamw_8bit": 600, "paged_adamw_8bit": 600}
QUANTILES_BYTES = 2 * 256 * 4  # of 8-bit moments, once
SMALLEST_IN_8_BITS = 4096  # values; smaller tensors stay in fp32
# A rank's piece of a tensor and of its moments names it four times and says where it lies.
PIECE_HEADER_BYTES = 300
GENERATORS_BYTES = 15_640  # of a rank: Python's, numpy's and torch's

# adapter_config.json, README.md and generation_config.json; the first names every matrix that has an adapter.
ADAPTER_TEXT_BYTES = 2_550
ADAPTER_ENTRY_BYTES = 42
MODEL_TEXT_BYTES = 2_000

TOKEN_BYTES = 5  # of the cache: an id and whether it is trained
SAMPLE_BYTES = 16  # where it begins, and its line


class DiskPlan(BaseModel):
    """On the host of the job, in bytes."""

    model_config = ConfigDict(frozen=True)

    checkpoint_bytes: int  # each, over all ranks
    most_checkpoints: int  # at a time, with the one that is being written
    kept_checkpoints: int  # in the end, at most
    result_bytes: int
    cache_bytes: int  # of tokens; nothing where they lie there already

    @property
    def total_bytes(self) -> int:
        """At the moment of most."""
        return self.most_checkpoints * self.checkpoint_bytes + self.result_bytes + self.cache_bytes

    @property
    def kept_bytes(self) -> int:
        """Of checkpoints."""
        return self.kept_checkpoints * self.checkpoint_bytes


def plan_disk(
    spec: JobSpec, model: ModelProfile, *, num_checkpoints: int, num_tokens: int, num_samples: int
) -> DiskPlan | None:
    """`spec` has its stage resolved; `num_checkpoints` are written in all, tokens and samples read. None where the
    model's sizes are not known."""
    shape = model.shape
    if shape is None or shape.missing:
        return None
    kept = min(num_checkpoints, spec.checkpoint.keep_last + spec.checkpoint.keep_best)
    return DiskPlan(
        checkpoint_bytes=checkpoint_bytes(spec, shape),
        most_checkpoints=min(num_checkpoints, kept + 1),
        kept_checkpoints=kept,
        result_bytes=result_bytes(spec, model, shape),
        cache_bytes=TOKEN_BYTES * num_tokens + SAMPLE_BYTES * num_samples,
    )


def checkpoint_bytes(spec: JobSpec, shape: Architecture) -> int:
    groups = trained_tensors(spec, shape)
    num_tensors = sum(group.num_tensors for group in groups)
    num_ranks, stage = spec.parallel.devices, spec.parallel.zero_stage
    name = NAME_BYTES["adapter" if isinstance(spec.method, Adapter) else "full"]
    numbers = sum(FP32 * group.num_values + group.moment_bytes(spec.optimizer.name) for group in groups)
    quantiles = 0 if spec.optimizer.name == "adamw" else QUANTILES_BYTES
    if stage in (0, "auto"):
        headers = num_tensors * (HEADER_BYTES + name + MOMENT_HEADER_BYTES[spec.optimizer.name])
    else:
        # Under stage 3 every rank owns a piece of each tensor, before it only borders are cut through.
        num_pieces = num_tensors * num_ranks if stage == 3 else num_tensors + num_ranks - 1
        headers = num_pieces * (PIECE_HEADER_BYTES + 4 * name)
    return numbers + quantiles + headers + num_ranks * GENERATORS_BYTES


@dataclass(frozen=True)
class Tensors:
    """Some that are about equally large."""

    num_tensors: int
    num_values: int  # in all

    def moment_bytes(self, optimizer: OptimizerName) -> int:
        """On disk, where nothing is paged out: in 8 bits two a value, and a scale for every 256 of either moment."""
        if optimizer == "adamw" or self.num_values < SMALLEST_IN_8_BITS * self.num_tensors:
            return 2 * FP32 * self.num_values
        return 2 * self.num_values + 2 * FP32 * -(-self.num_values // 256)


def trained_tensors(spec: JobSpec, shape: Architecture) -> list[Tensors]:
    layers = shape.num_layers
    assert layers is not None
    if isinstance(spec.method, Adapter):
        return [Tensors(2 * layers, layers * size) for size in adapters_of_layer(shape, spec.method).values()]
    kinds = shape.parameters
    norms = (shape.norms_per_layer or 2) + 2 * shape.has_query_norm
    groups = [
        Tensors(1, kinds.embedding),
        Tensors(1, kinds.head),  # none where it is tied
        Tensors(4 * layers, kinds.attention),
        Tensors((3 if shape.is_gated else 2) * layers if not shape.num_experts else layers, kinds.mlp),
        Tensors(2 * layers, kinds.experts),
        Tensors(norms * layers + 1, kinds.norms),
    ]
    return [group for group in groups if group.num_values]


def result_bytes(spec: JobSpec, model: ModelProfile, shape: Architecture) -> int:
    """A model in full is saved in the type that it came in."""
    tokenizer = model.tokenizer_bytes or 0
    if not isinstance(spec.method, Adapter):
        return model.bytes + tokenizer + MODEL_TEXT_BYTES
    groups = trained_tensors(spec, shape)
    num_tensors = sum(group.num_tensors for group in groups)
    headers = num_tensors * (HEADER_BYTES + SAVED_NAME_BYTES)
    config = ADAPTER_TEXT_BYTES + ADAPTER_ENTRY_BYTES * (num_tensors // 2)
    return FP32 * sum(group.num_values for group in groups) + headers + config + tokenizer
