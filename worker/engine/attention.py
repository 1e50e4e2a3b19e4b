"""Attention within each segment of a packed row, and nowhere else.

A row of a micro-batch is cut into segments: one a sample, the pad at its end too. The two functions below are
registered with transformers under `SEGMENTED` and `FLEX` and get the cuts as a forward keyword, a `Segments`, so they
also see them when gradient checkpointing runs a layer again. No mask of N x N exists in either: memory grows with the
row, not with its square, and work with the squares of the samples' lengths.

`SEGMENTED` takes for each layer the first of these that computes what the layer asks for:

  varlen       PyTorch's own flash attention, all segments of all rows in one call: CUDA from sm_80, bf16 or fp16, with
               or without a window
  flash_attn   the flash-attn package where it is installed, likewise; it also has soft caps, dropout and, in some
               versions, sinks
  sdpa         one causal call of scaled_dot_product_attention for each segment, whose fused kernels need no mask: CPUs,
               older GPUs, fp32
  plain        the formula written out for each segment, for soft caps and sinks; scores of L x L exist here

`FLEX` is torch's flex_attention over a mask of blocks, compiled on CUDA. On a CPU torch has its forward pass only.

What a model asks of its attention beyond that is honoured, or refused: a keyword that stands in no list below raises,
because one that is ignored (a soft cap, a window, a sink) moves logits by as much as their own scale and no loss curve
shows why.

`sdpa` and `eager` are transformers' own, which find the borders from positions that restart; they build a mask of
N x N for every row. Shapes: B rows, H heads, N positions, D head size, T = B x N, S segments
of one length, L positions of a segment, W window.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from transformers import AttentionInterface

from worker.engine.segments import Segments

SEGMENTED = "pegbox_segmented"
FLEX = "pegbox_flex"

# Says where a token stands or what to return; nothing that attention within a segment would compute otherwise.
WITHOUT_EFFECT = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
    }
)

# What torch's varlen_attn can be told grew over its versions: 2.10 only `is_causal`, 2.11 a scale and a window, then
# grouped heads.
VARLEN_KNOWS = frozenset(signature(varlen.varlen_attn).parameters)
FLASH_HEAD_MULTIPLE, FLASH_LARGEST_HEAD = 8, 256


class UnsupportedAttention(Exception):
    """The model asks for something that this way of attention does not compute."""


class Heads(NamedTuple):
    """Query, key and value in one shape, but for the number of heads: grouped queries share keys and values."""

    query: Tensor
    key: Tensor
    value: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> "Heads":
        return Heads(change(self.query), change(self.key), change(self.value))

    def as_many(self, dim: int) -> "Heads":
        """With keys and values repeated where heads, which lie along `dim`, share them."""
        repeats = self.query.shape[dim] // self.key.shape[dim]
        if repeats == 1:
            return self
        return Heads(self.query, *(shared.repeat_interleave(repeats, dim) for shared in (self.key, self.value)))

    @property
    def arithmetic(self) -> torch.dtype:
        """What a matmul would be computed in. Kernels called by their own names are not cast by autocast."""
        kind = self.query.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.query.dtype


@dataclass(frozen=True)
class Asked:
    """What a layer wants beside causal attention. `sinks_H`, one a head, as gpt_oss has them."""

    scaling: float
    dropout: float
    window: int | None
    softcap: float | None
    sinks_H: Tensor | None

    @property
    def changes_scores(self) -> bool:
        return self.softcap is not None or self.sinks_H is not None

    def beside_the_usual(self) -> str:
        wanted = {
            "soft caps": self.softcap is not None,
            "sinks": self.sinks_H is not None,
            "windows": self.window is not None,
            "dropout": self.dropout > 0,
        }
        return " and ".join(name for name, is_wanted in wanted.items() if is_wanted)


def _understand(
    module: torch.nn.Module,
    query_BHND: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **unknown: Any,
) -> tuple[Asked, Segments]:
    asked = sorted(name for name, value in unknown.items() if value is not None and name not in WITHOUT_EFFECT)
    if asked:
        raise UnsupportedAttention(f"{type(module).__name__} passes {', '.join(asked)}")
    if attention_mask is not None:
        raise UnsupportedAttention(f"{type(module).__name__} passes a mask of its own")
    if segments is None:
        raise UnsupportedAttention(f"{type(module).__name__} does not pass on the segments of its row")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedAttention(f"{type(module).__name__} is not causal")
    rows, _, width, head_size = query_BHND.shape
    assert rows == len(segments.rows) and width == segments.width, "training keeps no cache"
    if sliding_window is not None and sliding_window >= segments.longest:
        sliding_window = None
    scaling = head_size**-0.5 if scaling is None else float(scaling)
    return Asked(scaling, dropout, sliding_window, softcap, s_aux), segments


def segmented_attention(
    module: torch.nn.Module,
    query_BHND: Tensor,
    key_BHND: Tensor,
    value_BHND: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """Returns the output as B x N x H x D, as transformers wants it."""
    asked, segments = _understand(module, query_BHND, attention_mask, segments, **named)
    # As one sequence, T x H x D: a view where projections left their output as it was.
    heads_THD = Heads(query_BHND, key_BHND, value_BHND).each(lambda tensor: tensor.transpose(1, 2).flatten(0, 1))
    kernel = choose_kernel(heads_THD, asked)
    segments.used.add((kernel.name, kernel.reason))
    output_THD = kernel.run(heads_THD, segments, asked)
    return output_THD.view(len(segments.rows), segments.width, *output_THD.shape[1:]), None


@dataclass(frozen=True)
class Kernel:
    name: Literal["varlen", "flash_attn", "sdpa", "plain"]
    reason: str
    run: Callable[[Heads, Segments, Asked], Tensor]


def choose_kernel(heads: Heads, asked: Asked) -> Kernel:
    """The first that computes it."""
    obstacle = _flash_obstacle(heads)
    if obstacle is None:
        if not (asked.changes_scores or asked.dropout) and (asked.window is None or "window_size" in VARLEN_KNOWS):
            return Kernel(
                "varlen",
                "PyTorch's own flash attention takes all samples of a micro-batch in one call",
                take_all_at_once,
            )
        package = next((package for package in flash_packages().values() if package.computes(asked)), None)
        if package is not None:
            reason = "the flash-attn package takes all samples of a micro-batch in one call"
            return Kernel("flash_attn", reason, package.run)
        obstacle = f"no flash kernel here computes {asked.beside_the_usual()}"
    if asked.changes_scores:
        reason = (
            f"no fused kernel here computes {asked.beside_the_usual()}, so it is written out for each sample: a sample "
            "of L tokens has scores of L x L for each head, and memory and time grow with their square"
        )
        return Kernel("plain", reason, partial(_one_by_one, within=_plain))
    reason = f"{obstacle}: PyTorch's fused kernel runs once for each sample, without a mask"
    return Kernel("sdpa", reason, partial(_one_by_one, within=_sdpa))


def _flash_obstacle(heads: Heads) -> str | None:
    if heads.query.device.type != "cuda":
        return "on a CPU"
    major, minor = torch.cuda.get_device_capability(heads.query.device)
    if major < 8:
        return f"a GPU of sm_{major}{minor} has no flash kernel, which begin with sm_80"
    if heads.arithmetic not in (torch.bfloat16, torch.float16):
        return "flash kernels know bf16 and fp16 alone"
    head_size = heads.query.shape[-1]
    if heads.value.shape[-1] != head_size:
        return (
            f"flash kernels want values of the size of queries, which here are {heads.value.shape[-1]} and {head_size}"
        )
    if head_size % FLASH_HEAD_MULTIPLE or head_size > FLASH_LARGEST_HEAD:
        return f"flash kernels have no heads of {head_size}"
    return None


# -- all segments in one call: CUDA only -----------------------------------------------------------------------------


def take_all_at_once(heads_THD: Heads, segments: Segments, asked: Asked) -> Tensor:
    assert not asked.changes_scores and not asked.dropout
    named: dict[str, Any] = {}
    if "window_size" in VARLEN_KNOWS:
        # A query sees itself and the window - 1 positions before it; -1 is all of them.
        named["window_size"] = (-1 if asked.window is None else asked.window - 1, 0)
    else:
        assert asked.window is None
        named["is_causal"] = True
    if "scale" in VARLEN_KNOWS:
        named["scale"] = asked.scaling
    else:  # this version divides by the root of the head size and can't be told otherwise
        correction = asked.scaling * heads_THD.query.shape[-1] ** 0.5
        heads_THD = heads_THD._replace(query=heads_THD.query * correction)
    if "enable_gqa" in VARLEN_KNOWS:
        named["enable_gqa"] = True
    else:
        heads_THD = heads_THD.as_many(dim=1)
    query, key, value = heads_THD.each(lambda tensor: tensor.to(heads_THD.arithmetic))
    cuts, longest = segments.cumulative_lengths, segments.longest
    output_THD = varlen.varlen_attn(query, key, value, cuts, cuts, longest, longest, **named)
    assert isinstance(output_THD, Tensor)
    return output_THD


@dataclass(frozen=True)
class FlashPackage:
    function: Callable[..., Any]
    knows: frozenset[str]

    def computes(self, asked: Asked) -> bool:
        wanted = {
            "dropout_p": asked.dropout > 0,
            "window_size": asked.window is not None,
            "softcap": asked.softcap is not None,
            "s_aux": asked.sinks_H is not None,
        }
        return all(name in self.knows for name, is_wanted in wanted.items() if is_wanted)

    def run(self, heads_THD: Heads, segments: Segments, asked: Asked) -> Tensor:
        assert self.computes(asked)
        dtype = heads_THD.arithmetic
        named: dict[str, Any] = {"softmax_scale": asked.scaling, "causal": True}
        if asked.dropout:
            named["dropout_p"] = asked.dropout
        if asked.window is not None:
            named["window_size"] = (asked.window - 1, 0)
        if asked.softcap is not None:
            named["softcap"] = asked.softcap
        if asked.sinks_H is not None:
            named["s_aux"] = asked.sinks_H.to(dtype)
        cuts, longest = segments.cumulative_lengths, segments.longest
        output = self.function(*heads_THD.each(lambda tensor: tensor.to(dtype)), cuts, cuts, longest, longest, **named)
        output_THD: Tensor = output[0] if isinstance(output, tuple) else output
        return output_THD


@cache
def flash_packages() -> Mapping[str, FlashPackage]:
    """Those that are installed, the newer first: FlashAttention 3, whose package has another name, and 2."""
    found = {}
    for name in ("flash_attn_interface", "flash_attn"):
        try:
            function = importlib.import_module(name).flash_attn_varlen_func
        except ImportError:
            continue
        found[name] = FlashPackage(function, frozenset(signature(function).parameters))
    return found


# -- a call for each segment -----------------------------------------------------------------------------------------


def _one_by_one(
    heads_THD: Heads, segments: Segments, asked: Asked, *, within: Callable[[Heads, Asked], Tensor]
) -> Tensor:
    if segments.are_equal:  # a batch as they lie
        heads_SLHD = heads_THD.each(lambda tensor: tensor.view(-1, segments.longest, *tensor.shape[1:]))
        return within(heads_SLHD.each(lambda tensor: tensor.transpose(1, 2)), asked).transpose(1, 2).flatten(0, 1)
    heads_1HTD = heads_THD.each(lambda tensor: tensor.transpose(0, 1)[None])
    parts = zip(*(torch.split(tensor, list(segments.lengths), dim=2) for tensor in heads_1HTD), strict=True)
    outputs = [within(Heads(*heads_1HLD), asked) for heads_1HLD in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2)[0]


def _sdpa(heads_SHLD: Heads, asked: Asked) -> Tensor:
    is_on_cpu = heads_SHLD.query.device.type == "cpu"
    if not is_on_cpu:  # CUDA's memory-efficient kernel, the one for fp32, wants as many heads of each
        heads_SHLD = heads_SHLD.as_many(dim=1)
    attend = partial(F.scaled_dot_product_attention, dropout_p=asked.dropout, scale=asked.scaling, enable_gqa=is_on_cpu)
    query, key, value = heads_SHLD
    length, window = query.shape[2], asked.window
    if window is None or window >= length:
        return attend(query, key, value, is_causal=True)
    # A window: blocks of W queries see their own block and the one before, so the mask is W x 2W and never L x L.
    blocks = []
    for start in range(0, length, window):
        end, first_key = min(start + window, length), max(0, start - window + 1)
        sees = _sees(start, end, first_key, window, query.device)
        parts = (query[:, :, start:end], key[:, :, first_key:end], value[:, :, first_key:end])
        blocks.append(attend(*parts, attn_mask=sees))
    return torch.cat(blocks, dim=2)


def _plain(heads_SHLD: Heads, asked: Asked) -> Tensor:
    """What no kernel of SDPA offers, written out: L x L scores, softmax in fp32."""
    query, key, value = heads_SHLD.as_many(dim=1)
    length = query.shape[2]
    scores_SHLL = query @ key.transpose(2, 3) * asked.scaling
    if asked.softcap is not None:
        scores_SHLL = asked.softcap * torch.tanh(scores_SHLL / asked.softcap)
    sees_LL = _sees(0, length, 0, asked.window or length, query.device)
    scores_SHLL = scores_SHLL.float().masked_fill(~sees_LL, float("-inf"))
    if asked.sinks_H is not None:  # a column that takes a share of the attention and gives no value
        sink_SHL1 = asked.sinks_H.float().view(1, -1, 1, 1).expand(scores_SHLL.shape[0], -1, length, 1)
        scores_SHLL = torch.cat((scores_SHLL, sink_SHL1), dim=-1)
    weights_SHLL = scores_SHLL.softmax(dim=-1)[..., :length].to(value.dtype)
    return F.dropout(weights_SHLL, asked.dropout) @ value


def _sees(start: int, end: int, first_key: int, window: int, device: torch.device) -> Tensor:
    """Queries start:end by keys first_key:end; a query sees itself and the window - 1 positions before it."""
    query_L1 = torch.arange(start, end, device=device)[:, None]
    key_1L = torch.arange(first_key, end, device=device)[None, :]
    return (key_1L <= query_L1) & (key_1L > query_L1 - window)


# -- flex_attention --------------------------------------------------------------------------------------------------

FLEX_REASON = "flex_attention visits only the blocks of positions that hold pairs of one sample"


def flexible_attention(
    module: torch.nn.Module,
    query_BHND: Tensor,
    key_BHND: Tensor,
    value_BHND: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """Returns the output as B x N x H x D. Sinks are folded in through the logarithm of each query's sum."""
    asked, segments = _understand(module, query_BHND, attention_mask, segments, **named)
    if asked.dropout:
        raise UnsupportedAttention("flex_attention has no dropout")
    score_mod = None if asked.softcap is None else _cap(asked.softcap)
    heads_BHND = Heads(query_BHND, key_BHND, value_BHND)
    num_heads = query_BHND.shape[1]
    if num_heads & (num_heads - 1):  # it groups heads where they are a power of two
        heads_BHND = heads_BHND.as_many(dim=1)
    output_BHND, aside = _flex(query_BHND.device.type)(
        *heads_BHND.each(lambda tensor: tensor.to(heads_BHND.arithmetic)),
        score_mod=score_mod,
        block_mask=segments.block_mask(asked.window),
        scale=asked.scaling,
        enable_gqa=num_heads != heads_BHND.key.shape[1],
        return_aux=AuxRequest(lse=asked.sinks_H is not None),
    )
    if asked.sinks_H is not None:
        share_BHN1 = torch.sigmoid(aside.lse - asked.sinks_H.float().view(1, -1, 1))[..., None]
        output_BHND = output_BHND * share_BHN1.to(output_BHND.dtype)
    segments.used.add(("flex", FLEX_REASON))
    return output_BHND.transpose(1, 2), None


def _cap(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@cache
def _flex(device_type: str) -> Callable[..., Any]:
    # On CUDA it is only worth something compiled; on a CPU that would take g++, for a forward pass alone.
    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention  # type: ignore[return-value]


def register(wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function) -> None:
    """Makes both known to transformers. A name without a mask function gets no mask, which is what we want."""
    AttentionInterface.register(SEGMENTED, wrap(segmented_attention))
    AttentionInterface.register(FLEX, wrap(flexible_attention))
