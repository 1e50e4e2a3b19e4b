"""Plans of known sizes, and what must hold of any plan."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.memory import TERM_TITLES, Load, count_adapter_parameters, estimate_memory
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
