"""Bytes that a job needs on each device, as a sum of named terms.

It is an estimate, worked out from the architecture and from what the engine keeps: which tensors autograd saves for the
backward pass, and in which type, is read off the engine's own forward pass. `bench/memory.py` runs that pass without
memory (fake tensors) and prints both side by side; docs/memory.md has the table.

What is counted is the moment of most: the backward pass of a step's second micro-batch, when the first one's gradients
lie there in full. Trained weights, their gradients and moments are fp32, whatever the arithmetic; under bf16 autocast
casts each trained matrix, and the graph keeps the copy until the backward pass has used it.

Letters: h hidden size, q and k widths of queries and of keys, i of the MLP; n tokens of one forward pass on a device.
"""

from dataclasses import dataclass
from typing import Literal

from core.architecture import Architecture
from core.errors import N_
from core.spec import Adapter, AnyMethod
from core.zero import BUCKET_ELEMENTS

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
Offload = Literal["none", "optimizer", "optimizer_and_params"]
Term = Literal["weights", "gradients", "moments", "masters", "activations", "working", "casts", "gathered", "process"]

# As a page calls them.
TERM_TITLES: dict[Term, str] = {
    "weights": N_("weights"),
    "gradients": N_("gradients"),
    "moments": N_("optimizer states"),
    "masters": N_("master weights of the shards"),
    "activations": N_("activations"),
    "working": N_("what is at work: a chunk of logits, or the gradients inside one layer"),
    "casts": N_("copies that are computed with: bf16 of trained weights, experts with their adapters"),
    "gathered": N_("gathered weights and buckets"),
    "process": N_("process and libraries"),
}

# How `estimate_memory` works each out, for a page. T trained parameters, F bytes of the frozen ones, R devices,
# L layers, n tokens of the largest forward pass, h hidden size, V vocabulary; c bytes of a number that is computed with
# and r of one that passes from layer to layer: 4 if all is trained, else c.
TERM_FORMULAS: dict[Term, str] = {
    "weights": N_("4 T + F; over R under stage 3; none here if weights are offloaded"),
    "gradients": N_("4 T; over R from stage 2 on; none here under offload"),
    "moments": N_(
        "8 T with adamw; in 8 bits 2 T and 8 bytes for every 256 values, if paged those 8 bytes alone; over R from "
        "stage 1 on; none here under offload"
    ),
    "masters": N_("4 T / R from stage 1 on; none under stage 0 or offload"),
    "activations": N_(
        "L times what a layer keeps of n tokens, and n h (4 + 3 r) around the layers, 4 n h more if all is trained; "
        "with checkpointing L n h r and one layer's in place of all layers'"
    ),
    "working": N_(
        "the larger of a chunk of logits (8 V a row, c V more in 16 bits, and a trained head's gradient) and what is "
        "under way in a layer (2 c n times the width of its MLP, of experts c n h for each that a token meets, and a "
        "trained matrix' gradient); 4 V h of a trained head; c times the row's length squared of a dense mask"
    ),
    "casts": N_(
        "c for each value of a trained matrix in 16 bits, none where LoRA is fused; c for each of experts with "
        "adapters; over L with checkpointing"
    ),
    "gathered": N_(
        "none on one device without ZeRO; two buckets of 4 T, at most 32 MiB each, 64 MiB from stage 1 on; under "
        "stage 3 also 4 T + F, of at most a billion values"
    ),
    "process": N_("what driver and libraries hold: 1,200 MiB on a GPU, 450 MiB on a CPU"),
}

FP32 = 4  # bytes
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# NF4 with double quantisation: 4 bits, a byte for every 64 values, fp32 for every 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Logits of one chunk in fp32 (worker.engine.loss), and its rows at most. Measured on one CPU thread: with a vocabulary
# of 32,000, 256 rows (32 MiB) are fastest, forward and backward; 2,048 take 1.3x as long, 32 take 1.6x. With one of
# 4,096, 1,024 rows are, and 2,048 take 1.3x as long. A GPU wants larger matrices to be busy.
CHUNK_LOGITS_BYTES = {"cpu": 32 << 20, "gpu": 256 << 20}
MOST_CHUNK_ROWS = {"cpu": 1024, "gpu": 1 << 20}
# CUDA's context, cuBLAS' workspaces and their like; on a CPU torch and its libraries (436 MiB, measured).
PROCESS_BYTES = {"cpu": 450 << 20, "gpu": 1200 << 20}
# core.zero's stage3_max_live_parameters.
MOST_LIVE_VALUES = 1_000_000_000


@dataclass(frozen=True)
class Load:
    """What is to be held: a model, how it is trained, and the largest forward pass of one device."""

    shape: Architecture  # with nothing missing
    method: AnyMethod
    dtype: Literal["bf16", "fp16", "fp32"]
    attention: Literal["flash", "flex", "sdpa", "eager"]
    optimizer: OptimizerName
    gradient_checkpointing: bool
    num_ranks: int
    zero_stage: Literal[0, 1, 2, 3]
    offload: Offload
    tokens: int  # slots of the largest forward pass of one device
    longest_row: int  # tokens
    longest_sample: int  # tokens
    on_gpu: bool


@dataclass(frozen=True)
class MemoryPlan:
    terms: dict[Term, int]  # bytes on each device
    host_bytes: int  # in CPU memory beside, by each rank

    @property
    def total(self) -> int:
        return sum(self.terms.values())


def estimate_memory(load: Load) -> MemoryPlan:
    """Of one device, at its peak."""
    assert not load.shape.missing
    counts = count_parameters(load)
    shards = load.num_ranks
    trained, frozen_bytes = counts.trained, counts.frozen_bytes
    weights = FP32 * trained + frozen_bytes
    gradients = FP32 * trained
    moments = optimizer_state_bytes(trained, load.optimizer)
    masters = 0
    host = 0
    if load.zero_stage >= 1:
        moments //= shards
        masters = FP32 * trained // shards
    if load.zero_stage >= 2:
        gradients //= shards
    if load.zero_stage == 3:
        weights //= shards
    if load.offload != "none":
        host += moments + masters + gradients
        moments = masters = gradients = 0
    if load.offload == "optimizer_and_params":
        host += weights
        weights = 0
    terms: dict[Term, int] = {
        "weights": weights,
        "gradients": gradients,
        "moments": moments,
        "masters": masters,
        **_passing(load, counts),
        "gathered": _gathered(load, counts, whole=FP32 * trained + frozen_bytes),
        "process": PROCESS_BYTES["gpu" if load.on_gpu else "cpu"],
    }
    return MemoryPlan(terms, host)


# -- parameters ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    trained: int
    frozen_bytes: int
    trained_matrices: int  # values that autocast copies, adapters included
    largest_matrix: int  # trained, values
    total: int


def count_parameters(load: Load) -> Counts:
    parameters = load.shape.parameters
    compute = BYTES[load.dtype]
    head = parameters.head or parameters.embedding
    if not isinstance(load.method, Adapter):
        text = parameters.total - parameters.other
        matrices = parameters.attention + parameters.mlp + parameters.experts + head
        return Counts(text, compute * parameters.other, matrices, head, parameters.total)
    adapters = count_adapter_parameters(load.shape, load.method)
    if load.method.type == "qlora":
        # bitsandbytes quantises linear layers; experts in one tensor, embedding and head stay as they are.
        quantised = parameters.attention + parameters.mlp
        frozen = round(NF4_BYTES * quantised) + compute * (parameters.total - quantised)
    else:
        frozen = compute * parameters.total
    largest = load.method.rank * max(load.shape.hidden_size or 0, load.shape.intermediate_size or 0)
    return Counts(adapters, frozen, adapters, largest, parameters.total)


def count_adapter_parameters(shape: Architecture, method: Adapter) -> int:
    """Of a LoRA: rank x (in + out) for each layer that gets one. Layers that are named in a way that no family has here
    are not counted, nor is what `modules_to_save` trains in full."""
    assert shape.num_layers is not None
    return shape.num_layers * sum(adapters_of_layer(shape, method).values())


def adapters_of_layer(shape: Architecture, method: Adapter) -> dict[str, int]:
    """Parameters of each adapter of a layer, by the name of what it is laid on; experts whose weights are one tensor
    share one."""
    h, q, k = shape.hidden_size, shape.query_width, shape.key_value_width
    assert h is not None and q is not None and k is not None
    sides = {"q_proj": h + q, "k_proj": h + k, "v_proj": h + k, "o_proj": q + h}
    num_experts_of: dict[str, int] = {}
    if shape.parameters.mlp and shape.intermediate_size is not None and not shape.num_experts:
        mlp = ("gate_proj", "up_proj", "down_proj") if shape.is_gated else ("up_proj", "down_proj")
        sides |= dict.fromkeys(mlp, h + shape.intermediate_size)
    if shape.num_experts:
        assert shape.expert_size is not None
        sides |= {"gate_up_proj": h + 2 * shape.expert_size, "down_proj": shape.expert_size + h}
        num_experts_of = dict.fromkeys(("gate_up_proj", "down_proj"), shape.num_experts)
    asked = method.target_modules
    wanted = sides if asked == "all-linear" else {name.rsplit(".", 1)[-1] for name in asked}
    left_out = {name.rsplit(".", 1)[-1] for name in method.exclude_modules}
    expert_rank = max(1, method.rank // (shape.experts_per_token or 1))
    return {
        name: (expert_rank * num_experts_of[name] if name in num_experts_of else method.rank) * width
        for name, width in sides.items()
        if name in wanted and name not in left_out
    }


def optimizer_state_bytes(num_values: int, name: OptimizerName) -> int:
    """On the device, of one tensor: two moments in fp32, or in 8 bits with an fp32 scale for every 256 values."""
    if name == "adamw" or num_values < 4096:
        return 8 * num_values
    scales = 2 * 4 * -(-num_values // 256)
    is_paged = name == "paged_adamw_8bit" and num_values >= 100_000
    return scales if is_paged else 2 * num_values + scales


# -- what a pass leaves behind ---------------------------------------------------------------------------------------


def _passing(load: Load, counts: Counts) -> dict[Term, int]:
    """Activations, what is at work and autocast's copies, which the graph keeps as it keeps activations: all of them,
    or under checkpointing one layer's."""
    shape = load.shape
    assert shape.hidden_size is not None and shape.num_layers is not None
    compute = BYTES[load.dtype]
    is_full = not isinstance(load.method, Adapter)
    residual = FP32 if is_full else compute
    layer = activation_bytes(load)
    casts = compute * counts.trained_matrices if load.dtype != "fp32" and not is_fused(load) else 0
    casts += compute * _merged_experts(load)
    around = load.tokens * shape.hidden_size * (FP32 + FP32 * is_full + 3 * residual)
    # The decoder's backward pass begins when all logits are through.
    working = max(_logits(load), _under_way(load)) + _held_by_head(load)
    if not load.gradient_checkpointing:
        return {"activations": shape.num_layers * layer + around, "working": working, "casts": casts}
    kept = shape.num_layers * load.tokens * shape.hidden_size * residual + around
    return {"activations": kept + layer, "working": working, "casts": casts // shape.num_layers}


def _merged_experts(load: Load) -> int:
    """Values of the experts that bear adapters: PEFT adds a layer's experts and their adapters up to one tensor, by
    which the grouped product multiplies, and which the graph keeps."""
    shape, method = load.shape, load.method
    if not isinstance(method, Adapter) or not shape.num_experts:
        return 0
    adapted = adapters_of_layer(shape, method)
    thirds = 2 * ("gate_up_proj" in adapted) + ("down_proj" in adapted)  # gate and up are two matrices of three
    return shape.parameters.experts * thirds // 3


def is_fused(load: Load) -> bool:
    """Whether a layer and its adapter are one step of the graph, which keeps their input as it came: see
    worker.engine.lora_linear. (Under torch.compile they are not, which is not looked at here.)"""
    method = load.method
    return method.type == "lora" and load.zero_stage != 3 and not method.dropout and not method.use_dora


def activation_bytes(load: Load) -> int:
    """What autograd keeps of one layer, without checkpointing."""
    shape, n = load.shape, load.tokens
    h, q, k = shape.hidden_size, shape.query_width, shape.key_value_width
    assert h is not None and q is not None and k is not None and shape.num_heads is not None
    c = BYTES[load.dtype]
    is_full = not isinstance(load.method, Adapter)
    is_cast = load.dtype != "fp32"
    # A norm keeps its input in fp32 and, where its gain is trained, the normalised input; its output is kept by the
    # linear layers behind it: once, or cast by autocast for each of them.
    norm = FP32 + FP32 * is_full
    num_norms = shape.norms_per_layer or 2
    inputs = c * (3 + 2) if is_cast and not is_fused(load) else c * 2
    by_token = h * (num_norms * norm + inputs)
    # Queries and keys after rotation, values, the output and the copy of it in which segments lie end to end.
    by_token += c * (q + k) + c * k + 2 * c * q
    if shape.has_query_norm:
        by_token += norm * (q + k)
    by_token += _mlp(shape, c)
    if is_cast and not is_full and not is_fused(load):
        by_token += c * q  # the output projection's own cast, through the adapter's fp32
    return n * by_token + _scores(load)


def _under_way(load: Load) -> int:
    """Gradients inside one layer of the backward pass: two of the MLP's width, of experts also of what is gathered for
    them, and one matrix' before it is added."""
    shape = load.shape
    c = BYTES[load.dtype]
    if shape.num_experts:
        met = shape.experts_per_token or 0
        width, gathered = (shape.expert_size or 0) * met, (shape.hidden_size or 0) * met
        side = (shape.expert_size or 0) * shape.num_experts
    else:
        width, gathered, side = shape.intermediate_size or 0, 0, shape.intermediate_size or 0
    matrix = 0
    if not isinstance(load.method, Adapter):
        matrix = (FP32 + (c if load.dtype != "fp32" else 0)) * (shape.hidden_size or 0) * side
    return c * (2 * width + gathered) * load.tokens + matrix


def _mlp(shape: Architecture, c: int) -> int:
    """Bytes a token: gate, its activation, up and their product; of experts, as many as a token meets, with the inputs
    and outputs that are gathered for them."""
    h = shape.hidden_size
    assert h is not None
    if not shape.num_experts:
        assert shape.intermediate_size is not None
        return 4 * c * shape.intermediate_size
    assert shape.expert_size is not None and shape.experts_per_token is not None
    return shape.experts_per_token * (4 * c * shape.expert_size + 2 * c * h)


def _scores(load: Load) -> int:
    """Attention scores of one layer, where the path stores them: probabilities in fp32, and their cast."""
    shape = load.shape
    assert shape.num_heads is not None
    c = BYTES[load.dtype]
    kept = FP32 + (c if load.dtype != "fp32" else 0)
    if load.attention == "eager":
        return kept * shape.num_heads * load.tokens * load.longest_row
    if load.attention == "flash" and shape.has_plain_scores:
        return (kept + c) * shape.num_heads * load.tokens * load.longest_sample
    return 0


def chunk_rows(vocabulary: int, *, on_gpu: bool) -> int:
    """Targets whose logits are made at a time."""
    device = "gpu" if on_gpu else "cpu"
    return max(1, min(MOST_CHUNK_ROWS[device], CHUNK_LOGITS_BYTES[device] // (FP32 * vocabulary)))


def _logits(load: Load) -> int:
    """Of one chunk at the head: logits, what becomes their gradients in fp32, and in 16 bits their copy in fp32; where
    the head is trained, its gradient too."""
    shape = load.shape
    assert shape.vocabulary is not None
    rows = min(chunk_rows(shape.vocabulary, on_gpu=load.on_gpu), load.tokens)
    is_cast = load.dtype != "fp32"
    logits = rows * shape.vocabulary * (2 * FP32 + (BYTES[load.dtype] if is_cast else 0))
    if isinstance(load.method, Adapter):
        return logits
    # One chunk's gradient of the head's weights, before it is added to the others'.
    assert shape.hidden_size is not None
    return logits + shape.vocabulary * shape.hidden_size * (FP32 + (BYTES[load.dtype] if is_cast else 0))


def _held_by_head(load: Load) -> int:
    """A trained head's gradient, which is added to those of the micro-batches before when the decoder's pass is
    through, and a dense mask, of which one serves all layers."""
    shape = load.shape
    assert shape.vocabulary is not None and shape.hidden_size is not None
    gradient = 0 if isinstance(load.method, Adapter) else FP32 * shape.vocabulary * shape.hidden_size
    mask = load.longest_row**2 if load.attention in ("sdpa", "eager") else 0
    return gradient + mask * BYTES[load.dtype]


def _gathered(load: Load, counts: Counts, whole: int) -> int:
    """`whole` are the weights' bytes, unsharded."""
    if load.num_ranks == 1 and load.zero_stage == 0:
        return 0
    if load.zero_stage == 0:
        return 2 * min(FP32 * counts.trained, 32 << 20)  # worker.engine.gradient_sum
    buckets = 2 * FP32 * min(counts.trained, BUCKET_ELEMENTS)  # two are under way
    if load.zero_stage < 3:
        return buckets
    return buckets + round(whole * min(1.0, MOST_LIVE_VALUES / counts.total))
