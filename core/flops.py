"""Floating-point operations of an optimizer step: those that learning takes, and those that a layout makes of them.

A matrix of p values costs 2p for each token of the forward pass, 2p in the backward pass for the gradient of its
input, and 2p for its own where it is trained: 6 for each parameter and token in a full fine-tune, 4 under LoRA for the
frozen base, 6 for the adapters. The head is computed at trained positions alone, so only they count. In attention each
position meets itself and those before it in its own sample, or in its window: two matrix products of the queries' width
for each such pair, and twice that in the backward pass. Pads, dummy rows and recomputed activations are work that
nobody asked for: they make a step longer and count nothing. Embeddings are looked up; norms, biases and activations are
left out (under 1 % in models of use).

Model FLOP/s utilisation (PaLM, arXiv 2204.02311, appendix B) is then this over the time and the devices' peak.

To compare ways to lay the same samples out, the rest counts what the passes do compute: pads and dummies too, and
attention as the engine runs it, within each sample and each piece of pad, or under a dense mask over the whole row. Not
in it is what a pass costs however small it is, nor what is recomputed, which all ways do alike.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from core.architecture import Architecture
from core.arrangement import DUMMY_WIDTH, Arrangement, slots_of
from core.layout import pad_pieces

MULTIPLY_ADD = 2


def step_flops(
    shape: Architecture, lengths: Iterable[int], num_targets: int, *, num_adapter_parameters: int | None
) -> int | None:
    """Of a step whose samples have `lengths` tokens, `num_targets` of them trained. `num_adapter_parameters` is None in
    a full fine-tune. None where the model's sizes are not known."""
    if shape.missing:
        return None
    lengths = list(lengths)
    pairs = sum(_pairs(shape, length) for length in lengths)
    return (
        sum(lengths) * _flops_of_a_token(shape, num_adapter_parameters)
        + num_targets * _flops_of_a_target(shape, num_adapter_parameters)
        + pairs * _flops_of_a_pair(shape)
    )


@dataclass(frozen=True)
class AttentionFlops:
    """Counts what attention computes in forward and backward, pads and dummies included."""

    of_piece: tuple[int, ...]  # of a piece of so many positions
    of_pair: int | None  # of two positions of a row, where a dense mask is computed over all; None: within pieces

    def __call__(self, arrangement: Arrangement) -> int:
        if self.of_pair is None and not arrangement.has_pads:
            return sum(map(self.of_piece.__getitem__, arrangement.lengths))
        return sum(map(self._of_pass, arrangement.passes()))

    def _of_pass(self, rows: Sequence[Sequence[int]]) -> int:
        """By the lengths that lie side by side in its rows; none: a dummy's."""
        slots = slots_of(rows)
        width = slots // len(rows)
        if self.of_pair is not None:
            return slots * width * self.of_pair
        lengths = [length for row in rows for length in row] or [DUMMY_WIDTH]
        flops = sum(map(self.of_piece.__getitem__, lengths))
        if slots > sum(lengths):
            longest = max(lengths)
            for row in rows:
                flops += sum(map(self.of_piece.__getitem__, pad_pieces(width - sum(row), longest)))
        return flops


def attention_flops(shape: Architecture, longest: int, *, is_dense: bool) -> AttentionFlops:
    """Of samples of up to `longest` tokens, by a model whose sizes are known. `is_dense` where attention builds a mask
    of whole rows (`sdpa`, `eager`)."""
    pair = _flops_of_a_pair(shape)
    assert shape.num_unlimited_layers is not None
    num_layers = shape.num_unlimited_layers + shape.num_windowed_layers
    return AttentionFlops(
        of_piece=tuple(pair * _pairs(shape, length) for length in range(max(longest, DUMMY_WIDTH) + 1)),
        of_pair=pair * num_layers if is_dense else None,
    )


def matrix_flops(
    shape: Architecture, targets_per_token: float, *, num_adapter_parameters: int | None
) -> tuple[int, float]:
    """Of each position in the matrices, and of each token in the head, whose targets are spread over all of them."""
    return (
        _flops_of_a_token(shape, num_adapter_parameters),
        targets_per_token * _flops_of_a_target(shape, num_adapter_parameters),
    )


def _passes_of_a_matrix(num_adapter_parameters: int | None) -> int:
    """Forward, the input's gradient, and the matrix' own where it is trained."""
    return 3 if num_adapter_parameters is None else 2


def _flops_of_a_token(shape: Architecture, num_adapter_parameters: int | None) -> int:
    matrices = _passes_of_a_matrix(num_adapter_parameters) * _matrices_of_a_token(shape)
    return MULTIPLY_ADD * (matrices + 3 * (num_adapter_parameters or 0))


def _flops_of_a_target(shape: Architecture, num_adapter_parameters: int | None) -> int:
    return MULTIPLY_ADD * _passes_of_a_matrix(num_adapter_parameters) * _head(shape)


def _flops_of_a_pair(shape: Architecture) -> int:
    """Scores and weighted values, forward and twice that backward."""
    assert shape.query_width is not None
    return MULTIPLY_ADD * 3 * 2 * shape.query_width


def _matrices_of_a_token(shape: Architecture) -> int:
    """Values of all matrices of the decoder that a token meets: of the experts those that it is sent to."""
    parameters = shape.parameters
    experts = 0
    if shape.num_experts:
        assert shape.experts_per_token is not None
        experts = parameters.experts * shape.experts_per_token // shape.num_experts
    return parameters.attention + parameters.mlp + experts


def _head(shape: Architecture) -> int:
    assert shape.vocabulary is not None and shape.hidden_size is not None
    return shape.vocabulary * shape.hidden_size


def _pairs(shape: Architecture, length: int) -> int:
    """Of positions that look and are looked at in one sample, over all layers."""
    assert shape.num_unlimited_layers is not None
    window = min(shape.sliding_window or length, length)
    all_before = length * (length + 1) // 2
    in_window = window * (window + 1) // 2 + (length - window) * window
    return shape.num_unlimited_layers * all_before + shape.num_windowed_layers * in_window
