"""Plans of known sizes, and what must hold of any plan."""

from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.memory import (
    TERM_FORMULAS,
    TERM_TITLES,
    Load,
    Term,
    activation_bytes,
    chunk_rows,
    count_adapter_parameters,
    estimate_memory,
)
from core.spec import Full, Lora, Qlora
from tests.core.shapes import LLAMA_7B, LLAMA_70B

FULL = Load(
    shape=LLAMA_7B,
    method=Full(),
    dtype="bf16",
    attention="flash",
    optimizer="adamw",
    gradient_checkpointing=True,
    num_ranks=1,
    zero_stage=0,
    offload="none",
    tokens=4096,
    longest_row=4096,
    longest_sample=1024,
    on_gpu=True,
)
STATES = ("weights", "gradients", "moments", "masters")
GIB = 2**30


@st.composite
def loads(draw: Any) -> Load:
    ranks = draw(st.sampled_from([1, 2, 8]))
    return replace(
        FULL,
        shape=draw(st.sampled_from([LLAMA_7B, LLAMA_70B])),
        method=draw(st.sampled_from([Full(), Lora(), Lora(rank=256), Qlora()])),
        dtype=draw(st.sampled_from(["bf16", "fp32"])),
        attention=draw(st.sampled_from(["flash", "sdpa", "eager"])),
        optimizer=draw(st.sampled_from(["adamw", "adamw_8bit", "paged_adamw_8bit"])),
        gradient_checkpointing=draw(st.booleans()),
        num_ranks=ranks,
        tokens=draw(st.sampled_from([512, 4096, 65_536])),
    )


def test_a_full_fine_tune_takes_sixteen_bytes_a_parameter_before_activations() -> None:
    terms = estimate_memory(FULL).terms
    assert sum(terms[name] for name in STATES) == 16 * LLAMA_7B.parameters.total  # type: ignore[index]
    assert terms["masters"] == 0


def test_lora_takes_two_bytes_a_frozen_parameter_and_sixteen_a_trained_one() -> None:
    terms = estimate_memory(replace(FULL, method=Lora(rank=16))).terms
    adapters = 16 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11_008))
    assert count_adapter_parameters(LLAMA_7B, Lora(rank=16)) == adapters
    assert sum(terms[name] for name in STATES) == 2 * LLAMA_7B.parameters.total + 16 * adapters  # type: ignore[index]


def test_the_sizes_that_people_know_come_out() -> None:
    """A 7 B QLoRA fits 16 GB, its LoRA 24 GB, its full fine-tune no single 80 GB GPU."""
    qlora, lora = (estimate_memory(replace(FULL, method=method)).total for method in (Qlora(), Lora()))
    assert 4 * GIB < qlora < 14.4e9 < lora < 21.6e9
    assert estimate_memory(FULL).total > 80e9


@given(loads())
def test_no_term_is_negative_and_all_have_a_title(load: Load) -> None:
    plan = estimate_memory(load)
    assert plan.terms.keys() == TERM_TITLES.keys()
    assert all(isinstance(size, int) and size >= 0 for size in plan.terms.values())


@given(loads())
def test_recomputing_smaller_moments_and_fewer_tokens_never_take_more(load: Load) -> None:
    def total(**changes: Any) -> int:
        return estimate_memory(replace(load, **changes)).total

    assert total(gradient_checkpointing=True) <= total(gradient_checkpointing=False)
    assert total(optimizer="paged_adamw_8bit") <= total(optimizer="adamw_8bit") <= total(optimizer="adamw")
    assert total(tokens=512) <= total(tokens=4096)


@given(loads().filter(lambda load: load.num_ranks > 1))
def test_each_stage_shards_what_it_says(load: Load) -> None:
    plans = [estimate_memory(replace(load, zero_stage=stage)).terms for stage in (1, 2, 3)]
    first, second, third = plans
    assert second["gradients"] == pytest.approx(first["gradients"] / load.num_ranks, abs=1)
    assert second["weights"] == first["weights"] and second["moments"] == first["moments"]
    assert third["weights"] == pytest.approx(first["weights"] / load.num_ranks, abs=1)
    unsharded = estimate_memory(load).terms
    assert first["moments"] == pytest.approx(unsharded["moments"] / load.num_ranks, abs=1)


def test_offload_moves_states_to_the_host_and_loses_none() -> None:
    load = replace(FULL, num_ranks=4, zero_stage=3)
    here = estimate_memory(load)
    for offload, moved in (("optimizer", STATES[1:]), ("optimizer_and_params", STATES)):
        there = estimate_memory(replace(load, offload=offload))  # type: ignore[arg-type]
        assert there.host_bytes == sum(here.terms[name] for name in moved)  # type: ignore[index]
        assert there.total == here.total - there.host_bytes


def test_stored_scores_grow_with_the_rows_width_and_fused_ones_do_not() -> None:
    def activations(attention: Any, width: int) -> int:
        load = replace(FULL, attention=attention, longest_row=width, gradient_checkpointing=False)
        return estimate_memory(load).terms["activations"]

    assert activations("eager", 4096) - activations("eager", 2048) == 32 * 6 * 32 * 4096 * 2048
    assert activations("flash", 4096) == activations("flash", 2048)


def test_every_term_there_is_has_a_title_and_a_formula_and_is_in_every_plan() -> None:
    terms = set(get_args(Term))
    assert TERM_TITLES.keys() == TERM_FORMULAS.keys() == terms
    assert estimate_memory(FULL).terms.keys() == terms


@pytest.mark.parametrize(
    ("ranks", "stage", "offload", "optimizer"),
    [
        (1, 0, "none", "adamw"),
        (4, 0, "none", "adamw"),
        (4, 1, "none", "adamw_8bit"),
        (4, 2, "none", "adamw"),
        (4, 3, "none", "paged_adamw_8bit"),
        (4, 2, "optimizer", "adamw"),
        (4, 3, "optimizer_and_params", "adamw"),
    ],
)
def test_the_formulas_shown_are_those_that_the_plan_follows(
    ranks: int, stage: int, offload: str, optimizer: str
) -> None:
    """Of a full fine-tune in bf16, in the letters of the page: T, F, R, L, n, h, c, r, V."""
    changes: dict[str, Any] = {"num_ranks": ranks, "zero_stage": stage, "offload": offload, "optimizer": optimizer}
    load = replace(FULL, **changes)
    shape, R, n, c, r = load.shape, ranks, load.tokens, 2, 4
    T, F = shape.parameters.total, 0
    L, h, V = shape.num_layers or 0, shape.hidden_size or 0, shape.vocabulary or 0
    stays = offload == "none"
    moments = {"adamw": 8 * T, "adamw_8bit": 2 * T + 8 * -(-T // 256), "paged_adamw_8bit": 8 * -(-T // 256)}[optimizer]
    expected = {
        "weights": (4 * T + F) // (R if stage == 3 else 1) if offload != "optimizer_and_params" else 0,
        "gradients": 4 * T // (R if stage >= 2 else 1) if stays else 0,
        "moments": moments // (R if stage >= 1 else 1) if stays else 0,
        "masters": 4 * T // R if stage >= 1 and stays else 0,
        "process": 1200 << 20,
    }
    if stage == 0:
        expected["gathered"] = 2 * min(4 * T, 32 << 20) if R > 1 else 0
    else:
        cut = round((4 * T + F) * min(1.0, 1e9 / T)) if stage == 3 else 0
        expected["gathered"] = 2 * min(4 * T, 64 << 20) + cut
    head = shape.parameters.head
    matrices = shape.parameters.attention + shape.parameters.mlp + head
    layer = activation_bytes(load)
    around = n * h * (4 + 3 * r) + 4 * n * h
    recomputes = load.gradient_checkpointing
    expected["activations"] = (L * n * h * r + layer if recomputes else L * layer) + around
    expected["casts"] = c * matrices // (L if recomputes else 1)
    rows = min(chunk_rows(V, on_gpu=True), n)
    chunk = rows * V * (8 + c) + V * h * (4 + c)
    width = shape.intermediate_size or 0
    under_way = 2 * c * n * width + (4 + c) * h * width
    expected["working"] = max(chunk, under_way) + 4 * V * h
    assert estimate_memory(load).terms == expected
