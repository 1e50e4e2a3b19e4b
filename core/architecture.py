"""What a model is made of: its sizes and its parameters by kind, read from config and headers without loading a weight.

Memory and FLOPs are worked out from these facts. What the config does not say and the tensors do not show is None, and
whoever needs it then says so; a family's usual value is never put in its place. Widths come from the tensors where
they can, for configs leave out what their class knows by heart.

Of a vision model it is the language model that is described; its tower and projector count as `other`.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt

Kind = Literal["embedding", "attention", "mlp", "experts", "norms", "head", "other"]


# Last names of linear layers that choose experts: an adapter there changes who computes, not what is computed.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


class TensorHeader(BaseModel):
    """One entry of a safetensors header, as far as it matters here."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    dtype: str  # as safetensors names it: F32, BF16, U8, ...
    shape: tuple[NonNegativeInt, ...]


class ParametersByKind(BaseModel):
    model_config = ConfigDict(frozen=True)

    embedding: int = 0
    attention: int = 0
    mlp: int = 0  # and routers, shared experts
    experts: int = 0
    norms: int = 0
    head: int = 0  # 0 where it is tied to the embedding
    other: int = 0  # a vision tower and its projector, layers of no known kind

    @property
    def total(self) -> int:
        return sum(self.model_dump().values())


class Architecture(BaseModel):
    model_config = ConfigDict(frozen=True)

    model_type: str  # of the language model, as its config names it
    hidden_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None  # of a dense MLP; None where all are experts of another size
    is_gated: bool | None = None  # three matrices an MLP (gate, up, down) or two
    vocabulary: int | None = None
    has_tied_head: bool | None = None
    num_experts: int = 0
    experts_per_token: int | None = None
    expert_size: int | None = None  # intermediate size of one expert
    sliding_window: int | None = None  # tokens
    num_windowed_layers: int = 0
    num_unlimited_layers: int | None = None  # that attend to the whole sample; the rest keep a state instead
    norms_per_layer: int | None = None  # over the hidden size
    has_query_norm: bool = False  # and of the keys, a head at a time
    has_plain_scores: bool = False  # caps or sinks, so that no fused kernel serves and the scores are stored
    # Last names of all modules, and of those with a matrix in a layer; none in profiles of before they were noted.
    modules: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    parameters: ParametersByKind

    @property
    def query_width(self) -> int | None:
        return _product(self.num_heads, self.head_dim)

    @property
    def key_value_width(self) -> int | None:
        """Of the keys alone; the values are as wide again."""
        return _product(self.num_key_value_heads, self.head_dim)

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of sizes that a plan needs and that are unknown."""
        needed = ["hidden_size", "num_layers", "num_heads", "num_key_value_heads", "head_dim", "vocabulary"]
        needed += ["num_unlimited_layers", "is_gated"]
        needed += ["experts_per_token", "expert_size"] if self.num_experts else ["intermediate_size"]
        return tuple(name for name in needed if getattr(self, name) is None)


def _product(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first * second


# The same number under the names that families give it, the first that is there. `moe_*` and `ffn` before the common
# name, which then means the dense layers among them.
_NAMES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim"),
    "vocabulary": ("vocab_size",),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok", "num_experts_per_token", "top_k"),
    "expert_size": ("moe_intermediate_size",),
    "sliding_window": ("sliding_window",),
}
_TOWERS = re.compile(r"vision|visual|audio|projector|image|patch")
_KINDS: tuple[tuple[Kind, frozenset[str]], ...] = (
    ("embedding", frozenset({"embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "tok_embeddings"})),
    ("head", frozenset({"lm_head", "embed_out"})),
    ("experts", frozenset({"experts"})),
    ("mlp", frozenset({"mlp", "feed_forward", "block_sparse_moe", "shared_expert", "shared_experts"})),
    ("attention", frozenset({"self_attn", "attn", "attention", "self_attention"})),
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")


def read_architecture(config: Mapping[str, object], tensors: Mapping[str, TensorHeader]) -> Architecture:
    """`config` is the language model's part of config.json, its defaults filled in where they are known; `tensors` the
    headers of all safetensors files."""
    numbers = {field: _number(config, names) for field, names in _NAMES.items()}
    counts = dict.fromkeys(ParametersByKind.model_fields, 0)
    for name, tensor in tensors.items():
        counts[kind_of(name)] += num_values(name, tensor)
    parameters = ParametersByKind(**counts)
    text = {name: tensor.shape for name, tensor in tensors.items() if not _TOWERS.search(name)}
    widths = _Widths(text, numbers["hidden_size"])

    # With latent attention (kv_lora_rank) the name stands for another width.
    head_dim = None if "kv_lora_rank" in config else numbers["head_dim"] or widths.head_dim
    num_heads, hidden_size = numbers["num_heads"], numbers["hidden_size"]
    if head_dim is None and num_heads and widths.query:
        head_dim = widths.query // num_heads
    num_key_value_heads = numbers["num_key_value_heads"]
    if head_dim and widths.query and widths.key:
        num_heads, num_key_value_heads = num_heads or widths.query // head_dim, widths.key // head_dim
    num_experts = numbers["num_experts"] or 0
    expert_size = numbers["expert_size"]
    if num_experts and expert_size is None:
        expert_size = numbers["intermediate_size"]
    windowed, unlimited = _layers_by_reach(config, numbers["num_layers"], numbers["sliding_window"])
    return Architecture(
        model_type=str(config.get("model_type", "")),
        hidden_size=hidden_size,
        num_layers=numbers["num_layers"] or widths.num_layers,
        num_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        intermediate_size=numbers["intermediate_size"] or widths.intermediate,
        is_gated=widths.is_gated,
        vocabulary=numbers["vocabulary"],
        has_tied_head=_has_tied_head(config, parameters),
        num_experts=num_experts,
        experts_per_token=numbers["experts_per_token"] if num_experts else None,
        expert_size=expert_size if num_experts else None,
        sliding_window=numbers["sliding_window"] if windowed else None,
        num_windowed_layers=windowed,
        num_unlimited_layers=unlimited,
        norms_per_layer=widths.num_norms,
        has_query_norm=widths.norm_width is not None,
        has_plain_scores=config.get("attn_logit_softcapping") is not None or any(n.endswith(".sinks") for n in text),
        modules=tuple(sorted({part for name in text for part in name.split(".")[:-1] if not part.isdigit()})),
        linear=tuple(sorted(set(_linear(text)))),
        parameters=parameters,
    )


def kind_of(name: str) -> Kind:
    """Of a tensor, by the parts of its name."""
    if _TOWERS.search(name):
        return "other"
    parts = name.split(".")
    if any("norm" in part or part.startswith("ln_") for part in parts):
        return "norms"
    return next((kind for kind, names in _KINDS if not names.isdisjoint(parts)), "other")


def num_values(name: str, tensor: TensorHeader) -> int:
    """Parameters that a tensor holds. MXFP4 (gpt-oss) stores two in a byte, and a scale for each block beside them;
    old files of GPT-2 hold its causal mask."""
    if (tensor.dtype == "U8" and name.endswith("_scales")) or name.endswith((".attn.bias", ".attn.masked_bias")):
        return 0
    return math.prod(tensor.shape) * (2 if tensor.dtype == "U8" and name.endswith("_blocks") else 1)


def _linear(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Last names of what has a matrix in a layer: on these an adapter can be laid."""
    for name, shape in shapes.items():
        *_, layer, leaf = ("", *name.split("."))
        if len(shape) == 2 and leaf == "weight" and _LAYER.search(name) and kind_of(name) not in ("norms", "experts"):
            yield layer


def _number(config: Mapping[str, object], names: Sequence[str]) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


class _Widths:
    """What the tensors of the lowest layer show; None where they are named in a way that isn't known."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], hidden_size: int | None) -> None:
        layers = {int(found[1]) for name in shapes if (found := _LAYER.search(name))}
        self.num_layers = len(layers) or None
        self._shapes = {
            name: shape for name, shape in shapes.items() if (found := _LAYER.search(name)) and int(found[1]) == 0
        }
        self._hidden_size = hidden_size
        self.query = self._other_side("q_proj.weight")
        self.key = self._other_side("k_proj.weight")
        fused_query = self._other_side("o_proj.weight")
        fused = self._other_side("qkv_proj.weight")
        if self.query is None and fused is not None and fused_query is not None:
            self.query, self.key = fused_query, (fused - fused_query) // 2
        joint = self._other_side("c_attn.weight")  # GPT-2: as many keys and values as queries
        if self.query is None and joint is not None:
            self.query = self.key = joint // 3
        self.norm_width = next((shape[0] for shape in self._named("q_norm.weight")), None)
        self.head_dim = self.norm_width if self.norm_width != self.query else None
        norms = [shape for name, shape in self._shapes.items() if kind_of(name) == "norms" and name.endswith(".weight")]
        self.num_norms = sum(shape == (hidden_size,) for shape in norms) or None
        gate, up = self._other_side("gate_proj.weight"), self._other_side("up_proj.weight")
        gate_up = self._other_side("gate_up_proj.weight")
        plain = self._other_side("c_fc.weight") or self._other_side("fc1.weight")
        self.intermediate = up or (gate_up // 2 if gate_up else None) or plain
        has_gated_experts = any(
            part in name for name in self._shapes for part in (".experts.gate_up_proj", ".w3.", ".gate_proj")
        )
        self.is_gated: bool | None = None
        if gate is not None or gate_up is not None or has_gated_experts:
            self.is_gated = True
        elif self.intermediate is not None:
            self.is_gated = False

    def _named(self, end: str) -> Iterator[tuple[int, ...]]:
        return (shape for name, shape in self._shapes.items() if name.endswith(f".{end}"))

    def _other_side(self, end: str) -> int | None:
        """Of a matrix, one of whose sides is the hidden size, the other (Linear and Conv1D lie differently)."""
        shape = next((shape for shape in self._named(end) if len(shape) == 2), None)
        if shape is None or self._hidden_size not in shape:
            return None
        return shape[0] if shape[1] == self._hidden_size else shape[1]


def _layers_by_reach(
    config: Mapping[str, object], num_layers: int | None, sliding_window: int | None
) -> tuple[int, int | None]:
    """How many layers attend within a window, and how many without limit."""
    kinds = config.get("layer_types")
    if isinstance(kinds, list | tuple):
        windowed = sum(kind == "sliding_attention" for kind in kinds)
        if sliding_window is None and windowed:
            return 0, None
        return windowed, sum(kind == "full_attention" for kind in kinds)
    if num_layers is None:
        return 0, None
    if sliding_window is not None and config.get("use_sliding_window") is not False:
        return num_layers, 0
    return 0, num_layers


def _has_tied_head(config: Mapping[str, object], parameters: ParametersByKind) -> bool | None:
    tied = config.get("tie_word_embeddings")
    if isinstance(tied, bool):
        return tied
    return parameters.head == 0 if parameters.embedding else None
