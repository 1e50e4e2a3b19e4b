"""Attention within each segment of a packed row, and nowhere else.

A row of a micro-batch is cut into segments: one a sample, the pad at its end too. The function below is registered with
transformers under `SEGMENTED` and gets the cuts as a forward keyword, so it also sees them when gradient checkpointing
runs a layer again. Each segment is one causal call of SDPA, whose kernels need no mask then: memory grows with the
row, not with its square, and work with the squares of the samples' lengths.

What a model asks of its attention beyond that is honoured, or refused: a keyword that stands in no list below raises,
because one that is ignored (a soft cap, a window, a sink) moves logits by as much as their own scale and no loss curve
shows why.

`sdpa` and `eager` are transformers' own, which find the borders from positions that restart; they build a mask of
N x N for every row. Shapes: B rows, H heads, N positions, D head size, L positions of a segment, W window.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

SEGMENTED = "pegbox_segmented"
Segments = Sequence[Sequence[int]]  # per row: the lengths of its segments, which add up to its width

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


class UnsupportedAttention(Exception):
    """The model asks for something that attention per segment does not compute."""


def segmented_attention(
    module: torch.nn.Module,
    query_BHND: Tensor,
    key_BHND: Tensor,
    value_BHND: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """Returns the output as B x N x H x D, as transformers wants it. `s_aux` are the sinks of gpt_oss, one a head."""
    asked = sorted(name for name, value in unknown.items() if value is not None and name not in WITHOUT_EFFECT)
    if asked:
        raise UnsupportedAttention(f"{type(module).__name__} passes {', '.join(asked)}")
    if attention_mask is not None:
        raise UnsupportedAttention(f"{type(module).__name__} passes a mask of its own")
    if segments is None:
        raise UnsupportedAttention(f"{type(module).__name__} does not pass on the segments of its row")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedAttention(f"{type(module).__name__} is not causal")
    width = query_BHND.shape[2]
    assert key_BHND.shape[2] == width, "training keeps no cache"
    assert len(segments) == query_BHND.shape[0] and all(sum(row) == width for row in segments)

    needs_scores = softcap is not None or s_aux is not None
    within = partial(_plain, softcap=softcap, sinks_H=s_aux) if needs_scores else _sdpa
    rows = []
    for row, lengths in enumerate(segments):
        of_row = (tensor[row : row + 1] for tensor in (query_BHND, key_BHND, value_BHND))
        parts = zip(*(torch.split(tensor, list(lengths), dim=2) for tensor in of_row), strict=True)
        outputs = [within(*part, dropout=dropout, scaling=scaling, window=sliding_window) for part in parts]
        rows.append(torch.cat(outputs, dim=2))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


def _sdpa(
    query_BHLD: Tensor,
    key_BHLD: Tensor,
    value_BHLD: Tensor,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    length = query_BHLD.shape[2]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(
            query_BHLD,
            key_BHLD,
            value_BHLD,
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=query_BHLD.shape[1] != key_BHLD.shape[1],
        )
    # A window: blocks of W queries see their own block and the one before, so the mask is W x 2W and never L x L.
    key_BHLD, value_BHLD = _for_every_head(key_BHLD, query_BHLD), _for_every_head(value_BHLD, query_BHLD)
    blocks = []
    for start in range(0, length, window):
        end, first_key = min(start + window, length), max(0, start - window + 1)
        blocks.append(
            F.scaled_dot_product_attention(
                query_BHLD[:, :, start:end],
                key_BHLD[:, :, first_key:end],
                value_BHLD[:, :, first_key:end],
                attn_mask=_sees(start, end, first_key, window, query_BHLD.device),
                dropout_p=dropout,
                scale=scaling,
            )
        )
    return torch.cat(blocks, dim=2)


def _plain(
    query_BHLD: Tensor,
    key_BHLD: Tensor,
    value_BHLD: Tensor,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """What no kernel of SDPA offers, written out: L x L scores, softmax in fp32."""
    length, head_size = query_BHLD.shape[2:]
    scores_BHLL = query_BHLD @ _for_every_head(key_BHLD, query_BHLD).transpose(2, 3)
    scores_BHLL = scores_BHLL * (head_size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores_BHLL = softcap * torch.tanh(scores_BHLL / softcap)
    scores_BHLL = scores_BHLL.float().masked_fill(
        ~_sees(0, length, 0, window or length, query_BHLD.device), float("-inf")
    )
    if sinks_H is not None:  # a column that takes a share of the attention and gives no value
        sink_BHL1 = sinks_H.float().view(1, -1, 1, 1).expand(scores_BHLL.shape[0], -1, length, 1)
        scores_BHLL = torch.cat((scores_BHLL, sink_BHL1), dim=-1)
    weights_BHLL = scores_BHLL.softmax(dim=-1)[..., :length].to(query_BHLD.dtype)
    return F.dropout(weights_BHLL, dropout) @ _for_every_head(value_BHLD, query_BHLD)


def _sees(start: int, end: int, first_key: int, window: int, device: torch.device) -> Tensor:
    """Queries start:end by keys first_key:end; a query sees itself and the window - 1 positions before it."""
    query_L1 = torch.arange(start, end, device=device)[:, None]
    key_1L = torch.arange(first_key, end, device=device)[None, :]
    return (key_1L <= query_L1) & (key_1L > query_L1 - window)


def _for_every_head(shared_BHLD: Tensor, query_BHLD: Tensor) -> Tensor:
    """Repeats the heads that grouped queries share."""
    repeats = query_BHLD.shape[1] // shared_BHLD.shape[1]
    return shared_BHLD if repeats == 1 else shared_BHLD.repeat_interleave(repeats, dim=1)


def register() -> None:
    """Makes `SEGMENTED` known to transformers. A name without a mask function gets no mask, which is what we want."""
    AttentionInterface.register(SEGMENTED, segmented_attention)
