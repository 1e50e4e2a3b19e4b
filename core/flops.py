"""Floating-point operations of an optimizer step: those that learning takes, not those that a layout or a saving costs.

A matrix of p values costs 2p for each token of the forward pass, 2p in the backward pass for the gradient of its
input, and 2p for its own where it is trained: 6 for each parameter and token in a full fine-tune, 4 under LoRA for the
frozen base, 6 for the adapters. The head is computed at trained positions alone, so only they count. In attention each
position meets itself and those before it in its own sample, or in its window: two matrix products of the queries' width
for each such pair, and twice that in the backward pass. Pads, dummy rows and recomputed activations are work that
nobody asked for: they make a step longer and count nothing. Embeddings are looked up; norms, biases and activations are
left out (under 1 % in models of use).

Model FLOP/s utilisation (PaLM, arXiv 2204.02311, appendix B) is then this over the time and the devices' peak.
"""

from collections.abc import Iterable

from core.architecture import Architecture

MULTIPLY_ADD = 2


def step_flops(
    shape: Architecture, lengths: Iterable[int], num_targets: int, *, num_adapter_parameters: int | None
) -> int | None:
    """Of a step whose samples have `lengths` tokens, `num_targets` of them trained. `num_adapter_parameters` is None in
    a full fine-tune. None where the model's sizes are not known."""
    if shape.missing:
        return None
    lengths = list(lengths)
    tokens = sum(lengths)
    is_full = num_adapter_parameters is None
    # Forward, the input's gradient, the matrix' own.
    passes = 3 if is_full else 2
    matrices = passes * (tokens * _matrices_of_a_token(shape) + num_targets * _head(shape))
    adapters = 3 * tokens * (num_adapter_parameters or 0)
    pairs = sum(_pairs(shape, length) for length in lengths)
    query_width = shape.query_width
    assert query_width is not None
    attention = 3 * 2 * query_width * pairs
    return MULTIPLY_ADD * (matrices + adapters + attention)


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
