"""Architectures of well-known sizes, for plans."""

from core.architecture import Architecture, ParametersByKind


def llama(
    *, hidden: int, layers: int, heads: int, key_value_heads: int, intermediate: int, vocabulary: int = 32_000
) -> Architecture:
    head_dim = hidden // heads
    attention = layers * (2 * hidden * hidden + 2 * hidden * key_value_heads * head_dim)
    return Architecture(
        model_type="llama",
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        is_gated=True,
        vocabulary=vocabulary,
        has_tied_head=False,
        num_unlimited_layers=layers,
        norms_per_layer=2,
        parameters=ParametersByKind(
            embedding=vocabulary * hidden,
            attention=attention,
            mlp=layers * 3 * hidden * intermediate,
            norms=(2 * layers + 1) * hidden,
            head=vocabulary * hidden,
        ),
    )


LLAMA_7B = llama(hidden=4096, layers=32, heads=32, key_value_heads=32, intermediate=11_008)
LLAMA_70B = llama(hidden=8192, layers=80, heads=64, key_value_heads=8, intermediate=28_672)
